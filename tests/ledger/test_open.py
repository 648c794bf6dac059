"""Opening a ledger: its place, its schema, and records that can't be read."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from prefect_webapi.clock import Clock
from prefect_webapi.contract.errors import (
    ConfigurationError,
    LedgerError,
    LedgerFormatTooNew,
    LedgerUnavailable,
)
from prefect_webapi.ledger import schema
from prefect_webapi.ledger.backend import Backend, network_file_system
from prefect_webapi.ledger.records import JobState
from prefect_webapi.ledger.sql import SqlStore
from tests.ledger.processes import start_worker, told_by
from tests.ledger.raw import raw
from tests.support.ledger import another_store, draft_for, moved, sqlite_url


async def test_a_fresh_ledger_is_made_with_its_directory(tmp_path: Path) -> None:
    path = tmp_path / "a b" / "c%20?" / "ledger.db"
    async with another_store(sqlite_url(path)) as store:
        assert store.address == str(path)
        assert not store.is_shared
        await store.intent(draft_for())
    assert path.exists()


async def test_sqlite_commits_are_flushed_to_the_disk(tmp_path: Path) -> None:
    """L2: WAL and synchronous=FULL on each connection that writes."""
    url = sqlite_url(tmp_path / "ledger.db")
    assert (await raw(url, "PRAGMA journal_mode"))[0] == ("wal",)
    assert (await raw(url, "PRAGMA synchronous"))[0] == (2,)


async def test_a_ledger_is_found_again_as_it_was(ledger_url: str) -> None:
    async with another_store(ledger_url) as store:
        record = (await store.intent(draft_for())).record
    async with another_store(ledger_url) as store:
        assert await store.get(record.key) == record


async def test_stores_that_open_a_fresh_ledger_at_once_all_succeed(ledger_url: str) -> None:
    """Four on this loop and two processes."""
    workers = [start_worker("draw", ledger_url, name, "3") for name in ("one", "two")]

    async def use(n: int) -> None:
        async with another_store(ledger_url) as store:
            assert (await store.intent(draft_for(f"own {n}"))).made

    await asyncio.gather(*map(use, range(4)))
    await told_by(*workers)
    async with another_store(ledger_url) as store:
        assert len(await store.select()) == 4 + 2 * 3


async def test_the_migrations_make_the_tables_that_the_code_uses(ledger_url: str) -> None:
    def differences(conn: Connection) -> list[object]:
        options = {"compare_type": True, "version_table": schema.VERSION_TABLE}
        context = MigrationContext.configure(conn, opts=options)
        return compare_metadata(context, schema.metadata)

    async with another_store(ledger_url):
        engine = Backend(ledger_url).make_engine()
        async with engine.connect() as conn:
            assert await conn.run_sync(differences) == []
        await engine.dispose()


def test_the_newest_migration_is_the_one_the_code_names() -> None:
    directory = Path(schema.__file__).with_name("migrations")
    assert ScriptDirectory(str(directory)).get_current_head() == schema.REVISION


async def test_a_ledger_of_a_newer_schema_is_refused_readably(ledger_url: str) -> None:
    """CASE-203, L6."""
    async with another_store(ledger_url):
        pass
    await raw(ledger_url, f"UPDATE {schema.VERSION_TABLE} SET version_num = '9999'")
    store = SqlStore(ledger_url, clock=Clock())
    with pytest.raises(LedgerFormatTooNew, match=r"schema 9999.*[Uu]pgrade") as caught:
        await store.open()
    assert store.address in str(caught.value)
    (row,) = await raw(ledger_url, f"SELECT version_num FROM {schema.VERSION_TABLE}")
    assert row == ("9999",)


# --- records that can't be read --------------------------------------------------------------


async def test_one_corrupt_record_hurts_one_job_only(
    store: SqlStore, ledger_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """CASE-204, L7: reported once, with its key and the ledger's address."""
    drawn = await asyncio.gather(*(store.intent(draft_for(f"{n}")) for n in range(100)))
    bad = drawn[42].record.key
    sql = "UPDATE webapi_job SET details = '{\"task_name\": ' WHERE key = :key"
    await raw(ledger_url, sql, key=bad)
    with caplog.at_level(logging.ERROR):
        assert {r.key for r in await store.select()} == {d.record.key for d in drawn} - {bad}
        await store.select()
        with pytest.raises(LedgerError, match=bad):
            await store.get(bad)
        results = await asyncio.gather(
            *(store.intent(draft_for(f"{n}")) for n in range(100)), return_exceptions=True
        )
    assert [n for n, r in enumerate(results) if isinstance(r, LedgerError)] == [42]
    (line,) = caplog.records
    assert bad in line.getMessage()
    assert store.address in line.getMessage()


async def test_a_state_nobody_knows_makes_a_record_corrupt(
    store: SqlStore, ledger_url: str
) -> None:
    record = (await store.intent(draft_for())).record
    await raw(ledger_url, "UPDATE webapi_job SET state = 'NEXT'")
    assert await store.select() == []
    with pytest.raises(LedgerError, match="NEXT"):
        await store.get(record.key)


async def test_a_record_of_a_newer_format_is_refused_readably(
    store: SqlStore, ledger_url: str
) -> None:
    """CASE-203, L6: by `get` and by the call that would adopt it; nothing is made."""
    new = (await store.intent(draft_for("new"))).record
    alien = (await store.intent(draft_for("alien"))).record
    fine = (await store.intent(draft_for("fine"))).record
    sql = "UPDATE webapi_job SET details = :details WHERE key = :key"
    await raw(ledger_url, sql, key=new.key, details='{"format": 2, "task_name": "x"}')
    await raw(ledger_url, sql, key=alien.key, details='{"format": 3, "task_name": {"other": 1}}')
    for key, call in ((new.key, "new"), (alien.key, "alien")):
        with pytest.raises(LedgerFormatTooNew, match=f"{key}.*format [23].*Upgrade"):
            await store.get(key)
        with pytest.raises(LedgerFormatTooNew):
            await store.intent(draft_for(call, task_run="again", execution="e2"))
    assert await store.select() == [fine]
    assert len(await raw(ledger_url, "SELECT key FROM webapi_job")) == 3


async def test_fields_that_a_newer_minor_version_added_are_ignored(
    store: SqlStore, ledger_url: str
) -> None:
    record = (await store.intent(draft_for())).record
    details = '{"format": 1, "task_name": "task", "invented": [1]}'
    await raw(ledger_url, "UPDATE webapi_job SET details = :details", details=details)
    assert await store.get(record.key) == record


# --- ledgers that can't be used --------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite+aiosqlite:///file::memory:?uri=true",
        "sqlite:///file:x?mode=memory&uri=true",
        "mysql://host/db",
        "no url",
    ],
)
def test_what_could_not_survive_a_process_is_refused_at_once(url: str) -> None:
    with pytest.raises(ConfigurationError, match="sqlite:"):
        SqlStore(url, clock=Clock())


async def refused(url: str) -> str:
    store = SqlStore(url, clock=Clock())
    with pytest.raises(LedgerUnavailable) as caught:
        await store.open()
    assert store.address in str(caught.value)
    with pytest.raises(LedgerUnavailable):
        await store.intent(draft_for())
    await store.aclose()
    return str(caught.value)


async def test_a_file_that_is_no_ledger_is_refused_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "holiday.jpg"
    path.write_bytes(b"not a data base at all" * 100)
    assert "Name another path" in await refused(sqlite_url(path))
    assert path.read_bytes() == b"not a data base at all" * 100


async def test_a_directory_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    assert "names a file" in await refused(sqlite_url(tmp_path))


async def test_a_directory_that_can_not_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told = await refused(sqlite_url(tmp_path / "file" / "ledger.db"))
    assert "this user may write" in told


async def test_a_ledger_that_may_only_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    async with another_store(sqlite_url(path)):
        pass
    told = await refused(f"sqlite:///file:{path}?mode=ro&uri=true")
    assert "Let this user write the file" in told


@pytest.mark.parametrize(
    ("directory", "kind"),
    [
        ("/home/someone/.prefect", "nfs4"),
        ("/home/local/x", None),
        ("/mnt/my share", "cifs"),
        ("/mnt/my", None),
        ("/", None),
    ],
)
def test_a_ledger_on_a_network_file_system_is_recognised(directory: str, kind: str | None) -> None:
    mounts = (
        "/dev/vda / ext4 rw 0 0\nserver:/home /home nfs4 rw 0 0\n"
        "/dev/vdb /home/local ext4 rw 0 0\n//nas/x /mnt/my\\040share cifs rw 0 0\n"
    )
    assert network_file_system(Path(directory), mounts) == kind


async def test_a_server_that_can_not_be_reached_is_told_without_the_password() -> None:
    told = await refused("postgresql://someone:canary@localhost:1/db?password=canary")
    assert "canary" not in told
    assert "someone" not in told
    assert "Check that the server runs" in told


async def test_a_data_base_that_is_not_there_is_told(postgres_url: str) -> None:
    told = await refused(postgres_url.replace("/ledger_", "/missing_"))
    assert "does not exist" in told


async def test_a_store_that_was_never_opened_closes(tmp_path: Path) -> None:
    store = SqlStore(sqlite_url(tmp_path / "ledger.db"), clock=Clock())
    await store.aclose()
    await store.aclose()


async def test_libpq_names_and_plain_schemes_are_understood() -> None:
    backend = Backend("postgres://u:p@host:5433/db?sslmode=require")
    assert backend.address == "postgresql://host:5433/db"
    url = backend.make_engine().url
    assert (url.drivername, dict(url.query)) == ("postgresql+asyncpg", {"ssl": "require"})


async def test_cancelled_moves_leave_an_open_store_usable(store: SqlStore) -> None:
    record = (await store.intent(draft_for())).record
    tasks = [asyncio.ensure_future(store.intent(draft_for(f"{n}"))) for n in range(50)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await moved(store, record, JobState.CREATED)
    assert len(await store.select()) == 51
