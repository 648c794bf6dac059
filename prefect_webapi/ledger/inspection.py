"""What an operator asks of a ledger beyond its jobs: schema, counts by limit and state, whether it can be written."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

import anyio.to_thread
from sqlalchemy import case, func, select, text
from sqlalchemy.exc import DBAPIError

from prefect_webapi.ledger import schema
from prefect_webapi.ledger.reader import SqlReader
from prefect_webapi.ledger.records import JobState
from prefect_webapi.ledger.rows import from_micros, names_of

__all__ = ["JobCount", "LedgerInspector", "Queue"]

WRITE_SECONDS = 5.0
"""So long a lock is waited for, as the engine does."""

BLOCKED_SECONDS = 2.0
"""A session that waits so long does not do so by the way."""


@dataclass(frozen=True, slots=True)
class Queue:
    """Jobs that take places of the same limits.

    Attributes:
        names: the limits. holders: jobs that are counted, and their `places` of each. waiters: those that wait.
        waiting_since: when the first of them began; None: nobody waits.
    """

    names: tuple[str, ...]
    holders: int
    places: int
    waiters: int
    waiting_since: datetime | None


@dataclass(frozen=True, slots=True)
class JobCount:
    """Jobs that are not over of one process."""

    runtime: str
    state: JobState
    jobs: int


class LedgerInspector(SqlReader):
    """A `SqlReader` that counts, too. It writes nothing."""

    async def revision(self) -> str:
        """The schema's, as it is there."""
        rows = await self._fetch(text(f"SELECT version_num FROM {schema.VERSION_TABLE}"))
        return str(rows[0][0])

    async def queues(self) -> Sequence[Queue]:
        """Who has places and who waits, by the limits that they take."""
        job = schema.job.c
        waits = job.state == JobState.SLOT_REQUESTED
        query = (
            select(
                job.quotas,
                func.sum(job.counted).label("holders"),
                func.sum(job.counted * job.weight).label("places"),
                func.sum(case((waits, 1), else_=0)).label("waiters"),
                func.min(case((waits, job.created_at))).label("since"),
            )
            .where(text("state <> 'CLOSED'"))  # as the small index has it
            .group_by(job.quotas)
        )
        return [
            Queue(
                names_of(row.quotas),
                int(row.holders),
                int(row.places),
                int(row.waiters),
                None if row.since is None else from_micros(row.since),
            )
            for row in await self._fetch(query)
        ]

    async def jobs_not_over(self) -> Sequence[JobCount]:
        """How many there are, by the process that looks after them and by state."""
        job = schema.job.c
        query = (
            select(job.runtime, job.state, func.count().label("jobs"))
            .where(text("state <> 'CLOSED'"))
            .group_by(job.runtime, job.state)
        )
        counts = [
            JobCount(row.runtime, JobState(row.state), row.jobs) for row in await self._fetch(query)
        ]
        return [count for count in counts if not count.state.is_over]

    async def look_for_locks(self) -> str:
        """What keeps jobs from being written down; empty: nothing does.

        SQLite: a write is begun and at once given up. Postgres: sessions that wait for others are asked for.

        Raises:
            LedgerUnavailable: it can't be written; says why and what to do.
        """
        if not self.is_shared:
            return await anyio.to_thread.run_sync(self._try_to_write)
        rows = await self._fetch(text(_CAN_WRITE))
        if rows[0][0]:
            return "the data base is a standby that takes no writes: name its primary"
        rows = await self._fetch(text(_BLOCKERS), {"seconds": BLOCKED_SECONDS})
        return "; ".join(
            f"session {row.pid} ({row.application_name or 'no name'}, {row.state}) keeps {row.waiters} others waiting"
            for row in rows
        )

    def _try_to_write(self) -> str:
        path = self._backend.path
        if path is None:  # SQLite's own form of a URL: what it opens only SQLite knows
            return ""
        try:
            _begin_and_give_up(path)
        except sqlite3.Error as error:
            raise self._backend.unavailable(DBAPIError("", None, error)) from None
        return ""


def _begin_and_give_up(path: Path) -> None:
    conn = sqlite3.connect(
        f"file:{quote(str(path))}?mode=rw", uri=True, timeout=WRITE_SECONDS, isolation_level=None
    )
    try:
        conn.execute("BEGIN IMMEDIATE")
        conn.execute("ROLLBACK")
    finally:
        conn.close()


_CAN_WRITE = "SELECT pg_is_in_recovery()"
_BLOCKERS = """
SELECT blocker.pid, blocker.application_name, blocker.state, count(*) AS waiters
FROM pg_stat_activity AS waiting
CROSS JOIN LATERAL unnest(pg_blocking_pids(waiting.pid)) AS blocking(pid)
JOIN pg_stat_activity AS blocker ON blocker.pid = blocking.pid
WHERE waiting.datname = current_database() AND waiting.wait_event_type = 'Lock'
  AND waiting.query_start < clock_timestamp() - make_interval(secs => :seconds)
GROUP BY 1, 2, 3
"""
