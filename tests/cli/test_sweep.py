"""`prefect-webapi sweep`, `jobs cancel`, `jobs resolve`: end what was left, settle what is in doubt."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Crashed, Running

from prefect_webapi._prefect.api import Api
from prefect_webapi._prefect.runs import PrefectRuns
from prefect_webapi._prefect.slots import PrefectSlots
from prefect_webapi.ledger.records import JobState
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import ReportJob
from prefect_webapi_jobserver import entry as job_server_entry
from tests.cli.command import Command, command_for
from tests.support.engine import block, engine, request
from tests.support.prefect import PrefectServer, Scripts, save_block
from tests.support.waiting import eventually
from tests.support.witness import places_taken, records

QUOTA = {"resourceQuotas": {"default": 3}}
ENDLESS = ReportJob(outcome="never")


@flow
def nothing() -> None:
    """A flow whose runs the tests make by hand."""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return command_for(monkeypatch, capsys)


@dataclass(frozen=True, slots=True)
class Site:
    """A ledger, a job server, and a saved connection to it."""

    folder: Path
    server: EmbeddedJobServer
    connection: str

    def leave(self, *runs: UUID, spec: ReportJob = ENDLESS, connection: str | None = None) -> None:
        """Make a job for each of these flow runs and end the process."""

        async def begin() -> None:
            blocks = {connection or self.connection: block(self.server, QUOTA)}
            with engine(
                self.folder, [job_server_entry], blocks, slots=PrefectSlots, runs=PrefectRuns(Api())
            ) as host:
                for run in runs:
                    host.admit(
                        request(spec, run=str(run), connection=connection or self.connection)
                    )
                await eventually(lambda: self.server.stats().live == len(runs), within=20)
                await eventually(self.are_known, within=20)

        asyncio.run(begin())

    async def are_known(self) -> bool:
        return all(r.state is JobState.CREATED for r in await records(self.folder))


@pytest.fixture
def site(
    prefect_api: PrefectServer,
    job_server: EmbeddedJobServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Site:
    name = f"sweep-{tmp_path.name}".replace("_", "-").lower()[:60]
    save_block(block(job_server, QUOTA), name)
    url = f"sqlite+aiosqlite:///{tmp_path / 'webapi.db'}"
    monkeypatch.setenv("PREFECT_INTEGRATIONS_WEBAPI_LEDGER_URL", url)
    monkeypatch.setenv("PREFECT_INTEGRATIONS_WEBAPI_ORPHAN_AFTER", "1s")
    monkeypatch.setenv("COLUMNS", "200")
    return Site(tmp_path, job_server, name)


def run_in(state: State[Any]) -> UUID:
    """A flow run that has come into this state."""

    async def make() -> UUID:
        async with get_client() as client:
            made = await client.create_flow_run(nothing, state=Running())
            await client.set_flow_run_state(made.id, state, force=True)
            return made.id

    return asyncio.run(make())


def test_what_ended_flows_have_left_is_ended_and_the_rest_is_not(
    command: Command, site: Site
) -> None:
    """CASE-127, CASE-145: a dry run only tells; the pass deletes with the reason; places are free again."""
    cancelled, running = run_in(Cancelled()), run_in(Running())
    site.leave(cancelled, running)
    planned = command("sweep", "--dry-run", "--json")
    assert planned.code == 0
    assert [job["action"] for job in planned.data["jobs"]] == ["end"]
    assert site.server.stats().live == 2
    done = command("sweep")
    assert done.code == 0, done.err
    assert "the flow run was cancelled" in done.out
    assert "over as ABORTED" in done.out
    assert site.server.stats().live == 1
    assert [j.message for j in site.server.jobs() if j.state == "cancelled"] == [
        "the flow run was cancelled"
    ]
    assert asyncio.run(places_taken(site.folder)) == 1


def test_a_deleted_flow_run_has_no_claim(command: Command, site: Site) -> None:
    """CASE-127: a second after its process has gone, since `orphan_after` says so."""
    gone = run_in(Crashed())
    site.leave(gone)

    async def delete() -> None:
        async with get_client() as client:
            await client.delete_flow_run(gone)
        await asyncio.sleep(1.2)  # `orphan_after`

    asyncio.run(delete())
    done = command("sweep", "--json")
    assert ["no longer known" in job["reason"] for job in done.data["jobs"]] == [True]
    assert site.server.stats().live == 0


def test_jobs_of_an_unsaved_block_are_reported_until_a_block_is_named(
    command: Command, site: Site
) -> None:
    """CASE-285."""
    site.leave(run_in(Cancelled()), connection="inline")
    told = command("sweep", "--json")
    assert [job["action"] for job in told.data["jobs"]] == ["report"]
    assert "--connection" in told.data["jobs"][0]["reason"]
    assert site.server.stats().live == 1
    assert not site.server.log("delete")
    done = command("sweep", "--json", "--connection", site.connection)
    assert [job["came_to"] for job in done.data["jobs"]] == ["over as ABORTED"]
    assert site.server.stats().live == 0


def test_a_connection_that_is_gone_is_told(command: Command, site: Site) -> None:
    site.leave(run_in(Cancelled()), connection="nobody-knows")
    done = command("sweep")
    assert done.code == 1
    assert "nobody-knows" in done.out
    assert site.server.stats().live == 1


def test_an_operator_ends_a_job_of_a_run_that_goes_on(command: Command, site: Site) -> None:
    site.leave(run_in(Running()))
    [record] = asyncio.run(records(site.folder))
    done = command("jobs", "cancel", record.key, "--reason", "too dear", "--json")
    assert done.code == 0, done.err
    assert [job["phase"] for job in done.data] == ["ABORTED"]
    assert [job.message for job in site.server.jobs()] == ["too dear"]
    wrong = command("jobs", "cancel", "no-such-job")
    assert wrong.code == 2
    assert "no job 'no-such-job'" in wrong.err


def test_an_operator_settles_a_job_in_doubt(command: Command, site: Site) -> None:
    """T-15 and T-16: what only the service's own pages can tell."""
    site.leave(run_in(Running()), spec=ENDLESS)
    [record] = asyncio.run(records(site.folder))
    neither = command("jobs", "resolve", record.key)
    assert neither.code == 2
    refused = command("jobs", "resolve", record.key, "--handle", '{"name": "x"}')
    assert refused.code == 2
    assert "needs no handle" in refused.err
    done = command("jobs", "resolve", record.key, "--gone", "--json")
    assert done.code == 0, done.err
    assert done.data["state"] == "CLOSED"
    assert "settled by hand" in json.dumps(done.data)
    assert asyncio.run(places_taken(site.folder)) == 0


def test_the_flow_sweeps_as_the_command_does(site: Site, scripts: Scripts) -> None:
    """`flows/sweep.py`, as it is deployed."""
    site.leave(run_in(Cancelled()))
    ledger = "PREFECT_INTEGRATIONS_WEBAPI_LEDGER_URL"
    told = scripts.run(
        Path(__file__).parents[2] / "flows" / "sweep.py",
        PREFECT_INTEGRATIONS_WEBAPI_LEDGER_URL=os.environ[ledger],
    )
    assert "the flow run was cancelled. over as ABORTED" in told
    assert site.server.stats().live == 0
    assert asyncio.run(places_taken(site.folder)) == 0
