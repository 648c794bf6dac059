"""Moves: compare-and-set on (state, fence), durable, one owner at a time."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from prefect_webapi.contract.errors import LedgerUnavailable
from prefect_webapi.contract.keys import JobKey
from prefect_webapi.contract.phase import PhaseInfo
from prefect_webapi.ledger.records import (
    Details,
    JobState,
    Lease,
    Move,
    MoveResult,
    Outputs,
    Record,
    Steps,
)
from prefect_webapi.ledger.sql import SqlStore
from tests.support.ledger import another_store, draft_for, moved


def now() -> datetime:
    return datetime.now(UTC)


async def a_record(store: SqlStore, call: str = "call") -> Record:
    return (await store.intent(draft_for(call))).record


async def test_a_record_comes_back_exactly_as_it_was_made(store: SqlStore) -> None:
    """L3: found by its key, each field as it was, instants to the microsecond."""
    at = datetime(2031, 2, 3, 4, 5, 6, 789_123, tzinfo=UTC)
    details = Details(
        task_name='näme "quoted" \\ 🚀',
        labels={"a": "b"},
        created_remotely_at=at,
        phase=PhaseInfo.running("what\nfor"),
        outputs=Outputs(value={"x": [1, None, 2.5]}),
        lease=Lease(id="lease", until=at),
        steps=Steps().then("RUNNING", at, "\0 is text too"),
    )
    draft = draft_for(
        quotas=("limit",), weight=3, deadline=at + timedelta(microseconds=1), at=at, details=details
    )
    drawn = await store.intent(draft)
    assert drawn.made
    assert await store.get(drawn.record.key) == drawn.record
    assert drawn.record.details == details
    assert drawn.record.deadline == draft.deadline


async def test_there_is_no_record_for_an_unknown_key(store: SqlStore) -> None:
    assert await store.get(JobKey("none")) is None


async def test_a_move_changes_what_it_names_and_keeps_the_rest(store: SqlStore) -> None:
    record = await a_record(store)
    details = replace(record.details, tries=2)
    record = await moved(store, record, JobState.CREATED, handle='{"name": "x"}', details=details)
    at = now()
    assert await store.move(Move(old=record, state=JobState.OVER, at=at)) is MoveResult.OK
    assert await store.get(record.key) == replace(record, state=JobState.OVER, updated_at=at)


async def test_a_move_from_another_state_is_lost_and_changes_nothing(store: SqlStore) -> None:
    """L1."""
    record = await a_record(store)
    after = await moved(store, record, JobState.CREATED)
    move = Move(old=record, state=JobState.SUSPECT, at=now(), handle="h", cancel_reason="r")
    assert await store.move(move) is MoveResult.LOST
    assert await store.get(record.key) == after


async def test_who_takes_over_raises_the_fence_and_the_former_owner_loses(store: SqlStore) -> None:
    """L1, L4: after a take-over the old fence writes nothing any more."""
    record = await a_record(store)
    taken = await moved(store, record, JobState.CREATING, take_over=True, runtime="runtime-2")
    assert (taken.fence, taken.runtime) == (record.fence + 1, "runtime-2")
    late = Move(old=record, state=JobState.CREATED, at=now(), handle="h")
    assert await store.move(late) is MoveResult.LOST
    assert await store.get(record.key) == taken


async def test_of_two_stores_that_take_a_job_over_one_wins(
    store: SqlStore, ledger_url: str
) -> None:
    """L4."""
    record = await a_record(store)
    async with another_store(ledger_url) as other:
        results = await asyncio.gather(
            *(
                s.move(Move(old=record, state=record.state, at=now(), take_over=True, runtime=name))
                for s, name in ((store, "a"), (other, "b"))
            )
        )
    assert sorted(r.value for r in results) == ["lost", "ok"]


async def test_two_moves_of_one_job_at_once_happen_one_after_the_other(store: SqlStore) -> None:
    """At most one of a key goes into a batch: the second sees what the first has made."""
    record = await a_record(store)
    created = replace(record, state=JobState.CREATED)
    moves = [
        Move(old=record, state=JobState.CREATED, at=now()),
        Move(old=record, state=JobState.SUSPECT, at=now()),
        Move(old=created, state=JobState.OVER, at=now()),
    ]
    results = await asyncio.gather(*map(store.move, moves))
    assert results == [MoveResult.OK, MoveResult.LOST, MoveResult.OK]


async def test_a_cancelled_caller_does_not_take_its_write_back(store: SqlStore) -> None:
    record = await a_record(store)
    task = asyncio.ensure_future(store.move(Move(old=record, state=JobState.CREATED, at=now())))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    again = Move(old=record, state=JobState.CREATED, at=now())
    assert await store.move(again) is MoveResult.LOST
    found = await store.get(record.key)
    assert found is not None
    assert found.state is JobState.CREATED


async def test_what_is_pending_is_written_before_the_store_closes(ledger_url: str) -> None:
    async with another_store(ledger_url) as store:
        record = await a_record(store)
        pending = asyncio.ensure_future(
            store.move(Move(old=record, state=JobState.CREATED, at=now()))
        )
        await asyncio.sleep(0)
    assert await pending is MoveResult.OK
    with pytest.raises(LedgerUnavailable, match="closed"):
        await store.intent(draft_for())
    async with another_store(ledger_url) as store:
        found = await store.get(record.key)
        assert found is not None
        assert found.state is JobState.CREATED


async def test_many_writes_at_once_get_each_its_own_answer(store: SqlStore) -> None:
    """Group commit: 2,500 operations are more than one batch holds."""
    drawn = await asyncio.gather(*(store.intent(draft_for(f"call {n}")) for n in range(2500)))
    assert len({d.record.key for d in drawn}) == 2500
    stale = [n for n in range(2500) if n % 3 == 0]
    moves = [
        Move(
            old=replace(d.record, fence=7) if n % 3 == 0 else d.record,
            state=JobState.CREATED,
            at=now(),
            handle=f'"{n}"',
        )
        for n, d in enumerate(drawn)
    ]
    results = await asyncio.gather(*map(store.move, moves))
    assert [n for n, r in enumerate(results) if r is MoveResult.LOST] == stale
    rows = {r.key: r for r in await store.select()}
    for n, d in enumerate(drawn):
        assert rows[d.record.key].handle == (None if n % 3 == 0 else f'"{n}"')
