"""The ledger as the command line reads it: opened only where there is one."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from sqlalchemy import Connection, inspect
from sqlalchemy.exc import SQLAlchemyError

from prefect_webapi.clock import Clock
from prefect_webapi.contract.errors import LedgerError
from prefect_webapi.ledger.backend import Backend
from prefect_webapi.ledger.schema import VERSION_TABLE
from prefect_webapi.ledger.sql import SqlStore

__all__ = ["NoLedger", "is_there", "reading"]


class NoLedger(LedgerError):
    """There is no ledger at the address: no job was ever started with these settings.

    Attributes:
        address: where one was looked for, without credentials.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        super().__init__(
            f"there is no ledger at {address}, and none was made: it comes with the first job. If jobs were run, "
            "they used another one: see `prefect-webapi config show`, setting LEDGER_URL."
        )


@asynccontextmanager
async def reading(url: str) -> AsyncGenerator[SqlStore]:
    """The ledger at `url`, open for reading; it is never made.

    Raises:
        NoLedger: there is none.
        LedgerError: it can't be used.
    """
    backend = Backend(url)
    if not await is_there(backend):
        raise NoLedger(backend.address)
    store = SqlStore(url, clock=Clock())
    await store.open()
    try:
        yield store
    finally:
        await store.aclose()


async def is_there(backend: Backend) -> bool:
    """Whether the data base exists and holds a ledger.

    Raises:
        LedgerUnavailable: that can't be found out.
    """
    if backend.path is not None and not backend.path.exists():
        return False
    engine = backend.make_engine()
    try:
        async with engine.connect() as conn:
            return await conn.run_sync(_has_version)
    except (SQLAlchemyError, OSError) as error:
        raise backend.unavailable(error) from error
    finally:
        await engine.dispose()


def _has_version(conn: Connection) -> bool:
    return inspect(conn).has_table(VERSION_TABLE)
