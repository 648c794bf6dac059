"""Bring a ledger to any revision of its schema, as one of another version of the package would have it."""

from __future__ import annotations

from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from prefect_webapi.ledger import schema
from prefect_webapi.ledger.backend import Backend
from tests.ledger.raw import raw

__all__ = ["REVISIONS", "bring_to", "revision_of"]

_scripts = ScriptDirectory(str(schema.MIGRATIONS))
REVISIONS = [script.revision for script in _scripts.walk_revisions()][::-1]
"""All there are, oldest first."""


async def bring_to(url: str, revision: str) -> None:
    """Upgrade or downgrade in one transaction, as `SqlStore.open` does; `base` takes everything away."""

    def work(conn: Connection) -> None:
        config = schema.migrations(conn)
        if revision != "base":
            command.upgrade(config, revision)
        command.downgrade(config, revision)

    engine = Backend(url).make_engine()
    try:
        async with engine.begin() as conn:
            await conn.run_sync(work)
    finally:
        await engine.dispose()


async def revision_of(url: str) -> str:
    [(found,)] = await raw(url, f"SELECT version_num FROM {schema.VERSION_TABLE}")
    return found
