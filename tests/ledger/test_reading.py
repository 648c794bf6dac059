"""A ledger that somebody only looks at: it stays as it is, whatever it is."""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError

from prefect_webapi.clock import Clock
from prefect_webapi.contract.errors import (
    LedgerError,
    LedgerFormatTooNew,
    LedgerUnavailable,
    NoLedger,
)
from prefect_webapi.contract.keys import JobKey
from prefect_webapi.ledger import schema
from prefect_webapi.ledger.backend import Backend
from prefect_webapi.ledger.reader import SqlReader
from prefect_webapi.ledger.records import JobState, QuotaRow
from prefect_webapi.ledger.rows import JobRow
from prefect_webapi.ledger.sql import SqlStore
from tests.ledger.migrating import REVISIONS, bring_to, revision_of
from tests.ledger.processes import ROOT
from tests.ledger.raw import raw
from tests.support.ledger import PostgresServer, another_store, draft_for, moved, sqlite_url


@asynccontextmanager
async def reader_of(url: str) -> AsyncGenerator[SqlReader]:
    reader = SqlReader(url, clock=Clock())
    await reader.open()
    try:
        yield reader
    finally:
        await reader.aclose()


async def refusal(url: str) -> LedgerError:
    with pytest.raises(LedgerError) as caught:
        async with reader_of(url):
            pass
    return caught.value


async def test_what_others_write_is_read_while_they_write_it(ledger_url: str) -> None:
    async with another_store(ledger_url) as store:
        record = (await store.intent(draft_for())).record
        async with reader_of(ledger_url) as reader:
            assert await reader.get(record.key) == record
            await store.set_quota("limit", 3)
            later = await moved(store, record, JobState.CREATED)
            assert list(await reader.select()) == [later]
            assert await reader.quotas() == [QuotaRow("limit", live=0, limit=3)]
            assert await reader.runtimes() == []
            assert reader.address == store.address
            assert reader.is_shared == store.is_shared


async def test_looking_for_a_ledger_makes_none(ledger_url: str) -> None:
    told = await refusal(ledger_url)
    assert isinstance(told, NoLedger)
    assert told.address == Backend(ledger_url).address
    path = Backend(ledger_url).path
    if path is not None:
        assert list(path.parent.iterdir()) == []
        path.touch()
        assert isinstance(await refusal(ledger_url), NoLedger)
        assert path.stat().st_size == 0
    else:
        tables = "SELECT 1 FROM pg_tables WHERE schemaname = 'public'"
        assert await raw(ledger_url, tables) == []


async def test_a_reader_has_no_way_to_write(ledger_url: str) -> None:
    """Not even past its methods: the data base itself refuses."""
    async with another_store(ledger_url) as store:
        record = (await store.intent(draft_for())).record
    engine = Backend(ledger_url).make_engine(read_only=True)
    async with engine.connect() as conn:
        with pytest.raises(DBAPIError, match=r"readonly|read-only"):
            await conn.execute(text("UPDATE webapi_job SET state = 'CLOSED'"))
    await engine.dispose()
    async with reader_of(ledger_url) as reader:
        assert await reader.select() == [record]


@pytest.mark.parametrize("revision", REVISIONS)
async def test_an_older_ledger_is_not_brought_up_to_date(ledger_url: str, revision: str) -> None:
    """It is read where that can be done, else people are told what to do."""
    async with another_store(ledger_url) as store:
        await store.intent(draft_for())
    await bring_to(ledger_url, revision)
    if revision == schema.REVISION:
        async with reader_of(ledger_url) as reader:
            assert len(await reader.select()) == 1
    else:
        told = str(await refusal(ledger_url))
        assert f"schema {revision}" in told
        assert "brings it up to date" in told
    assert await revision_of(ledger_url) == revision


async def test_an_older_ledger_that_lacks_nothing_is_read(
    ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with another_store(ledger_url) as store:
        record = (await store.intent(draft_for())).record
    before = schema.REVISION
    monkeypatch.setattr(schema, "REVISION", "9999")
    async with reader_of(ledger_url) as reader:
        assert await reader.select() == [record]
    assert await revision_of(ledger_url) == before


async def test_a_newer_ledger_is_refused_to_a_reader_too(ledger_url: str) -> None:
    """CASE-203, L6."""
    async with another_store(ledger_url):
        pass
    await raw(ledger_url, f"UPDATE {schema.VERSION_TABLE} SET version_num = '9999'")
    assert isinstance(await refusal(ledger_url), LedgerFormatTooNew)


# --- people who may not write --------------------------------------------------------------------


@pytest.mark.parametrize("is_in_use", [True, False])
async def test_a_file_that_may_only_be_read_is_read(is_in_use: bool) -> None:
    """While its owner has it open and after: with and without SQLite's files beside it."""
    with tempfile.TemporaryDirectory(prefix="webapi-shown-") as folder:
        path = Path(folder) / "ledger.db"
        async with another_store(sqlite_url(path)) as store:
            record = (await store.intent(draft_for())).record
            if is_in_use:
                assert await asyncio.to_thread(seen_by_a_stranger, path) == [record.key]
        if not is_in_use:
            assert await asyncio.to_thread(seen_by_a_stranger, path) == [record.key]


def seen_by_a_stranger(path: Path) -> list[str]:
    """The keys of the jobs, as somebody reads them who may write neither the file nor its folder."""
    path.parent.chmod(0o555)
    path.chmod(0o444)
    command = [sys.executable, "-m", "tests.ledger.stranger", str(path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    path.chmod(0o644)
    path.parent.chmod(0o755)
    assert ended.returncode == 0, ended.stderr
    keys: list[str] = json.loads(ended.stdout)
    return keys


async def test_a_role_that_may_only_select_is_enough(
    postgres_server: PostgresServer, postgres_url: str
) -> None:
    async with another_store(postgres_url) as store:
        record = (await store.intent(draft_for())).record
    postgres_server.psql("CREATE ROLE looker LOGIN")
    try:
        await raw(postgres_url, "GRANT SELECT ON ALL TABLES IN SCHEMA public TO looker")
        url = make_url(postgres_url).set(username="looker").render_as_string(hide_password=False)
        async with reader_of(url) as reader:
            assert await reader.select() == [record]
        with pytest.raises(LedgerUnavailable, match="permission denied"):
            await SqlStore(url, clock=Clock()).open()
    finally:
        await raw(postgres_url, "DROP OWNED BY looker")
        postgres_server.psql("DROP ROLE looker")


async def test_a_read_that_nobody_waits_for_any_more_leaves_no_connection_open(
    sqlite_store: SqlStore,
) -> None:
    """Python 3.13 and later tell of a connection that is collected unclosed; then this test fails."""
    for turn in range(300):
        reading = asyncio.ensure_future(sqlite_store.runtimes())
        await asyncio.sleep(turn % 30 / 10_000)
        reading.cancel()
        await asyncio.wait([reading])
    await sqlite_store.aclose()
    gc.collect()


async def test_each_of_many_that_read_at_once_gets_an_error_of_its_own(ledger_url: str) -> None:
    """They are one read; a raised error collects what its raiser's frames hold."""
    async with another_store(ledger_url) as store:
        await raw(ledger_url, "DROP TABLE webapi_job")
        reads = [store.get(JobKey(str(n))) for n in range(3)]
        errors = await asyncio.gather(*reads, return_exceptions=True)
    assert [type(error) for error in errors] == [LedgerUnavailable] * 3
    assert len({id(error) for error in errors}) == 3
    assert len({str(error) for error in errors}) == 1


def test_a_row_has_the_columns_of_its_table() -> None:
    assert list(JobRow._fields) == schema.job.columns.keys()
