"""What is asked of the ledger beside single jobs, and what is deleted."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from prefect_webapi.contract.keys import JobKey
from prefect_webapi.ledger import reader
from prefect_webapi.ledger.records import JobState, Move, MoveResult, OpenJob, Pace, RuntimeRow
from prefect_webapi.ledger.sql import SqlStore
from tests.ledger.raw import raw
from tests.support.ledger import draft_for, moved

AT = datetime(2030, 1, 1, tzinfo=UTC)


async def test_records_are_selected_by_all_that_is_given(store: SqlStore) -> None:
    """L3: by owner run, state and process."""
    for n, (root, flow, runtime) in enumerate(
        [("r1", "f1", "a"), ("r1", "f2", "a"), ("r2", "f3", "b"), ("r2", "f3", "a")]
    ):
        draft = draft_for(f"{n}", root_run=root, flow_run=flow, runtime=runtime)
        record = (await store.intent(draft)).record
        if n % 2:
            await moved(store, record, JobState.CREATED)
    everything = await store.select()
    assert len(everything) == 4

    async def found(**what: Any) -> list[int]:
        return [everything.index(r) for r in await store.select(**what)]

    assert await found(root_run="r1") == [0, 1]
    assert await found(flow_run="f3") == [2, 3]
    assert await found(runtime="a") == [0, 1, 3]
    assert await found(runtime="a", root_run="r2") == [3]
    created = await store.select(states=[JobState.CREATED], runtime="a")
    assert [everything.index(r) for r in created] == [1, 3]
    both = await store.select(states={JobState.CREATED, JobState.CREATING, JobState.CLOSED})
    assert both == everything
    assert await store.select(states=[]) == []


async def test_how_often_a_process_reads_its_jobs_is_told_until_it_says_farewell(
    store: SqlStore,
) -> None:
    first, second = Pace("p", "default", 10, 30.5, 0.25), Pace("p", "other", 1, 5.0, 0.0)
    await store.set_paces("a", [first])
    await store.set_paces("b", [first, second])
    await store.set_paces("a", [second])
    assert await store.paces() == {"a": [second], "b": [first, second]}
    await store.farewell("b")
    await store.set_paces("a", [])
    assert await store.paces() == {}


async def test_what_a_killed_process_told_of_its_reads_goes_with_it(store: SqlStore) -> None:
    await store.set_paces("killed", [Pace("p", "default", 10, 30.5, 0.25)])
    await store.prune(AT)
    assert await store.paces() == {}


async def test_durations_are_remembered_by_task_until_nobody_runs_it_any_more(
    store: SqlStore,
) -> None:
    await store.set_durations({("p", "one"): [1.5, 2.0], ("p", "two"): [3.25]}, AT)
    await store.set_durations({("p", "two"): [4.0]}, AT + timedelta(days=1))
    assert await store.durations() == {("p", "one"): [1.5, 2.0], ("p", "two"): [4.0]}
    await store.prune(AT + timedelta(hours=1))
    assert await store.durations() == {("p", "two"): [4.0]}


async def test_records_come_oldest_first_or_newest_first(store: SqlStore) -> None:
    for n in (2, 0, 3, 1):
        await store.intent(draft_for(f"{n}", at=AT + timedelta(microseconds=n)))
    ages = [r.created_at.microsecond for r in await store.select()]
    assert ages == [0, 1, 2, 3]
    newest = await store.select(newest_first=True, limit=2)
    assert [r.created_at.microsecond for r in newest] == [3, 2]


async def test_any_process_can_ask_for_a_cancel_and_the_owner_finds_it(store: SqlStore) -> None:
    drawn = await asyncio.gather(*(store.intent(draft_for(f"{n}")) for n in range(4)))
    keys = [d.record.key for d in drawn]
    await store.ask_cancel(keys[:3], "flow run is cancelled\0")
    await store.ask_cancel(keys[1:2], "another reason")
    await store.ask_cancel([], "nobody")
    asked = await store.cancels_asked("runtime-1")
    assert {r.key for r in asked} == set(keys[:3])
    assert {r.cancel_reason for r in asked} == {"flow run is cancelled"}
    assert await store.cancels_asked("runtime-2") == []


async def test_a_cancel_asked_for_does_not_disturb_the_owners_next_move(store: SqlStore) -> None:
    record = (await store.intent(draft_for())).record
    await store.ask_cancel([record.key], "why")
    move = Move(old=record, state=JobState.CANCELLING, at=AT)
    assert await store.move(move) is MoveResult.OK
    found = await store.get(record.key)
    assert found is not None
    assert found.cancel_reason == "why"
    assert await store.cancels_asked("runtime-1") == []


async def test_a_job_that_is_over_is_not_asked_to_end(store: SqlStore) -> None:
    record = (await store.intent(draft_for())).record
    over = await moved(store, record, JobState.OVER)
    await store.ask_cancel([record.key, JobKey("unknown")], "late")
    assert await store.get(record.key) == over


async def test_processes_that_beat_are_known_until_they_say_farewell(store: SqlStore) -> None:
    one = RuntimeRow(id="one", host="h", pid=1, born=1234.0625, started=AT, last_beat=AT)
    later = AT + timedelta(seconds=10)
    two = RuntimeRow(id="two", host="h", pid=2, born=0.5, started=later, last_beat=later)
    await store.beat(one)
    await store.beat(two)
    assert await store.runtimes() == [one, two]
    again = RuntimeRow(id="one", host="h", pid=1, born=1234.0625, started=AT, last_beat=later)
    await store.beat(again)
    assert await store.runtimes() == [again, two]
    await store.farewell("one")
    await store.farewell("unknown")
    assert [(row.id, row.pid) for row in await store.runtimes()] == [("one", 0), ("two", 2)]


# --- pruning ---------------------------------------------------------------------------------


async def closed(store: SqlStore, call: str, at: datetime, **changes: Any) -> JobKey:
    record = (await store.intent(draft_for(call, **changes))).record
    move = Move(old=record, state=JobState.CLOSED, at=at)
    assert await store.move(move) is MoveResult.OK
    return record.key


OLD, NEW = AT - timedelta(days=1), AT + timedelta(days=1)


async def test_old_closed_records_are_deleted_with_their_claims(
    store: SqlStore, ledger_url: str
) -> None:
    for n in range(1200):  # more than one transaction deletes
        if n % 400 == 0:
            await asyncio.gather(
                *(closed(store, f"{m}", OLD, root_run="old") for m in range(n, n + 400))
            )
    kept = await closed(store, "new", NEW, root_run="new")
    open_job = (await store.intent(draft_for("open", at=OLD, root_run="open"))).record.key
    assert await store.prune(AT) == 1200
    assert {r.key for r in await store.select()} == {kept, open_job}
    assert len(await raw(ledger_url, "SELECT * FROM webapi_claim")) == 2
    locks = 2 if ledger_url.startswith("postgresql") else 0  # SQLite has one lock for all
    assert len(await raw(ledger_url, "SELECT * FROM webapi_group")) == locks
    assert await store.prune(AT) == 0
    drawn = await store.intent(draft_for("7"))
    assert (drawn.record.attempt, drawn.record.ordinal, drawn.made) == (1, 0, True)


async def test_nothing_is_deleted_of_a_root_run_that_is_still_at_work(store: SqlStore) -> None:
    """Its next execution may count on what the first jobs came to."""
    await closed(store, "one", OLD, root_run="busy")
    await store.intent(draft_for("two", at=OLD, root_run="busy"))
    await closed(store, "three", OLD, root_run="recent")
    await closed(store, "four", NEW, root_run="recent")
    outside = await closed(store, "five", OLD, root_run="")
    assert await store.prune(AT) == 1
    assert await store.get(outside) is None


async def test_attempts_are_deleted_together(store: SqlStore) -> None:
    """Otherwise a later call would start at attempt 1 again beside them."""
    first = await closed(store, "call", OLD, root_run="r1")
    second = await closed(store, "call", NEW, root_run="r2", execution="e2")
    assert first != second
    assert await store.prune(AT) == 0
    assert await store.prune(NEW + timedelta(seconds=1)) == 2


async def test_processes_long_silent_are_forgotten(store: SqlStore) -> None:
    for name, at in (("old", OLD), ("new", NEW)):
        await store.beat(RuntimeRow(id=name, host="h", pid=1, born=1, started=at, last_beat=at))
    await store.prune(AT)
    assert [r.id for r in await store.runtimes()] == ["new"]


async def test_open_jobs_are_seen_without_being_read(store: SqlStore, ledger_url: str) -> None:
    drawn = [(await store.intent(draft_for(f"{n}", runtime=f"r{n}"))).record for n in range(4)]
    with_handle = await moved(store, drawn[1], JobState.CREATED, handle="{}")
    await moved(store, drawn[2], JobState.OVER, JobState.CLOSED)
    await raw(ledger_url, "UPDATE webapi_job SET details = '{' WHERE key = :key", key=drawn[3].key)
    expected = [OpenJob.of(record) for record in (drawn[0], with_handle, drawn[3])]
    assert await store.open_jobs() == expected
    assert [job.has_handle for job in expected] == [False, True, False]
    keys = [record.key for record in reversed(drawn)]
    assert [record.key for record in await store.records(keys)] == [r.key for r in drawn[:3]]
    assert await store.records([]) == []


@pytest.mark.parametrize("jobs", [0, 3, 4, 5])
async def test_open_jobs_come_by_the_portion_each_once(
    store: SqlStore, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    """Also those that were made at one instant."""
    monkeypatch.setattr(reader, "_FETCHED_AT_ONCE", 2)
    drawn = [(await store.intent(draft_for(f"{n}", at=AT))).record for n in range(jobs)]
    expected = [OpenJob.of(record) for record in sorted(drawn, key=lambda record: record.key)]
    assert await store.open_jobs() == expected


@pytest.mark.parametrize("time", ["'noon'", "1000000000000000000"])
async def test_an_open_job_whose_time_is_none_is_seen_and_not_read(
    sqlite_store: SqlStore, time: str
) -> None:
    record = (await sqlite_store.intent(draft_for())).record
    await raw(f"sqlite:///{sqlite_store.address}", f"UPDATE webapi_job SET updated_at = {time}")
    assert [job.key for job in await sqlite_store.open_jobs()] == [record.key]
    assert await sqlite_store.records([record.key]) == []
