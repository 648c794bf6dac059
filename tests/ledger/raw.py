"""SQL past the store, to break what the store must bear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import text

from prefect_webapi.ledger.backend import Backend

__all__ = ["raw"]


async def raw(url: str, sql: str, **values: Any) -> Sequence[Any]:
    """Run one statement in a transaction and return its rows, if it has any."""
    engine = Backend(url).make_engine()
    try:
        async with engine.begin() as conn:
            result = await conn.execute(text(sql), values)
            return result.all() if result.returns_rows else []
    finally:
        await engine.dispose()
