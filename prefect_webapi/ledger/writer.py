"""The one writer of a ledger in this process: what is pending is committed together.

Nobody waits for others to gather, unless others just did: while one batch commits, the next one gathers by itself.
A caller that is cancelled doesn't take its operation back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, overload

import anyio
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from prefect_webapi.clock import Clock
from prefect_webapi.contract.errors import LedgerError, LedgerUnavailable
from prefect_webapi.contract.keys import canonical_json
from prefect_webapi.ledger import batch
from prefect_webapi.ledger.backend import Backend, Trouble, copied
from prefect_webapi.ledger.records import Draft, Drawn, Move, MoveResult
from prefect_webapi.ledger.rows import RecordReader
from prefect_webapi.ledger.statements import Statements

__all__ = ["Writer"]

T = TypeVar("T")

MAX_BATCH = 500
ANSWERED_AT_ONCE, WOKEN_AT_ONCE = MAX_BATCH // 4, 50
"""Answers that are given, and callers that go on with theirs, before others get their turn of the loop. A batch has the
data base work three to five times.
"""
A_CROWD, ENOUGH, GATHERING_SECONDS = 3, 50, 0.008
"""Who is one of so many in a batch will be back soon, as the others will. Where fewer of them are there for the next
one, and fewer than enough, it waits for them so long: a transaction takes about the same for one of them and for ten.
"""
REPEATS = 7
_FIRST_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 1.0
_FLUSH_SECONDS = 60.0
_TOLD_WITHIN_SECONDS = 0.05


@dataclass(slots=True, eq=False)
class _Call:
    """A write that is none of the two kinds. It is repeatable and gets a transaction of its own."""

    function: Callable[[Connection], Any]
    future: asyncio.Future[Any]


_Work: TypeAlias = Callable[[Connection, bool], Any]


class Writer:
    """Owns the queue, the task that empties it, and the connection that writes."""

    def __init__(
        self, backend: Backend, engine: AsyncEngine, reader: RecordReader, clock: Clock
    ) -> None:
        self._backend = backend
        self._connection = backend.make_writing_connection(engine, self._on_work)
        self._reader = reader
        self._clock = clock
        self._statements = Statements(backend.dialect)
        self._pending: deque[batch.Operation] = deque()
        self._calls: deque[_Call] = deque()
        self._wake = anyio.Event()
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop
        self._untold: deque[batch.Operation] = deque()
        self._telling: asyncio.TimerHandle | None = None
        self._is_called = False

    @property
    def statements(self) -> Statements:
        return self._statements

    def start(self) -> None:
        # A task group would tie open and close to one task. The owner is the store: it awaits this
        # task in aclose().
        self._loop = asyncio.get_running_loop()
        self._task = self._loop.create_task(self._run(), name="webapi-ledger-writer")

    async def aclose(self) -> None:
        """Write what is pending, then end."""
        self._closing = True
        self._wake.set()
        task, self._task = self._task, None
        if task is None:
            return
        with anyio.CancelScope(shield=True):
            done, _ = await asyncio.wait([task], timeout=_FLUSH_SECONDS)
            if not done:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def intent(self, draft: Draft) -> Drawn:
        [drawn] = await self.intents([draft])
        if isinstance(drawn, LedgerError):
            raise drawn
        return drawn

    async def intents(self, drafts: Sequence[Draft]) -> Sequence[Drawn | LedgerError]:
        if not drafts:
            return []
        party = batch.Party(len(drafts))
        levels = {id(draft.levels): draft.levels for draft in drafts}  # most have the same
        texts = {each: canonical_json(dict(given)) for each, given in levels.items()}
        operations = [batch.Intent(draft, texts[id(draft.levels)], party) for draft in drafts]
        self._put(self._pending, *operations)
        await party.over
        return [_answer_of(operation) for operation in operations]

    async def move(self, move: Move) -> MoveResult:
        operation = batch.Shift(move, batch.Party(1))
        self._put(self._pending, operation)
        await operation.party.over
        result = _answer_of(operation)
        if isinstance(result, LedgerError):
            raise result
        return result

    async def call(self, function: Callable[[Connection], T]) -> T:
        """Run `function` in a transaction of its own, perhaps twice: it must be repeatable."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._put(self._calls, _Call(function, future))
        return await future

    def _put(self, queue: deque[T], *items: T) -> None:
        if self._task is None or self._task.done():
            raise self._closed()
        queue.extend(items)
        self._wake.set()

    def _closed(self) -> LedgerUnavailable:
        return LedgerUnavailable(f"the ledger at {self._backend.address} is closed in this process")

    async def _run(self) -> None:
        written = 0
        try:
            while True:
                if self._pending:
                    if written >= A_CROWD and len(self._pending) < min(written, ENOUGH):
                        await self._tell_rest()
                        await asyncio.sleep(GATHERING_SECONDS)
                    taken = self._take()
                    written = len(taken)
                    await self._commit(taken)
                elif self._calls:
                    await self._commit_call(self._calls.popleft())
                elif self._closing:
                    return
                else:
                    self._wake = anyio.Event()
                    await self._wake.wait()
                # Work that never ends must not keep the rare calls waiting.
                if self._calls and self._pending:
                    await self._commit_call(self._calls.popleft())
        finally:
            with anyio.CancelScope(shield=True):
                await self._tell_rest()
                await self._connection.close()
            for operation in self._pending:
                _tell(operation, self._closed())
            for call in self._calls:
                _fail(call.future, self._closed())

    def _take(self) -> list[batch.Operation]:
        """What is pending, in order; a second move of one job waits for the next batch."""
        taken: list[batch.Operation] = []
        later: list[batch.Operation] = []
        moving: set[str] = set()
        while self._pending and len(taken) < MAX_BATCH:
            operation = self._pending.popleft()
            if isinstance(operation, batch.Shift):
                key = operation.move.old.key
                if key in moving:
                    later.append(operation)
                    continue
                moving.add(key)
            taken.append(operation)
        self._pending.extendleft(reversed(later))
        return taken

    async def _commit(
        self, operations: Sequence[batch.Operation], *, is_repeated: bool = False
    ) -> None:
        def work(conn: Connection, repeated: bool) -> None:
            batch.run(conn, self._statements, self._reader, operations, repeated=repeated)

        attempt = _Attempt(work, is_repeated)
        try:
            await self._repeat(attempt)
        except LedgerUnavailable as exc:
            for operation in operations:
                _tell(operation, copied(exc))
        except Exception as exc:  # noqa: BLE001  one operation must not end the writer of all
            if len(operations) == 1:
                _tell(operations[0], _refused(exc))
                return
            half = len(operations) // 2
            await self._commit(operations[:half], is_repeated=attempt.is_repeated)
            await self._commit(operations[half:], is_repeated=attempt.is_repeated)
        else:
            await self._tell_rest()  # of the batch before
            self._untold.extend(operations)
            if self._pending:
                within = _TOLD_WITHIN_SECONDS
                self._telling = self._loop.call_later(within, self._tell_late)
            else:
                await self._tell_rest()

    def _on_work(self) -> None:
        """The data base is about to work, and the loop has time for those whose batch it has written.

        Who gets an answer goes on. They would otherwise do so when the writer's thread wants Python's lock, and have
        nothing left to do when the data base works.
        """
        if self._untold and not self._is_called:  # a loop that is busy would wake all at once
            self._is_called = True
            with contextlib.suppress(RuntimeError):  # the loop has closed, and nobody waits
                self._loop.call_soon_threadsafe(self._tell_some)

    def _tell_some(self) -> None:
        self._is_called = False
        woken = 0
        for _ in range(min(ANSWERED_AT_ONCE, len(self._untold))):
            woken += self._untold.popleft().party.one_is_answered()
            if woken == WOKEN_AT_ONCE:
                return

    def _tell_late(self) -> None:
        """What is being written may be stuck, and those who wait have nothing to do with it."""
        self._tell_some()
        if self._untold:
            self._telling = self._loop.call_later(0, self._tell_late)

    async def _tell_rest(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
        while self._untold:
            self._tell_some()
            await asyncio.sleep(0)

    async def _commit_call(self, call: _Call) -> None:
        try:
            result = await self._repeat(_Attempt(lambda conn, _repeated: call.function(conn)))
        except LedgerUnavailable as exc:
            _fail(call.future, exc)
        except Exception as exc:  # noqa: BLE001  as above
            _fail(call.future, _refused(exc))
        else:
            _answer(call.future, result)

    async def _repeat(self, attempt: _Attempt) -> Any:
        """Run its work in one transaction, again while the trouble may pass.

        Raises:
            LedgerUnavailable: it did not pass.
        """
        pause = _FIRST_PAUSE_SECONDS
        for left in reversed(range(REPEATS + 1)):
            try:
                return await self._connection.run(attempt)
            except (SQLAlchemyError, OSError) as exc:
                await self._connection.close()
                trouble = self._backend.judge(exc)
                if trouble is Trouble.OPERATION:
                    raise
                if trouble is Trouble.LASTING or not left:
                    raise self._backend.unavailable(exc) from exc
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await self._connection.close()
                raise
            await self._clock.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        raise AssertionError("unreachable")


class _Attempt:
    """One transaction, told whether an earlier one may have been committed after all (`is_repeated`)."""

    def __init__(self, work: _Work, is_repeated: bool = False) -> None:
        self._work = work
        self.is_repeated = is_repeated

    def __call__(self, conn: Connection) -> Any:
        with conn.begin() as transaction:
            result = self._work(conn, self.is_repeated)
            self.is_repeated = True
            transaction.commit()
            return result


def _refused(exc: Exception) -> LedgerError:
    if isinstance(exc, LedgerError):
        return exc
    error = LedgerError(f"the ledger refused this write: {type(exc).__name__}: {exc}")
    error.__cause__ = exc
    return error


def _tell(operation: batch.Operation, error: LedgerError) -> None:
    operation.answer = error
    operation.party.one_is_answered()


@overload
def _answer_of(operation: batch.Intent) -> Drawn | LedgerError: ...


@overload
def _answer_of(operation: batch.Shift) -> MoveResult | LedgerError: ...


def _answer_of(operation: batch.Operation) -> Drawn | MoveResult | LedgerError:
    assert operation.answer is not None
    return operation.answer


def _answer(future: asyncio.Future[Any], answer: Any) -> None:
    if not future.done():  # done: its caller was cancelled
        future.set_result(answer)


def _fail(future: asyncio.Future[Any], error: LedgerError) -> None:
    if not future.done():
        future.set_exception(error)
