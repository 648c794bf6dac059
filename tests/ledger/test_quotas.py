"""The admission count: places of a limit are taken and given back with the move they belong to."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime

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
