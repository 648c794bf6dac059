"""Quotas with slots of a real Prefect server: several processes, what people see, a server that goes away."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import TaskRun
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound

from prefect_webapi import Phase
from prefect_webapi._prefect.slots import PrefectSlots
from prefect_webapi.clock import Clock, use_clock
from prefect_webapi.engine.host import Host, Ticket
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import Report, ReportJob, run_job
from tests.support.engine import at, block, request
from tests.support.engine_child import Work, child
from tests.support.ledger import another_store, sqlite_url
from tests.support.prefect import PrefectServer, pointed_at, prefect_leaks
from tests.support.waiting import eventually


def quota(jobs: int) -> dict[str, Any]:
    return {"resourceQuotas": {"default": jobs}, "caching": {"resyncInterval": "5s"}}


async def taken(name: str) -> int | None:
    """What Prefect counts; None: there is no such limit."""
    async with get_client() as client:
        try:
            found = await client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            return None
    return int(found.active_slots)


async def is_free(name: str) -> bool:
    return await taken(name) == 0


async def places_taken(ledger: Path) -> int:
    async with another_store(sqlite_url(ledger)) as store:
        return sum(row.live for row in await store.quotas())


def this_flow_run() -> str:
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    return str(context.flow_run.id)


async def task_runs(flow_run: str) -> Sequence[TaskRun]:
    wanted = FlowRunFilter(id=FlowRunFilterId(any_=[uuid.UUID(flow_run)]))
    async with get_client() as client:
        return await client.read_task_runs(flow_run_filter=wanted)


async def test_four_processes_share_a_quota_of_three(
    prefect_api: PrefectServer, job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-130, REQ-75: one ledger, one limit at Prefect."""
    works = [
        Work(
            folder=tmp_path,
            server=job_server.url,
            specs=tuple(ReportJob(kind=f"process {n}", day=day, seconds=0.2) for day in range(4)),
            config=quota(3),
            prefect=prefect_api,
        )
        for n in range(4)
    ]
    with ExitStack() as stack:
        children = [stack.enter_context(child(work)) for work in works]
        ends = [await asyncio.to_thread(each.ends) for each in children]
    assert [end.phase for ended in ends for end in ended] == ["SUCCESS"] * 16
    stats = job_server.stats()
    assert (stats.created, stats.peak_live, stats.live) == (16, 3, 0)
    assert not stats.duplicates
    assert await taken("webapi:keys:default:default") == 0
    assert await places_taken(tmp_path / "webapi.db") == 0


@pytest.fixture
def connection() -> str:
    """Name of a block of this test's own."""
    return f"quota-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def hurried() -> Iterator[None]:
    """Five seconds, the shortest time between two looks at a block, pass in one."""
    use_clock(Clock(5))
    yield
    use_clock(None)


@prefect_leaks
async def test_a_waiting_task_run_shows_what_it_waits_for_until_the_saved_block_makes_room(
    engine_here: Path, hurried: None, job_server: EmbeddedJobServer, connection: str
) -> None:
    """CASE-136, CASE-140, REQ-76: seen by the API; the block is saved again with a quota of two."""

    async def save(jobs: int) -> None:
        times = {"getTimeout": "10m", "createTimeout": "10m"}
        await block(job_server, quota(jobs), **times).asave(connection, overwrite=True)

    limit = f"webapi:job-server:{connection}:default"
    told: list[str] = []

    @flow
    async def endless_jobs() -> list[Report]:
        told.append(this_flow_run())
        job = run_job.with_options(connection=connection)
        return await asyncio.gather(*(job(day=day, outcome="never") for day in range(3)))

    async def waiting(number: int) -> list[TaskRun]:
        """Those that wait, if there are so many."""
        runs = await task_runs(told[0]) if told else list[TaskRun]()
        found = [run for run in runs if run.state and run.state.name == "AwaitingConcurrencySlot"]
        return found if len(found) == number else []

    await save(1)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(endless_jobs())
        both = await eventually(lambda: waiting(2), within=30, every=0.2)
        await eventually(lambda: job_server.stats().created == 1, within=5)
        for run in both:
            assert run.state is not None
            assert re.fullmatch(
                rf"quota {limit}: limit 1, position \d, waits for \d+ s", run.state.message or ""
            )
        assert all(run.state is not None and run.state.is_pending() for run in both)
        await save(2)
        await eventually(lambda: job_server.stats().live == 2, within=15, every=0.1)
        one = await eventually(lambda: waiting(1), within=10, every=0.2)
        assert one[0].id in {run.id for run in both}
        job_server.end(job_server.jobs()[0].name, "succeeded")
        await eventually(lambda: job_server.stats().created == 3, within=10, every=0.1)
        for job in job_server.jobs()[1:]:
            job_server.end(job.name, "succeeded")
        reports = await running
    assert len(reports) == 3
    assert job_server.stats().peak_live == 2
    await eventually(lambda: is_free(limit), within=20)
    assert {run.run_count for run in await task_runs(told[0])} == {1}


@prefect_leaks
async def test_a_throttled_create_costs_no_run_and_without_a_quota_there_is_no_limit(
    engine_here: Path, job_server: EmbeddedJobServer, connection: str
) -> None:
    """CASE-154, CASE-132, REQ-60: five times 429 for a task without retries."""

    @flow
    async def one() -> tuple[str, Report]:
        report = await run_job.with_options(connection=connection)(seconds=0.1, result="made")
        return this_flow_run(), report

    await block(job_server).asave(connection)
    job_server.fault("create", status=429, times=5)
    flow_run, report = await one()
    assert report.data == "made"
    assert [create.status for create in job_server.log("create")] == [429] * 5 + [201]
    assert job_server.stats().created == 1

    async def completed() -> list[TaskRun]:
        return [run for run in await task_runs(flow_run) if run.state_name == "Completed"]

    [run] = await eventually(completed, within=20, every=0.2)
    assert run.run_count == 1
    assert await taken(f"webapi:job-server:{connection}:default") is None


async def test_jobs_outlive_a_restart_of_prefect_and_none_starts_without_a_slot(
    own_prefect_server: PrefectServer,
    job_server: EmbeddedJobServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """CASE-141, CASE-142: the restarted server has forgotten the leases, and counts their slots for ever."""
    server = own_prefect_server
    limit = "webapi:keys:default:default"

    def endless(host: Host, day: int) -> Ticket:
        spec = ReportJob(outcome="never", day=day)
        return host.admit(request(spec, task_type="keys", task_run=f"t{day}"))

    def end(nth: int) -> None:
        job_server.end(job_server.jobs()[nth].name, "succeeded")

    with pointed_at(server), at(tmp_path, job_server, quota(2), slots=PrefectSlots) as host:
        first = [endless(host, 0), endless(host, 1)]
        await eventually(lambda: job_server.stats().live == 2, within=20, every=0.1)
        later = [endless(host, 2), endless(host, 3)]
        await asyncio.to_thread(server.kill)
        with caplog.at_level(logging.WARNING, "prefect_webapi.quotas"):
            await eventually(lambda: "none starts without its slot" in caplog.text, within=20)
        end(0)
        ended = await asyncio.wait(
            [asyncio.ensure_future(ticket.outcome()) for ticket in first],
            timeout=20,
            return_when=asyncio.FIRST_COMPLETED,
        )
        assert len(ended[0]) == 1
        assert (job_server.stats().created, job_server.stats().live) == (2, 1)
        await asyncio.to_thread(server.start)
        await eventually(lambda: job_server.stats().created == 3, within=40, every=0.1)
        assert (job_server.stats().live, await taken(limit)) == (2, 2)
        end(1)
        await eventually(lambda: job_server.stats().created == 4, within=40, every=0.1)
        end(2)
        end(3)
        outcomes = await asyncio.gather(*(ticket.outcome() for ticket in [*first, *later]))
        await eventually(lambda: is_free(limit), within=20)
    assert all(outcome.info.phase is Phase.SUCCESS for outcome in outcomes)
    assert job_server.stats().peak_live == 2
    assert not job_server.log("delete")
    assert await places_taken(tmp_path / "webapi.db") == 0
