"""Prefect's API is away for a while: what runs remotely goes on, and what it came to arrives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client

from prefect_webapi.testing import EmbeddedJobServer
from tests.support.engine import block
from tests.support.prefect import PrefectServer, Scripts, pointed_at
from tests.support.waiting import eventually

FLOW = """
import asyncio, json, sys
from pathlib import Path

from prefect import flow
from prefect_webapi_jobserver import run_job

here = Path(sys.argv[1])
job = run_job.with_options(connection="outage")


@flow
async def reports():
    early = [job.submit(seconds=8, day=day, result=day) for day in range(3)]
    awaited = await asyncio.gather(*(job(seconds=8, day=day, result=day) for day in range(3, 6)))
    results = [future.result().data for future in early] + [report.data for report in awaited]
    (here / "results").write_text(json.dumps(results))
    while not (here / "go").exists():
        await asyncio.sleep(0.1)
    return results


asyncio.run(reports())
"""


@pytest.mark.chaos
async def test_jobs_go_on_while_prefects_api_is_down_and_results_arrive(
    own_prefect_server: PrefectServer, job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-194, KP-34, REQ-75, REQ-78: the server is killed while jobs run, and comes back after their end."""
    server = own_prefect_server
    with pointed_at(server):
        await block(job_server, {"resourceQuotas": {"default": 6}}).asave("outage")
    scripts = Scripts(server, tmp_path)
    try:
        ledger = f"sqlite+aiosqlite:///{tmp_path / 'webapi.db'}"
        child = scripts.start(FLOW, str(tmp_path), PREFECT_INTEGRATIONS_WEBAPI_LEDGER_URL=ledger)
        await eventually(lambda: job_server.stats().live == 6, within=60)
        server.kill()
        told = tmp_path / "results"
        await eventually(told.exists, within=60)
        assert not server.is_healthy
        assert sorted(json.loads(told.read_text())) == list(range(6))
        server.start()
        (tmp_path / "go").touch()
        child.finish(within=120)
    finally:
        scripts.close()
    assert job_server.stats().created == 6
    assert job_server.log("delete") == []
    with pointed_at(server):
        async with get_client() as client:
            [run] = await client.read_flow_runs()
            assert run.state is not None
            assert run.state.is_completed()
            await eventually(_slots_are_free, within=60, every=0.5)
            await eventually(_task_runs_are_completed, within=60, every=0.5)


async def _task_runs_are_completed() -> bool:
    async with get_client() as client:
        runs = await client.read_task_runs()
    return [run.state_name for run in runs] == ["Completed"] * 6


async def _slots_are_free() -> bool:
    async with get_client() as client:
        limits = await client.read_global_concurrency_limits(limit=10, offset=0)
        return all(limit.active_slots == 0 for limit in limits)
