"""Somebody who may only look: `python -m tests.ledger.stranger PATH`. Prints the keys of the jobs in the ledger."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path

from prefect_webapi.clock import Clock
from prefect_webapi.ledger.reader import SqlReader
from tests.support.ledger import another_store, sqlite_url

NOBODY = 65534


async def keys(path: Path) -> list[str]:
    reader = SqlReader(sqlite_url(path), clock=Clock())
    await reader.open()
    try:
        return [record.key for record in await reader.select()]
    finally:
        await reader.aclose()


async def look_at_a_ledger_of_ones_own() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.db"
        async with another_store(sqlite_url(path)):
            await keys(path)


def main(path: Path) -> None:
    if os.getuid() == 0:
        asyncio.run(look_at_a_ledger_of_ones_own())  # imports what may be closed to others
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    assert not os.access(path, os.W_OK)
    assert not os.access(path.parent, os.W_OK)
    sys.stdout.write(json.dumps(asyncio.run(keys(path))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
