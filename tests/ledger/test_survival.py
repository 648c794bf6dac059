"""What was acknowledged survives: kills, lost connections, a commit whose end nobody saw, a full disk."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest
from sqlalchemy import Connection, create_engine, make_url, text
from sqlalchemy.engine import RootTransaction
from sqlalchemy.exc import OperationalError

from prefect_webapi.contract.keys import JobKey
from prefect_webapi.ledger import batch
from prefect_webapi.ledger.connection import OnThread
from prefect_webapi.ledger.records import JobState, Move, MoveResult, QuotaRow
from prefect_webapi.ledger.sql import SqlStore
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import ReportJob
from tests.ledger.processes import begin, start_worker, told_by
from tests.ledger.raw import raw
from tests.support.engine_child import Work, child
from tests.support.ledger import another_store, draft_for, moved, sqlite_url
from tests.support.waiting import eventually
from tests.support.witness import records

ORDER = [JobState.CREATING, JobState.CREATED, JobState.OVER, JobState.CLOSED]


def now() -> datetime:
    return datetime.now(UTC)


async def test_all_that_a_killed_process_had_acknowledged_is_there(ledger_url: str) -> None:
    """L2: SIGKILL in the middle of writing, then the ledger is opened again."""
    async with another_store(ledger_url):
        pass
    worker = start_worker("write", ledger_url, "victim")
    begin(worker)
    assert worker.stdout is not None
    assert worker.stdin is not None
    told: list[Any] = []
    for line in iter(worker.stdout.readline, ""):
        told.append(json.loads(line))
        if len(told) == 1500:
            worker.kill()  # what it told until then is still read
    worker.wait()
    worker.stdout.close()
    worker.stdin.close()
    last: dict[JobKey, int] = {}
    for key, state in told:
        last[key] = max(last.get(key, 0), ORDER.index(JobState(state)))
    async with another_store(ledger_url) as store:
        found = {r.key: r for r in await store.select()}
        for key, rank in last.items():
            assert ORDER.index(found[key].state) >= rank
            assert rank == 0 or found[key].handle is not None


# --- a connection that breaks around COMMIT --------------------------------------------------


class Wire:
    """A socket between store and server that can break at the next COMMIT."""

    def __init__(self, directory: Path, server: Path) -> None:
        self.path = directory / ".s.PGSQL.5432"
        self._server = server
        # "before": COMMIT is not sent; "after": its answer is lost
        self.break_at: str | None = None
        self.broken = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(str(self._server))
        answers = asyncio.ensure_future(self._pump(far_reader, writer))
        try:
            while data := await reader.read(65536):
                if self.break_at and b"COMMIT;" in data:  # BEGIN has "READ COMMITTED;"
                    at, self.break_at = self.break_at, None
                    self.broken.set()
                    answers.cancel()
                    await asyncio.wait([answers])
                    if at == "after":
                        far_writer.write(data)
                        answer = await far_reader.read(65536)
                        assert b"COMMIT" in answer  # and the store won't hear of it
                    break
                far_writer.write(data)
        except ConnectionError:
            pass
        finally:
            answers.cancel()
            for end in (far_writer, writer):
                end.close()

    @staticmethod
    async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()


@asynccontextmanager
async def wired(url: str) -> AsyncGenerator[tuple[SqlStore, Wire]]:
    server = make_url(url)
    with tempfile.TemporaryDirectory(prefix="wire") as directory:
        wire = Wire(Path(directory), Path(str(server.query["host"])) / ".s.PGSQL.5432")
        listening = await asyncio.start_unix_server(wire.serve, str(wire.path))
        through = server.update_query_dict({"host": directory})
        async with another_store(through.render_as_string(hide_password=False)) as store:
            yield store, wire
        listening.close()
        await listening.wait_closed()


@pytest.mark.parametrize("break_at", ["before", "after"])
async def test_a_commit_with_unknown_end_is_done_exactly_once(
    postgres_url: str, break_at: str
) -> None:
    """Each kind of operation, whether or not the lost COMMIT took effect; none is done twice."""
    async with wired(postgres_url) as (store, wire):
        await store.set_quota("limit", 2)
        counted = {"state": JobState.SLOT_REQUESTED, "quotas": ("limit",)}
        drafts = [draft_for(f"counted {n}", **counted) for n in range(3)]
        drafts += [draft_for(name) for name in ("taken", "moving", "lost", "left")]
        drawn = [(await store.intent(draft)).record for draft in drafts]
        giving, taking, taking_too, taken, moving, lost, left = drawn
        giving = await moved(store, giving, JobState.SLOT_HELD, count=1)
        await moved(store, lost, JobState.CREATED)

        wire.break_at = break_at
        drawing = asyncio.gather(
            store.intent(draft_for("new")),
            store.intent(draft_for("new", task_run="equal")),
            store.intent(draft_for("new")),
            store.intent(draft_for("taken")),
            store.intent(draft_for("left", runtime="runtime-2", heir_of={"runtime-1"})),
        )
        moves = [
            Move(old=giving, state=JobState.OVER, at=now(), count=-1),
            Move(old=taking, state=JobState.SLOT_HELD, at=now(), count=1),
            Move(old=taking_too, state=JobState.SLOT_HELD, at=now(), count=1),
            Move(old=taken, state=taken.state, at=now(), take_over=True, runtime="runtime-2"),
            Move(old=moving, state=JobState.CREATED, at=now(), handle='"h"'),
            Move(old=lost, state=JobState.SUSPECT, at=now()),
        ]
        results = await asyncio.gather(*map(store.move, moves))
        new, equal, same, adopted, inherited = await drawing
        assert wire.broken.is_set()
        assert [d.made for d in (new, equal, same, adopted)] == [True, True, False, False]
        assert [d.record.ordinal for d in (new, equal, same)] == [0, 1, 0]
        assert results == [MoveResult.OK] * 5 + [MoveResult.LOST]

        rows = {r.key: r for r in await store.select()}
        assert len(rows) == 9
        assert await store.quotas() == [QuotaRow("limit", live=2, limit=2)]
        assert inherited.record == rows[left.key]
        assert (rows[left.key].fence, rows[left.key].runtime) == (2, "runtime-2")
        assert (rows[taken.key].fence, rows[taken.key].runtime) == (2, "runtime-2")
        assert (rows[moving.key].state, rows[moving.key].handle) == (JobState.CREATED, '"h"')
        assert rows[lost.key].state is JobState.CREATED


async def test_a_batch_that_is_halved_after_a_commit_with_unknown_end_is_done_once(
    store: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commit took effect, and what follows is refused as a whole: each half finds its own work done."""
    drawn = [(await store.intent(draft_for(name))).record for name in ("one", "two")]
    commit, run, runs = RootTransaction.commit, batch.run, list[int]()

    def commit_and_break(transaction: RootTransaction) -> None:
        commit(transaction)
        if len(runs) == 1:
            lost = ConnectionError("the connection was lost")
            raise OperationalError("COMMIT", None, lost, connection_invalidated=True)

    def run_once(*arguments: Any, **options: Any) -> None:
        runs.append(len(arguments[3]))
        if len(runs) == 2:
            raise ValueError("one of these operations can't be written")
        run(*arguments, **options)

    monkeypatch.setattr(RootTransaction, "commit", commit_and_break)
    monkeypatch.setattr(batch, "run", run_once)
    moves = [Move(old=record, state=JobState.CREATED, at=now()) for record in drawn]
    results = await asyncio.gather(*map(store.move, moves))
    assert runs == [2, 2, 1, 1]
    assert results == [MoveResult.OK] * 2


async def test_a_move_that_another_process_overtook_meanwhile_is_lost(postgres_url: str) -> None:
    """After an unknown end only our own work counts as done."""
    async with wired(postgres_url) as (store, wire):
        record = (await store.intent(draft_for())).record
        wire.break_at = "before"
        async with another_store(postgres_url) as other:
            mine = asyncio.ensure_future(
                store.move(Move(old=record, state=JobState.CREATED, at=now()))
            )
            await wire.broken.wait()
            theirs = Move(
                old=record, state=JobState.CREATED, at=now(), take_over=True, runtime="other"
            )
            assert await other.move(theirs) is MoveResult.OK
            assert await mine is MoveResult.LOST


async def test_connections_that_were_cut_are_made_again(postgres_url: str) -> None:
    async with another_store(postgres_url) as store:
        record = (await store.intent(draft_for())).record
        await store.get(record.key)
        await raw(
            postgres_url,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE pid <> pg_backend_pid() AND datname = current_database()",
        )
        assert await store.get(record.key) == record
        await moved(store, record, JobState.CREATED)


# --- SQLite's own troubles -------------------------------------------------------------------


@contextmanager
def locked(path: Path) -> Generator[None]:
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


async def test_a_lock_of_another_program_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    async with another_store(sqlite_url(path)) as store:
        with locked(path):
            pending = asyncio.ensure_future(store.intent(draft_for()))
            await asyncio.sleep(0.2)
            assert not pending.done()
        assert (await pending).made


async def test_work_that_nobody_waits_for_any_more_has_the_connection_to_its_end(
    tmp_path: Path,
) -> None:
    connection = OnThread(create_engine(sqlite_url(tmp_path / "ledger.db")), lambda: None)
    begun, goes_on, found = threading.Event(), threading.Event(), list[int]()

    def work(conn: Connection) -> None:
        begun.set()
        goes_on.wait(10)
        found.append(conn.execute(text("SELECT 1")).scalar_one())

    waiting = asyncio.ensure_future(connection.run(work))
    await asyncio.to_thread(begun.wait, 10)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    closing = asyncio.ensure_future(connection.close())
    await asyncio.wait([closing], timeout=0.2)
    assert not closing.done()
    goes_on.set()
    await closing
    assert found == [1]


async def test_writes_do_not_wait_for_threads_that_others_have_taken(store: SqlStore) -> None:
    """An author's calls may be stuck in all of them."""
    threads = anyio.to_thread.current_default_thread_limiter()
    takers = [object() for _ in range(int(threads.available_tokens))]
    for taker in takers:
        threads.acquire_on_behalf_of_nowait(taker)
    try:
        assert (await asyncio.wait_for(store.intent(draft_for()), 10)).made
    finally:
        for taker in takers:
            threads.release_on_behalf_of(taker)


async def test_who_is_written_down_does_not_wait_for_what_is_stuck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, runs, goes_on = batch.run, list[int](), threading.Event()

    def run_stuck(*arguments: Any, **options: Any) -> None:
        runs.append(len(arguments[3]))
        if len(runs) == 2:
            goes_on.wait(20)
        run(*arguments, **options)

    monkeypatch.setattr(batch, "run", run_stuck)
    monkeypatch.setattr("prefect_webapi.ledger.writer.MAX_BATCH", 3)
    monkeypatch.setattr("prefect_webapi.ledger.writer.ANSWERED_AT_ONCE", 1)
    async with another_store(sqlite_url(tmp_path / "ledger.db")) as store:
        *first, stuck = (asyncio.ensure_future(store.intent(draft_for(f"{n}"))) for n in range(4))
        try:
            await asyncio.wait_for(asyncio.gather(*first), 10)
            assert not stuck.done()
        finally:
            goes_on.set()
        assert (await stuck).made
    assert runs == [3, 1]


async def test_a_loop_that_is_busy_is_asked_once_to_tell_who_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it would wake the callers of several batches in one turn."""
    loop, run, runs = asyncio.get_running_loop(), batch.run, 0
    asked, told = list[str](), list[int]()
    is_held, goes_on = threading.Event(), threading.Event()
    real = loop.call_soon_threadsafe

    def counted(callback: Any, *arguments: Any) -> Any:
        asked.append(callback.__name__)
        return real(callback, *arguments)

    def hold() -> None:
        is_held.set()
        goes_on.wait(20)

    def run_while_held(*arguments: Any, **options: Any) -> None:
        nonlocal runs
        runs += 1
        if runs == 2:
            real(hold)
            is_held.wait(20)
            asked.clear()
        run(*arguments, **options)
        told.append(asked.count("_tell_some"))
        if runs == 2:
            goes_on.set()

    monkeypatch.setattr(batch, "run", run_while_held)
    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    monkeypatch.setattr("prefect_webapi.ledger.writer.MAX_BATCH", 3)
    monkeypatch.setattr("prefect_webapi.ledger.writer.ANSWERED_AT_ONCE", 1)
    async with another_store(sqlite_url(tmp_path / "ledger.db")) as store:
        await asyncio.gather(*(store.intent(draft_for(f"{n}")) for n in range(6)))
    assert told == [0, 1]  # while the second batch was written, in four statements


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many operations each transaction has."""
    run, sizes = batch.run, list[int]()

    def run_noted(*arguments: Any, **options: Any) -> None:
        sizes.append(len(arguments[3]))
        run(*arguments, **options)

    monkeypatch.setattr(batch, "run", run_noted)
    return sizes


async def test_who_comes_after_a_crowd_waits_a_moment_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: list[int]
) -> None:
    monkeypatch.setattr("prefect_webapi.ledger.writer.GATHERING_SECONDS", 1.0)
    async with another_store(sqlite_url(tmp_path / "ledger.db")) as store:
        await asyncio.gather(*(store.intent(draft_for(f"{n}")) for n in range(6)))
        first = asyncio.ensure_future(store.intent(draft_for("first")))
        for _ in range(20):  # turns of the loop
            await asyncio.sleep(0)
        others = (store.intent(draft_for(f"other {n}")) for n in range(3))
        await asyncio.gather(first, *others)
    assert batches == [6, 4]


async def test_nobody_waits_for_others_who_are_there_or_were_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: list[int]
) -> None:
    """One after the other, the same ten again, and enough after many more."""
    monkeypatch.setattr("prefect_webapi.ledger.writer.GATHERING_SECONDS", 60.0)
    rounds = (1, 1, 2, 1, 10, 10, 300, 60)
    async with another_store(sqlite_url(tmp_path / "ledger.db")) as store, asyncio.timeout(20):
        for place, size in enumerate(rounds):
            drafts = [draft_for(f"{place} {n}") for n in range(size)]
            await asyncio.gather(*(store.intent(draft) for draft in drafts))
    assert batches == [*rounds]


async def test_readers_do_not_wait_for_writers(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    async with another_store(sqlite_url(path)) as store:
        record = (await store.intent(draft_for())).record
        with locked(path):
            assert await store.get(record.key) == record


async def test_a_disk_that_takes_no_more_is_told_and_the_store_works_on_after(
    tmp_path: Path,
) -> None:
    """CASE-205's ledger half: readable, nothing acknowledged is lost, no restart needed."""
    path = tmp_path / "ledger.db"
    full, after = await told_by(start_worker("fill", sqlite_url(path), "x"))
    written, refused, told = full
    assert str(path) in told
    assert "disk" in told
    made, records = after
    assert made
    assert written + 1 <= records <= written + 1 + refused  # the end of the refused ones is unknown


@pytest.mark.chaos
async def test_a_job_whose_handle_finds_no_room_on_the_disk_is_ended(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-205, KP-35: the disk is full when create answers, and stays so for longer than two minutes."""
    work = Work(
        folder=tmp_path,
        server=job_server.url,
        specs=(ReportJob(outcome="never"),),
        speed=20,
        epoch=time.time(),
        full_at="KP-08",
    )
    with child(work) as process:
        await eventually(lambda: job_server.stats().created, within=60)
        assert process.ends() == []
        assert process.code == 1  # the call has failed
    assert len(job_server.log("create")) == len(job_server.log("delete")) == 1
    assert job_server.stats().live == 0
    [job] = job_server.jobs()
    assert job.message == "its handle could not be written to the ledger"
    [record] = await records(tmp_path)
    assert record.state is JobState.CREATING
