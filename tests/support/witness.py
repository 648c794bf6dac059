"""What the ledger says, asked from beside the engines that work on it."""

from __future__ import annotations

from pathlib import Path

from prefect_webapi.ledger.records import Record
from tests.support.ledger import another_store, ledger_of

__all__ = ["places_taken", "records"]


async def records(folder: Path) -> list[Record]:
    """All records, oldest first."""
    async with another_store(ledger_of(folder)) as store:
        return list(await store.select())


async def places_taken(folder: Path) -> int:
    """Places that the ledger counts as taken, over all quotas."""
    async with another_store(ledger_of(folder)) as store:
        return sum(row.live for row in await store.quotas())
