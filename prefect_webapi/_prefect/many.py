"""Many jobs in one task run: handed over together, collected as they end, each retried by itself.

Prefect's own cost of a task run, some 100 ms of CPU, is paid once for all of them.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from prefect.client.schemas.objects import State
from prefect.context import TaskRunContext
from prefect.states import Completed, Failed

from prefect_webapi._prefect import states
from prefect_webapi._prefect.body import Call, Job, driven, request_of
from prefect_webapi._prefect.identity import attempt_of, caller, chain_here
from prefect_webapi._prefect.options import Options
from prefect_webapi._prefect.reports import ManyReporter
from prefect_webapi._prefect.service import Engine
from prefect_webapi.contract.errors import EngineClosed
from prefect_webapi.contract.keys import JobKey
from prefect_webapi.contract.phase import Phase
from prefect_webapi.contract.task import JobSpec
from prefect_webapi.engine.request import JobRequest, Outcome

if TYPE_CHECKING:  # the engine itself is loaded by the first job
    from prefect_webapi.engine.host import HostApi, Ticket

__all__ = ["run_jobs"]

ADMITTED_AT_ONCE = 200
"""So many are handed over before other tasks of the flow's loop get their turn."""


async def run_jobs(
    job: Job,
    name: str,
    load: Callable[[], Options],
    specs: Sequence[JobSpec[Any]],
    *,
    retries: int,
    delays: Sequence[float],
    raise_on_failure: bool,
) -> State[Any]:
    """The body of the task run. Its state holds the results and failures in the order of the specs.

    Args:
        name: the task's.
        delays: seconds before each retry of a job; the last one counts for those after it too.
    """
    context = TaskRunContext.get()
    assert context is not None
    run = context.task_run

    def admit(engine: Engine) -> Call[_Jobs]:
        reporter = ManyReporter(engine.display, len(specs))
        who = caller(run, chain=chain_here(own=run.id), run_key=engine.run_key, retries=retries)

        first = attempt_of(run)
        # What is the same for all of them is there once: the spec and its place are a job's own.
        one = request_of(job, specs[0], who, reporter, task_name=name, attempt=first, inputs={})

        def request(index: int, attempt: int) -> JobRequest:
            spec = specs[index]
            return replace(
                one, spec=spec, nth=index, attempt=max(attempt, first), inputs=_inputs_of(spec)
            )

        jobs = _Jobs(engine.host, request, len(specs), retries, delays, reporter)
        return Call(engine, jobs, reporter, job, who, run, jobs.ended)

    async def end(call: Call[_Jobs]) -> State[Any]:
        await call.ticket.start()
        outcomes = await call.ticket.outcomes()
        stopped = next(filter(call.ticket.has_stopped, outcomes), None)
        if stopped is not None:
            return states.cancelled(stopped.info.reason or "cancelled", stopped)
        return _end(outcomes, raise_on_failure)

    return await driven(load, admit, end)


def _inputs_of(spec: JobSpec[Any]) -> Mapping[str, Any]:
    """Its fields, by name; where it can be, the mapping that the spec has itself: there are many."""
    return dict(spec) if spec.model_extra else vars(spec)


def _end(outcomes: Sequence[Outcome], raise_on_failure: bool) -> State[Any]:
    ends = [
        each.value if each.info.phase is Phase.SUCCESS else states.job_failed(each)
        for each in outcomes
    ]
    failed = [each for each in outcomes if each.info.phase is not Phase.SUCCESS]
    if not failed:
        return Completed(message=f"{len(ends)} jobs succeeded.", data=ends)
    counted = f"{len(failed)} of {len(ends)} jobs failed"
    if not raise_on_failure:
        return Completed(message=f"{counted}.", data=ends)
    first = states.ending(failed[0])
    failure = states.job_failed(failed[0])
    failure.add_note(f"{counted}; this is the first of them")
    return Failed(message=f"{counted}. The first: {first.message}", data=failure)


class _Running:
    """One of the jobs that are not over; called when it is."""

    __slots__ = ("_note", "attempt", "index", "ticket")

    def __init__(
        self, note: Callable[[int], None], index: int, attempt: int, ticket: Ticket
    ) -> None:
        self._note = note
        self.index = index
        self.attempt = attempt
        self.ticket = ticket

    def __call__(self) -> None:
        self._note(self.index)


class _Jobs:
    """The jobs of the task run as one (`engine.host.Waiting`): what is said to it is said to all that are not over.

    `start`, `outcomes` and `outcome` belong to the flow's loop, the rest to any thread.

    Attributes:
        ended: as in `body.Call`; each as soon as it is over.
    """

    def __init__(
        self,
        host: HostApi,
        request: Callable[[int, int], JobRequest],
        count: int,
        retries: int,
        delays: Sequence[float],
        reporter: ManyReporter,
    ) -> None:
        self._host = host
        self._request = request
        self._retries = retries
        self._delays = delays
        self._reporter = reporter
        self._lock = threading.Lock()
        self._running: dict[int, _Running] = {}
        self._ends: list[Outcome | None] = [None] * count
        self.ended: list[JobKey] = []
        self._left = 0
        self._backing_off: dict[int, tuple[asyncio.TimerHandle, Outcome]] = {}
        self._over: deque[int] = deque()
        self._stirred = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._stop: Callable[[Ticket], None] | None = None
        self._is_cancelled = self._is_paused = False
        self._error: Exception | None = None
        self._note_over: Callable[[int], None] = self._note  # one for all of them

    async def start(self) -> None:
        for index in range(len(self._ends)):
            self._admit(index, 1)
            self._left += 1
            if index % ADMITTED_AT_ONCE == ADMITTED_AT_ONCE - 1:
                await asyncio.sleep(0)

    async def outcomes(self) -> list[Outcome]:
        """How each that was handed over has ended, in order.

        Raises:
            Exception: what kept one of them from having an end; the others have theirs.
        """
        await self._collect()
        if self._error is not None:
            raise self._error
        return [end for end in self._ends if end is not None]

    # --- all of them as one -----------------------------------------------------------

    async def outcome(self) -> Outcome:
        """One of the ends, when all are over."""
        return (await self.outcomes())[-1]

    def cancel(self, reason: str) -> None:
        self._is_cancelled = True
        self._say(lambda ticket: ticket.cancel(reason))

    def pause(self, *, leaves: bool) -> None:
        self._is_paused = True
        # Of a flow run that is only paused we hear again for as long as it is: then the jobs go on.
        self._say(lambda ticket: ticket.pause(leaves=leaves), ends=leaves, leaves=leaves)

    def detach(self) -> None:
        self._say(lambda ticket: ticket.detach(), leaves=True)

    def has_stopped(self, outcome: Outcome) -> bool:
        """Whether a job was stopped with all others, and not by itself: by its deadline, or by an operator."""
        stops = self._is_cancelled or (self._is_paused and outcome.settings.cancel_on_pause)
        return stops and outcome.stopped_by_us and outcome.info.phase is Phase.ABORTED

    def _say(
        self, what: Callable[[Ticket], None], *, ends: bool = True, leaves: bool = False
    ) -> None:
        with self._lock:
            if ends:
                self._stop = what
            running = list(self._running.values())
        for job in running:
            what(job.ticket)
        if ends:
            with suppress(RuntimeError):  # as in `_note`
                self._loop.call_soon_threadsafe(self._retry_none, leaves)

    # --- one job -----------------------------------------------------------------------------

    def _admit(self, index: int, attempt: int) -> None:
        ticket = self._host.admit(self._request(index, attempt))
        job = _Running(self._note_over, index, attempt, ticket)
        with self._lock:
            self._running[index] = job
            stop = self._stop
        if stop is not None:
            stop(ticket)
        ticket.when_over(job)

    def _note(self, index: int) -> None:
        with self._lock:  # of two at once, one has to be the first
            self._over.append(index)
            is_first = len(self._over) == 1
        if is_first:  # else the loop is awake, or about to be
            with suppress(RuntimeError):  # it has ended; nobody waits any more
                self._loop.call_soon_threadsafe(self._stirred.set)

    async def _collect(self) -> None:
        while self._left:
            self._stirred.clear()
            while self._over:
                self._take(self._over.popleft())
            if self._left:
                await self._stirred.wait()

    def _take(self, index: int) -> None:
        with self._lock:
            job = self._running.pop(index)
            stopping = self._stop is not None
        try:
            outcome = job.ticket.outcome_blocking()
        except Exception as error:  # noqa: BLE001 - the engine hands on what it did not foresee, too
            self._fail(error)
            return
        self._ends[index] = outcome
        if not outcome.is_of_another_run:
            self.ended.append(outcome.job_key)
        if outcome.info.may_retry and job.attempt <= self._retries and not stopping:
            delay = self._delays[min(job.attempt, len(self._delays)) - 1]
            timer = self._loop.call_later(delay, self._retry, index, job.attempt + 1)
            self._backing_off[index] = timer, outcome
            self._reporter.again(outcome.job_key)
            return
        self._count(outcome)

    def _count(self, outcome: Outcome) -> None:
        self._left -= 1
        self._reporter.over(outcome)

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._left -= 1

    def _retry(self, index: int, attempt: int) -> None:
        del self._backing_off[index]
        try:
            self._admit(index, attempt)
        except Exception as error:  # noqa: BLE001 - the loop would only log it, and we wait for ever
            self._fail(error)
            self._stirred.set()

    def _retry_none(self, leaves: bool) -> None:
        """Those that wait for their next attempt don't get it: they have ended as they have."""
        waiting = list(self._backing_off.values())
        self._backing_off.clear()
        for timer, outcome in waiting:
            timer.cancel()
            if leaves:
                self._fail(EngineClosed("the process is ending; the next run tries the job again"))
            else:
                self._count(outcome)
        self._stirred.set()
