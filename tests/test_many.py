"""`run_many`: a job for each spec from one task run, against a real Prefect and a real job server."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from datetime import timedelta
from functools import partial
from typing import Any, Literal
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.client.schemas.objects import TaskRun
from prefect.runtime import flow_run
from prefect.settings import PREFECT_TASKS_DEFAULT_RETRIES, temporary_settings

from benchmarks.service import Service
from prefect_webapi import ConfigurationError, JobFailed, run_many, task_for
from prefect_webapi._prefect import service
from prefect_webapi.contract.keys import JobKey
from prefect_webapi.engine.reaper import cancel
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import Report, ReportJob
from tests.support.engine import block
from tests.support.jobserver import TOKEN
from tests.support.prefect import Scripts, prefect_leaks
from tests.support.waiting import eventually, eventually_blocking

pytestmark = pytest.mark.usefixtures("engine_here")

Ends = list[Report | JobFailed]


def task_of(server: EmbeddedJobServer, config: dict[str, Any] | None = None, **options: Any) -> Any:
    return task_for(
        "job-server", ReportJob, name="run", connection=block(server, config), **options
    )


async def task_runs(run: UUID) -> list[TaskRun]:
    async with get_client() as client:
        return await client.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run]))
        )


@prefect_leaks
async def test_results_come_in_the_order_of_the_specs_from_one_task_run(
    job_server: EmbeddedJobServer,
) -> None:
    """Equal specs get a job each; the progress is an artifact of the task run."""
    runs: list[UUID] = []

    @flow
    async def nightly() -> Ends:
        runs.append(UUID(str(flow_run.id)))
        days = [3, 1, 2, 2, 0]
        specs = [ReportJob(day=day, seconds=day / 10, result=f"day {day}") for day in days]
        return await run_many(task_of(job_server), specs)

    reports = await nightly()
    assert [report.data for report in reports if isinstance(report, Report)] == [
        f"day {day}" for day in (3, 1, 2, 2, 0)
    ]
    assert job_server.stats().created == 5
    [run] = await eventually(lambda: task_runs(runs[0]), within=20)
    assert run.name.startswith("run x 5")
    found = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=runs))

    async def finished() -> bool:
        async with get_client() as client:
            artifacts = await client.read_artifacts(artifact_filter=found)
        return [(each.type, each.data) for each in artifacts] == [("progress", 100.0)]

    await eventually(finished, within=20, every=0.2)


@prefect_leaks
async def test_failures_are_collected_or_raised_when_all_are_over(
    job_server: EmbeddedJobServer,
) -> None:
    specs = [
        ReportJob(day=1, seconds=0.1),
        ReportJob(day=2, seconds=0.1, outcome="fail", message="no figures"),
        ReportJob(day=3, seconds=0.3),
    ]

    @flow
    async def nightly(raise_on_failure: bool) -> Ends:
        return await run_many(task_of(job_server), specs, raise_on_failure=raise_on_failure)

    first, second, third = await nightly(raise_on_failure=False)
    assert isinstance(first, Report)
    assert isinstance(second, JobFailed)
    assert "no figures" in str(second)
    assert isinstance(third, Report)
    with pytest.raises(JobFailed, match="no figures") as caught:
        await nightly(raise_on_failure=True)
    assert "1 of 3 jobs failed" in caught.value.__notes__[0]
    assert job_server.stats().live == 0


@prefect_leaks
async def test_a_job_beyond_its_deadline_is_one_failure_among_results(
    job_server: EmbeddedJobServer,
) -> None:
    """Its time is up, not that of the others."""
    specs = [
        ReportJob(day=0, seconds=0.1, result=0),
        ReportJob(day=1, outcome="never"),
        ReportJob(day=2, seconds=0.1, result=2),
    ]
    task = task_of(job_server).with_options(deadline=timedelta(seconds=2))

    @flow
    async def nightly() -> Ends:
        return await run_many(task, specs, raise_on_failure=False)

    first, late, last = await nightly()
    assert isinstance(first, Report)
    assert isinstance(late, JobFailed)
    assert "deadline" in str(late)
    assert isinstance(last, Report)


@prefect_leaks
async def test_a_job_that_an_operator_ends_is_one_failure_among_results(
    job_server: EmbeddedJobServer,
) -> None:
    """`jobs cancel KEY`: the call itself was not cancelled."""
    specs = [ReportJob(day=0, outcome="never"), ReportJob(day=1, seconds=0.1, result=1)]

    @flow
    async def nightly() -> Ends:
        return await run_many(task_of(job_server), specs, raise_on_failure=False)

    running = asyncio.ensure_future(nightly())
    await eventually(
        lambda: (job_server.stats().created, job_server.stats().live) == (2, 1), within=20
    )
    engine = service.started()
    assert engine is not None
    [job] = [job for job in job_server.jobs() if not job.state.is_over]
    ending = partial(cancel, keys=[JobKey(job.name)], reason="an operator ends it")
    await asyncio.wrap_future(engine.host.perform(ending))
    first, second = await running
    assert isinstance(first, JobFailed)
    assert "an operator ends it" in str(first)
    assert isinstance(second, Report)


@prefect_leaks
async def test_each_job_is_retried_by_itself(job_server: EmbeddedJobServer) -> None:
    """The task's `retries`: nothing that succeeded is made again."""
    specs = [
        ReportJob(day=1, seconds=0.1),
        ReportJob(day=2, seconds=0.1, outcome="fail-first"),
        ReportJob(day=3, seconds=0.1, outcome="fail", message="never"),
    ]

    @flow
    async def nightly() -> Ends:
        task = task_of(job_server, retries=2, retry_delay_seconds=0.1)
        return await run_many(task, specs, raise_on_failure=False)

    ends = await nightly()
    assert [isinstance(end, Report) for end in ends] == [True, True, False]
    made = Counter(entry.body["spec"]["day"] for entry in job_server.log("create"))
    assert made == {1: 1, 2: 2, 3: 3}


@prefect_leaks
async def test_prefects_defaults_for_tasks_do_not_reach_the_task_run(
    job_server: EmbeddedJobServer,
) -> None:
    """The task's own `retries` count, and no result is stored that nobody asked to be stored."""
    runs: list[UUID] = []
    task = task_of(job_server, retries=0)

    @flow
    async def nightly(outcome: Literal["succeed", "fail"]) -> Ends:
        runs.append(UUID(str(flow_run.id)))
        return await run_many(task, [ReportJob(day=1, seconds=0.1, outcome=outcome)])

    with temporary_settings({PREFECT_TASKS_DEFAULT_RETRIES: 1}):
        with pytest.raises(JobFailed):
            await nightly("fail")
        await nightly("succeed")
    made = Counter(entry.body["spec"]["outcome"] for entry in job_server.log("create"))
    assert made == {"fail": 1, "succeed": 1}

    async def ended() -> list[TaskRun]:
        return [run for run in await task_runs(runs[1]) if run.state and run.state.is_final()]

    [run] = await eventually(ended, within=20)
    assert run.state is not None
    assert run.state.data is None


@prefect_leaks
async def test_a_quota_bounds_them(job_server: EmbeddedJobServer) -> None:
    """REQ-75, counted at the service."""
    config = {"resourceQuotas": {"default": 3}}

    @flow
    async def nightly() -> Ends:
        return await run_many(
            task_of(job_server, config), [ReportJob(day=day, seconds=0.1) for day in range(12)]
        )

    assert len(await nightly()) == 12
    assert job_server.stats().peak_live <= 3


@prefect_leaks
async def test_who_cancels_the_flow_ends_them_all(job_server: EmbeddedJobServer) -> None:
    """CASE-110: and the caller stays cancelled."""
    specs = [ReportJob(day=day, outcome="never") for day in range(20)]

    @flow
    async def nightly() -> Ends:
        return await run_many(task_of(job_server), specs)

    running = asyncio.ensure_future(nightly())
    await eventually(lambda: job_server.stats().live == 20, within=30)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await eventually(lambda: job_server.stats().live == 0, within=30)
    assert job_server.stats().created == 20


KILLED = """
    import asyncio
    import sys
    from uuid import UUID

    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.flow_engine import run_flow_async
    from prefect.runtime import flow_run

    from prefect_webapi import PluginConfig, run_many
    from prefect_webapi_jobserver import JobServer, ReportJob, run_job

    WIDE = {{"qps": 100_000, "burst": 10_000}}
    SERVER = JobServer(
        base_url="{url}",
        token="{token}",
        engine=PluginConfig.load(
            {{"readRateLimiter": WIDE, "writeRateLimiter": WIDE, "caching": {{"size": 500_000}}}}
        ),
    )

    @flow
    async def nightly():
        print("RUN", flow_run.id, flush=True)
        specs = [ReportJob(day=day, result=day, {more}) for day in range({jobs})]
        reports = await run_many(run_job.with_options(connection=SERVER), specs)
        print("IN ORDER", [report.data for report in reports] == list(range({jobs})))

    async def main():
        again = None
        if len(sys.argv) > 1:
            async with get_client() as client:
                again = await client.read_flow_run(UUID(sys.argv[1]))
        await run_flow_async(nightly, flow_run=again)

    asyncio.run(main())
"""


def test_a_killed_flow_run_meets_all_of_them_when_it_is_run_again(
    scripts: Scripts, job_server: EmbeddedJobServer
) -> None:
    """CASE-280: those that were over and those that were not."""
    more = "seconds=0, outcome='succeed' if day < 4 else 'never'"
    script = scripts.write(KILLED.format(url=job_server.url, token=TOKEN, jobs=9, more=more))
    first = scripts.start(script)
    eventually_blocking(
        lambda: job_server.stats().created == 9 and job_server.stats().live == 5, within=120
    )
    first.send(signal.SIGKILL)
    _, told = first.end()
    for job in job_server.jobs():
        if not job.state.is_over:
            job_server.end(job.name, "succeeded")
    again = scripts.run(script, told.split("RUN ")[1].split()[0], within=200)
    assert "IN ORDER True" in again
    assert job_server.stats().created == 9


@pytest.mark.chaos
@pytest.mark.parametrize("jobs", [1_000, 100_000])
def test_a_hundred_thousand_are_not_made_twice_by_who_is_killed_half_way(
    scripts: Scripts, jobs: int
) -> None:
    """The job server's wire, lean: each job takes a minute, so that some are over at the kill, or end unwatched."""
    with Service() as service:
        service.reset()
        script = scripts.write(
            KILLED.format(url=service.url, token=TOKEN, jobs=jobs, more="seconds=60")
        )
        first = scripts.start(script)
        eventually_blocking(lambda: service.stats()["made"] > jobs / 2, within=600)
        first.send(signal.SIGKILL)
        _, told = first.end()
        made = service.stats()["made"]
        again = scripts.run(script, told.split("RUN ")[1].split()[0], within=1_200)
        assert "IN ORDER True" in again
        assert jobs / 2 < made < jobs
        assert service.stats()["made"] == jobs


async def test_what_is_no_spec_is_refused_before_any_job(job_server: EmbeddedJobServer) -> None:
    """With its place and its type."""
    specs: Any = [ReportJob(day=1), {"day": 2}]
    with pytest.raises(ConfigurationError, match=r"specs\[1\] is of dict, not a JobSpec"):
        await run_many(task_of(job_server), specs)
    named = task_of(job_server).with_options(idempotency_key="one")
    with pytest.raises(ConfigurationError, match="names one job"):
        await run_many(named, [ReportJob(day=1)])
    assert await run_many(task_of(job_server), []) == []
    assert job_server.stats().created == 0
