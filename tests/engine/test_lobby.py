"""Calls, jobs to be made or deleted and ends that come by the hundred wait outside, where waiting costs no task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from prometheus_client import CollectorRegistry

from prefect_webapi import Phase, PluginEntry, StatusContext, TaskExecutionContextReader
from prefect_webapi.contract.errors import EngineClosed
from prefect_webapi.engine import runtime
from prefect_webapi.engine.host import Host, Ticket
from prefect_webapi.engine.lobby import Lobby
from prefect_webapi.engine.runtime import Runtime
from prefect_webapi.ledger.records import JobState
from prefect_webapi.metrics import Metrics
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import JobServer, JobServerPlugin, ReportJob
from prefect_webapi_jobserver.models import JobHandle, JobView
from tests.support.engine import GivenConnections, Told, at, block, engine, request, run
from tests.support.engine_child import Work, child
from tests.support.plugins import ALL, OutputsPlugin, entry
from tests.support.waiting import eventually
from tests.support.witness import places_taken, records

CALLS = 500
PLACES = 5
DAYS = range(30)


class Slow(JobServerPlugin):
    async def resource_requirements(self, ctx: Any) -> Any:
        await asyncio.sleep(60)


SLOW = PluginEntry(
    id="slow",
    supported_task_types=["slow"],
    connection=JobServer,
    spec=ReportJob,
    plugin_loader=lambda setup: Slow(setup.connection),
)


@pytest.mark.parametrize("slow", ["connection", "requirements"])
async def test_a_connection_that_is_slow_to_come_holds_no_other_up(
    job_server: EmbeddedJobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    """Who keeps the block, or what a plugin asks of its service, takes its time."""
    resolve = GivenConnections.resolve

    async def slowly(self: GivenConnections, ref: Any, *args: Any, **kwargs: Any) -> Any:
        if ref == "sick" and slow == "connection":
            await asyncio.sleep(60)
        return await resolve(self, ref, *args, **kwargs)

    monkeypatch.setattr(GivenConnections, "resolve", slowly)
    sick = block(job_server, {"resourceQuotas": {"default": 1000}})
    blocks = {"default": block(job_server), "sick": sick}
    with engine(tmp_path, (*ALL, SLOW), blocks) as host:
        for day in range(CALLS):
            host.admit(request(ReportJob(day=day), task_type="slow", connection="sick"))
        outcome = await asyncio.wait_for(run(host, ReportJob(seconds=0.1)), 15)
    assert outcome.info.phase is Phase.SUCCESS


# --- jobs to be sent and ends ------------------------------------------------------------------


def test_a_line_has_as_many_places_as_were_said_last() -> None:
    inside, openings = list[int](), list[Callable[[], None]]()
    lobby = Lobby[int](lambda _: "a line", 2, 10, inside.extend, openings.append)

    def all_come_in_who_may() -> int:
        while openings:
            openings.pop()()
        return len(inside)

    for who in range(20):
        lobby.come(who)
    assert all_come_in_who_may() == 2
    lobby.allow(0, 6)
    assert all_come_in_who_may() == 6
    lobby.allow(0, 3)
    for who in range(3):
        lobby.leave(who)
        assert all_come_in_who_may() == 6
    assert not lobby.enter_now(20)
    lobby.leave(3)
    assert all_come_in_who_may() == 7
    assert lobby.position(19) == 3 + 13


@pytest.fixture
def few_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "TO_BE_SENT", PLACES)
    monkeypatch.setattr(runtime, "COMING_TO_END", PLACES)


def writes(per_second: int) -> dict[str, Any]:
    return {"writeRateLimiter": {"qps": per_second, "burst": 5}}


def admitted(
    host: Host, days: Sequence[int] = DAYS, told: Told | None = None, **spec: Any
) -> list[Ticket]:
    return [
        host.admit(
            request(
                ReportJob(day=day, **spec),
                task_type="keys",
                task_run=f"task-{day}",
                reporter=told or Told(),
            )
        )
        for day in days
    ]


async def tasks(_: Runtime) -> int:
    return len(asyncio.all_tasks())


async def watched(runtime: Runtime) -> int:
    return sum(runtime.has_seen(record.key) for record in await runtime.services.store.select())


async def all_are_written_down(folder: Path) -> bool:
    named = {record.task_run for record in await records(folder)}
    return named >= {f"task-{day}" for day in DAYS}


@pytest.mark.usefixtures("few_places", "each_ledger")
async def test_who_waits_behind_others_for_a_permit_costs_no_task_and_keeps_his_turn(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    with at(tmp_path, job_server, writes(5)) as host:
        await run(host, ReportJob(seconds=0))  # what all jobs share is there
        alone, seen = host.perform(tasks).result(10), len(job_server.log())
        tickets = admitted(host, seconds=0)
        await eventually(lambda: all_are_written_down(tmp_path), within=10)
        waiting = host.perform(tasks).result(10)
        assert len(job_server.log("create")) < len(DAYS) - 2 * PLACES  # else nobody waits any more
        outcomes = await asyncio.wait_for(asyncio.gather(*(t.outcome() for t in tickets)), 30)
    assert waiting - alone <= 2 * PLACES
    assert all(outcome.info.phase is Phase.SUCCESS for outcome in outcomes)
    sent = [create.body["spec"]["day"] for create in job_server.log("create", since=seen)]
    assert sorted(sent) == list(DAYS)
    # On their way they may jostle.
    assert all(abs(place - day) <= PLACES for place, day in enumerate(sent))


@pytest.mark.usefixtures("few_places", "each_ledger")
async def test_who_is_wanted_no_more_does_not_wait_for_his_turn(
    job_server: EmbeddedJobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is cancelled, one let go, and nobody holds up the end of the process; the next one makes all the others."""
    monkeypatch.setattr(runtime, "CLOSING_SECONDS", 60.0)
    with at(tmp_path, job_server, writes(1), sweeps=False) as host:
        tickets = admitted(host, outcome="never")
        await eventually(lambda: all_are_written_down(tmp_path), within=10)
        tickets[20].cancel("enough")
        outcome = await asyncio.wait_for(tickets[20].outcome(), 10)
        tickets[21].detach()
        with pytest.raises(EngineClosed):
            await asyncio.wait_for(tickets[21].outcome(), 10)

        async def is_let_go() -> bool:
            return sum(record.runtime == "" for record in await records(tmp_path)) == 1

        await eventually(is_let_go, within=10)
        await asyncio.wait_for(asyncio.to_thread(host.close), 20)
    assert (outcome.info.phase, outcome.info.reason) == (Phase.ABORTED, "enough")
    sent = len(job_server.log("create"))
    assert sent < 20
    closed = [r for r in await records(tmp_path) if r.state is JobState.CLOSED]
    assert len(closed) == 1
    with at(tmp_path, job_server, sweeps=False) as host:
        admitted(host, [day for day in DAYS if day != 20], outcome="never")
        await eventually(lambda: job_server.stats().live == len(DAYS) - 1, within=20)
    assert not job_server.stats().duplicates
    assert 20 not in {create.body["spec"]["day"] for create in job_server.log("create")}


@pytest.mark.usefixtures("few_places", "each_ledger")
async def test_who_waits_behind_others_for_a_place_is_told_so(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    told, registry = Told(), CollectorRegistry()
    config = {"resourceQuotas": {"default": 2}}
    with at(tmp_path, job_server, config, metrics=Metrics(registry)) as host:
        tickets = admitted(host, DAYS[:-1], seconds=0.05)
        tickets += admitted(host, DAYS[-1:], told, seconds=0.05)
        await eventually(lambda: told.phases, within=10)
        outcomes = await asyncio.wait_for(asyncio.gather(*(t.outcome() for t in tickets)), 60)
    assert all(outcome.info.phase is Phase.SUCCESS for outcome in outcomes)
    phase, reason = told.phases[0]
    assert phase == "WAITING_FOR_RESOURCES"
    assert reason.startswith("quota webapi:keys:default:default, position ")
    assert waiting_jobs(registry) == 0
    assert (job_server.stats().created, job_server.stats().peak_live) == (len(DAYS), 2)
    assert await places_taken(tmp_path) == 0


@pytest.mark.usefixtures("few_places", "each_ledger")
async def test_who_has_a_place_does_not_wait_behind_those_who_want_one(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """A process died with its only place taken; the line of those who wait for it is full when its job is asked for."""
    config = {"resourceQuotas": {"default": 1}}
    left = ReportJob(day=99, seconds=0)
    work = Work(
        folder=tmp_path, server=job_server.url, specs=(left,), config=config, die_at="KP-06"
    )
    with child(work) as dead:
        assert dead.ends() == []
    assert await places_taken(tmp_path) == 1
    with at(tmp_path, job_server, config, sweeps=False) as host:
        tickets = admitted(host, seconds=0)
        await eventually(lambda: all_are_written_down(tmp_path), within=10)
        again = request(left, task_type="keys", execution="execution-2", task_run="execution-2/0")
        tickets.append(host.admit(again))
        outcomes = await asyncio.wait_for(asyncio.gather(*(t.outcome() for t in tickets)), 60)
    assert all(outcome.info.phase is Phase.SUCCESS for outcome in outcomes)
    stats = job_server.stats()
    assert (stats.created, stats.peak_live) == (1 + len(DAYS), 1)
    assert not stats.duplicates


@pytest.mark.usefixtures("few_places", "each_ledger")
async def test_the_duty_to_delete_is_written_down_for_all_before_its_turn_comes(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """Jobs that were cancelled together wait for the limiter, not for the ledger, and cost no task meanwhile."""
    with at(tmp_path, job_server) as host:  # faster than the limiter of the next process
        admitted(host, outcome="never")
        await eventually(lambda: job_server.stats().live == len(DAYS), within=10)
    with at(tmp_path, job_server, writes(5), sweeps=False) as host:
        tickets = admitted(host, outcome="never")
        await eventually(lambda: host.perform(watched).result(10) == len(DAYS), within=10)
        alone = host.perform(tasks).result(10)
        for ticket in tickets:
            ticket.cancel("enough")

        async def all_are_to_be_deleted() -> bool:
            return {r.state for r in await records(tmp_path)} <= {
                JobState.CANCELLING,
                JobState.CLOSED,
            }

        await eventually(all_are_to_be_deleted, within=10)
        waiting = host.perform(tasks).result(10)
        assert len(job_server.log("delete")) < len(DAYS) - 2 * PLACES
        outcomes = await asyncio.wait_for(asyncio.gather(*(t.outcome() for t in tickets)), 30)
        await eventually(lambda: job_server.stats().live == 0, within=30)
    assert waiting - alone <= 3 * PLACES
    assert {outcome.info.phase for outcome in outcomes} == {Phase.ABORTED}
    assert len(job_server.log("delete")) == job_server.stats().created == len(DAYS)


@pytest.mark.usefixtures("few_places", "each_ledger")
async def test_nobody_is_said_to_wait_when_the_process_has_ended(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    registry = CollectorRegistry()
    config = {"resourceQuotas": {"default": 1}}
    with at(tmp_path, job_server, config, metrics=Metrics(registry), sweeps=False) as host:
        admitted(host, outcome="never")
        await eventually(lambda: all_are_written_down(tmp_path), within=10)
        await eventually(lambda: job_server.stats().live == 1, within=10)
        assert waiting_jobs(registry) == len(DAYS) - 1
    assert waiting_jobs(registry) == 0


def waiting_jobs(registry: CollectorRegistry) -> float | None:
    return registry.get_sample_value("prefect_webapi_waiting_jobs", {"plugin": "keys"})


class Creating(JobServerPlugin):
    """Counts the creates that are under way, and answers none before all are."""

    now: ClassVar[int] = 0

    async def create(self, ctx: TaskExecutionContextReader) -> Any:
        Creating.now += 1
        await eventually(lambda: Creating.now == len(DAYS), within=20)
        return await super().create(ctx)


@pytest.mark.usefixtures("few_places", "each_ledger")
async def test_who_has_his_permit_makes_room_for_the_next(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """A service that is slow to answer is asked for as many at one time as the limiter permits."""
    Creating.now = 0
    with at(tmp_path, job_server, entries=[entry(Creating, "keys")]) as host:
        tickets = admitted(host, seconds=0)
        outcomes = await asyncio.wait_for(asyncio.gather(*(t.outcome() for t in tickets)), 30)
    assert {outcome.info.phase for outcome in outcomes} == {Phase.SUCCESS}
    assert job_server.stats().created == len(DAYS)


class Fetching(OutputsPlugin):
    """Counts how many results are fetched at one time, and fetches none before it may."""

    may: ClassVar[bool] = False
    now: ClassVar[int] = 0
    most: ClassVar[int] = 0

    async def outputs(self, ctx: StatusContext[JobHandle, JobView]) -> Any:
        Fetching.now += 1
        Fetching.most = max(Fetching.most, Fetching.now)
        try:
            await eventually(lambda: Fetching.may, within=60)
            return await super().outputs(ctx)
        finally:
            Fetching.now -= 1


async def ending(runtime: Runtime) -> int:
    return sum(job.is_finishing for job in runtime._jobs.values())  # pyright: ignore[reportPrivateUsage] # no public way


@pytest.mark.usefixtures("few_places", "each_ledger")
async def test_results_that_are_long_to_come_wait_for_each_other_and_hold_nothing_else_up(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """Who is cancelled meanwhile keeps his result if he was over before, and is deleted if he lives."""
    Fetching.may, Fetching.now, Fetching.most = False, 0, 0
    *over, failing, living = DAYS
    with at(tmp_path, job_server, entries=[entry(Fetching, "keys")]) as host:
        tickets = admitted(host, outcome="never")
        await eventually(lambda: job_server.stats().live == len(DAYS), within=10)
        names = {record.task_run: record.key for record in await records(tmp_path)}
        for day in over:
            job_server.end(names[f"task-{day}"], "succeeded")
        await eventually(lambda: host.perform(ending).result(10) == len(over), within=10)
        assert Fetching.now == PLACES
        job_server.end(names[f"task-{failing}"], "failed")
        failed = await asyncio.wait_for(tickets[failing].outcome(), 10)
        for ticket in tickets:
            ticket.cancel("late")
        cancelled = await asyncio.wait_for(tickets[living].outcome(), 10)
        await eventually(lambda: job_server.stats().live == 0, within=10)
        Fetching.may = True
        outcomes = await asyncio.wait_for(
            asyncio.gather(*(tickets[day].outcome() for day in over)), 30
        )
    assert failed.info.phase is not Phase.SUCCESS
    assert cancelled.info.phase is Phase.ABORTED
    assert {outcome.info.phase for outcome in outcomes} == {Phase.SUCCESS}
    assert Fetching.most == PLACES
    assert len(job_server.log("delete")) == 1
