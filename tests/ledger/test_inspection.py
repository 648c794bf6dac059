"""What an operator is told of a ledger: who has places, who waits, what is not over, and whether it can be written."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import pytest
from sqlalchemy import text

from prefect_webapi.clock import Clock
from prefect_webapi.contract.errors import LedgerUnavailable, NoLedger
from prefect_webapi.ledger import inspection, schema
from prefect_webapi.ledger.backend import Backend
from prefect_webapi.ledger.inspection import JobCount, LedgerInspector, Queue
from prefect_webapi.ledger.records import JobState
from prefect_webapi.ledger.sql import SqlStore
from tests.support.ledger import another_store, draft_for, moved, sqlite_url
from tests.support.waiting import eventually

NOON = datetime(2024, 5, 1, 12, 0, tzinfo=UTC)
BOTH = ("webapi:a:b:default", "webapi:a:b:project=x")


@pytest.fixture
async def inspector(store: SqlStore, ledger_url: str) -> AsyncIterator[LedgerInspector]:
    """Of the same ledger as `store`."""
    opened = LedgerInspector(ledger_url, clock=Clock())
    await opened.open()
    yield opened
    await opened.aclose()


async def test_holders_and_waiters_are_counted_by_the_limits_they_take(
    store: SqlStore, inspector: LedgerInspector
) -> None:
    for name in BOTH:
        await store.set_quota(name, 5)
    for minute, call in enumerate(("holds", "waits", "waits longer")):
        drawn = await store.intent(
            draft_for(
                call,
                state=JobState.SLOT_REQUESTED,
                quotas=BOTH,
                weight=2,
                at=NOON + timedelta(minutes=minute),
            )
        )
        if call == "holds":
            await moved(store, drawn.record, JobState.SLOT_HELD, count=1)
    ended = await store.intent(draft_for("ended"))
    await moved(store, ended.record, JobState.CREATED, JobState.OVER, JobState.CLOSED)

    assert await inspector.queues() == [Queue(BOTH, 1, 2, 2, NOON + timedelta(minutes=1))]
    assert sorted(await inspector.jobs_not_over(), key=lambda each: each.jobs) == [
        JobCount("runtime-1", JobState.SLOT_HELD, 1),
        JobCount("runtime-1", JobState.SLOT_REQUESTED, 2),
    ]
    assert await inspector.revision() == schema.REVISION
    assert await inspector.look_for_locks() == ""


def test_nothing_is_made_where_there_is_no_ledger(tmp_path: Path) -> None:
    inspector = LedgerInspector(sqlite_url(tmp_path / "none.db"), clock=Clock())
    with pytest.raises(NoLedger):
        asyncio.run(inspector.open())
    assert not list(tmp_path.iterdir())


async def test_a_lock_on_sqlite_is_found(
    sqlite_store: SqlStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "WRITE_SECONDS", 0.05)
    path = tmp_path / "ledger.db"
    inspector = LedgerInspector(sqlite_url(path), clock=Clock())
    await inspector.open()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerUnavailable, match="Another program keeps it locked"):
        await inspector.look_for_locks()
    other.execute("ROLLBACK")
    other.close()
    assert await inspector.look_for_locks() == ""
    await inspector.aclose()
    assert (await sqlite_store.intent(draft_for("still"))).made


async def test_a_session_that_keeps_others_waiting_on_postgres_is_named(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "BLOCKED_SECONDS", 0.0)
    inspector, other = (
        LedgerInspector(postgres_url, clock=Clock()),
        Backend(postgres_url).make_engine(),
    )
    told: list[str] = []

    async def is_told() -> bool:
        told.append(await inspector.look_for_locks())
        return bool(told[-1])

    async with another_store(postgres_url) as store, anyio.create_task_group() as group:
        await inspector.open()
        drawn = await store.intent(draft_for("call"))
        async with other.connect() as blocker:
            await blocker.execute(text("LOCK TABLE webapi_job IN EXCLUSIVE MODE"))
            group.start_soon(moved, store, drawn.record, JobState.CREATED)
            await eventually(is_told, within=10)
    assert "(prefect-webapi, idle in transaction) keeps 1 others waiting" in told[-1]
    assert await inspector.look_for_locks() == ""
    await inspector.aclose()
    await other.dispose()
