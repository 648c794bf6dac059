"""Calls that come together find their records with one question; each still gets what is its own."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from prefect_webapi import Phase
from prefect_webapi.contract.errors import (
    BadTaskSpecification,
    ConfigurationError,
    LedgerError,
    LedgerUnavailable,
    WebApiError,
)
from prefect_webapi.contract.keys import JobKey
from prefect_webapi.engine.host import Host, Ticket
from prefect_webapi.engine.reaper import sweep
from prefect_webapi.engine.request import Fate, Outcome, RunState
from prefect_webapi.engine.runtime import Runtime
from prefect_webapi.ledger.records import Draft, Drawn, JobState, Move, Record
from prefect_webapi.ledger.sql import SqlStore
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import JobServerPlugin, ReportJob
from tests.ledger.raw import raw
from tests.support.engine import GivenConnections, GivenRuns, at, block, engine, request
from tests.support.ledger import another_store, draft_for, ledger_of
from tests.support.plugins import ALL
from tests.support.sweeping import swept
from tests.support.waiting import eventually
from tests.support.witness import records

pytestmark = pytest.mark.usefixtures("each_ledger")

JOBS = 30
SPECS = [ReportJob(outcome="never", day=day, result=day) for day in range(JOBS)]


class Odd(ReportJob):
    what: Any = None


def calls(host: Host, execution: str, specs: Sequence[ReportJob] = SPECS) -> list[Ticket]:
    return [
        host.admit(request(spec, task_type="keys", execution=execution, task_run=execution))
        for spec in specs
    ]


async def left(folder: Path, server: EmbeddedJobServer) -> dict[int, Record]:
    """Jobs that a process has left alive, by day."""
    with at(folder, server, sweeps=False) as host:
        calls(host, "1")

        async def are_known() -> bool:
            found = await records(folder)
            return len(found) == JOBS and all(r.state is JobState.CREATED for r in found)

        await eventually(are_known, within=20)
    return {_day_of(record): record for record in await records(folder)}


def _day_of(record: Record) -> int:
    return ReportJob.model_validate_json(record.details.spec or "").day


async def changed(folder: Path, record: Record, **columns: Any) -> None:
    """Past the ledger's own ways."""
    [(name, value)] = columns.items()
    sql = f"UPDATE webapi_job SET {name} = :value WHERE key = :key"
    await raw(ledger_of(folder), sql, value=value, key=record.key)


def all_succeed(server: EmbeddedJobServer) -> None:
    for job in server.jobs():
        server.end(job.name, "succeeded")


async def ends(tickets: Sequence[Ticket]) -> list[Outcome | BaseException]:
    waiting = (ticket.outcome() for ticket in tickets)
    return await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 20)


async def test_each_job_that_was_left_has_its_own_fate(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """Nothing is made, and what is the matter with one of them is nothing to the others."""
    jobs = await left(tmp_path, job_server)
    await changed(tmp_path, jobs[0], handle="{}")
    await changed(tmp_path, jobs[1], details="{")
    await changed(tmp_path, jobs[2], cancel_reason="enough")
    await changed(tmp_path, jobs[3], deadline=1)
    await changed(tmp_path, jobs[4], state="CREATING")
    odd = Odd(day=JOBS, what=b"\xff")
    with at(tmp_path, job_server, sweeps=False) as host:
        tickets = calls(host, "2", [*SPECS, odd])
        ended = asyncio.create_task(ends(tickets))
        await eventually(lambda: len(job_server.log("delete")) == 2, within=10)
        for day, record in jobs.items():
            if day > 3:
                job_server.end(record.key, "succeeded")
        outcomes = await ended
    unreadable, corrupt, cancelled, late, *well, refused = outcomes
    assert isinstance(unreadable, WebApiError)
    assert "can't be read by this version of plugin" in str(unreadable)
    assert isinstance(corrupt, LedgerError)
    assert isinstance(cancelled, Outcome)
    assert (cancelled.info.phase, cancelled.info.reason) == (Phase.ABORTED, "enough")
    assert isinstance(late, Outcome)
    assert late.info.err is not None
    assert late.info.err.code == "Timeout"
    assert [each.value.data for each in well if isinstance(each, Outcome)] == list(range(4, JOBS))
    assert isinstance(refused, BadTaskSpecification)
    assert job_server.stats().created == JOBS
    assert not job_server.stats().duplicates


async def test_a_wish_to_end_reaches_those_that_are_on_their_way_in(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    await left(tmp_path, job_server)
    with at(tmp_path, job_server, sweeps=False) as host:
        tickets = calls(host, "2")
        for ticket in tickets[::2]:
            ticket.cancel("enough")
        for ticket in tickets[1::2]:
            ticket.detach()
        outcomes = await ends(tickets)
        await eventually(lambda: job_server.stats().live == JOBS // 2, within=10)
    assert {each.info.phase for each in outcomes if isinstance(each, Outcome)} == {Phase.ABORTED}
    assert sum(isinstance(each, Outcome) for each in outcomes) == JOBS // 2
    assert job_server.stats().created == JOBS


def _watched(host: Host) -> int:
    async def count(runtime: Runtime) -> int:
        return sum(len(channel.poller) for channel in runtime._channels)  # pyright: ignore[reportPrivateUsage] # no public way

    return host.perform(count).result(10)


async def test_more_than_a_process_tracks_wait_for_room(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    await left(tmp_path, job_server)
    with at(tmp_path, job_server, {"caching": {"size": 10}}, sweeps=False) as host:
        tickets = calls(host, "2")
        await eventually(lambda: _watched(host) > 0, within=10)
        seen = len(job_server.log())
        await eventually(lambda: len(job_server.log()) > seen + 4, within=10)
        assert _watched(host) == 10
        all_succeed(job_server)
        outcomes = await ends(tickets)
    assert [each.value.data for each in outcomes if isinstance(each, Outcome)] == list(range(JOBS))
    assert job_server.stats().created == JOBS


async def test_little_is_read_while_a_crowd_is_taken_up(
    job_server: EmbeddedJobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is not taken up yet is looked after by nobody."""
    await left(tmp_path, job_server)
    all_succeed(job_server)
    monkeypatch.setattr(JobServerPlugin, "max_batch", 1)
    for places in ("COMING_IN", "COMING_BACK"):
        monkeypatch.setattr(f"prefect_webapi.engine.runtime.{places}", 5)
    monkeypatch.setattr("prefect_webapi.poller.EASED_SECONDS", 60.0)
    monkeypatch.setattr("prefect_webapi.poller.EASED_GAP", 0.05)
    with at(tmp_path, job_server, sweeps=False) as host:
        began = time.monotonic()
        outcomes = await ends(calls(host, "2"))
        assert time.monotonic() - began >= 0.05 * (JOBS - 5 - 1)  # the first few may come alone
    assert [each.value.data for each in outcomes if isinstance(each, Outcome)] == list(range(JOBS))


class AtOnce(SqlStore):
    """All parties get their answers at one moment."""

    parties = 0
    are_here: asyncio.Event

    async def intents(self, drafts: Sequence[Draft]) -> Sequence[Drawn | LedgerError]:
        if not AtOnce.parties:
            AtOnce.are_here = asyncio.Event()
        drawn = await super().intents(drafts)
        AtOnce.parties += 1
        if AtOnce.parties == PARTIES:
            AtOnce.are_here.set()
        await AtOnce.are_here.wait()
        return drawn


PARTIES, EACH, PORTION = 5, 20, 4


async def test_parties_that_are_answered_at_one_moment_do_not_hold_the_loop_up_together(
    job_server: EmbeddedJobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them is helped on its way at a time, a portion in a turn."""
    begun = Counter[int]()
    turn = 0
    enter = Runtime._enter  # pyright: ignore[reportPrivateUsage] # no public way

    async def counted(self: Runtime, *given: Any) -> None:
        begun[turn] += 1
        await enter(self, *given)

    async def count(_: Runtime) -> None:
        nonlocal turn
        while begun.total() < PARTIES * EACH:
            turn += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(Runtime, "_enter", counted)
    monkeypatch.setattr(AtOnce, "parties", 0)
    monkeypatch.setattr("prefect_webapi.engine.runtime.TOGETHER", EACH)
    monkeypatch.setattr("prefect_webapi.engine.runtime.ENTERED_AT_ONCE", PORTION)
    with at(tmp_path, job_server, store=AtOnce, sweeps=False) as host:
        done = host.perform(count)
        specs = [ReportJob(seconds=0, day=day) for day in range(PARTIES * EACH)]

        async def come(_: Runtime) -> list[Ticket]:
            return calls(host, "1", specs)

        tickets = host.perform(come).result(10)
        outcomes = await ends(tickets)
        done.result(10)
    assert all(isinstance(each, Outcome) for each in outcomes)
    assert job_server.stats().created == len(specs)
    # A count may be of two turns: where in them the counter has its place is unknown.
    assert max(begun.values()) <= 2 * PORTION


class Awaited(SqlStore):
    """Who asked is gone when the answer is there."""

    asked: ClassVar[list[Ticket]] = []

    async def intents(self, drafts: Sequence[Draft]) -> Sequence[Drawn | LedgerError]:
        drawn = await super().intents(drafts)
        for ticket in self.asked:
            ticket.detach()
        await asyncio.sleep(0.2)  # that is heard in this time, or the test shows nothing
        return drawn


async def test_a_record_that_nobody_waits_for_any_more_is_let_go(
    job_server: EmbeddedJobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with at(tmp_path, job_server, store=Awaited, sweeps=False) as host:
        monkeypatch.setattr(Awaited, "asked", tickets := calls(host, "1"))
        await ends(tickets)

        async def are_free() -> bool:
            return {record.runtime for record in await records(tmp_path)} == {""}

        await eventually(are_free, within=10)
    assert job_server.stats().created <= 1  # the first may come alone


async def test_a_type_that_nobody_serves_is_told_to_each(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    with at(tmp_path, job_server, sweeps=False) as host:
        tickets = [host.admit(request(spec, task_type="nobody")) for spec in SPECS]
        outcomes = await ends(tickets)
    assert all(isinstance(each, ConfigurationError) for each in outcomes)
    assert len({id(each) for each in outcomes}) == JOBS


class Unanswered(SqlStore):
    """The first answer is lost: what was asked may have been done."""

    asked = 0

    async def intents(self, drafts: Sequence[Draft]) -> Sequence[Drawn | LedgerError]:
        Unanswered.asked += 1
        await super().intents(drafts)
        return [LedgerUnavailable("no answer") for _ in drafts]

    async def intent(self, draft: Draft) -> Drawn:
        """Who comes alone, as the first may, fares as the others do."""
        await super().intent(draft)
        raise LedgerUnavailable("no answer")


async def test_a_ledger_that_does_not_answer_is_told_to_each(
    job_server: EmbeddedJobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it may have written down is found by those who ask again."""
    monkeypatch.setattr(Unanswered, "asked", 0)
    with at(tmp_path, job_server, store=Unanswered, sweeps=False) as host:
        outcomes = await ends(calls(host, "1"))
    assert Unanswered.asked
    assert all(isinstance(each, LedgerUnavailable) for each in outcomes)
    assert job_server.stats().created == 0
    with at(tmp_path, job_server, sweeps=False) as host:
        tickets = calls(host, "2")
        await eventually(lambda: job_server.stats().created == JOBS, within=10)
        all_succeed(job_server)
        outcomes = await ends(tickets)
    assert [each.value.data for each in outcomes if isinstance(each, Outcome)] == list(range(JOBS))
    assert not job_server.stats().duplicates


class Broken(SqlStore):
    async def intents(self, drafts: Sequence[Draft]) -> Sequence[Drawn | LedgerError]:
        raise RuntimeError("nobody thought of this")


async def test_who_can_not_come_in_together_comes_in_alone(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    with at(tmp_path, job_server, store=Broken, sweeps=False) as host:
        tickets = calls(host, "1")
        await eventually(lambda: job_server.stats().created == JOBS, within=10)
        all_succeed(job_server)
        outcomes = await ends(tickets)
    assert [each.value.data for each in outcomes if isinstance(each, Outcome)] == list(range(JOBS))


class Raced(SqlStore):
    """Another process takes jobs over while a pass is about to look at them."""

    taken: frozenset[JobKey] = frozenset()

    async def records(self, keys: Collection[JobKey]) -> Sequence[Record]:
        for record in await super().records(keys):
            if record.key in self.taken:
                await self.move(Move.taking(record, "another process"))
        return await super().records(keys)


async def test_a_pass_leaves_alone_what_was_taken_while_it_looked(
    job_server: EmbeddedJobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = await left(tmp_path, job_server)
    monkeypatch.setattr(Raced, "taken", frozenset({jobs[0].key, jobs[1].key}))
    cancelled = {"run-1": Fate(RunState.CANCELLED, "Cancelled")}
    report = await swept(tmp_path, job_server, cancelled, store=Raced)
    assert (report.looked_at, report.driven, len(report.jobs)) == (JOBS, 2, JOBS - 2)
    assert {job.name for job in job_server.jobs() if job.state == "running"} == Raced.taken


class Lost(SqlStore):
    """The first answer is lost."""

    asked = 0

    async def intent(self, draft: Draft) -> Drawn:
        drawn = await super().intent(draft)
        Lost.asked += 1
        if Lost.asked == 1:
            raise LedgerUnavailable("no answer")
        return drawn


async def test_a_party_that_is_slow_to_come_holds_no_other_up(
    job_server: EmbeddedJobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record of this process that nobody drives may be a party's, but not of one that has not asked yet."""
    resolve = GivenConnections.resolve

    async def slowly(self: GivenConnections, ref: Any, *args: Any, **kwargs: Any) -> Any:
        if ref == "sick":
            await asyncio.sleep(60)
        return await resolve(self, ref, *args, **kwargs)

    monkeypatch.setattr(GivenConnections, "resolve", slowly)
    monkeypatch.setattr(Lost, "asked", 0)
    blocks = {"default": block(job_server), "sick": block(job_server)}
    with engine(tmp_path, ALL, blocks, store=Lost, sweeps=False) as host:
        for spec in SPECS:
            host.admit(request(spec, task_type="keys", connection="sick"))
        spec = [ReportJob(seconds=0.1, result="done")]
        [lost] = await ends(calls(host, "1", spec))
        assert isinstance(lost, LedgerUnavailable)
        [outcome] = await ends(calls(host, "1", spec))
    assert isinstance(outcome, Outcome)
    assert outcome.value.data == "done"


class Slow(SqlStore):
    """What was asked together is answered late."""

    answers: ClassVar[threading.Event]
    is_asked: ClassVar[threading.Event]

    async def intents(self, drafts: Sequence[Draft]) -> Sequence[Drawn | LedgerError]:
        drawn = await super().intents(drafts)
        self.is_asked.set()
        while not self.answers.is_set():  # noqa: ASYNC110 - set by another thread
            await asyncio.sleep(0.01)
        return drawn


async def test_an_equal_call_does_not_take_a_job_that_is_about_to_be_driven(
    job_server: EmbeddedJobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger names this process as its owner, which does not look after it yet."""
    monkeypatch.setattr(Slow, "answers", threading.Event(), raising=False)
    monkeypatch.setattr(Slow, "is_asked", threading.Event(), raising=False)

    def named(spec: ReportJob, task_run: str) -> Ticket:
        key = f"day {spec.day}"
        return host.admit(request(spec, task_type="keys", idempotency_key=key, task_run=task_run))

    with at(tmp_path, job_server, store=Slow, sweeps=False) as host:
        tickets = [named(spec, "first") for spec in SPECS]
        await asyncio.to_thread(Slow.is_asked.wait, 10)
        alone = named(SPECS[-1], "second")

        async def has_asked() -> bool:
            return alone in await asyncio.wrap_future(host.perform(_entering))

        await eventually(has_asked, within=10)
        await asyncio.sleep(0.5)  # it would have taken the job by then
        Slow.answers.set()
        await eventually(lambda: job_server.stats().created == JOBS, within=10)
        all_succeed(job_server)
        outcomes = await ends([*tickets, alone])
    found = [each.value.data for each in outcomes if isinstance(each, Outcome)]
    assert found == [*range(JOBS), JOBS - 1]
    assert job_server.stats().created == JOBS
    assert {record.fence for record in await records(tmp_path)} == {1}


async def _entering(runtime: Runtime) -> set[Any]:
    return set(runtime._entering)  # pyright: ignore[reportPrivateUsage] # no public way


async def test_a_record_that_no_code_is_ready_for_hurts_its_own_job_only(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """Whatever it is: the engine goes on, and who asks again is told the same."""
    jobs = await left(tmp_path, job_server)
    details = json.loads(jobs[5].details.to_json())
    details["created_remotely_at"] = "2024-01-01T00:00:00"  # without a zone
    await changed(tmp_path, jobs[5], details=json.dumps(details))
    with at(tmp_path, job_server, sweeps=False) as host:
        tickets = calls(host, "2")
        with pytest.raises(TypeError):
            await asyncio.wait_for(tickets[5].outcome(), 10)
        [again] = calls(host, "2", [SPECS[5]])
        with pytest.raises(TypeError):
            await asyncio.wait_for(again.outcome(), 10)
        all_succeed(job_server)
        outcomes = await ends(tickets)
    well = [each.value.data for each in outcomes if isinstance(each, Outcome)]
    assert well == [day for day in range(JOBS) if day != 5]


async def test_a_pass_counts_what_it_can_not_read_as_nothing(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    jobs = await left(tmp_path, job_server)
    await changed(tmp_path, jobs[0], details="{")
    await changed(tmp_path, jobs[1], updated_at=10**18)
    report = await swept(tmp_path, job_server)
    assert (report.looked_at, report.driven, len(report.jobs)) == (JOBS - 2, 0, JOBS - 2)


class Silent(GivenRuns):
    async def fates(self, *ids: Any) -> Any:
        raise LedgerUnavailable("no answer")


async def test_a_pass_that_breaks_off_forgets_none_of_our_own(tmp_path: Path) -> None:
    """Those that this process has let go are looked for again by the next one."""
    with engine(tmp_path, ALL, {}, runs=Silent(), sweeps=False) as host:
        async with another_store(ledger_of(tmp_path)) as store:
            await store.intents([draft_for(f"{n}", runtime="dead") for n in range(3)])

        async def broken_off(runtime: Runtime) -> bool:
            runtime.has_let_go = True
            with pytest.raises(LedgerUnavailable):
                await sweep(runtime, stay=True)
            return runtime.has_let_go

        assert await asyncio.wrap_future(host.perform(broken_off))
