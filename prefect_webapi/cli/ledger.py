"""The ledger as the command line reads it: it never makes, changes or locks one."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from prefect_webapi.clock import Clock
from prefect_webapi.ledger.reader import SqlReader

__all__ = ["reading"]


@asynccontextmanager
async def reading(url: str) -> AsyncGenerator[SqlReader]:
    """The ledger at `url`, open for reading.

    Raises:
        NoLedger: there is none.
        LedgerError: it can't be used, or not by this version.
    """
    reader = SqlReader(url, clock=Clock())
    await reader.open()
    try:
        yield reader
    finally:
        await reader.aclose()
