"""A process of its own that works on a ledger: `python -m tests.ledger.worker COMMAND URL [ARGUMENT …]`.

Tells on standard output, a JSON value per line, what it has seen acknowledged.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import resource
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from prefect_webapi.contract.errors import LedgerUnavailable
from prefect_webapi.ledger.records import JobState, Move, MoveResult
from prefect_webapi.ledger.sql import SqlStore
from tests.support.ledger import another_store, draft_for


def tell(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


async def draw(store: SqlStore, name: str, calls: str) -> None:
    """Draw equal calls of three bases, each asked twice."""
    drafts = [
        draft_for(f"call {n % 3}", task_run=f"{name}-{n}", runtime=name) for n in range(int(calls))
    ]
    for start in range(0, len(drafts), 7):
        some = drafts[start : start + 7]
        for drawn in await asyncio.gather(*map(store.intent, some + some)):
            tell([drawn.record.key, drawn.record.ordinal, drawn.made])


async def count(store: SqlStore, name: str, jobs: str) -> None:
    """Take a place of limit `quota`, hold it a little, give it back."""

    async def one(n: int) -> None:
        draft = draft_for(f"{name} {n}", state=JobState.SLOT_REQUESTED, quotas=("quota",), weight=1)
        record = (await store.intent(draft)).record
        take = Move(old=record, state=JobState.SLOT_HELD, at=datetime.now(UTC), count=1)
        while await store.move(take) is MoveResult.FULL:  # noqa: ASYNC110  the other process has it
            await asyncio.sleep(0.005)
        taken = time.monotonic()
        await asyncio.sleep(0.01)
        given = time.monotonic()
        held = replace(record, state=JobState.SLOT_HELD)
        give = Move(old=held, state=JobState.OVER, at=datetime.now(UTC), count=-1)
        assert await store.move(give) is MoveResult.OK
        tell([taken, given])

    await asyncio.gather(*map(one, range(int(jobs))))


async def write(store: SqlStore, name: str) -> None:
    """Write without end."""
    numbers = itertools.count()

    async def some() -> None:
        for n in numbers:
            record = (await store.intent(draft_for(f"{name} {n}"))).record
            tell([record.key, record.state])
            handle = f'"{n}"'
            for state in (JobState.CREATED, JobState.OVER, JobState.CLOSED):
                move = Move(old=record, state=state, at=datetime.now(UTC), handle=handle)
                assert await store.move(move) is MoveResult.OK
                tell([record.key, state])
                record = replace(record, state=state)

    await asyncio.gather(*(some() for _ in range(20)))


async def fill(store: SqlStore, name: str) -> None:
    """Write until the file may not grow any more, then when it may again."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    written, refused = 0, list[LedgerUnavailable]()
    while not refused:
        drafts = [draft_for(f"{name} {written + n}") for n in range(10)]
        for drawn in await asyncio.gather(*map(store.intent, drafts), return_exceptions=True):
            if isinstance(drawn, LedgerUnavailable):
                refused.append(drawn)
            else:
                written += 1
    tell([written, len(refused), str(refused[0])])
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    drawn = await store.intent(draft_for("after"))
    tell([drawn.made, len(await store.select())])


async def main() -> None:
    command, url, *arguments = sys.argv[1:]
    async with another_store(url) as store:
        tell("ready")
        await asyncio.to_thread(sys.stdin.readline)
        await {"draw": draw, "count": count, "write": write, "fill": fill}[command](
            store, *arguments
        )


if __name__ == "__main__":
    asyncio.run(main())
