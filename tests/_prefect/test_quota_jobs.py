"""Quotas with slots of a real Prefect server: several processes, what people see, a server that goes away."""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import TaskRun
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound

from prefect_webapi import Phase
from prefect_webapi._prefect.slots import PrefectSlots
from prefect_webapi.clock import Clock, use_clock
from prefect_webapi.engine.channels import LedgerCount
from prefect_webapi.engine.host import Host, Ticket
from prefect_webapi.ledger.records import Move, MoveResult
from prefect_webapi.ledger.sql import SqlStore
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import Report, ReportJob, run_job
from tests.support.engine import Told, at, block, engine, request
from tests.support.engine_child import Work, child
from tests.support.leaks import given_back
from tests.support.ledger import another_store, ledger_of
from tests.support.plugins import ALL
from tests.support.prefect import PrefectServer, pointed_at, prefect_leaks
from tests.support.sweeping import swept
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


async def places_taken(ledger: str) -> int:
    async with another_store(ledger) as store:
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


@pytest.mark.parametrize("tasks", [4, pytest.param(20, marks=pytest.mark.chaos)])
async def test_four_processes_share_a_quota_of_three(
    prefect_api: PrefectServer, job_server: EmbeddedJobServer, tmp_path: Path, tasks: int
) -> None:
    """CASE-130, REQ-75: one ledger, one limit at Prefect."""
    works = [
        Work(
            folder=tmp_path,
            server=job_server.url,
            specs=tuple(ReportJob(kind=f"process {n}", day=day, seconds=1) for day in range(tasks)),
            config=quota(3),
            prefect=prefect_api,
        )
        for n in range(4)
    ]
    with ExitStack() as stack:
        children = [stack.enter_context(child(work)) for work in works]
        ends = [await asyncio.to_thread(each.ends) for each in children]
    assert [end.phase for ended in ends for end in ended] == ["SUCCESS"] * 4 * tasks
    stats = job_server.stats()
    assert (stats.created, stats.peak_live, stats.live) == (4 * tasks, 3, 0)
    assert not stats.duplicates
    assert await taken("webapi:keys:default:default") == 0
    assert await places_taken(ledger_of(tmp_path)) == 0


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
    assert await places_taken(ledger_of(tmp_path)) == 0


@dataclass
class Processes:
    """Engines that share a ledger and a limit at Prefect, as processes on one machine do.

    Attributes:
        told: what each waiting job was told, by day; tickets: in the order of admission.
    """

    folder: Path
    server: EmbeddedJobServer
    connection: str
    store: type[SqlStore] = SqlStore
    tickets: list[Ticket] = field(default_factory=list[Ticket])
    told: list[Told] = field(default_factory=list[Told])

    @property
    def limit(self) -> str:
        return f"webapi:keys:{self.connection}:default"

    def one(self, jobs: int) -> AbstractContextManager[Host]:
        blocks = {self.connection: block(self.server, quota(jobs), getTimeout="10m")}
        return engine(self.folder, ALL, blocks, store=self.store, slots=PrefectSlots)

    def endless(self, host: Host) -> None:
        """One more job, of a day of its own."""
        day = len(self.tickets)
        self.told.append(Told())
        called = request(
            ReportJob(outcome="never", day=day),
            task_type="keys",
            task_run=f"t{day}",
            connection=self.connection,
            reporter=self.told[-1],
        )
        self.tickets.append(host.admit(called))

    async def until_waiting(self) -> None:
        """The newest job waits."""
        told = self.told[-1]
        await eventually(lambda: "WAITING_FOR_RESOURCES" in told.names, within=20)

    async def until_created(self, jobs: int) -> None:
        await eventually(lambda: self.server.stats().created >= jobs, within=20)

    def end(self, nth: int) -> None:
        self.server.end(self.server.jobs()[nth].name, "succeeded")

    async def until_free(self) -> None:
        await asyncio.gather(*(ticket.outcome() for ticket in self.tickets))
        await eventually(lambda: is_free(self.limit), within=20)


def seconds_to_create(job_server: EmbeddedJobServer) -> float:
    """From the last read before the newest create, which saw a job over, to this create."""
    log = job_server.log()
    created = max(each.mono for each in log if each.op == "create")
    reads = (each.mono for each in log if each.op in ("get", "batch"))
    return created - max(read for read in reads if read < created)


async def test_jobs_of_two_processes_start_in_the_order_in_which_they_came(
    prefect_api: PrefectServer, job_server: EmbeddedJobServer, connection: str, tmp_path: Path
) -> None:
    """CASE-137, REQ-76: a freed place wakes the next one at once, in another process within two seconds."""
    both = Processes(tmp_path, job_server, connection)
    waits: list[float] = []
    with both.one(1) as first, both.one(1) as second:
        both.endless(first)
        await both.until_created(1)
        for host in (second, first, second, second, first):
            both.endless(host)
            await both.until_waiting()
        for nth in range(5):
            both.end(nth)
            await both.until_created(nth + 2)
            waits.append(seconds_to_create(job_server))
        both.end(5)
        await both.until_free()
    assert [create.body["spec"]["day"] for create in job_server.log("create")] == [*range(6)]
    assert job_server.stats().peak_live == 1
    assert waits[3] < 0.9, "this one stays in its process"
    assert max(waits) < 2.5


class FullStore(SqlStore):
    """Counts how often the ledger had no room."""

    refused: ClassVar[int] = 0

    async def move(self, move: Move) -> MoveResult:
        result = await super().move(move)
        FullStore.refused += result is MoveResult.FULL
        return result


@pytest.mark.parametrize("done", ["deleted", "switched off"])
async def test_a_limit_that_is_gone_or_off_meanwhile_lets_nobody_start(
    prefect_api: PrefectServer,
    job_server: EmbeddedJobServer,
    connection: str,
    tmp_path: Path,
    done: str,
) -> None:
    """CASE-146: Prefect counts from nothing, or not at all; the ledger's count holds, and no slot stays taken."""
    FullStore.refused = 0
    process = Processes(tmp_path, job_server, connection, FullStore)
    with process.one(2) as host:
        process.endless(host)
        process.endless(host)
        await process.until_created(2)
        async with get_client() as client:
            if done == "deleted":
                await client.delete_global_concurrency_limit_by_name(process.limit)
            else:
                off = GlobalConcurrencyLimitUpdate(active=False)
                await client.update_global_concurrency_limit(process.limit, off)
        process.endless(host)
        await eventually(lambda: FullStore.refused >= 3, within=10)
        assert job_server.stats().created == 2
        process.end(0)
        await process.until_created(3)
        async with get_client() as client:
            on = GlobalConcurrencyLimitUpdate(active=True)
            await client.update_global_concurrency_limit(process.limit, on)
        process.end(1)
        process.end(2)
        await asyncio.gather(*(ticket.outcome() for ticket in process.tickets))

        await give_back_what_leaked(process.limit, ledger_of(tmp_path))
    assert await taken(process.limit) == 0
    assert job_server.stats().peak_live == 2


async def give_back_what_leaked(limit: str, ledger: str) -> Mapping[str, int]:
    """What the first use of a limit does, and the sweeper; by limit."""
    async with PrefectSlots(Clock()) as slots, another_store(ledger) as store:
        return await given_back(slots, limit, LedgerCount(store))


@pytest.mark.chaos
async def test_nothing_stops_a_quota_neither_a_kill_nor_a_restart_of_prefect(
    own_prefect_server: PrefectServer,
    each_ledger: str,
    job_server: EmbeddedJobServer,
    tmp_path: Path,
) -> None:
    """CASE-130, CASE-131, CASE-141, CASE-142: three processes of six jobs each; one is killed with live jobs, then the
    server, whose leases are lost; what the dead one left is run again.
    """
    server = own_prefect_server

    def work(n: int, execution: str) -> Work:
        return Work(
            folder=tmp_path,
            server=job_server.url,
            specs=tuple(ReportJob(kind=f"process {n}", day=day, seconds=3) for day in range(6)),
            execution=execution,
            config=quota(3),
            prefect=server,
        )

    def has_live_job(execution: str) -> bool:
        runs = {j.labels["task_run_id"] for j in job_server.jobs() if j.state == "running"}
        return any(run.startswith(execution) for run in runs)

    with ExitStack() as stack:
        dying, *living = [stack.enter_context(child(work(n, f"first-{n}"))) for n in range(3)]
        await eventually(
            lambda: job_server.stats().live == 3 and has_live_job("first-0"), within=60
        )
        dying.signal(signal.SIGKILL)
        await asyncio.to_thread(server.kill)
        await eventually(lambda: job_server.stats().live == 0, within=60)
        seen = job_server.stats().created
        await asyncio.to_thread(server.start)
        again = stack.enter_context(child(work(0, "second-0")))
        ends = [await asyncio.to_thread(each.ends, within=180) for each in (*living, again)]
    assert [end.phase for ended in ends for end in ended] == ["SUCCESS"] * 18
    stats = job_server.stats()
    assert seen < 18
    assert (stats.created, stats.peak_live) == (18, 3)
    assert not stats.duplicates
    assert await places_taken(each_ledger) == 0
    with pointed_at(server):
        await give_back_what_leaked("webapi:keys:default:default", each_ledger)
        assert await taken("webapi:keys:default:default") == 0


@pytest.mark.chaos
async def test_a_process_that_slept_longer_than_its_lease_finds_its_jobs_and_the_quota_as_they_were(
    prefect_api: PrefectServer, job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-141: it is stopped with two of two live; Prefect lends its slots to others, the ledger admits none."""
    specs = tuple(ReportJob(day=day, outcome="never") for day in range(2))
    work = Work(
        folder=tmp_path, server=job_server.url, specs=specs, config=quota(2), prefect=prefect_api
    )
    limit = "webapi:keys:default:default"
    FullStore.refused = 0
    with (
        child(work) as sleeper,
        at(tmp_path, job_server, quota(2), store=FullStore, slots=PrefectSlots) as host,
    ):
        await eventually(lambda: job_server.stats().live == 2, within=30)
        sleeper.signal(signal.SIGSTOP)
        waiter = host.admit(
            request(ReportJob(seconds=0), task_type="keys", run="other", task_run="other")
        )
        await eventually(lambda: FullStore.refused >= 5, within=240, every=0.5)
        assert job_server.stats().created == 2
        sleeper.signal(signal.SIGCONT)
        await eventually(lambda: sleeper.said("it lapsed unrenewed") == 2, within=60, every=0.5)
        for job in job_server.jobs()[:2]:
            job_server.end(job.name, "succeeded")
        ends = await asyncio.to_thread(sleeper.ends)
        outcome = await waiter.outcome()
        await eventually(lambda: is_free(limit), within=30)
    assert [end.phase for end in ends] == ["SUCCESS"] * 2
    assert outcome.info.phase is Phase.SUCCESS
    stats = job_server.stats()
    assert (stats.created, stats.peak_live) == (3, 2)
    assert not stats.duplicates


@pytest.mark.chaos
async def test_a_sweeper_gives_back_what_a_restarted_prefect_counts_for_a_dead_holder(
    own_prefect_server: PrefectServer,
    each_ledger: str,
    job_server: EmbeddedJobServer,
    tmp_path: Path,
) -> None:
    """CASE-286: not before the jobs are gone; once, by two sweepers together; and although others wait for them."""
    server, limit = own_prefect_server, "webapi:keys:default:default"
    specs = tuple(ReportJob(day=day, outcome="never") for day in range(3))
    work = Work(
        folder=tmp_path, server=job_server.url, specs=specs, config=quota(3), prefect=server
    )
    with child(work) as holder:
        await eventually(lambda: job_server.stats().live == 3, within=60)
        holder.signal(signal.SIGKILL)
    await asyncio.to_thread(server.kill)
    await asyncio.to_thread(server.start)
    with pointed_at(server):
        assert await taken(limit) == 3
        assert not await give_back_what_leaked(limit, each_ledger), "the jobs live"
        await swept(tmp_path, job_server, config=quota(3))
        assert job_server.stats().live == 0
        assert (await taken(limit), await places_taken(each_ledger)) == (3, 0)
        with at(tmp_path, job_server, quota(3), slots=PrefectSlots) as host:
            told = [Told() for _ in specs]
            tickets = [
                host.admit(
                    request(
                        ReportJob(day=day, seconds=0.5),
                        task_type="keys",
                        run="next",
                        task_run=f"next {day}",
                        reporter=each,
                    )
                )
                for day, each in enumerate(told)
            ]
            for each in told:
                await eventually(lambda t=each: "WAITING_FOR_RESOURCES" in t.names, within=20)
            done = await asyncio.gather(
                *(give_back_what_leaked(limit, each_ledger) for _ in range(2))
            )
            assert sorted(given.get(limit, 0) for given in done) == [0, 3]
            outcomes = await asyncio.gather(*(ticket.outcome() for ticket in tickets))
            await eventually(lambda: is_free(limit), within=20)
    assert all(outcome.info.phase is Phase.SUCCESS for outcome in outcomes)
    assert (job_server.stats().created, job_server.stats().peak_live) == (6, 3)
