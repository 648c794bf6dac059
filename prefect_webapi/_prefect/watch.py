"""Hears of cancellation where Prefect doesn't tell the task: submitted tasks above all.

A task in a pool thread gets no interrupt; it is killed after 30 s. So this process looks by itself: at what
the runner said over its control channel, at signals, at a flow that failed around a running task, and at
the flow run's state in Prefect's API. It only ends jobs of people who wanted that: a flow run that is
rescheduled or relinquished leaves its jobs to the next process.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext
from prefect.utilities import engine as prefects_engine

from prefect_webapi._prefect.causes import LEAVING_INTENTS, control_intent, reason_of
from prefect_webapi.bell import Bell
from prefect_webapi.contract.errors import WebApiError

if TYPE_CHECKING:  # the engine's parts are loaded by the first job
    from prefect_webapi._prefect.api import Api
    from prefect_webapi.engine.host import Waiting

__all__ = ["MOST_RUNS", "Watch", "cancel_event_of", "read_flow_runs"]

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.2
"""How often this process looks at itself; the API is asked less often."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)
MOST_RUNS = 200
"""Flow runs asked about in one request: the API's own limit for a page."""
KEPT_REASONS = 1_000
"""A task reads the reason as it ends; in a task worker there come ever more flow runs."""

Handler = Callable[[int, FrameType | None], Any]


def cancel_event_of(task_run: UUID) -> threading.Event | None:
    """The event that a thread pool runner sets for a task when it shuts down.

    `ThreadPoolTaskRunner._cancel_events` is private. It is set when the flow ends in any way, also in
    order, so it means something only together with the flow run's state.
    """
    context = FlowRunContext.get()
    runner: Any = context.task_runner if context else None
    event = getattr(runner, "_cancel_events", {}).get(task_run)
    return event if isinstance(event, threading.Event) else None


@dataclass(slots=True, eq=False)
class _Watched:
    """A call that waits, and the flow runs whose cancellation ends it."""

    ticket: Waiting
    flow_runs: frozenset[str]
    flow: FlowRunContext | None
    flow_state: UUID | None  # of the flow run when the call was made
    cancel_event: threading.Event | None
    leaves_job: bool  # as its task says, by on_exit
    is_told: bool = False

    def tell(self, reason: str) -> None:
        """Its job shall end, or be left; said once."""
        if not self.is_told:
            self.is_told = True
            if self.leaves_job:
                self.ticket.detach()
            else:
                self.ticket.cancel(reason)

    @property
    def is_shut_down(self) -> bool:
        """The flow's function is over, in whatever way, and its runner ends what is in its pool."""
        return self.cancel_event is not None and self.cancel_event.is_set()

    @property
    def was_abandoned(self) -> bool:
        """Its flow was broken off, or failed, while the task was still running in a pool.

        The runner's event alone says only that the flow's function is over. When that is so in good order, or for a
        retry, a pause or a suspension, the flow run has got a new state before.
        """
        if not self.is_shut_down:
            return False
        run = self.flow.flow_run if self.flow else None
        if self.flow is None or run is None or run.state is None:
            return False
        if self.flow.flow_run_suspension_request.is_requested():
            return False
        return run.state.id == self.flow_state or run.state.is_failed() or run.state.is_crashed()


class Watch:
    """The calls of one process that wait. `run` belongs to the runtime's loop, the rest to any thread."""

    def __init__(self) -> None:
        self._watched: dict[int, _Watched] = {}
        self._lock = threading.Lock()
        self._signal: signal.Signals | None = None
        self._last: tuple[float, signal.Signals] | None = None
        self._bell = Bell()
        self._told = False
        self._looks_soon = False
        self._reasons: dict[str, str] = {}  # by flow run, whose jobs were told to end
        self._missing: dict[str, float] = {}  # flow run to when it was first missing, monotonic

    def add(
        self,
        ticket: Waiting,
        flow_runs: Iterable[str],
        task_run: UUID,
        *,
        leaves_job: bool = False,
    ) -> Callable[[], None]:
        """Watch over a call until the returned function is called. Called in the task's context.

        Args:
            leaves_job: whatever ends the call, its job goes on.
        """
        flow = FlowRunContext.get()
        run = flow.flow_run if flow else None
        watched = _Watched(
            ticket,
            frozenset(filter(None, flow_runs)),
            flow,
            run.state.id if run and run.state else None,
            cancel_event_of(task_run),
            leaves_job,
        )
        with self._lock:
            self._watched[id(watched)] = watched
            looks_soon = self._looks_soon
        self.listen()
        if not looks_soon:  # else at all of them, without being told
            self._bell.ring()

        def forget() -> None:
            with self._lock:
                self._watched.pop(id(watched), None)

        return forget

    # --- signals ------------------------------------------------------------------------------------

    def listen(self) -> None:
        """Stand in front of the present signal handlers; nothing where this isn't the main thread.

        Prefect installs its own at each flow's start and takes it away at the end, so this is asked again
        by each call.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        with prefects_engine._prefect_sigterm_bridge_lock:  # pyright: ignore[reportPrivateUsage] # see `_bridge`
            for number in SIGNALS:
                present = signal.getsignal(number)
                if callable(present) and not _is_ours(present, self):
                    chained = _Chained(self, present)
                    if present is _bridge():
                        prefects_engine._prefect_sigterm_handler = chained  # pyright: ignore[reportPrivateUsage] # see `_bridge`
                    signal.signal(number, chained)

    def heard(self, number: int) -> None:
        self._signal = signal.Signals(number)
        self._last = time.monotonic(), self._signal
        self._bell.ring()

    def reason_told_to(self, flow_run: UUID) -> str | None:
        """Why the jobs of this flow run were told to end; None: they were not."""
        return self._reasons.get(str(flow_run))

    def signal_since(self, at: float) -> signal.Signals | None:
        """The last signal, if it came after this monotonic time."""
        return self._last[1] if self._last is not None and self._last[0] >= at else None

    # --- the runtime's side -----------------------------------------------------------------------------

    async def run(self, api: Api, every_seconds: float, deleted_after: float) -> None:
        """Look until cancelled; ask the API every so often. Seconds are real ones.

        Args:
            deleted_after: how long a flow run is missing from Prefect until its jobs end.
        """
        asked_at = time.monotonic()
        with self._bell.heard():
            while True:
                self._bell.look()
                with self._lock:
                    watched = list(self._watched.values())
                    self._looks_soon = bool(watched)
                self._look(watched)
                if watched and time.monotonic() - asked_at >= every_seconds:
                    asked_at = time.monotonic()
                    await self._ask(watched, api, deleted_after)
                await self._bell.wait(LOOK_SECONDS if watched else None)

    def _look(self, watched: list[_Watched]) -> None:
        heard, self._signal = self._signal, None
        intent = control_intent()
        if intent in LEAVING_INTENTS:
            for each in watched:
                each.is_told = True
                each.ticket.detach()
        elif intent == "cancel":
            self._cancel(watched, "the flow run was cancelled")
        elif heard is not None:
            self._cancel(
                [each for each in watched if each.flow_runs],
                reason_of(heard),
            )
        else:
            self._cancel([each for each in watched if each.was_abandoned], "the flow run ended")

    def _cancel(self, watched: Iterable[_Watched], reason: str) -> None:
        for each in watched:
            each.tell(reason)

    def _cancel_run(self, watched: Iterable[_Watched], run: str, reason: str) -> None:
        # Before any of them ends: one end makes asyncio cancel the others.
        self._reasons[run] = reason
        if len(self._reasons) > KEPT_REASONS:
            del self._reasons[next(iter(self._reasons))]
        self._cancel([each for each in watched if run in each.flow_runs], reason)

    async def _ask(self, watched: list[_Watched], api: Api, deleted_after: float) -> None:
        """Ask Prefect whether somebody cancelled, paused or deleted a flow run that we have jobs for."""
        ids = sorted({run for each in watched for run in each.flow_runs})
        for run_id in self._missing.keys() - set(ids):  # none of our jobs is its any more
            del self._missing[run_id]
        try:
            for start in range(0, len(ids), MOST_RUNS):
                reading = partial(
                    read_flow_runs, [UUID(run) for run in ids[start : start + MOST_RUNS]]
                )
                missing = set(ids[start : start + MOST_RUNS])
                for run in await api.once("read flow runs", reading):
                    missing.discard(str(run.id))
                    self._missing.pop(str(run.id), None)
                    if run.state is not None and _is_cancelled(run.state):
                        self._cancel_run(watched, str(run.id), "the flow run was cancelled")
                    elif run.state is not None and run.state.is_paused():
                        for each in watched:
                            if str(run.id) in each.flow_runs:
                                # A flow that is suspended waits for its pool's threads before its process ends.
                                each.ticket.pause(leaves=each.is_shut_down)
                for run_id in missing:
                    now = time.monotonic()
                    if now - self._missing.setdefault(run_id, now) >= deleted_after:
                        self._cancel_run(watched, run_id, "the flow run was deleted")
            self._told = False
        except WebApiError as error:
            if not self._told:
                self._told = True
                logger.warning("cancelled flow runs can't be heard of for now: %s", error)


async def read_flow_runs(wanted: list[UUID], client: PrefectClient) -> list[FlowRun]:
    """The flow runs of these ids that exist; at most `MOST_RUNS` of them."""
    return await client.read_flow_runs(
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=wanted)), limit=MOST_RUNS
    )


def _is_cancelled(state: State[Any]) -> bool:
    return state.is_cancelling() or state.is_cancelled()


class _Chained:
    """A signal handler that makes a note and then lets the former one act."""

    def __init__(self, watch: Watch, former: Any) -> None:
        self.watch = watch
        self._former = cast(Handler, former)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.watch.heard(number)  # first: Prefect's handler raises inside whatever happens to run
        self._former(number, frame)


def _is_ours(handler: Any, watch: Watch) -> bool:
    return isinstance(handler, _Chained) and handler.watch is watch


def _bridge() -> Any:
    """Prefect's own SIGTERM handler.

    `prefect.utilities.engine._prefect_sigterm_handler` is private. A flow process tells its runner that it has
    understood "cancel" or "reschedule" only while this very object is the handler; else the runner takes the run for
    crashed, or kills it. So ours takes its place under that name too.
    """
    return prefects_engine._prefect_sigterm_handler  # pyright: ignore[reportPrivateUsage] # see above
