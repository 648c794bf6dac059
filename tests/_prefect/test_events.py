"""Events of jobs as Prefect's server has them, and the documented automation on a real server."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect import flow
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

from prefect_webapi import JobFailed, run_many, sync_task_for, task_for
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import ReportJob
from tests.support.engine import block
from tests.support.jobserver import TOKEN
from tests.support.prefect import PrefectServer, pointed_at, prefect_leaks, save_block
from tests.support.waiting import eventually, eventually_blocking

PAGE = Path(__file__).parents[2] / "docs" / "events.md"
HELD = {"resourceQuotas": {"default": 1}}


def events_about(run: str) -> list[dict[str, Any]]:
    """Job events that are related to this flow run, oldest first."""
    wanted = {
        "event": {"prefix": ["prefect-webapi.job."]},
        "related": {"id": [f"prefect.flow-run.{run}"]},
        "order": "ASC",
    }
    with get_client(sync_client=True) as client:
        answer = client.request("POST", "/events/filter", json={"filter": wanted, "limit": 50})
    found: list[dict[str, Any]] = answer.json()["events"]
    return found


def names(found: list[dict[str, Any]]) -> list[str]:
    return [each["event"].removeprefix("prefect-webapi.job.") for each in found]


def test_a_job_tells_its_phases_and_its_end_with_the_runs_that_own_it(
    engine_here: Path, job_server: EmbeddedJobServer
) -> None:
    """The failure's code and kind are there, the link is, and no secret."""
    run = sync_task_for(
        "job-server", ReportJob, name="report", connection=block(job_server), retries=1
    )
    runs: list[str] = []

    @flow
    def nightly() -> None:
        runs.append(str(flow_run.id))
        with pytest.raises(JobFailed):
            run(seconds=0.3, queued_seconds=0.2, outcome="fail", message=f"bad token={TOKEN}")

    nightly()

    def told() -> list[dict[str, Any]]:
        found = events_about(runs[0])
        return found if names(found).count("failed") == 2 else []

    found = eventually_blocking(told, within=20, every=0.2)
    first, last = found[0], found[-1]
    assert names(found) == ["queued", "running", "failed"] * 2
    assert len({each["resource"]["prefect.resource.id"] for each in found}) == 2
    assert first["resource"] == {
        "prefect.resource.id": f"prefect-webapi.job.{first['payload']['job_key']}",
        "prefect.resource.name": "report",
        "prefect-webapi.plugin": "job-server",
        "prefect-webapi.connection": "inline",
        "prefect-webapi.task-type": "job-server",
    }
    roles = {each["prefect.resource.role"] for each in first["related"]}
    assert {"flow-run", "task-run", "flow"} <= roles
    told_last = last["payload"]
    assert (told_last["code"], told_last["kind"], told_last["retryable"]) == (
        *("JobFailed", "user"),
        True,
    )
    assert (told_last["attempt"], told_last["max_attempts"]) == (2, 2)
    assert f"{job_server.url}/" in told_last["links"]
    assert TOKEN not in json.dumps(found)


@prefect_leaks
@pytest.mark.chaos
async def test_of_many_jobs_only_failures_are_told(
    engine_here: Path, job_server: EmbeddedJobServer
) -> None:
    many = task_for("job-server", ReportJob, name="report", connection=block(job_server))
    runs: list[str] = []

    @flow
    async def nightly() -> None:
        runs.append(str(flow_run.id))
        specs = [ReportJob(day=day, seconds=0.1) for day in range(3)]
        broken = ReportJob(seconds=0.1, outcome="fail", message="no figures")
        await run_many(many, [*specs, broken], raise_on_failure=False)

    await nightly()
    found = await eventually(lambda: events_about(runs[0]), within=20, every=0.2)
    assert names(found) == ["failed"]
    assert found[0]["payload"]["reason"] == "no figures"


class Receiver(BaseHTTPRequestHandler):
    """What a notification is sent to."""

    told: list[dict[str, Any]]

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.told.append(json.loads(self.rfile.read(length)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None: ...


@contextmanager
def receiver() -> Generator[tuple[str, list[dict[str, Any]]]]:
    """Its address, and what it has got."""
    told: list[dict[str, Any]] = []
    with HTTPServer(("127.0.0.1", 0), type("Own", (Receiver,), {"told": told})) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", told
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.timeout(280)
def test_the_documented_automation_tells_of_a_job_that_waits(
    own_prefect_server: PrefectServer,
    engine_here: Path,
    job_server: EmbeddedJobServer,
    tmp_path: Path,
) -> None:
    """The hour is made ten seconds; a job that waits for a moment only is not told of."""
    (text,) = [part.split("```")[0] for part in PAGE.read_text().split("```yaml\n")[1:]]
    described: dict[str, Any] = yaml.safe_load(text)
    described["trigger"]["within"] = 10
    own_prefect_server.restart(PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED="true")
    with pointed_at(own_prefect_server), receiver() as (url, notified):
        webhook = CustomWebhookNotificationBlock(
            name="alerts",
            url=url,
            headers=None,
            cookies=None,
            json_data={"subject": "{{subject}}", "body": "{{body}}"},
        )
        save_block(webhook, "alerts")
        identity: UUID | None = webhook._block_document_id  # pyright: ignore[reportPrivateUsage] # no public way
        described["actions"][0]["block_document_id"] = str(identity)
        file = tmp_path / "waits.yaml"
        file.write_text(yaml.safe_dump(described))
        command = [sys.executable, "-m", "prefect", "automation", "create", "--from-file", file]
        subprocess.run(
            command, check=True, capture_output=True, env=own_prefect_server.environment()
        )
        run = sync_task_for(
            "job-server", ReportJob, name="report", connection=block(job_server, HELD)
        )
        runs: list[str] = []

        @flow
        def nightly() -> None:
            runs.append(str(flow_run.id))
            first = run.submit(day=1, seconds=2)
            eventually_blocking(lambda: job_server.stats().live == 1, within=40)
            brief = run.submit(day=2, outcome="never")
            first.wait()
            eventually_blocking(lambda: job_server.stats().live == 1, within=40)
            long = run.submit(day=3, seconds=0.1)
            eventually_blocking(lambda: notified, within=120)
            for job in job_server.jobs():
                if job.state not in ("succeeded", "cancelled"):
                    job_server.end(job.name, "succeeded")
            brief.wait()
            long.wait()

        nightly()

        def waited() -> list[dict[str, Any]]:
            found = events_about(runs[0])
            return found if names(found).count("succeeded") == 3 else []

        found = eventually_blocking(waited, within=20, every=0.2)
    waits = [each for each in found if each["event"].endswith("waiting-for-quota")]
    assert len(waits) == 2
    [alert] = notified
    assert alert["subject"] == "A job waits for its quota"
    assert "report has waited an hour" in alert["body"]
    assert waits[1]["resource"]["prefect.resource.id"] in alert["body"]
