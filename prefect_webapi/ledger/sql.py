"""The ledger on SQLite (a file) or Postgres. Writes go through one writer, reads through a pool."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

import anyio
from sqlalchemy import Connection, Executable, delete, insert, select, text, update

from prefect_webapi.clock import Clock
from prefect_webapi.contract.errors import LedgerError
from prefect_webapi.contract.keys import JobKey
from prefect_webapi.ledger import schema, turns
from prefect_webapi.ledger.reader import SqlReader
from prefect_webapi.ledger.records import (
    Draft,
    Drawn,
    JobState,
    Move,
    MoveResult,
    Pace,
    Record,
    RuntimeRow,
)
from prefect_webapi.ledger.rows import (
    micros,
    names_of,
    names_text,
    plain_text,
)
from prefect_webapi.ledger.statements import json_rows
from prefect_webapi.ledger.writer import Writer

__all__ = ["SqlStore"]

_OVER = tuple(state for state in JobState if state.is_over)
_PRUNED_AT_ONCE = 500

_SET_QUOTA = text(
    "INSERT INTO webapi_quota (name, live, lim) VALUES (:name, 0, :lim)"
    " ON CONFLICT (name) DO UPDATE SET lim = excluded.lim"
)
_TAKE_SURPLUS = text(
    "DELETE FROM webapi_surplus WHERE name = :name AND since <= :before RETURNING slots"
)
_SEE_SURPLUS = text(
    "INSERT INTO webapi_surplus (name, slots, since) VALUES (:name, :slots, :at)"
    " ON CONFLICT (name) DO UPDATE SET slots = excluded.slots"
    " WHERE excluded.slots < webapi_surplus.slots"
)
_LOCK_RATE = text(
    "INSERT INTO webapi_rate (name, free_at) VALUES (:name, 0)"
    " ON CONFLICT (name) DO UPDATE SET free_at = webapi_rate.free_at RETURNING free_at"
)
_MOST_TURNS, _LEAST_SECONDS = 1_000, 60.0
"""A turn that is further away than both was taken before the machine started anew, or its clock was set back."""

_FAREWELL = text("UPDATE webapi_runtime SET pid = 0, last_beat = :at WHERE id = :id")
_BURY = text(
    "DELETE FROM webapi_runtime WHERE last_beat < :before AND id NOT IN"
    " (SELECT runtime FROM webapi_job WHERE state <> 'CLOSED')"
)
_BEAT = text(
    "INSERT INTO webapi_runtime (id, host, pid, born, started, last_beat)"
    " VALUES (:id, :host, :pid, :born, :started, :last_beat)"
    " ON CONFLICT (id) DO UPDATE SET last_beat = excluded.last_beat"
)

_SET_DURATION = text(
    "INSERT INTO webapi_duration (plugin, task, seconds, updated_at) VALUES (:plugin, :task, :seconds, :at)"
    " ON CONFLICT (plugin, task) DO UPDATE SET seconds = excluded.seconds, updated_at = excluded.updated_at"
)


class SqlStore(SqlReader):
    """A `Store` in a data base; open before use, close at the end, from one event loop.

    Args:
        url: `sqlite:///path` or `postgresql://user:password@host/database`.

    Raises:
        ConfigurationError: the URL names no ledger that could survive a process.
    """

    _read_only = False

    def __init__(self, url: str, *, clock: Clock) -> None:
        super().__init__(url, clock=clock)
        self._writer = Writer(self._backend, self._engine, self._reader, clock)

    async def open(self) -> None:
        await asyncio.to_thread(
            self._backend.make_directory
        )  # its thread is joined when the loop ends
        await self._open(self._bring_up_to_date)
        self._writer.start()

    async def _bring_up_to_date(self) -> None:
        async with self._engine.begin() as conn:
            await conn.run_sync(schema.bring_up_to_date, self.address)

    async def aclose(self) -> None:
        with anyio.CancelScope(shield=True):
            await self._writer.aclose()
        await super().aclose()

    # --- jobs --------------------------------------------------------------------------------

    async def intent(self, draft: Draft) -> Drawn:
        return await self._writer.intent(draft)

    async def intents(self, drafts: Sequence[Draft]) -> Sequence[Drawn | LedgerError]:
        return await self._writer.intents(drafts)

    async def move(self, move: Move) -> MoveResult:
        return await self._writer.move(move)

    # --- cancelling from outside -------------------------------------------------------------

    async def ask_cancel(self, keys: Collection[JobKey], reason: str) -> None:
        if not keys:
            return
        values = json_rows({"key": key} for key in sorted(keys)) | {"reason": plain_text(reason)}
        await self._execute(self._writer.statements.ask_cancel, values)

    async def cancels_asked(self, runtime: str) -> Sequence[Record]:
        job = schema.job.c
        query = (
            select(schema.job)
            .where(job.runtime == runtime, job.cancel_reason.is_not(None))
            .where(job.state.not_in((*_OVER, JobState.CANCELLING)))
            .order_by(job.created_at, job.key)
        )
        return self._reader.read_all(await self._fetch(query))

    # --- quotas ------------------------------------------------------------------------------

    async def set_quota(self, name: str, limit: int) -> None:
        await self._execute(_SET_QUOTA, {"name": name, "lim": limit})

    async def note_surplus(self, name: str, slots: int, at: datetime, since: datetime) -> int:
        def work(conn: Connection) -> int:
            if not slots:
                conn.execute(delete(schema.surplus).where(schema.surplus.c.name == name))
                return 0
            before = {"name": name, "before": micros(since)}
            known = conn.execute(_TAKE_SURPLUS, before).scalar()
            if known is not None:
                return min(known, slots)
            conn.execute(_SEE_SURPLUS, {"name": name, "slots": slots, "at": micros(at)})
            return 0

        return await self._writer.call(work)

    async def reserve(self, name: str, seconds: float) -> float:
        def work(conn: Connection) -> float:
            free_at: int = conn.execute(_LOCK_RATE, {"name": name}).scalar_one()
            now = self._shared_now(conn)
            wait = max(0.0, free_at / 1e6 - now)
            if wait > max(_MOST_TURNS * seconds, _LEAST_SECONDS):
                wait = 0.0
            turn = round((now + wait + seconds) * 1e6)
            at = update(schema.rate).where(schema.rate.c.name == name)
            conn.execute(at.values(free_at=turn))
            return wait

        return await self._writer.call(work)

    def _shared_now(self, conn: Connection) -> float:
        """Real seconds of a clock that all processes on this ledger share."""
        if conn.dialect.name == "postgresql":
            return float(
                conn.execute(text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one()
            )
        return self._clock.real(self._clock.monotonic())  # one machine, one count since its start

    async def is_next(self, record: Record, at: datetime, *, waits: bool) -> bool:
        mine = {"runtime": record.runtime, "quotas": names_text(record.quotas)}
        if waits:
            await self._execute(turns.MARK, mine | {"asked_at": micros(at)})
        since = micros(at - turns.MARK_LASTS)
        before = {"since": since, "before": micros(record.created_at)}
        earlier = [
            turns.Waiter(frozenset(names_of(row.quotas)), row.weight)
            for row in await self._fetch(turns.WAITING, mine | before)
        ]
        if not earlier:
            return True
        return turns.is_next(record.quotas, earlier, {row.name: row for row in await self.quotas()})

    # --- who is alive ------------------------------------------------------------------------

    async def beat(self, runtime: RuntimeRow) -> None:
        values = {
            "id": runtime.id,
            "host": runtime.host,
            "pid": runtime.pid,
            "born": runtime.born,
            "started": micros(runtime.started),
            "last_beat": micros(runtime.last_beat),
        }
        await self._execute(_BEAT, values)

    async def farewell(self, runtime: str) -> None:
        for table in (schema.queue, schema.reading):
            await self._execute(delete(table).where(table.c.runtime == runtime))
        at = micros(self._clock.now())  # since when nobody drives what it leaves
        await self._execute(_FAREWELL, {"id": runtime, "at": at})

    # --- reading -----------------------------------------------------------------------------

    async def set_paces(self, runtime: str, paces: Sequence[Pace]) -> None:
        def work(conn: Connection) -> None:
            conn.execute(delete(schema.reading).where(schema.reading.c.runtime == runtime))
            if paces:
                conn.execute(
                    insert(schema.reading), [{"runtime": runtime} | asdict(p) for p in paces]
                )

        await self._writer.call(work)

    async def durations(self) -> Mapping[tuple[str, str], Sequence[float]]:
        rows = await self._fetch(select(schema.duration))
        return {(row.plugin, row.task): json.loads(row.seconds) for row in rows}

    async def set_durations(
        self, of: Mapping[tuple[str, str], Sequence[float]], at: datetime
    ) -> None:
        rows = [
            {
                "plugin": plugin,
                "task": plain_text(task),
                "seconds": json.dumps(seconds),
                "at": micros(at),
            }
            for (plugin, task), seconds in sorted(of.items())
        ]
        await self._writer.call(lambda conn: conn.execute(_SET_DURATION, rows))

    # --- keeping it small --------------------------------------------------------------------

    async def prune(self, before: datetime) -> int:
        at = micros(before)
        await self._execute(_BURY, {"before": at})
        await self._execute(delete(schema.queue).where(schema.queue.c.asked_at < at))
        await self._execute(delete(schema.duration).where(schema.duration.c.updated_at < at))
        alive = select(schema.runtime.c.id)
        await self._execute(delete(schema.reading).where(schema.reading.c.runtime.not_in(alive)))
        places = [
            {"base": row.base, "ordinal": row.ordinal}
            for row in await self._fetch(self._writer.statements.old_places, {"before": at})
        ]
        deleted = 0
        for start in range(0, len(places), _PRUNED_AT_ONCE):
            values = json_rows(places[start : start + _PRUNED_AT_ONCE])
            deleted += await self._writer.call(lambda conn, v=values: self._delete(conn, v, at))
        return deleted

    def _delete(self, conn: Connection, places: dict[str, str], before: int) -> int:
        sql = self._writer.statements
        conn.execute(sql.lock_old_groups, places).all()
        deleted = conn.execute(sql.delete_jobs, {**places, "before": before}).rowcount
        conn.execute(sql.delete_claims, places)
        conn.execute(sql.delete_groups, places)
        return deleted

    # --- the way to the data base -------------------------------------------------------------

    async def _execute(self, statement: Executable, values: dict[str, Any] | None = None) -> None:
        def work(conn: Connection) -> None:
            conn.execute(statement, values)

        await self._writer.call(work)
