"""A flow run is paused or suspended while its job runs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import TaskRun
from prefect.flow_runs import apause_flow_run, aresume_flow_run

from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import run_job
from tests._prefect.test_quota_jobs import task_runs, this_flow_run
from tests.support.engine import block
from tests.support.prefect import Child, PrefectServer, Scripts, prefect_leaks
from tests.support.waiting import eventually


@prefect_leaks
@pytest.mark.parametrize("cancels", [pytest.param(False, marks=pytest.mark.chaos), True])
async def test_a_paused_flow_runs_job_goes_on_unless_its_connection_says_otherwise(
    engine_here: Path, job_server: EmbeddedJobServer, cancels: bool
) -> None:
    """CASE-128: `pause_flow_run` with a submitted task; the job is created once, and deleted with `cancel_on_pause`."""
    connection, told = block(job_server, cancelOnPause=cancels), list[str]()

    @flow
    async def pausing() -> str | None:
        told.append(this_flow_run())
        future = run_job.with_options(connection=connection).submit(outcome="never", result="made")
        await eventually(lambda: job_server.stats().live == 1, within=20)
        await apause_flow_run(timeout=60, poll_interval=1)
        future.wait()
        return future.state.name

    async def is_paused() -> bool:
        async with get_client() as client:
            run = await client.read_flow_run(UUID(told[0])) if told else None
        return bool(run and run.state and run.state.is_paused())

    running = asyncio.ensure_future(pausing())
    await eventually(is_paused, within=40, every=0.1)
    if cancels:
        await eventually(lambda: job_server.stats().live == 0, within=10)
    else:
        reads = len(job_server.log())
        await eventually(lambda: len(job_server.log()) >= reads + 3, within=10)
        assert job_server.stats().live == 1
    await aresume_flow_run(UUID(told[0]))
    if not cancels:
        job_server.end(job_server.jobs()[0].name, "succeeded")
    wanted = "Cancelled" if cancels else "Completed"
    assert await running == wanted

    async def ended() -> Sequence[TaskRun]:
        runs = await task_runs(told[0])
        return [run for run in runs if run.state is not None and run.state.is_final()]

    [run] = await eventually(ended, within=20, every=0.2)
    assert run.state_name == wanted
    assert job_server.stats().created == 1
    assert len(job_server.log("delete")) == cancels
    if cancels:
        assert job_server.jobs()[0].message == "the flow run was paused"


FLOW = """
    import time
    from pathlib import Path

    from prefect import flow
    from prefect.flow_runs import suspend_flow_run
    from prefect_webapi_jobserver import run_job

    job = run_job.with_options(connection="{connection}")


    @flow
    def suspending():
        future = job.submit(outcome="never", result="made")
        while not Path("go").exists():
            time.sleep(0.1)
        suspend_flow_run(timeout=None)
        return future.result().data
"""
EXECUTE = """
    import runpy
    runpy.run_module("prefect", run_name="__main__")
"""


@pytest.mark.chaos
@pytest.mark.parametrize("cancels", [False, True])
async def test_a_suspended_flow_run_meets_its_job_when_it_is_resumed(
    prefect_api: PrefectServer,
    scripts: Scripts,
    job_server: EmbeddedJobServer,
    tmp_path: Path,
    cancels: bool,
) -> None:
    """CASE-128: its process ends, the job goes on; another process takes it up. With `cancel_on_pause` it is deleted,
    and the other process makes a new one.
    """
    connection = f"suspend-{uuid4().hex[:8]}"
    await block(job_server, cancelOnPause=cancels).asave(connection)
    script = scripts.write(FLOW.format(connection=connection))
    cli = scripts.write(EXECUTE, "cli.py")
    ledger = f"sqlite+aiosqlite:///{tmp_path / 'webapi.db'}"

    def execute(run: UUID) -> Child:
        return scripts.start(
            cli, "flow-run", "execute", str(run), PREFECT_INTEGRATIONS_WEBAPI_LEDGER_URL=ledger
        )

    async with get_client() as client:
        folder = {"directory": str(tmp_path)}
        deployment = await client.create_deployment(
            flow_id=await client.create_flow_from_name("suspending"),
            name=connection,
            entrypoint=f"{script.name}:suspending",
            pull_steps=[{"prefect.deployments.steps.set_working_directory": folder}],
        )
        run = (await client.create_flow_run_from_deployment(deployment)).id
        first = execute(run)
        await eventually(lambda: job_server.stats().live == 1, within=60)
        (tmp_path / "go").touch()
        await asyncio.to_thread(first.end, within=60)
        state = (await client.read_flow_run(run)).state
        assert state is not None
        assert state.name == "Suspended"
        assert job_server.stats().live == (not cancels)
        await client.resume_flow_run(run)
        second = execute(run)
        await eventually(lambda: job_server.stats().live == 1, within=60)
        if not cancels:
            reads = len(job_server.log("get"))
            await eventually(lambda: len(job_server.log("get")) > reads, within=60)
        job_server.end(job_server.jobs()[-1].name, "succeeded")
        await asyncio.to_thread(second.finish, within=60)
        state = (await client.read_flow_run(run)).state
        assert state is not None
        assert state.is_completed()
    assert job_server.stats().created == 1 + cancels
    assert len(job_server.log("delete")) == cancels
    assert not job_server.stats().duplicates
