"""`prefect.yaml`: every flow is deployed, run and cancelled as an operator does it, by Prefect's own commands."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from pydantic import HttpUrl, SecretStr

from prefect_webapi import PluginConfig
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import JobServer
from tests.support.jobserver import TOKEN
from tests.support.operator import Operator, ended, stop
from tests.support.prefect import PrefectServer, pointed_at, save_block
from tests.support.waiting import eventually_blocking

ROOT = Path(__file__).parents[1]
DEPLOYED = ROOT / "prefect.yaml"


@pytest.fixture
def client(own_prefect_server: PrefectServer) -> Iterator[SyncPrefectClient]:
    with pointed_at(own_prefect_server), get_client(sync_client=True) as client:
        yield client


def deployments(client: SyncPrefectClient) -> Sequence[Any]:
    return client.request("POST", "/deployments/filter", json={}).json()


def job_events(client: SyncPrefectClient, run: UUID, *, ends: int) -> Sequence[Any]:
    """Events of a flow run's jobs, once so many have told that they succeeded."""
    wanted = {
        "event": {"prefix": ["prefect-webapi.job."]},
        "related": {"id": [f"prefect.flow-run.{run}"]},
    }

    def told() -> Sequence[Any]:
        answer = client.request("POST", "/events/filter", json={"filter": wanted, "limit": 50})
        found: Sequence[Any] = answer.json()["events"]
        return found if sum(each["event"].endswith(".succeeded") for each in found) == ends else []

    return eventually_blocking(told, within=30, every=0.2)


@pytest.mark.timeout(600)
def test_every_flow_is_deployed_one_is_run_and_one_is_cancelled_half_way(
    own_prefect_server: PrefectServer,
    client: SyncPrefectClient,
    job_server: EmbeddedJobServer,
    tmp_path: Path,
) -> None:
    """How many jobs there are, and live, is asked of the job server."""
    described: dict[str, Any] = yaml.safe_load(DEPLOYED.read_text())
    before = DEPLOYED.read_bytes()
    env = own_prefect_server.environment(
        PREFECT_INTEGRATIONS_WEBAPI_LEDGER_URL=f"sqlite+aiosqlite:///{tmp_path / 'webapi.db'}"
    )
    save_block(
        JobServer(
            base_url=HttpUrl(job_server.url),
            token=SecretStr(TOKEN),
            engine=PluginConfig(resource_quotas={"default": 2}),
        ),
        "quickstart",
    )
    operator = Operator(sys.executable, ROOT, env)
    operator.prefect("work-pool", "create", "webapi", "--type", "process")
    operator.prefect("deploy", "--all", "--no-prompt")
    assert DEPLOYED.read_bytes() == before
    made = {each["name"]: each for each in deployments(client)}
    assert made.keys() == {each["name"] for each in described["deployments"]}
    assert {each["work_pool_name"] for each in made.values()} == {"webapi"}
    assert made["report"]["parameters"] == {"days": 3}
    assert [each["schedule"]["cron"] for each in made["report"]["schedules"]] == ["0 6 * * *"]
    assert [each["parameters"] for each in made["report"]["schedules"]] == [{"days": 7}]

    elsewhere = Operator(sys.executable, tmp_path, env)  # a worker may start anywhere
    worker, log = elsewhere.worker("webapi"), tmp_path / "worker.log"
    try:
        report = operator.run("nightly/report", days=2)
        assert ended(client, report, log) == "Completed"
        assert (job_server.stats().created, job_server.stats().live) == (3, 0)
        owners = {
            (related["prefect.resource.role"], related["prefect.resource.id"])
            for event in job_events(client, report, ends=3)
            for related in event["related"]
        }
        deployment = ("deployment", f"prefect.deployment.{made['report']['id']}")
        assert {("flow-run", f"prefect.flow-run.{report}"), deployment} <= owners
        assert sum(role == "task-run" for role, _ in owners) == 3

        night = operator.run("quickstart/quickstart")
        eventually_blocking(lambda: job_server.stats().live == 2, within=150, every=0.2)
        operator.prefect("flow-run", "cancel", str(night))
        assert ended(client, night, log) == "Cancelled"
    finally:
        stop(worker)
    stats = job_server.stats()
    assert stats.live == 0
    assert (stats.duplicates, stats.peak_live) == ({}, 2)
    assert "flow run was cancelled" in str(job_server.log("delete"))
