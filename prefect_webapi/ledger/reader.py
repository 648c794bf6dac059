"""A ledger that others write, read as it is: nothing is made, brought up to date or locked."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import anyio
from sqlalchemy import Executable, Row, Select, literal, select, text, tuple_
from sqlalchemy.exc import SQLAlchemyError

from prefect_webapi.clock import Clock
from prefect_webapi.contract.errors import LedgerUnavailable, NoLedger
from prefect_webapi.contract.keys import JobKey
from prefect_webapi.ledger import schema
from prefect_webapi.ledger.backend import Backend, Trouble, copied
from prefect_webapi.ledger.records import JobState, OpenJob, Pace, QuotaRow, Record, RuntimeRow
from prefect_webapi.ledger.rows import RecordReader, from_micros
from prefect_webapi.portions import in_portions

__all__ = ["SqlReader"]

T = TypeVar("T")

_PAUSES = (0.05, 0.2, 0.5)
_CLOSING_SECONDS = 10.0
_READ_AT_ONCE = 500
_FETCHED_AT_ONCE = 10_000
"""Rows of a few columns that one statement brings: they become objects in one go, on the loop."""
_OPEN_STATES = sorted(state for state in JobState if state is not JobState.CLOSED)
_OPEN = text("state <> 'CLOSED'")
"""Says that the small index will do."""


class _Batch:
    """Records that are read together."""

    def __init__(self) -> None:
        self.keys: set[JobKey] = set()
        self.rows: asyncio.Task[Mapping[JobKey, Row[Any]]]


class SqlReader:
    """A `Reader` of a data base, for whoever may do no more; open before use, close at the end, from one event loop.

    Args:
        url: `sqlite:///path` or `postgresql://user:password@host/database`.

    Raises:
        ConfigurationError: the URL names no ledger that could survive a process.
    """

    _read_only: ClassVar[bool] = True

    def __init__(self, url: str, *, clock: Clock) -> None:
        self._backend = Backend(url)
        self._clock = clock
        self._engine = self._backend.make_engine(read_only=self._read_only)
        self._reader = RecordReader(self._backend.address)
        self._reads = self._engine.execution_options(**self._backend.read_options)
        self._reading: set[asyncio.Task[Any]] = set()
        self._batch: _Batch | None = None

    @property
    def address(self) -> str:
        return self._backend.address

    @property
    def is_shared(self) -> bool:
        return self._backend.dialect == "postgresql"

    async def open(self) -> None:
        if self._backend.is_missing:
            raise NoLedger(self.address)

        async def look() -> None:
            async with self._reads.connect() as conn:
                await conn.run_sync(schema.look_at, self.address)

        await self._open(look)

    async def _open(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await self._again(work)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._engine.dispose()
            raise

    async def aclose(self) -> None:
        with anyio.CancelScope(shield=True):
            if self._reading:
                _, late = await asyncio.wait(self._reading, timeout=_CLOSING_SECONDS)
                for reading in late:
                    reading.cancel()
            await self._engine.dispose()

    async def get(self, key: JobKey) -> Record | None:
        """Asked by many in one turn of the loop, it is one read."""
        batch = self._batch
        if batch is None or len(batch.keys) == _READ_AT_ONCE:
            batch = self._batch = _Batch()
            batch.rows = self._own(self._read_batch(batch))
        batch.keys.add(key)
        try:
            row = (await asyncio.shield(batch.rows)).get(key)
        except LedgerUnavailable as error:
            raise copied(error) from error.__cause__
        return None if row is None else self._reader.read(row)

    async def _read_batch(self, batch: _Batch) -> Mapping[JobKey, Row[Any]]:
        await asyncio.sleep(0)
        if self._batch is batch:
            self._batch = None
        return {row.key: row for row in await self._read(_of_these(batch.keys))}

    async def select(
        self,
        *,
        states: Collection[JobState] | None = None,
        root_run: str | None = None,
        flow_run: str | None = None,
        runtime: str | None = None,
        newest_first: bool = False,
        limit: int | None = None,
    ) -> Sequence[Record]:
        job = schema.job.c
        query = select(schema.job)
        if states is not None:
            query = query.where(job.state.in_(sorted(states)))
            if JobState.CLOSED not in states:
                query = query.where(_OPEN)
        if root_run is not None:
            query = query.where(job.root_run == root_run)
        if flow_run is not None:
            query = query.where(job.flow_run == flow_run)
        if runtime is not None:
            query = query.where(job.runtime == runtime)
        if newest_first:
            query = query.order_by(job.created_at.desc(), job.key.desc())
        else:
            query = query.order_by(job.created_at, job.key)
        rows, records = await self._fetch(query.limit(limit)), list[Record]()
        # In portions: a hundred thousand would hold the loop up.
        for start in range(0, len(rows), _READ_AT_ONCE):
            records += self._reader.read_all(rows[start : start + _READ_AT_ONCE])
            await asyncio.sleep(0)
        return records

    async def open_jobs(self) -> Sequence[OpenJob]:
        job, found = schema.job.c, list[OpenJob]()
        has_handle = job.handle.is_not(None).label("has_handle")
        columns = job.key, job.runtime, job.state, has_handle, job.updated_at, job.created_at
        place = tuple_(job.created_at, job.key)
        first = select(*columns).where(job.state.in_(_OPEN_STATES), _OPEN)
        query = first = first.order_by(job.created_at, job.key).limit(_FETCHED_AT_ONCE)
        while True:
            rows = await self._fetch(query)
            found += [_seen(row) async for row in in_portions(rows, _READ_AT_ONCE)]
            if len(rows) < _FETCHED_AT_ONCE:
                return found
            last = tuple_(literal(rows[-1].created_at), literal(rows[-1].key))
            query = first.where(place > last)

    async def records(self, keys: Collection[JobKey]) -> Sequence[Record]:
        job, wanted, found = schema.job.c, sorted(keys), list[Record]()
        for start in range(0, len(wanted), _READ_AT_ONCE):
            query = _of_these(wanted[start : start + _READ_AT_ONCE])
            rows = await self._fetch(query.order_by(job.created_at, job.key))
            found += self._reader.read_all(rows)
        return found

    async def quotas(self) -> Sequence[QuotaRow]:
        rows = await self._fetch(select(schema.quota).order_by(schema.quota.c.name))
        return [QuotaRow(row.name, row.live, row.lim) for row in rows]

    async def runtimes(self) -> Sequence[RuntimeRow]:
        rows = await self._fetch(select(schema.runtime).order_by(schema.runtime.c.started))
        return [
            RuntimeRow(
                id=row.id,
                host=row.host,
                pid=row.pid,
                born=row.born,
                started=from_micros(row.started),
                last_beat=from_micros(row.last_beat),
            )
            for row in rows
        ]

    async def paces(self) -> Mapping[str, Sequence[Pace]]:
        found: dict[str, list[Pace]] = {}
        for row in await self._fetch(select(schema.reading)):
            pace = Pace(row.plugin, row.connection, row.jobs, row.every, row.late)
            found.setdefault(row.runtime, []).append(pace)
        return found

    async def _fetch(
        self, query: Executable, values: dict[str, Any] | None = None
    ) -> Sequence[Row[Any]]:
        return await asyncio.shield(self._own(self._read(query, values)))

    def _own(self, reading: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A read goes on though who waits for it is cancelled: cut off half-way, it leaves its connection open."""
        task = asyncio.get_running_loop().create_task(reading)
        self._reading.add(task)
        task.add_done_callback(self._reading.discard)
        return task

    async def _read(
        self, query: Executable, values: dict[str, Any] | None = None
    ) -> Sequence[Row[Any]]:
        async def read() -> Sequence[Row[Any]]:
            async with self._reads.connect() as conn:
                return (await conn.execute(query, values)).all()

        return await self._again(read)

    async def _again(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do what is repeatable, a few times while the trouble may pass."""
        for pause in (*_PAUSES, None):
            try:
                return await work()
            except (SQLAlchemyError, OSError) as exc:
                if pause is None or self._backend.judge(exc) is not Trouble.PASSING:
                    raise self._backend.unavailable(exc) from exc
            await self._clock.sleep(pause)
        raise AssertionError("unreachable")


def _of_these(keys: Collection[JobKey]) -> Select[Any]:
    return select(schema.job).where(schema.job.c.key.in_(sorted(keys)))


def _seen(row: Row[Any]) -> OpenJob:
    try:
        updated_at = from_micros(row.updated_at)
    except (TypeError, OverflowError):
        updated_at = from_micros(0)  # read whole, the record is refused
    return OpenJob(row.key, row.runtime, JobState(row.state), bool(row.has_handle), updated_at)
