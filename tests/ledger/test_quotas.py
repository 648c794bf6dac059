"""The admission count: places are taken and given back with the move they belong to, in the order of arrival."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from prefect_webapi.contract.errors import LedgerError
from prefect_webapi.ledger.records import JobState, Move, MoveResult, QuotaRow, Record
from prefect_webapi.ledger.sql import SqlStore
from tests.ledger.processes import start_worker, told_by
from tests.support.ledger import another_store, draft_for, moved


async def jobs(store: SqlStore, number: int, *, weight: int = 1) -> list[Record]:
    drafts = [
        draft_for(f"call {n}", state=JobState.SLOT_REQUESTED, quotas=("limit",), weight=weight)
        for n in range(number)
    ]
    return [d.record for d in await asyncio.gather(*map(store.intent, drafts))]


def take(record: Record) -> Move:
    return Move(old=record, state=JobState.SLOT_HELD, at=datetime.now(UTC), count=1)


def give(record: Record) -> Move:
    return Move(old=record, state=record.state, at=datetime.now(UTC), count=-1)


async def live(store: SqlStore) -> int:
    (row,) = await store.quotas()
    return row.live


async def test_as_many_as_the_limit_get_a_place_in_order_of_arrival(store: SqlStore) -> None:
    await store.set_quota("limit", 3)
    records = await jobs(store, 5)
    results = await asyncio.gather(*(store.move(take(r)) for r in records))
    assert results == [MoveResult.OK] * 3 + [MoveResult.FULL] * 2
    assert await store.quotas() == [QuotaRow("limit", live=3, limit=3)]


async def test_full_leaves_the_record_as_it_was(store: SqlStore) -> None:
    await store.set_quota("limit", 0)
    (record,) = await jobs(store, 1)
    assert await store.move(take(record)) is MoveResult.FULL
    assert await store.get(record.key) == record


async def test_a_place_given_back_can_be_taken_again(store: SqlStore) -> None:
    await store.set_quota("limit", 1)
    one, two = await jobs(store, 2)
    one = await moved(store, one, JobState.SLOT_HELD, count=1)
    assert one.counted
    assert await store.move(take(two)) is MoveResult.FULL
    one = await moved(store, one, JobState.OVER, count=-1)
    assert not one.counted
    assert await store.move(take(two)) is MoveResult.OK


async def test_weights_count(store: SqlStore) -> None:
    await store.set_quota("limit", 5)
    records = await jobs(store, 3, weight=2)
    results = await asyncio.gather(*(store.move(take(r)) for r in records))
    assert results == [MoveResult.OK, MoveResult.OK, MoveResult.FULL]
    assert await live(store) == 4


async def test_taking_and_giving_back_twice_counts_once(store: SqlStore) -> None:
    """KP-18: a second giving back is a no-op, not somebody else's place."""
    await store.set_quota("limit", 9)
    one, two = await jobs(store, 2)
    await moved(store, two, JobState.SLOT_HELD, count=1)
    one = await moved(store, one, JobState.SLOT_HELD, count=1)
    one = await moved(store, one, JobState.SLOT_HELD, count=1)
    assert await live(store) == 2
    one = await moved(store, one, JobState.OVER, count=-1)
    assert await store.move(give(one)) is MoveResult.OK
    assert await live(store) == 1


async def test_a_lost_move_takes_no_place(store: SqlStore) -> None:
    await store.set_quota("limit", 2)
    one, two = await jobs(store, 2)
    await moved(store, one, JobState.OVER)
    results = await asyncio.gather(store.move(take(one)), store.move(take(two)))
    assert results == [MoveResult.LOST, MoveResult.OK]
    assert await live(store) == 1


async def test_a_lowered_limit_keeps_the_count_and_admits_nobody_until_it_fits(
    store: SqlStore,
) -> None:
    await store.set_quota("limit", 3)
    records = await jobs(store, 4)
    held = [await moved(store, r, JobState.SLOT_HELD, count=1) for r in records[:3]]
    await store.set_quota("limit", 1)
    assert await store.quotas() == [QuotaRow("limit", live=3, limit=1)]
    for record in held[:2]:
        assert await store.move(take(records[3])) is MoveResult.FULL
        assert await store.move(give(record)) is MoveResult.OK
    assert await store.move(take(records[3])) is MoveResult.FULL
    assert await store.move(give(held[2])) is MoveResult.OK
    assert await store.move(take(records[3])) is MoveResult.OK


async def test_a_record_without_quota_counts_nowhere(store: SqlStore) -> None:
    await store.set_quota("limit", 0)
    record = (await store.intent(draft_for())).record
    assert await store.move(take(record)) is MoveResult.OK
    assert await live(store) == 0


async def test_a_limit_that_was_never_set_is_an_error_of_that_move_alone(store: SqlStore) -> None:
    (record,) = await jobs(store, 1)
    other = (await store.intent(draft_for("other"))).record
    move = Move(old=other, state=JobState.CREATED, at=datetime.now(UTC))
    refused, result = await asyncio.gather(
        store.move(take(record)), store.move(move), return_exceptions=True
    )
    assert isinstance(refused, LedgerError)
    assert "'limit'" in str(refused)
    assert result is MoveResult.OK


def most_at_once(held: Sequence[Sequence[float]]) -> int:
    changes = sorted([(t, 1) for t, _ in held] + [(t, -1) for _, t in held])
    at_once = most = 0
    for _, change in changes:
        at_once += change
        most = max(most, at_once)
    return most


@pytest.mark.parametrize("limit", [1, 4])
async def test_two_processes_together_keep_the_limit(ledger_url: str, limit: int) -> None:
    """L4: counted from the times at which the processes themselves held a place."""
    async with another_store(ledger_url) as store:
        await store.set_quota("quota", limit)
        workers = [start_worker("count", ledger_url, name, "15") for name in ("one", "two")]
        held = await told_by(*workers)
        assert len(held) == 30
        assert most_at_once(held) <= limit
        assert await live(store) == 0


async def several(store: SqlStore, call: str, *quotas: str, **changes: Any) -> Record:
    draft = draft_for(call, state=JobState.SLOT_REQUESTED, quotas=quotas, **changes)
    return (await store.intent(draft)).record


async def taken(store: SqlStore) -> dict[str, int]:
    return {row.name: row.live for row in await store.quotas()}


async def test_places_of_several_limits_are_taken_and_given_back_together(store: SqlStore) -> None:
    """CASE-134, CASE-135: the second finds one of its limits full and takes of none."""
    for name, limit in {"gpu": 10, "gpu:project=ab": 3, "other": 9}.items():
        await store.set_quota(name, limit)
    one, two, three = (
        await several(store, "one", "gpu", "gpu:project=ab", weight=2),
        await several(store, "two", "gpu", "gpu:project=ab", weight=2),
        await several(store, "three", "gpu"),
    )
    results = await asyncio.gather(*(store.move(take(r)) for r in (one, two, three)))
    assert results == [MoveResult.OK, MoveResult.FULL, MoveResult.OK]
    assert await taken(store) == {"gpu": 3, "gpu:project=ab": 2, "other": 0}
    held = await store.get(one.key)
    assert held is not None
    assert held.quotas == ("gpu", "gpu:project=ab")
    assert await store.move(give(held)) is MoveResult.OK
    assert await taken(store) == {"gpu": 1, "gpu:project=ab": 0, "other": 0}
    assert await store.move(take(two)) is MoveResult.OK


# --- whose turn it is ------------------------------------------------------------------------


NOW = datetime(2026, 1, 1, tzinfo=UTC)
LATER = NOW + timedelta(seconds=10)


@dataclass
class Line:
    """Waiters of two processes; `early` has waited for ten seconds longer."""

    store: SqlStore

    async def early(self, *quotas: str, weight: int = 1) -> Record:
        changes = {"runtime": "their process", "at": NOW, "weight": weight}
        return await several(self.store, "early", *quotas, **changes)

    async def late(self, *quotas: str, runtime: str = "our process") -> Record:
        return await several(self.store, f"late {runtime}", *quotas, runtime=runtime, at=LATER)

    async def asks_in_vain(self, record: Record, at: datetime = LATER) -> None:
        await self.store.is_next(record, at, waits=True)

    async def may_ask(self, record: Record, at: datetime = LATER) -> bool:
        return await self.store.is_next(record, at, waits=False)


@pytest.fixture
async def line(store: SqlStore) -> Line:
    for name in ("q", "ab", "abc", "far"):
        await store.set_quota(name, 1)
    return Line(store)


async def test_an_earlier_job_of_another_process_goes_first_as_long_as_it_asks(line: Line) -> None:
    """REQ-76: one that is dead, stopped or without Prefect asks no more, and holds nobody up."""
    early, late = await line.early("q"), await line.late("q")
    assert await line.may_ask(late)  # they have not said that they wait
    await line.asks_in_vain(early)
    assert not await line.may_ask(late)
    assert await line.may_ask(early)
    assert not await line.may_ask(late, LATER + timedelta(seconds=4))
    assert await line.may_ask(late, LATER + timedelta(seconds=6))
    await line.asks_in_vain(early, LATER + timedelta(seconds=6))
    assert not await line.may_ask(late, LATER + timedelta(seconds=6))
    await moved(line.store, early, JobState.SLOT_HELD, count=1)
    assert await line.may_ask(late, LATER + timedelta(seconds=6))


async def test_the_next_one_of_a_process_counts_from_the_moment_the_first_has_its_place(
    line: Line,
) -> None:
    """REQ-76: no later job of another process slips in between."""
    early, late = await line.early("q"), await line.late("q")
    behind = await several(
        line.store, "behind", "q", runtime="their process", at=NOW + timedelta(seconds=1)
    )
    await line.asks_in_vain(early)
    await moved(line.store, early, JobState.SLOT_HELD, count=1)
    assert not await line.may_ask(late)
    assert await line.may_ask(behind)


async def test_who_waits_for_another_limit_only_may_be_passed(line: Line) -> None:
    """CASE-134, REQ-74: a project that has used up its share does not hold up the others."""
    holder = await line.late("ab", runtime="third")
    await moved(line.store, holder, JobState.SLOT_HELD, count=1)
    early = await line.early("ab", "q")
    await line.asks_in_vain(early)
    late = await line.late("abc", "q")
    assert await line.may_ask(late)
    assert await line.may_ask(await line.late("far", runtime="fourth"))
    assert not await line.may_ask(await line.late("ab", runtime="fifth"))
    await moved(line.store, late, JobState.SLOT_HELD, count=1)
    assert not await line.may_ask(await line.late("q", runtime="sixth"))  # now it waits for q too


async def test_what_all_is_free_for_is_left_to_the_earlier_one(line: Line) -> None:
    """CASE-135: of the same process as well, where each set of limits has a queue of its own."""
    early = await line.early("ab", "q")
    await line.asks_in_vain(early)
    assert not await line.may_ask(await line.late("abc", "q"))
    assert not await line.may_ask(await line.late("q", runtime="their process"))


async def test_a_heavy_job_is_not_passed_by_light_ones(line: Line) -> None:
    """REQ-76: two of three places are free, it wants three."""
    await line.store.set_quota("q", 3)
    light = await line.late("q", runtime="third")
    await moved(line.store, light, JobState.SLOT_HELD, count=1)
    await line.asks_in_vain(await line.early("q", weight=3))
    assert not await line.may_ask(await line.late("q"))


async def test_a_process_that_says_farewell_holds_nobody_up(line: Line) -> None:
    """REQ-76."""
    early, late = await line.early("q"), await line.late("q")
    await line.asks_in_vain(early)
    await line.store.farewell(early.runtime)
    assert await line.may_ask(late)


SECOND = timedelta(seconds=1)


async def test_a_surplus_is_handed_to_one_of_those_who_see_it_long_enough(ledger_url: str) -> None:
    """CASE-286: two sweepers that look at the same instant don't both give it back; then it is forgotten."""
    async with another_store(ledger_url) as one, another_store(ledger_url) as two:
        began = datetime.now(UTC)
        for store in (one, two):
            assert await store.note_surplus("limit", 3, began, began - 150 * SECOND) == 0
        later = began + 149 * SECOND
        assert await two.note_surplus("limit", 2, later, later - 150 * SECOND) == 0
        later += SECOND
        looks = [
            store.note_surplus("limit", 3, later, later - 150 * SECOND) for store in (one, two) * 10
        ]
        assert sorted(await asyncio.gather(*looks)) == [0] * 19 + [2]
        later += 149 * SECOND
        assert await one.note_surplus("limit", 3, later, later - 150 * SECOND) == 0
        later += SECOND
        assert await one.note_surplus("limit", 0, later, later - 150 * SECOND) == 0
        assert await one.note_surplus("limit", 3, later, later - 150 * SECOND) == 0


async def test_processes_take_turns_of_a_rate_one_after_the_other(ledger_url: str) -> None:
    """CASE-268: each turn is given once, whoever asks, and nobody saves up turns while nobody calls."""
    async with another_store(ledger_url) as one, another_store(ledger_url) as two:
        assert await one.reserve("other", 50.0) == 0.0
        assert await one.reserve("rate", 5.0) == 0.0
        began = asyncio.get_running_loop().time()
        waits = sorted(
            await asyncio.gather(*(store.reserve("rate", 5.0) for store in (one, two) * 3))
        )
        took = asyncio.get_running_loop().time() - began
        for n, wait in enumerate(waits, start=1):
            assert 5.0 * n - took - 1 < wait <= 5.0 * n


async def test_a_turn_from_before_a_restart_of_the_machine_holds_nobody_up(
    ledger_url: str,
) -> None:
    """CASE-206, CASE-268: a count that began anew, or a clock that was set back, is an hour away."""
    async with another_store(ledger_url) as store:
        assert await store.reserve("rate", 3600.0) == 0.0
        assert await store.reserve("rate", 1.0) == 0.0
        assert 0.0 < await store.reserve("rate", 1.0) <= 1.0
