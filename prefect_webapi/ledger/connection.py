"""The connection that writes: what is done on it is a function of SQLAlchemy's own connection, on both data bases."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Protocol, TypeVar

import anyio.to_thread
from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

__all__ = ["OnLoop", "OnThread", "WritingConnection"]

T = TypeVar("T")


class WritingConnection(Protocol):
    """One connection, opened when it is needed; for one piece of work at a time.

    Each is made with `on_work`: called when the data base is about to work, in the thread that waits for it.
    """

    async def run(self, work: Callable[[Connection], T]) -> T:
        """Do it, and raise what connecting or the work raises."""
        ...

    async def close(self) -> None:
        """The next work gets a new one. Raises nothing of the data base's."""
        ...


class OnLoop:
    """To a server: the driver waits for it on the loop."""

    def __init__(self, engine: AsyncEngine, on_work: Callable[[], None]) -> None:
        self._engine = engine
        self._on_work = on_work
        self._conn: AsyncConnection | None = None

    async def run(self, work: Callable[[Connection], T]) -> T:
        if self._conn is None:
            self._conn = await self._engine.connect()
            _listen(self._conn.sync_connection, self._on_work)
        return await self._conn.run_sync(work)

    async def close(self) -> None:
        conn, self._conn = self._conn, None
        if conn is not None:
            with contextlib.suppress(SQLAlchemyError, OSError):
                await conn.close()


class OnThread:
    """To SQLite, which works in the thread that asks it: a transaction is one hop to a thread and back.

    Each step of each statement would be one otherwise, and what is made of the rows would keep the loop.
    """

    def __init__(self, engine: Engine, on_work: Callable[[], None]) -> None:
        self._engine = engine
        self._on_work = on_work
        self._conn: Connection | None = None
        self._used = threading.Lock()  # a wait that is cancelled leaves its work behind

    async def run(self, work: Callable[[Connection], T]) -> T:
        return await anyio.to_thread.run_sync(self._run, work, limiter=_own_thread())

    def _run(self, work: Callable[[Connection], T]) -> T:
        with self._used:
            if self._conn is None:
                self._conn = self._engine.connect()
                _listen(self._conn, self._on_work)
            return work(self._conn)

    async def close(self) -> None:
        await anyio.to_thread.run_sync(self._close, limiter=_own_thread())

    def _close(self) -> None:
        with self._used:
            conn, self._conn = self._conn, None
            if conn is not None:
                with contextlib.suppress(SQLAlchemyError, OSError):
                    conn.close()


def _own_thread() -> anyio.CapacityLimiter:
    """None of those that authors' calls may all have taken."""
    return anyio.CapacityLimiter(1)


def _listen(conn: Connection | None, on_work: Callable[[], None]) -> None:
    for happens in ("before_cursor_execute", "commit"):
        event.listen(conn, happens, lambda *_: on_work())
