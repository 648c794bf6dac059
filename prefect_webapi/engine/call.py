"""One call that waits for a job: what is said to it from any thread, and how it hears the end."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from prefect_webapi.engine.request import JobRequest, Outcome

__all__ = ["Call", "Post", "Server"]

STEP_SECONDS, STEP_SECONDS_OF_MANY, LONG_STEP_SECONDS = 0.2, 1.0, 5.0
"""A blocking wait is cut into steps, so that signals get through; in threads beside the main one, of which a flow may
have hundreds, what Prefect raises there when a task's time is over; where no such time is set, whatever else may be
raised is heard later, as each step takes CPU."""

_answering = threading.Lock()
"""Held for the moment in which a call gets its answer or another listener, by all calls alike."""


def _forget() -> None:
    """A fork may have come at that moment, and who held it is not in the child."""
    global _answering
    _answering = threading.Lock()


os.register_at_fork(after_in_child=_forget)


class Server(Protocol):
    """Who serves calls; on its own loop."""

    def cancel(self, call: Call, reason: str) -> None: ...

    def pause(self, call: Call, leaves: bool) -> None: ...

    def detach(self, call: Call) -> None: ...


Post = Callable[[Callable[[Server], None]], object]
"""Has something done on the server's loop; from any thread, at once."""


class Call:
    """A `host.Ticket`: one call's place in the engine, bound to no loop. It is told its end once.

    A `concurrent.futures.Future` would do, and takes more memory than everything else of a live job.

    Attributes:
        job: the server's, once that is found; nothing here looks into it.
    """

    __slots__ = ("_end", "_listeners", "_post", "job", "request")

    def __init__(self, request: JobRequest, post: Post) -> None:
        self.request = request
        self.job: Any = None
        self._post = post
        self._end: Outcome | Exception | None = None
        self._listeners: tuple[Callable[[], None], ...] = ()

    # --- who asked -------------------------------------------------------------------------

    async def outcome(self) -> Outcome:
        loop = asyncio.get_running_loop()
        arrived: asyncio.Future[None] = loop.create_future()

        def arrive() -> None:
            if not arrived.done():
                arrived.set_result(None)

        def tell() -> None:
            with suppress(RuntimeError):  # the caller's loop has ended; nobody waits any more
                loop.call_soon_threadsafe(arrive)

        self.when_over(tell)
        await arrived
        return self.result()

    def outcome_blocking(self, *, is_timed: bool = True) -> Outcome:
        over = threading.Event()
        self.when_over(over.set)
        is_main = threading.current_thread() is threading.main_thread()
        step = STEP_SECONDS_OF_MANY if is_timed else LONG_STEP_SECONDS
        while not over.wait(STEP_SECONDS if is_main else step):
            pass
        return self.result()

    def when_over(self, tell: Callable[[], None], /) -> None:
        """Call `tell` when the end is there: at once, or in the engine's thread. It must raise nothing."""
        with _answering:
            if self._end is None:
                self._listeners = (*self._listeners, tell)
                return
        tell()

    def cancel(self, reason: str) -> None:
        self._post(lambda server: server.cancel(self, reason))

    def pause(self, *, leaves: bool) -> None:
        self._post(lambda server: server.pause(self, leaves))

    def detach(self) -> None:
        self._post(lambda server: server.detach(self))

    # --- who serves it -----------------------------------------------------------------------

    @property
    def is_waiting(self) -> bool:
        return self._end is None

    def answer(self, outcome: Outcome) -> None:
        self._tell(outcome)

    def fail(self, error: Exception) -> None:
        self._tell(error)

    def result(self) -> Outcome:
        """The outcome of a call that waits no more. Raises what it failed with."""
        if isinstance(self._end, Exception):
            raise self._end
        assert self._end is not None
        return self._end

    def _tell(self, end: Outcome | Exception) -> None:
        with _answering:
            if self._end is not None:
                return
            self._end, self.job = end, None
            listeners, self._listeners = self._listeners, ()
        for tell in listeners:
            tell()
