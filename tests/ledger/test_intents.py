"""Which job a call gets: the rule of claims, ordinals and attempts."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy.util import await_only

from prefect_webapi.contract.errors import LedgerError
from prefect_webapi.contract.keys import Fingerprint, job_key
from prefect_webapi.contract.phase import PhaseInfo
from prefect_webapi.ledger import batch
from prefect_webapi.ledger.records import Details, Drawn, JobState, Move, MoveResult, Record
from prefect_webapi.ledger.sql import SqlStore
from tests.ledger.processes import start_worker, told_by
from tests.ledger.raw import raw
from tests.support.ledger import another_store, draft_for, moved


async def calls(store: SqlStore, *task_runs: str, **changes: Any) -> list[tuple[int, bool]]:
    """(ordinal, made) of equal calls by these task runs, one after the other."""
    drawn = [await store.intent(draft_for(task_run=run, **changes)) for run in task_runs]
    return [(d.record.ordinal, d.made) for d in drawn]


async def test_equal_calls_of_one_execution_get_jobs_of_their_own(store: SqlStore) -> None:
    """CASE-060."""
    assert await calls(store, "a", "b", "c") == [(0, True), (1, True), (2, True)]


async def test_a_different_call_counts_by_itself(store: SqlStore) -> None:
    await calls(store, "a")
    drawn = await store.intent(draft_for("another call", task_run="b"))
    assert (drawn.record.ordinal, drawn.made) == (0, True)


async def test_equal_specs_inside_one_task_run_are_told_apart_by_their_index(
    store: SqlStore,
) -> None:
    drawn = [await store.intent(draft_for(nth=nth)) for nth in (0, 1, 2, 1)]
    assert [(d.record.ordinal, d.made) for d in drawn] == [
        (0, True),
        (1, True),
        (2, True),
        (1, False),
    ]


async def test_a_second_execution_meets_the_jobs_of_the_first(store: SqlStore) -> None:
    """REQ-27: a killed flow that is run again has new task runs, and finds its jobs."""
    await calls(store, "a", "b")
    again = await calls(store, "x", "y", "z", execution="execution-2")
    assert again == [(0, False), (1, False), (2, True)]


async def test_a_second_execution_that_makes_fewer_calls_leaves_the_other_jobs(
    store: SqlStore,
) -> None:
    await calls(store, "a", "b", "c", "d")
    assert await calls(store, "x", "y", execution="execution-2") == [(0, False), (1, False)]
    assert len(await store.select()) == 4


async def test_an_old_execution_that_goes_on_meets_the_jobs_of_its_successor(
    store: SqlStore,
) -> None:
    """Both count their own claims, both reach the same three jobs."""
    assert await calls(store, "a") == [(0, True)]
    assert await calls(store, "x", "y", "z", execution="execution-2") == [
        (0, False),
        (1, True),
        (2, True),
    ]
    assert await calls(store, "b", "c") == [(1, False), (2, False)]


async def test_a_task_run_that_asks_again_keeps_its_ordinal(store: SqlStore) -> None:
    await calls(store, "a", "b")
    assert await calls(store, "b", "a") == [(1, False), (0, False)]


async def test_a_subflow_that_runs_again_meets_its_own_jobs(store: SqlStore) -> None:
    """Its first run's claims name the same run with another state, so they do not count."""
    parent: Mapping[str, str] = {}
    first, second = {"subflow": "state-1"}, {"subflow": "state-2"}
    assert await calls(store, "p", levels=parent) == [(0, True)]
    assert await calls(store, "a", "b", levels=first) == [(1, True), (2, True)]
    assert await calls(store, "c", "d", levels=second) == [(1, False), (2, False)]
    assert await calls(store, "q", levels=parent) == [(3, True)]


async def test_a_retried_outer_task_leads_to_the_same_job(store: SqlStore) -> None:
    assert await calls(store, "a", levels={"outer": "state-1"}) == [(0, True)]
    assert await calls(store, "b", levels={"outer": "state-2"}) == [(0, False)]


async def test_subflows_side_by_side_share_no_jobs(store: SqlStore) -> None:
    """Also when all their equal calls come in one batch."""
    drafts = [
        draft_for(task_run=f"{sub}-{n}", levels={"outer": "o", sub: "state"})
        for sub in ("s1", "s2", "s3")
        for n in range(4)
    ]
    drawn = await asyncio.gather(*map(store.intent, drafts))
    assert sorted(d.record.ordinal for d in drawn) == list(range(12))
    assert all(d.made for d in drawn)


async def test_a_burst_of_equal_calls_draws_dense_ordinals(store: SqlStore) -> None:
    """Three thousand are more than one batch."""
    drafts = [draft_for(task_run=f"t{n}") for n in range(3000)]
    drawn = await asyncio.gather(*map(store.intent, drafts))
    assert sorted(d.record.ordinal for d in drawn) == list(range(3000))
    again = await asyncio.gather(
        *(store.intent(draft_for(task_run=f"u{n}", execution="e2")) for n in range(3000))
    )
    assert not any(d.made for d in again)
    assert {d.record.key for d in again} == {d.record.key for d in drawn}


async def test_one_call_asked_twice_in_a_batch_is_one_job(store: SqlStore) -> None:
    one, two = await asyncio.gather(store.intent(draft_for()), store.intent(draft_for()))
    assert one.record == two.record
    assert (one.made, two.made) == (True, False)


async def test_an_idempotency_key_leads_every_run_to_one_job(store: SqlStore) -> None:
    """CASE-061: no claims, ordinal 0, whatever runs call."""
    first = await calls(store, "a", "b", pinned=True)
    second = await calls(store, "c", execution="e2", levels={"x": "y"}, pinned=True)
    assert first + second == [(0, True), (0, False), (0, False)]


async def test_the_key_is_the_hash_of_base_ordinal_and_attempt(store: SqlStore) -> None:
    await calls(store, "a")
    draft = draft_for(task_run="b")
    drawn = await store.intent(draft)
    assert drawn.record.key == job_key(draft.base, 1, 1)


async def test_two_processes_draw_dense_ordinals(ledger_url: str) -> None:
    """L4: three bases, each call asked twice, in two processes on one ledger."""
    async with another_store(ledger_url):
        pass
    told = await told_by(*(start_worker("draw", ledger_url, name, "90") for name in ("one", "two")))
    assert len(told) == 360
    made = [key for key, _, was_made in told if was_made]
    assert len(made) == len(set(made)) == 180
    async with another_store(ledger_url) as store:
        records = await store.select()
    by_base: dict[str, list[int]] = {}
    for record in records:
        by_base.setdefault(record.base, []).append(record.ordinal)
    assert [sorted(ordinals) for ordinals in by_base.values()] == [list(range(60))] * 3


# --- attempts --------------------------------------------------------------------------------

FAILED = PhaseInfo.retryable_failure("Code", "why")
SUCCESS = PhaseInfo.success()
ABORTED = PhaseInfo.aborted()


async def ended(store: SqlStore, state: JobState, phase: PhaseInfo | None) -> Record:
    record = (await store.intent(draft_for())).record
    details = Details(task_name="task", phase=phase)
    return await moved(store, record, state, details=details)


@pytest.mark.parametrize(
    ("state", "phase", "is_retry", "reuse", "attempt"),
    [
        (JobState.CREATED, None, False, True, 1),
        (JobState.CREATED, None, True, True, 1),  # a retry re-attaches
        (JobState.CANCELLING, FAILED, True, False, 1),
        (JobState.OVER, FAILED, False, True, 1),  # not delivered yet
        (JobState.OVER, FAILED, True, True, 2),
        (JobState.DELIVERED, FAILED, False, True, 2),
        (JobState.CLOSED, FAILED, False, True, 2),
        (JobState.CLOSED, ABORTED, False, True, 2),
        (JobState.CLOSED, None, False, True, 2),
        (JobState.OVER, SUCCESS, False, True, 1),
        (JobState.OVER, SUCCESS, False, False, 1),
        (JobState.DELIVERED, SUCCESS, False, True, 1),
        (JobState.CLOSED, SUCCESS, True, True, 1),
        (JobState.DELIVERED, SUCCESS, False, False, 2),
        (JobState.CLOSED, SUCCESS, False, False, 2),
    ],
)
async def test_a_new_attempt_is_made_only_when_the_last_one_can_not_serve(
    sqlite_store: SqlStore,
    state: JobState,
    phase: PhaseInfo | None,
    is_retry: bool,
    reuse: bool,
    attempt: int,
) -> None:
    """CASE-063."""
    old = await ended(sqlite_store, state, phase)
    drawn = await sqlite_store.intent(draft_for(is_retry=is_retry, reuse_results=reuse))
    assert (drawn.record.attempt, drawn.made) == (attempt, attempt == 2)
    if attempt == 1:
        assert drawn.record == old
    else:
        assert drawn.record.key != old.key
        assert await sqlite_store.get(drawn.record.key) == drawn.record


async def test_the_newest_attempt_counts(store: SqlStore) -> None:
    for attempt in (1, 2, 3):
        drawn = await store.intent(draft_for(is_retry=attempt > 1))
        assert (drawn.record.attempt, drawn.made) == (attempt, True)
        await moved(store, drawn.record, JobState.OVER, details=Details(phase=FAILED))
    drawn = await store.intent(draft_for(task_run="another", execution="execution-2"))
    assert (drawn.record.attempt, drawn.made) == (3, False)


async def test_a_retry_in_a_batch_with_its_twin_makes_one_attempt(store: SqlStore) -> None:
    await ended(store, JobState.OVER, FAILED)
    drawn: list[Drawn] = await asyncio.gather(
        *(store.intent(draft_for(is_retry=True)) for _ in range(3))
    )
    assert [(d.record.attempt, d.made) for d in drawn] == [(2, True), (2, False), (2, False)]


async def test_a_draft_that_no_data_base_takes_hurts_only_itself(store: SqlStore) -> None:
    """Found by halving the batch."""
    drafts = [draft_for(f"call {n}", at=datetime.now(UTC)) for n in range(9)]
    drafts[5] = draft_for("bad", plugin=None)
    drawn = await asyncio.gather(*map(store.intent, drafts), return_exceptions=True)
    bad = drawn.pop(5)
    assert isinstance(bad, LedgerError)
    assert all(isinstance(d, Drawn) and d.made for d in drawn)
    assert len(await store.select()) == 8


# --- what a dead process has left ------------------------------------------------------------------


HEIR: dict[str, Any] = {
    "execution": "execution-2",
    "runtime": "runtime-2",
    "flow_run": "flow-run-2",
    "root_run": "root-run-2",
    "owner_task_run": "task-run-2",
    "heir_of": {"runtime-1"},
}
"""A second execution's call, in a process that knows that the first one's has ended."""


async def left(store: SqlStore, state: JobState = JobState.CREATED, **changes: Any) -> Record:
    drawn = await store.intent(draft_for(**changes))
    return await moved(store, drawn.record, state, details=Details(tries=1))


async def test_a_job_that_was_left_is_taken_over_by_who_asks_for_it(store: SqlStore) -> None:
    """One write for the identity and the ownership: a restart asks for thousands."""
    old = await left(store)
    drawn = await store.intent(draft_for(**HEIR))
    assert (drawn.made, drawn.taken) == (False, True)
    assert drawn.record == await store.get(old.key)
    assert drawn.record == replace(
        old,
        fence=old.fence + 1,
        runtime="runtime-2",
        flow_run="flow-run-2",
        root_run="root-run-2",
        task_run="task-run-2",
    )


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"heir_of": {"another"}}, id="its process lives"),
        pytest.param(
            {"fingerprint": Fingerprint("another"), "pinned": True}, id="another spec's, by its key"
        ),
    ],
)
async def test_a_job_that_is_somebodys_stays_so(store: SqlStore, changes: dict[str, Any]) -> None:
    old = await left(store, pinned=True)
    asked: dict[str, Any] = {**HEIR, "pinned": True, **changes}
    drawn = await store.intent(draft_for(**asked))
    assert (drawn.made, drawn.taken, drawn.record) == (False, False, old)
    assert await store.get(old.key) == old


async def test_a_job_that_is_over_is_handed_out_and_not_taken(store: SqlStore) -> None:
    old = await ended(store, JobState.OVER, SUCCESS)
    drawn = await store.intent(draft_for(**HEIR))
    assert (drawn.made, drawn.taken, drawn.record) == (False, False, old)


async def test_of_two_calls_that_mean_one_job_the_first_takes_it(store: SqlStore) -> None:
    old = await left(store)
    drawn = await asyncio.gather(*(store.intent(draft_for(**HEIR)) for _ in range(2)))
    assert [(d.made, d.taken) for d in drawn] == [(False, True), (False, False)]
    found = await store.get(old.key)
    assert found is not None
    assert found.fence == old.fence + 1


async def test_of_two_processes_that_mean_one_job_one_takes_it(
    store: SqlStore, ledger_url: str
) -> None:
    await left(store)
    async with another_store(ledger_url) as other:
        drawn = await asyncio.gather(
            store.intent(draft_for(**HEIR)),
            other.intent(draft_for(**{**HEIR, "runtime": "runtime-3"})),
        )
    assert sorted(d.taken for d in drawn) == [False, True]


async def test_many_that_are_asked_for_together_are_answered_in_order(
    store: SqlStore, ledger_url: str
) -> None:
    """One that can't be read hurts itself only."""
    drafts = [draft_for(f"{n}") for n in range(600)]  # more than one batch
    made = await store.intents(drafts)
    assert all(isinstance(each, Drawn) and each.made for each in made)
    again = await store.intents([draft_for(f"{n}") for n in reversed(range(600))])
    assert _keys(again) == _keys(made)[::-1]
    bad = _keys(made)[7]
    await raw(ledger_url, "UPDATE webapi_job SET details = '{' WHERE key = :key", key=bad)
    broken = await store.intents(drafts)
    assert [n for n, each in enumerate(broken) if isinstance(each, LedgerError)] == [7]


async def test_who_is_too_late_to_take_a_job_over_is_told_so_and_so_is_its_twin(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process takes it between the look at it and the taking; SQLite lets none come between."""
    async with another_store(postgres_url) as ours, another_store(postgres_url) as theirs:
        old = (await theirs.intent(draft_for(runtime="dead", pinned=True))).record
        take_over = batch._take_over  # pyright: ignore[reportPrivateUsage] # the moment is inside

        async def meanwhile() -> None:
            move = Move.taking(old, "theirs", ("flow", "root", "task"))
            assert await theirs.move(move) is MoveResult.OK

        def late(*arguments: Any) -> Any:
            await_only(meanwhile())
            return take_over(*arguments)

        monkeypatch.setattr(batch, "_take_over", late)
        heir = draft_for(runtime="ours", pinned=True, heir_of={"dead"})
        both = await ours.intents([heir, replace(heir, task_run="twin")])
        assert [isinstance(each, Drawn) and each.record for each in both] == [old, old]
        assert not any(isinstance(each, Drawn) and each.taken for each in both)


def _keys(drawn: Sequence[Drawn | LedgerError]) -> list[str]:
    return [each.record.key for each in drawn if isinstance(each, Drawn)]
