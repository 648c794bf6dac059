"""The one thread and loop that own the runtime; the thread-safe door to it.

Flows run on loops and threads of their own, and HTTP clients, limiters and the ledger belong to one loop. So a task
only hands a job over and waits for its outcome; everything else happens here.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from functools import partial
from typing import Protocol, TypeVar

from prefect_webapi.contract.errors import WebApiError
from prefect_webapi.engine.call import Call, Post
from prefect_webapi.engine.reaper import sweep
from prefect_webapi.engine.request import JobRequest, Outcome
from prefect_webapi.engine.runtime import Runtime, too_late
from prefect_webapi.engine.watchdog import watching

__all__ = ["Host", "HostApi", "Ticket", "Waiting"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

SWEEP_SECONDS = 30.0
FIRST_CALLS_SECONDS = 0.2
"""Who starts the engine has a call for it, perhaps thousands, and they go before the first pass over the ledger."""
START_SECONDS = 60.0
STOP_SECONDS = 30.0


class Waiting(Protocol):
    """A task run's place in the engine: what is said to it is thread-safe."""

    async def outcome(self) -> Outcome:
        """Wait on the caller's loop. Cancelling the wait changes nothing remotely."""
        ...

    def cancel(self, reason: str) -> None:
        """The job shall end (user intent). The outcome comes as ABORTED within `cancel_grace`."""
        ...

    def pause(self, *, leaves: bool) -> None:
        """The flow run is paused: the job ends if its connection says so (`cancel_on_pause`).

        Args:
            leaves: it is suspended, its process is to end: otherwise the job is left, as by `detach`.
        """
        ...

    def detach(self) -> None:
        """Leave the job as it is for the next process; the outcome raises `EngineClosed`."""
        ...


class Ticket(Waiting, Protocol):
    """One call's place in the engine, bound to no loop."""

    def outcome_blocking(self, *, is_timed: bool = True) -> Outcome:
        """Wait in the caller's thread, in short steps so that signals get through.

        Args:
            is_timed: a time-out may be raised in this thread; False: it is looked for less often.
        """
        ...

    def when_over(self, tell: Callable[[], None], /) -> None:
        """Call `tell` when the outcome is there, from any thread: it must be quick and raise nothing."""
        ...


class HostApi(Protocol):
    """What the Prefect side needs of a host."""

    def admit(self, request: JobRequest) -> Ticket:
        """Hand a job over; returns at once, from any thread. Errors come with the outcome."""
        ...

    def cancel_flow_run(self, flow_run: str, reason: str) -> None:
        """Every job of this flow run shall end; returns at once, also from a signal handler."""
        ...

    def perform(self, work: Callable[[Runtime], Awaitable[T]], /) -> concurrent.futures.Future[T]:
        """Do some work on the engine's loop; the future is bound to no loop. Raises as `admit`."""
        ...


class Host:
    """Starts the runtime's thread with the first job and ends it in order.

    Args:
        make_runtime: builds the runtime; called on the new loop.
        sweeps: take up what is overdue in the ledger when it starts; False: the caller sweeps by itself.
    """

    def __init__(self, make_runtime: Callable[[], Runtime], *, sweeps: bool = True) -> None:
        self._make_runtime = make_runtime
        self._sweeps = sweeps
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._runtime: Runtime | None = None
        self._failure: BaseException | None = None
        self._closed = False
        self._post: Post = self.post  # one for all calls

    def admit(self, request: JobRequest) -> Ticket:
        """Hand a job over.

        Raises:
            EngineClosed: the process is ending.
            LedgerError, ConfigurationError: the engine can't start; nothing was started.
        """
        self.start()
        call = Call(request, self._post)
        if not self.post(lambda runtime: runtime.admit(call)):
            call.fail(too_late())
        return call

    def cancel_flow_run(self, flow_run: str, reason: str) -> None:
        self.post(lambda runtime: runtime.cancel_flow_run(flow_run, reason))

    def perform(self, work: Callable[[Runtime], Awaitable[T]], /) -> concurrent.futures.Future[T]:
        """Do some work on the engine's loop; the future is bound to no loop. Raises as `admit`."""
        self.start()
        done: concurrent.futures.Future[T] = concurrent.futures.Future()
        if not self.post(lambda runtime: runtime.perform(work, done)):
            done.set_exception(too_late())
        return done

    def post(self, action: Callable[[Runtime], None]) -> bool:
        """Run `action` on the runtime's loop; dropped when there is none, since then nothing is alive.

        Returns:
            Whether there was one.
        """
        runtime = self._runtime
        if runtime is None:
            return False
        runtime.hand_in(partial(action, runtime))
        return True

    def close(self) -> None:
        """Stop admitting, leave live jobs to the next process, flush, end the thread."""
        with self._lock:
            self._closed = True
            thread = self._thread
        if thread is None:
            return
        loop, runtime = self._loop, self._runtime
        if loop is not None and runtime is not None:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(runtime.stop)
        thread.join(STOP_SECONDS)
        if thread.is_alive():
            logger.warning("the engine did not end within %s s", STOP_SECONDS)

    def start(self) -> None:
        """Start the thread, unless it runs. Raises as `admit`."""
        with self._lock:
            if self._closed:
                raise too_late()
            if self._thread is None or not self._thread.is_alive():
                self._ready, self._failure = threading.Event(), None
                self._thread = threading.Thread(
                    target=self._main, args=(self._ready,), name="prefect-webapi", daemon=True
                )
                self._thread.start()
            if not self._ready.wait(START_SECONDS):  # who calls next waits for the same thread
                raise WebApiError(f"the engine did not start within {START_SECONDS:g} s")
            if self._failure is not None:
                self._thread.join(STOP_SECONDS)
                raise self._failure

    def _main(self, ready: threading.Event) -> None:
        try:
            asyncio.run(self._serve(ready))
        except BaseException as error:
            if not ready.is_set():
                self._failure = error
            else:
                logger.exception("the engine has stopped")
        finally:
            runtime, self._runtime, self._loop = self._runtime, None, None
            if runtime is not None:
                runtime.refuse_mail()
            ready.set()

    async def _serve(self, ready: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        runtime = self._make_runtime()
        self._runtime = runtime
        if self._closed:  # while it was made
            runtime.stop()

        def begin() -> None:
            stack.enter_context(watching(runtime.services.metrics))  # before it, there is no job
            if self._sweeps:
                runtime.perform(_sweep_now_and_then, concurrent.futures.Future[None]())
            ready.set()

        with ExitStack() as stack:
            await runtime.run(begin)


async def _sweep_now_and_then(runtime: Runtime) -> None:
    """Take up what is overdue in this ledger: at the start, and while jobs of our own are driven by nobody or wait for
    places that the dead may hold.
    """
    services = runtime.services
    await asyncio.sleep(FIRST_CALLS_SECONDS)
    while True:
        try:
            await sweep(runtime, stay=True)
        except WebApiError as error:
            logger.info("nothing was swept: %s", error)
        except Exception:
            logger.exception(
                "a pass over the ledger failed; the next one is in %s s", SWEEP_SECONDS
            )
        await services.clock.sleep(SWEEP_SECONDS)
        while not (services.quotas.has_waiting or runtime.has_let_go):
            await services.clock.sleep(SWEEP_SECONDS)
