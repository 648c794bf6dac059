"""The ledger as the verbs use it: to read, which never makes, changes or locks one; and to act on its jobs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from prefect_webapi.clock import Clock
from prefect_webapi.contract.errors import ConfigurationError
from prefect_webapi.contract.keys import JobKey
from prefect_webapi.ledger.inspection import LedgerInspector
from prefect_webapi.ledger.reader import SqlReader

__all__ = ["acting", "inspecting", "no_such_job", "reading"]

ReaderT = TypeVar("ReaderT", bound=SqlReader)


@asynccontextmanager
async def reading(url: str | None = None) -> AsyncGenerator[SqlReader]:
    """The ledger at `url` (None: the one that the settings name), open for reading.

    Raises:
        NoLedger: there is none.
        LedgerError: it can't be used, or not by this version.
    """
    async with _opened(SqlReader, url) as reader:
        yield reader


@asynccontextmanager
async def inspecting() -> AsyncGenerator[LedgerInspector]:
    """The ledger that the settings name, open for counting. Raises as `reading`."""
    async with _opened(LedgerInspector, None) as inspector:
        yield inspector


@asynccontextmanager
async def _opened(kind: type[ReaderT], url: str | None) -> AsyncGenerator[ReaderT]:
    from prefect_webapi.settings import WebApiSettings

    reader = kind(url or WebApiSettings.load().ledger_url.get_secret_value(), clock=Clock())
    await reader.open()
    try:
        yield reader
    finally:
        await reader.aclose()


@asynccontextmanager
async def acting(*keys: JobKey) -> AsyncGenerator[None]:
    """For what takes an engine, which is ended at the end of the block.

    Raises:
        ConfigurationError: the ledger has no such job.
        NoLedger, LedgerError: as `reading`.
    """
    from prefect_webapi._prefect import service

    async with reading() as store:
        missing = [key for key in keys if await store.get(key) is None]
        if missing:
            raise no_such_job(store.address, missing)
    try:
        yield
    finally:
        service.close()


def no_such_job(address: str, keys: Sequence[str]) -> ConfigurationError:
    told = ", ".join(repr(str(key)) for key in keys)
    return ConfigurationError(
        f"the ledger at {address} has no job {told}. `prefect-webapi jobs list` shows those it has"
    )
