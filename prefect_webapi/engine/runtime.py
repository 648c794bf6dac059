"""Drives the jobs of one process: takes calls, follows the machine, persists before it acts.

All of it runs on one loop. A job has a coroutine of its own while it is being created and while it ends; in
between it is an entry of a poller and costs no task. One way in (`admit`), one way out (`_deliver`).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

import anyio
import anyio.abc
from pydantic import ValidationError

from prefect_webapi.bell import Bell
from prefect_webapi.contract.errors import (
    EngineClosed,
    LedgerConflict,
    LedgerError,
    NotFound,
    RemoteError,
    WebApiError,
)
from prefect_webapi.contract.keys import Fingerprint, JobKey
from prefect_webapi.contract.phase import Phase, PhaseInfo
from prefect_webapi.engine.adapters import handle_adapter
from prefect_webapi.engine.call import Call
from prefect_webapi.engine.calls import Calls, can_clear_up, is_sync
from prefect_webapi.engine.cancel import ask_to_end, note_duty
from prefect_webapi.engine.channels import Channel, Channels
from prefect_webapi.engine.contexts import ReadView, StatusView
from prefect_webapi.engine.drafts import conflict, draft_for
from prefect_webapi.engine.durations import Durations
from prefect_webapi.engine.faults import fault_point
from prefect_webapi.engine.handover import (
    Others,
    close,
    outcome_of,
    release,
    request_of,
    spec_of,
    take_over,
)
from prefect_webapi.engine.job import Ending, Job, note_lease, persist
from prefect_webapi.engine.liveness import BEAT_EVERY
from prefect_webapi.engine.lobby import Lobby
from prefect_webapi.engine.machine import Event
from prefect_webapi.engine.observe import Observer
from prefect_webapi.engine.outputs import Collected, collect
from prefect_webapi.engine.request import JobRequest, Outcome, outermost_run
from prefect_webapi.engine.services import Services
from prefect_webapi.engine.submit import (
    Alive,
    Answered,
    GivenUp,
    Refused,
    Stuck,
    outcome_unknown,
    submit,
    without_handle,
)
from prefect_webapi.ledger.records import (
    Draft,
    Drawn,
    JobState,
    Record,
    RuntimeRow,
)
from prefect_webapi.poller import Observation
from prefect_webapi.portions import in_portions
from prefect_webapi.registry import Loaded

__all__ = ["Runtime", "too_late"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

HOUSEKEEPING_SECONDS = 1.0
WISH_SECONDS = 10.0
"""So often a wish to end a job is offered to a ledger that does not take it."""
CLOSING_SECONDS = 5.0
"""How long a closing runtime waits for deletes that are a duty already, for creates that were sent, and for records of
jobs that were just delivered to be closed."""


READ_AT_ONCE = 200
"""Letters that are read before others get their turn of the loop."""
COUNTED_AT_ONCE = 5_000
"""Jobs that are counted for the gauges before others get their turn of the loop; and so many a second at most."""
COUNTED_EACH_SECOND, COUNTED_EVERY = 200, 5.0
"""Up to so many jobs are counted each second, more of them each five: for a thousand, a count a second took a sixth of
the CPU that reading them takes."""
COMING_IN, COMING_BACK, TOGETHER = 400, 1_000, 100
"""Calls of a connection whose records are looked for at one time, and by one question: the loop is not held up by them
for long, and has the next ones ready when the ledger has answered. Who finds a job that was left behind needs no task,
so that more of them may come.
"""
ENTERED_AT_ONCE = 25
"""Calls that are helped on their way before others get their turn of the loop."""
TO_BE_SENT = 1_000
"""Jobs of a connection that wait with a task each for a permit, to be made or to be deleted; and of each set of quotas
that wait for places."""
COMING_TO_END = 500
"""Jobs of a connection whose results are fetched and written down at one time, and so many each of other ends and of
duties to delete: as many as the ledger takes in one transaction. The collector looks at what each of them holds."""
SYNC_GRACE_SECONDS = 0.5


class Runtime:
    """The engine of one process. `run()` is its life; the other methods belong to the same loop.

    Attributes:
        has_let_go: jobs may be ours in the ledger that are not driven; a pass of the sweeper looks at them.
    """

    def __init__(self, services: Services, me: RuntimeRow) -> None:
        self._services = services
        self._me = me
        self._calls = Calls(services)
        self._others = Others(services, me)
        self._jobs: dict[JobKey, Job] = {}
        self._entering: set[Call] = set()
        self._entrance = Lobby[Call](_line_of, COMING_IN, TOGETHER, self._let_in, self._open)
        self._to_send = Lobby[Job](
            self._queue_of, TO_BE_SENT, ENTERED_AT_ONCE, self._let_send, self._open
        )
        self._to_delete = Lobby[Job](
            self._channel_of,
            TO_BE_SENT,
            ENTERED_AT_ONCE,
            partial(self._start_each, self._delete),
            self._open,
        )
        self._to_end = Lobby[_Step](
            self._kind_of,
            COMING_TO_END,
            ENTERED_AT_ONCE,
            partial(self._start_each, self._write),
            self._open,
        )
        self._parties: set[asyncio.Event] = set()
        # One party is helped on its way at a time: a portion of each would make a long turn.
        self._helping = asyncio.Lock()
        self._ended: dict[Call, Ending] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._mail = Bell()
        self._stop = asyncio.Event()
        self._performing: set[concurrent.futures.Future[Any]] = set()
        self._closing = False
        self._is_over = False
        self._settling = 0
        self._has_told_paces = False
        self.has_let_go = False
        self._tasks: anyio.abc.TaskGroup
        self._channels: Channels
        self._durations: Durations
        self._observer: Observer

    # --- life --------------------------------------------------------------------------------

    async def run(self, ready: Callable[[], None]) -> None:
        """Open the ledger, serve until `stop`, close in order. `ready()` says that calls may come."""
        services = self._services
        await services.store.open()
        try:
            await services.store.beat(self._me)
            services.pulse.last = self._me.last_beat
            await self._others.look()
            self._durations = Durations(await services.store.durations())
            async with services.quotas, anyio.create_task_group() as self._tasks:
                self._channels = Channels(services, self._calls, self._tasks, self._observe)
                self._observer = Observer(
                    services, self._calls, self._channels, self._durations, self
                )
                self._tasks.start_soon(self._read_mail)
                self._tasks.start_soon(self._keep_house)
                self._tasks.start_soon(self._look_at_blocks)
                ready()
                await self._stop.wait()
                self._closing = True
                await self._close()
                self._tasks.cancel_scope.cancel()
            await self._keep_durations()
            await services.store.farewell(self._me.id)
        finally:
            self._closing = True
            self._leave_all()
            self.refuse_mail()
            with anyio.CancelScope(shield=True):
                await services.plugins.aclose()
                await services.store.aclose()

    def stop(self) -> None:
        """Admit nothing more, leave what is alive to the next process, and end `run`."""
        self._stop.set()

    def post(self, action: Callable[[], None]) -> None:
        """Have the runtime do something in its own task: callbacks of the loop may not start tasks."""
        self._inbox.append(action)
        self._mail.ring_here()

    def hand_in(self, action: Callable[[], None]) -> None:
        """As `post`, from any thread. What comes when the runtime is over is done all the same, and finds nothing."""
        self._inbox.append(action)  # first: whoever is last to look does it
        if self._is_over:
            self.refuse_mail()
        else:
            self._mail.ring()

    def refuse_mail(self) -> None:
        """The runtime is over: who still comes is told so."""
        self._closing = self._is_over = True
        while True:
            try:
                action = self._inbox.popleft()
            except IndexError:
                return
            action()

    def _open(self, open_line: Callable[[], None]) -> None:
        """Have those come in who wait in a line; when the runtime is over nobody does: they have been told."""

        def open_if_alive() -> None:
            if not self._is_over:
                open_line()

        self.post(open_if_alive)

    def _start_each(
        self, step: Callable[[T], Coroutine[Any, Any, None]], those: Sequence[T]
    ) -> None:
        """Let them in with a task each."""
        for each in those:
            self._tasks.start_soon(step, each)

    async def _read_mail(self) -> None:
        with self._mail.heard():
            while True:
                self._mail.look()
                while self._inbox:
                    for _ in range(min(READ_AT_ONCE, len(self._inbox))):
                        self._inbox.popleft()()
                    await asyncio.sleep(0)
                await self._mail.wait()

    async def _close(self) -> None:
        """What must not stop half-way gets a moment; everything else stays as the ledger has it."""
        self._fail_calls([job for job in self._jobs.values() if job.ending is None])
        for job in list(self._jobs.values()):
            if job.ending is None:
                job.leave()
            if self._leave_line(job):
                self._let_go(job)
        with anyio.move_on_after(CLOSING_SECONDS):
            while self._settling or any(  # noqa: ASYNC110 - bounded by the scope, only at the very end
                job.is_creating or (job.ending and not job.delete_taken)
                for job in self._jobs.values()
            ):
                await anyio.sleep(0.05)

    def _leave_all(self) -> None:
        self._fail_calls(list(self._jobs.values()))
        for job in self._jobs.values():
            job.stop_timers()
        for done in self._performing:  # their tasks had no time to begin
            with suppress(concurrent.futures.InvalidStateError):
                done.set_exception(EngineClosed("the process is ending"))

    def _fail_calls(self, jobs: Sequence[Job]) -> None:
        closed = EngineClosed("the process is ending; the job goes on and the next run takes it up")
        for call in [*self._entering, *(call for job in jobs for call in job.calls)]:
            call.fail(closed)

    # --- the way in --------------------------------------------------------------------------

    def admit(self, call: Call) -> None:
        """Take a call. Whatever goes wrong is told through its future."""
        if self._closing or self._stop.is_set():
            call.fail(too_late())
            return
        self._entering.add(call)
        self._entrance.come(call)

    @property
    def services(self) -> Services:
        return self._services

    @property
    def me(self) -> RuntimeRow:
        return self._me

    @property
    def is_crowded(self) -> bool:
        """Whether calls wait until others have found their records."""
        return self._entrance.is_crowded

    def drives(self, key: JobKey) -> bool:
        """Whether this process looks after the job now."""
        return key in self._jobs

    def has_seen(self, key: JobKey) -> bool:
        """Whether the service has told this process how the job stands."""
        job = self._jobs.get(key)
        return job is not None and job.last is not None

    async def adopt(
        self,
        record: Record,
        loaded: Loaded,
        orphaned: Ending | None = None,
        *,
        closes: bool = True,
        is_guess: bool = False,
    ) -> Job | None:
        """Drive a job that no process drives, although no call waits for it: the sweeper's door.

        It is on its way when this returns; how it went is in the ledger, and in `failure`.

        Args:
            orphaned: why it shall end if it is seen alive; None: it is looked after as any other.
            closes: nobody will come back for its end.
            is_guess: `loaded` was named by a person; that its service knows no such job proves nothing.

        Returns:
            None: another process, or a call, was first.
        """
        if self.drives(record.key):
            return None
        await self._channels.open(loaded)
        taken = await take_over(self._services, record)
        if taken is None or self.drives(record.key):
            return None
        job = self._swept(taken, loaded)
        job.orphaned, job.closes, job.is_guess = job.orphaned or orphaned, closes, is_guess
        self._tasks.start_soon(self._drive, job)
        return job

    def _swept(self, taken: Record, loaded: Loaded) -> Job:
        """A job that nobody waits for, in the place where calls look for it."""
        request = request_of(taken, loaded)
        job = Job(self._services, taken, request, loaded)
        job.is_swept = True
        if taken.details.orphaned:
            job.orphaned = Ending(taken.cancel_reason or "orphan")
        self._jobs[taken.key] = job
        return job

    async def seems_over(self, record: Record, loaded: Loaded) -> bool:
        """Whether a job is over at its service, by one read of which nothing is written down.

        What can't be told is not over; what the service does not know seems so. Nor is a success over whose spec was
        not kept: only its caller can fetch the result.
        """
        job = Job(self._services, record, request_of(record, loaded), loaded)
        try:
            handle = handle_adapter(loaded).validate_json(record.handle or "")
            snapshot = await self._calls.get(loaded, ReadView(handle, job))
            info = await self._calls.status(loaded, StatusView(job, handle, snapshot))
        except (RemoteError, ValidationError) as error:
            return isinstance(error, NotFound)
        if info.phase is Phase.SUCCESS and spec_of(record, loaded) is None:
            return False
        return info.phase.is_terminal

    async def give_up(self, key: JobKey) -> None:
        """Look after a job that was adopted no longer, unless a call has come to wait for it."""
        job = self._jobs.get(key)
        if job is not None and job.is_swept:
            job.leave()
            await self._part(job)

    async def repair_slots(self) -> Mapping[str, int]:
        """Look for what dead holders have leaked, of every limit in the ledger; how much was given back, by limit."""
        if not self._services.owns_limits:
            return {}
        names = [row.name for row in await self._services.store.quotas()]
        return (await self._channels.repair(names)).given

    def perform(
        self, work: Callable[[Runtime], Awaitable[T]], done: concurrent.futures.Future[T]
    ) -> None:
        """Do some work on this loop; its result goes to `done`, which is bound to no loop."""
        if self._is_over:
            done.set_exception(too_late())
            return
        self._performing.add(done)
        self._tasks.start_soon(self._perform, work, done)

    async def _perform(
        self, work: Callable[[Runtime], Awaitable[T]], done: concurrent.futures.Future[T]
    ) -> None:
        self._performing.discard(done)
        if not done.set_running_or_notify_cancel():  # who waits may go, the work is finished
            return
        try:
            done.set_result(await work(self))
        except Exception as error:  # noqa: BLE001 - it is raised where `done` is waited for
            done.set_exception(error)
        finally:
            if not done.done():
                done.set_exception(EngineClosed("the process is ending"))

    def cancel(self, call: Call, reason: str) -> None:
        """This call no longer wants its job. The job ends unless another call waits for it."""
        self._end_call(call, Ending(reason))

    def cancel_flow_run(self, flow_run: str, reason: str) -> None:
        for call in self.calls_of(flow_run):
            self._end_call(call, Ending(reason))

    def pause(self, call: Call, leaves: bool) -> None:
        """The call's flow run is paused. Its job goes on, unless its connection wants it gone.

        Args:
            leaves: the flow's process ends meanwhile, so the call is detached.
        """
        job, stays = self._job_of(call), call.request.options.on_exit == "leave"
        if job is not None and job.loaded.settings.cancel_on_pause and not stays:
            self._end_call(call, Ending("the flow run was paused"))
        elif leaves:
            self.detach(call)

    def calls_of(self, flow_run: str) -> list[Call]:
        """Waiting calls that belong to this flow run or to one below it."""
        everywhere = [*self._entering, *(c for job in self._jobs.values() for c in job.calls)]
        return [
            call
            for call in dict.fromkeys(everywhere)
            if call.is_waiting
            and flow_run
            in (
                call.request.caller.flow_run,
                *call.request.caller.levels,
                call.request.caller.root_run,
            )
        ]

    def detach(self, call: Call) -> None:
        """Leave the job as it is for the next process."""
        job = self._job_of(call)
        call.fail(EngineClosed("the call was detached; the job goes on"))
        if job is not None and not job.is_awaited and job.ending is None:
            job.leave()
            if job.watched is not None:
                self._let_go(job)
                self._tasks.start_soon(self._release, job)
            else:
                self._send_no_more(job)

    def _end_call(self, call: Call, ending: Ending) -> None:
        if not call.is_waiting:
            return
        job = self._job_of(call)
        if job is None:
            self._wish(call, ending)
            return
        if any(other.is_waiting for other in job.calls if other is not call):
            call.answer(self._outcome(job.record, job.loaded, ending.final()))
            return
        self.end(job, ending)

    def _wish(self, call: Call, ending: Ending) -> None:
        """A call that has no job yet shall end. It goes on: it may be about to meet one that an earlier run left."""
        if self._ended.setdefault(call, ending) is not ending:
            return
        grace = self._services.clock.real(self._services.settings.cancel_grace.total_seconds())
        asyncio.get_running_loop().call_later(grace, self.post, partial(self._wish_over, call))

    def _wish_over(self, call: Call) -> None:
        """As `_grace_over`, for a call that has come no further."""
        ending = self._ended.get(call)
        if ending is not None:
            told = f"{ending.reason}; whether it has a job is not known yet"
            call.answer(
                Outcome(
                    job_key=JobKey(""),
                    fingerprint=Fingerprint(""),
                    info=ending.final().model_copy(update={"reason": told}),
                    stopped_by_us=True,
                    settings=self._services.settings,
                )
            )

    def _job_of(self, call: Call) -> Job | None:
        job: Job | None = call.job
        return job if job is not None and self._jobs.get(job.record.key) is job else None

    def _let_in(self, calls: Sequence[Call]) -> None:
        if len(calls) == 1:
            self._tasks.start_soon(self._enter, calls[0])
        else:
            self._tasks.start_soon(self._enter_together, calls)

    async def _enter_together(self, calls: Sequence[Call]) -> None:
        """Of those who come to one connection at one time: the ledger is asked once for the records of all.

        From the answer until each has begun with its record this process has records that it does not drive yet. Other
        calls that are told of one wait for the end of the party, and don't take it for one that was let go.
        """
        met: dict[Call, _Meeting] = {}
        is_over = asyncio.Event()
        try:
            try:
                met = await self._meet(calls, is_over)
            except Exception as error:  # noqa: BLE001 - each meets it again by himself, and hears of it
                logger.debug("%s calls enter one by one: %r", len(calls), error)
            self._make_way(calls, met)
            async with self._helping:
                async for call in in_portions(calls, ENTERED_AT_ONCE):
                    meeting = met.get(call)
                    if meeting is not None and self._resumes(call, meeting):
                        self._entrance.leave(call)
                    else:  # it begins before those that wait for the party
                        self._tasks.start_soon(self._enter, call, meeting)
        finally:
            self._parties.discard(is_over)
            is_over.set()

    def _make_way(self, calls: Sequence[Call], met: Mapping[Call, _Meeting]) -> None:
        """If most are back with their jobs, as after a restart, more may come in, and reads can wait for them."""
        taken = [
            each for each in met.values() if isinstance(each.drawn, Drawn) and each.drawn.taken
        ]
        are_back = 2 * len(taken) > len(calls)
        self._entrance.allow(calls[0], COMING_BACK if are_back else COMING_IN)
        if are_back and self._entrance.is_crowded:
            taken[0].channel.poller.ease()

    async def _until_parties_are_over(self) -> None:
        for party in list(self._parties):
            await party.wait()

    async def _meet(self, calls: Sequence[Call], is_over: asyncio.Event) -> dict[Call, _Meeting]:
        """The records of those who need nothing but the ledger for it; whoever is not among them asks for himself."""
        channel = await self._channel_for(calls[0].request)
        drafts: dict[Call, Draft] = {}
        async for call in in_portions(calls, ENTERED_AT_ONCE):
            if channel.quotas:  # what each needs is asked of its plugin
                break
            if call.is_waiting and call not in self._ended:
                with suppress(WebApiError):
                    drafts[call] = await self._draft_for(channel, call.request)
        fault_point("KP-01")
        self._parties.add(
            is_over
        )  # not sooner: a connection that is slow to come holds no other up
        found = await self._services.store.intents(list(drafts.values()))
        return {
            call: _Meeting(channel, draft, drawn)
            for (call, draft), drawn in zip(drafts.items(), found, strict=True)
        }

    async def _channel_for(self, request: JobRequest) -> Channel:
        plugins = self._services.plugins
        loaded = await plugins.get(request.task_type, request.plugin, request.connection)
        return await self._channels.open(loaded)

    def _channel_of(self, job: Job) -> Channel:
        return self._channels.of(job.loaded)

    def _queue_of(self, job: Job) -> Hashable:
        """Jobs of one connection that wait for the same places, if for any."""
        return self._channel_of(job), job.record.quotas

    def _kind_of(self, step: _Step) -> Hashable:
        return self._channel_of(step.job), step.kind

    async def _draft_for(self, channel: Channel, request: JobRequest) -> Draft:
        heir_of = self._others.gone
        return await draft_for(
            self._services, self._calls, self._channels, channel, request, heir_of
        )

    def _resumes(self, call: Call, meeting: _Meeting) -> bool:
        """Have a job that was left behind alive read again, if nothing else is to be done; whether it is."""
        channel, drawn = meeting.channel, meeting.drawn
        if isinstance(drawn, LedgerError) or not drawn.taken or channel.capacity.is_full:
            return False
        record = drawn.record
        is_alive = record.state is JobState.CREATED and not record.details.orphaned
        if not is_alive or record.cancel_reason or record.quotas or self.drives(record.key):
            return False
        job = Job(self._services, record, call.request, channel.loaded)
        try:
            handle = _handle_of(job)
        except Exception:  # noqa: BLE001 - it is told where one job is taken up by itself
            return False
        self._begin(job, call)
        if job.is_unwanted or job.is_left or not self._watches(job, handle):
            self._tasks.start_soon(self._guarded, job, partial(self._advance, job))
            return True
        job.holds_capacity = channel.capacity.take_now()
        return True

    def _watches(self, job: Job, handle: Any) -> bool:
        try:
            job.handle = handle
            self._observer.watch(job, is_resumed=True)
        except Exception:  # noqa: BLE001 - as above
            job.handle = None
            return False
        return True

    async def _enter(self, call: Call, met: _Meeting | None = None) -> None:
        try:
            with ExitStack() as inside:
                inside.callback(self._entrance.leave, call)
                await self._find_or_make(call, inside.close, met)
        except LedgerError as error:
            self.has_let_go = True  # what it asked for may have been done
            call.fail(error)
        except (WebApiError, OSError) as error:
            call.fail(error)
        except Exception as error:
            logger.exception("a call of task %s failed in the engine", call.request.task_name)
            call.fail(error)
        finally:
            if call.job is None:  # else `_attach` did so; and who lost that job enters anew
                self._has_entered(call)

    async def _find_or_make(
        self, call: Call, found: Callable[[], None], met: _Meeting | None
    ) -> None:
        """From a call to its job, or from the record that it has `met`. `found()`: what follows may last."""
        request = call.request
        services = self._services
        if met is None:
            channel = await self._channel_for(request)
            draft = await self._draft_for(channel, request)
            fault_point("KP-01")
        else:
            channel, draft = met.channel, met.draft
        loaded = channel.loaded
        waited_for: JobKey | None = None
        while met is not None or call.is_waiting or call in self._ended:
            drawn = met.drawn if met is not None else await services.store.intent(draft)
            met = None
            if isinstance(drawn, LedgerError):
                raise drawn
            found()
            record = drawn.record
            if record.fingerprint != draft.fingerprint:
                raise conflict(record)
            known = self._jobs.get(record.key)
            if known is not None and known.takes_callers:
                self._attach(call, known)
                return
            if known is not None:  # it ends; then this call gets an attempt of its own
                await self._until_over(known, call)
                if known.ending is not None and (ending := self._ended.get(call)) is not None:
                    call.answer(self._outcome(known.record, loaded, ending.final()))
                    return
                draft = replace(draft, is_retry=draft.is_retry or not known.is_left)
                continue
            if record.state.is_over and not drawn.made:
                if record.details.orphaned and record.state is not JobState.CLOSED:
                    await close(services, record)  # nobody was told, and nobody shall be
                    continue
                outcome = await self._others.hand_out(record, request.spec, loaded)
                is_of_another = outermost_run(record) != outermost_run(request.caller)
                call.answer(replace(outcome, is_of_another_run=is_of_another))
                return
            if not drawn.made and not drawn.taken:
                if record.runtime == self._me.id and waited_for != record.key:
                    waited_for = record.key  # it may be about to be driven: see `_enter_together`
                    await self._until_parties_are_over()
                    continue
                if await self._others.drive(record):
                    outcome = await self._others.follow(
                        record, call, partial(self._ended.get, call)
                    )
                    if outcome is None:
                        outcome = await self._others.ended(record, request.spec, loaded)
                    if outcome is None:
                        continue
                    call.answer(outcome)
                    return
                taken = await take_over(services, record, request.caller)
                if taken is None or self.drives(record.key):
                    continue
                record = taken
            if record.details.orphaned and not drawn.made:  # it ends; then this call gets another
                ending = self._swept(record, loaded)
                self._tasks.start_soon(self._drive, ending)
                continue
            job = Job(services, record, request, loaded, is_new=drawn.made)
            await self._drive(job, call)
            return

    def _attach(self, call: Call, job: Job) -> None:
        job.serve(call)
        ended = self._has_entered(call)
        if ended is not None and call.is_waiting:
            self._end_call(call, ended)
        elif ended is not None and not job.is_awaited:
            self.end(job, ended)

    def _has_entered(self, call: Call) -> Ending | None:
        """It has met its job, or its end. Why it was to end meanwhile, if somebody said so."""
        self._entering.discard(call)
        if not self._entering:
            self._entering = set()  # one that held thousands keeps their room
        return self._ended.pop(call, None)

    # --- driving -----------------------------------------------------------------------------

    async def _drive(self, job: Job, call: Call | None = None) -> None:
        """From a record to the end, or to the poller, or to the line of those that are still to be sent."""
        self._begin(job, call)
        if job.is_swept or job.is_unwanted or job.is_left or not _waits_in_line(job.record):
            await self._guarded(job, partial(self._advance, job))
        elif self._to_send.enter_now(job):
            await self._send(job)
        else:
            self._wait_to_be_sent(job)

    def _begin(self, job: Job, call: Call | None) -> None:
        """From now on this process looks after the job."""
        record = job.record
        self._jobs[record.key] = job
        job.note("ADMITTED", record.created_at if job.is_new else self._services.clock.now())
        if call is not None:
            self._attach(call, job)
        if not job.is_new and record.cancel_reason and record.state is not JobState.CANCELLING:
            self.end(job, Ending(record.cancel_reason))
        self._set_deadline(job)
        if not job.is_awaited and job.ending is None:
            job.leave()  # detached meanwhile

    def _wait_to_be_sent(self, job: Job) -> None:
        """So many wait for their places and permits already that this one needs no task for it yet."""
        self._to_send.come(job)
        if job.record.quotas:
            self._services.metrics.add("waiting_jobs", 1, plugin=job.record.plugin)
            limits = ", ".join(job.record.quotas)
            told = f"quota {limits}, position {self._to_send.position(job)}"
            job.report_no_place(self._services.clock.now(), told)

    def _let_send(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._waits_no_more(job)
        self._start_each(self._send, jobs)

    def _leave_line(self, job: Job) -> bool:
        """Take a job out of the line of those that are to be sent; False: it does not stand there."""
        stood = self._to_send.withdraw(job)
        if stood:
            self._waits_no_more(job)
        return stood

    def _waits_no_more(self, job: Job) -> None:
        if job.record.quotas:
            self._services.metrics.add("waiting_jobs", -1, plugin=job.record.plugin)

    async def _send(self, job: Job) -> None:
        """Advance one that has its place among those that wait for permits."""
        with ExitStack() as waiting:
            waiting.callback(self._to_send.leave, job)
            await self._guarded(job, partial(self._advance, job, waiting.close))

    def _send_no_more(self, job: Job) -> bool:
        """What is left to do for a job that is to be sent is not to wait; False: it does not wait in the line."""
        stood = self._leave_line(job)
        if stood:
            self._tasks.start_soon(self._guarded, job, partial(self._advance, job))
        return stood

    async def _guarded(self, job: Job, step: Callable[[], Any]) -> None:
        """Run a part of a job's way. Who loses the job to another process follows that one."""
        try:
            await step()
        except LedgerConflict:
            calls = [call for call in job.calls if call.is_waiting]
            if (slot := job.slot) is not None:
                self._services.quotas.forget(slot)
            self._let_go(job)
            logger.info("job %s: another process took it over", job.record.key)
            if job.ending is not None and job.calls:  # who wanted it to end still does
                for call in calls:
                    self._wish(call, job.ending)
                self._tasks.start_soon(self._note_wish, job.record.key, job.ending.reason)
            for call in calls:
                self.admit(call)
        except LedgerError as error:
            for call in job.calls:
                call.fail(error)
            self._let_go(job)
            self.has_let_go = True
            if job.ending is not None:
                self._tasks.start_soon(self._note_wish, job.record.key, job.ending.reason)
        except Exception as error:
            logger.exception("job %s failed in the engine", job.record.key)
            job.failure = error
            for call in job.calls:
                call.fail(error)
            await self._part(job)

    async def _advance(self, job: Job, permitted: Callable[[], None] = lambda: None) -> None:
        """Do the next step of the state that the record is in. `permitted()`: it is about to be sent."""
        capacity = self._channel_of(job).capacity
        if capacity.is_full:
            info = PhaseInfo.not_ready(
                f"this process tracks {capacity.size} jobs of this connection (caching.size); waiting"
            )
            job.report(info)

        async def be_tracked() -> None:
            await capacity.take()
            job.holds_capacity = True

        tracked = job.is_swept or await job.unless_ending(be_tracked)  # a pass bounds itself
        if not tracked and (job.is_new or job.is_left):
            await self._give_up(job)
            return
        match job.record.state:
            case JobState.CREATED | JobState.CANCELLING:
                self._resume(job)
                # It may end by itself while its delete fails.
                self._observer.watch(job, is_resumed=job.record.state is JobState.CREATED)
                if job.record.state is JobState.CANCELLING:
                    job.ending = job.orphaned or Ending(job.record.cancel_reason or "cancelled")
                if job.ending is not None:
                    self.delete(job)
                return
            case JobState.SUSPECT if not can_clear_up(job.loaded):
                info = job.record.details.phase or outcome_unknown(job, "an earlier run sent it")
                self._deliver(job, info)
                await self._part(job)
                return
            case _:
                pass
        unsent = job.is_new or job.record.state in (
            JobState.INTENT,
            JobState.SLOT_REQUESTED,
            JobState.SLOT_HELD,
        )
        if not job.is_new:
            self._adopt_lease(job)
        came_to = await submit(self._services, self._calls, job, unsent=unsent, permitted=permitted)
        match came_to:
            case Alive(snapshot=snapshot):
                await self._start(job, snapshot)
            case Refused(info=info):
                await self._finish(job, info, event=Event.NOTHING_MADE)
            case Answered(info=info):
                await self._finish(job, info, event=Event.ENDED)
            case GivenUp():
                await self._give_up(job)
            case Stuck(info=info):
                self._deliver(job, info)
                await self._part(job)

    async def _give_up(self, job: Job) -> None:
        """No longer wanted before anything was sent; or left, then the record stays as it is."""
        if job.ending is None:
            await self._part(job)
            return
        await self._finish(job, PhaseInfo.undefined(), event=_nothing_sent(job.record.state))

    async def _start(self, job: Job, snapshot: Any) -> None:
        """The job exists: report it, judge what create told, have it read."""
        info = PhaseInfo.queued()
        job.told(info)
        job.report(info)
        if snapshot is not None and await self._observer.judge_first(job, snapshot):
            return
        if job.handle is None:
            stuck = await without_handle(self._services, job)
            self._deliver(job, stuck.info)
            await self._part(job)
            return
        if job.ending is not None:
            self._observer.watch(job, fresh=True)  # it may end by itself while its delete fails
            self.delete(job)
        elif job.is_left:
            await self._part(job)
        else:
            fault_point("KP-10")
            self._observer.watch(job, fresh=True, is_known=snapshot is not None)

    def _resume(self, job: Job) -> None:
        """Take up what the record has of a job that lives."""
        job.handle = _handle_of(job)
        self._adopt_lease(job)

    def _adopt_lease(self, job: Job) -> None:
        """Renew the lease of an earlier process from now on."""
        slot = job.slot
        if not job.record.quotas or slot is None:
            return
        self._services.quotas.adopt(
            job.record.quotas,
            slot,
            weight=job.record.weight,
            holder=job.record.task_run,
            changed=job.lend,
            written=partial(note_lease, self._services, job),
        )

    async def _observe(self, observation: Observation) -> None:
        """Do what follows from a read, in the task that made it."""
        job: Job = observation.watched.token
        if job.watched is observation.watched and not job.record.state.is_over:
            await self._guarded(job, partial(self._observer.take_in, job, observation))

    # --- ending ------------------------------------------------------------------------------

    def end(self, job: Job, ending: Ending) -> None:
        """Somebody wants the job gone. What has to be done for it depends on where it stands."""
        if job.record.state.is_over or self._is_over:
            return
        is_news = job.end(ending)
        if is_news or job.grace is None:  # it may have been ending already when this process met it
            self._set_grace(job)
        if not is_news:
            return
        if job.record.state is JobState.CREATED:
            if job.handle is not None:  # else it is about to be read from the record
                self.delete(job)
        elif self._send_no_more(job):
            return
        elif job.record.state.job_may_exist and job.scope is None:
            self._tasks.start_soon(self._note_wish, job.record.key, ending.reason)

    def _set_grace(self, job: Job) -> None:
        grace = self._services.clock.real(job.loaded.settings.cancel_grace.total_seconds())
        if is_sync(job.loaded):  # there is nothing that could confirm the end
            grace = min(grace, SYNC_GRACE_SECONDS)
        job.grace = asyncio.get_running_loop().call_later(
            grace, self.post, partial(self._grace_over, job)
        )

    async def _note_wish(self, key: JobKey, reason: str) -> None:
        """Create is on its way, or nobody drives the job: the wish is written down, the duty follows."""
        while True:
            try:
                await self._services.store.ask_cancel([key], reason)
            except LedgerError as error:
                logger.warning("the wish to end job %s could not be written down: %s", key, error)
            else:
                return
            await self._services.clock.sleep(WISH_SECONDS)

    def over(self, job: Job, info: PhaseInfo, snapshot: Any = None) -> None:
        """The job was seen ended: what that takes is done beside the reading of others."""
        if job.is_finishing:
            return
        job.is_finishing = True
        kind = "result" if info.phase is Phase.SUCCESS else "end"
        was_ending = job.ending is not None  # not what comes while it waits
        finish = partial(self._finish, job, info, snapshot=snapshot, was_ending=was_ending)
        self._to_end.enter(_Step(job, kind, finish))

    async def _write(self, step: _Step) -> None:
        try:
            await self._guarded(step.job, step.write)
        finally:
            self._to_end.leave(step)

    def part(self, job: Job, info: PhaseInfo) -> None:
        """The attempt is over, the job is not: the next attempt takes it up."""
        self._deliver(job, info)
        self._let_go(job)  # the record stays ours: the attempt that follows is made by this process
        self.has_let_go = True

    def delete(self, job: Job) -> None:
        """The job lives and shall not: the duty is written down, the delete follows when the limiter permits."""
        if not (job.record.state.is_over or job.is_deleting or job.is_finishing):
            job.is_deleting = True
            self._to_end.enter(_Step(job, "duty", partial(self._note_duty, job)))

    async def _note_duty(self, job: Job) -> None:
        if job.record.state.is_over or job.is_finishing or job.ending is None:
            return
        await note_duty(self._services, job, job.ending)
        self._to_delete.enter(job)

    async def _delete(self, job: Job) -> None:
        """Delete one that has its place among those that wait for permits."""
        with ExitStack() as waiting:
            waiting.callback(self._to_delete.leave, job)
            await self._guarded(job, partial(self._send_delete, job, waiting.close))

    async def _send_delete(self, job: Job, permitted: Callable[[], None]) -> None:
        if job.ending is None or job.is_finishing:  # it was seen over meanwhile
            return
        job.delete_taken = await ask_to_end(self._services, self._calls, job, job.ending, permitted)
        job.is_deleting = job.delete_taken
        is_ours = self._jobs.get(job.key) is job
        if is_ours and job.record.state is JobState.CANCELLING and not job.is_finishing:
            self._observer.watch(job, fresh=True)

    def _grace_over(self, job: Job) -> None:
        """People need not wait longer; the duty and the place in the quota stay."""
        job.grace = None
        if job.ending is not None and not job.record.state.is_over:
            info = job.ending.final()
            told = f"{info.reason}; the service has not confirmed the end yet"
            self._deliver(job, info.model_copy(update={"reason": told}))

    def _set_deadline(self, job: Job) -> None:
        deadline = job.record.deadline
        if deadline is None:
            return
        left = (deadline - self._services.clock.now()).total_seconds()
        whole = (deadline - job.record.created_at).total_seconds()
        reason = f"deadline of {whole:g}s exceeded"
        ending = Ending(reason, PhaseInfo.failure("Timeout", reason))
        if left <= 0:
            self.end(job, ending)
        else:
            job.timer = asyncio.get_running_loop().call_later(
                self._services.clock.real(left), self.post, partial(self.end, job, ending)
            )

    async def _finish(
        self,
        job: Job,
        info: PhaseInfo,
        *,
        event: Event = Event.ENDED,
        snapshot: Any = None,
        was_ending: bool | None = None,
    ) -> None:
        """The job is over: keep its result, write it down, give everything back, deliver.

        Args:
            was_ending: whether somebody had wanted its end when it was seen over; None: that was just now.
        """
        if job.record.state.is_over:
            return
        services = self._services
        if was_ending is None:
            was_ending = job.ending is not None
        well = info.phase is Phase.SUCCESS
        collected, request = Collected(info), job.request
        if info.phase is Phase.SUCCESS:
            fault_point("KP-14")
            is_known = not job.is_swept or spec_of(job.record, job.loaded) is not None
            if is_known:  # else only its caller could say what to fetch, and nobody is to come back
                collected = await collect(services, self._calls, job, info, snapshot)
            fault_point("KP-16")
        final = collected.info
        if final is info and (not was_ending or (well and job.ending is job.orphaned)):
            job.ending = None  # it was seen over before anybody wanted that
        if job.ending is not None:
            final = _with_links(
                job.ending.final(info if info.phase is not Phase.UNDEFINED else None),
                info,
                job.last,
            )
        job.note(final.phase.name, final.info.occurred_at or services.clock.now(), final.reason)
        await persist(
            services,
            job,
            event,
            phase=final,
            outputs=collected.outputs,
            stopped_by_us=job.ending is not None,
            spec=None,
            last_error=final.reason if final.phase is not Phase.SUCCESS else None,
        )
        fault_point("KP-17")
        if not job.closes:
            self._let_go(job)
            return
        if final.phase is not Phase.SUCCESS:
            # A failure counts as told before it is told: only so does the next call make a new attempt.
            with suppress(LedgerConflict):  # another process told it: so do we
                await persist(services, job, Event.DELIVERED)
        fault_point("KP-19")
        value = collected.value
        if final.phase is Phase.SUCCESS and job.request is not request:
            # A call has come meanwhile: its spec says what the result is.
            outcome = await outcome_of(services, job.record, job.request.spec, job.loaded)
            final, value = outcome.info, outcome.value
        self._deliver(job, final, value)
        await self._settle(job)

    async def _settle(self, job: Job) -> None:
        """Give the slot back and close the record."""
        self._let_go(job)
        self._settling += 1
        try:
            fault_point("KP-18")
            await persist(self._services, job, Event.SETTLED)
            fault_point("KP-20")
        finally:
            self._settling -= 1

    def _let_go(self, job: Job) -> None:
        """Forget a job in memory; its place is given back only if it is over. The ledger keeps the rest."""
        if self._jobs.get(job.record.key) is job:
            del self._jobs[job.record.key]
        job.stop_timers()
        self._observer.forget(job)
        if job.holds_capacity:
            job.holds_capacity = False
            self._channel_of(job).capacity.give()
        if job.record.quotas and job.record.state.is_over:
            self._services.quotas.release(job.record.quotas, job.slot, weight=job.record.weight)
            job.lease = None

    async def _part(self, job: Job) -> None:
        """Let go of a job that is not over, and say so: whoever wants it, or the sweeper, may take it at once."""
        self._let_go(job)
        await self._release(job)

    async def _release(self, job: Job) -> None:
        if self._closing or job.record.state.is_over:
            return  # a process that has ended drives nothing
        if (slot := job.slot) is not None:
            if job.lease == job.record.details.lease or slot.part:
                self._services.quotas.forget(slot)
            else:  # lent meanwhile, and nobody would find it
                self._services.quotas.release(job.record.quotas, slot, weight=job.record.weight)
        with suppress(LedgerError):  # then it counts as ours for as long as this process lives
            async with job.writing():
                await release(self._services, job.record)

    def _deliver(self, job: Job, info: PhaseInfo, value: Any = None) -> None:
        outcome = self._outcome(job.record, job.loaded, info, value, stopped=job.ending is not None)
        for call in job.calls:
            call.answer(outcome)

    def _outcome(
        self,
        record: Record,
        loaded: Loaded,
        info: PhaseInfo,
        value: Any = None,
        *,
        stopped: bool = True,
    ) -> Outcome:
        return Outcome(
            job_key=record.key,
            fingerprint=record.fingerprint,
            info=info,
            value=value,
            stopped_by_us=stopped,
            settings=loaded.settings,
        )

    async def _until_over(self, job: Job, call: Call) -> None:
        """Wait until the job is gone; or the call is to end, as the job is already."""
        while self._jobs.get(job.record.key) is job:
            if job.ending is not None and call in self._ended:
                return
            await self._services.clock.sleep(0.1)

    # --- housekeeping ---------------------------------------------------------------------

    async def _keep_house(self) -> None:
        """Beat, and hear what other processes ask."""
        clock, pulse = self._services.clock, self._services.pulse
        next_beat, next_count = clock.monotonic(), 0.0
        while True:
            await anyio.sleep(min(HOUSEKEEPING_SECONDS, clock.real(BEAT_EVERY.total_seconds())))
            try:
                if clock.monotonic() >= next_beat or not pulse.is_fresh(clock.now()):
                    next_beat = clock.monotonic() + BEAT_EVERY.total_seconds()
                    beat = replace(self._me, last_beat=clock.now())
                    await self._services.store.beat(beat)
                    pulse.last = beat.last_beat
                    await self._keep_durations()
                    await self._tell_paces()
                for record in await self._services.store.cancels_asked(self._me.id):
                    job = self._jobs.get(record.key)
                    if job is not None and record.cancel_reason:
                        self.end(job, Ending(record.cancel_reason))
            except LedgerError as error:
                logger.warning("the ledger does not answer: %s", error)
            if time.monotonic() >= next_count:
                every = 0.0 if len(self._jobs) <= COUNTED_EACH_SECOND else COUNTED_EVERY
                next_count = time.monotonic() + max(every, len(self._jobs) / COUNTED_AT_ONCE)
                await self._gauge()

    async def _keep_durations(self) -> None:
        if durations := self._durations.news():
            await self._services.store.set_durations(durations, self._services.clock.now())

    async def _tell_paces(self) -> None:
        """Say how often jobs are read here, for who asks the ledger."""
        paces = [pace for channel in self._channels if (pace := channel.pace()) is not None]
        if paces or self._has_told_paces:
            await self._services.store.set_paces(self._me.id, paces)
        self._has_told_paces = bool(paces)

    async def _look_at_blocks(self) -> None:
        """Look at the blocks again. Apart from the beat: whoever keeps them may take a minute to answer."""
        clock = self._services.clock
        next_look = clock.monotonic()
        while True:
            await anyio.sleep(HOUSEKEEPING_SECONDS)
            every = self._channels.look_every
            if every is not None and clock.monotonic() >= next_look:
                next_look = clock.monotonic() + every
                await self._channels.look_at_blocks()

    async def _gauge(self) -> None:
        """Say how many jobs this process looks after, and how many of them must still be deleted."""
        tracked, ending = Counter[str](), Counter[str]()
        async for job in in_portions(list(self._jobs.values()), COUNTED_AT_ONCE):
            tracked[job.record.plugin] += 1
            ending[job.record.plugin] += job.ending is not None
        for plugin in {channel.loaded.entry.id for channel in self._channels}:
            self._services.metrics.set("tracked_jobs", tracked[plugin], plugin=plugin)
            self._services.metrics.set("pending_cancels", ending[plugin], plugin=plugin)


@dataclass(frozen=True, slots=True)
class _Meeting:
    """What was asked of the ledger for a call, and its answer."""

    channel: Channel
    draft: Draft
    drawn: Drawn | LedgerError


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """What is to be written down of a job that ends. A result may be long to come: what is of another kind passes."""

    job: Job
    kind: Literal["result", "end", "duty"]
    write: Callable[[], Awaitable[None]]


def too_late() -> EngineClosed:
    """What is told to who comes too late."""
    return EngineClosed("the process is ending: nothing new is started")


def _with_links(final: PhaseInfo, *seen: PhaseInfo | None) -> PhaseInfo:
    """The phase with the job's links as the service told them last."""
    logs = next((info.info.logs for info in seen if info and info.info.logs), ())
    if not logs or final.info.logs:
        return final
    return final.model_copy(update={"info": final.info.model_copy(update={"logs": logs})})


def _handle_of(job: Job) -> Any:
    """The stored handle, read back."""
    text = job.record.handle
    if text is None:
        raise WebApiError(f"job {job.record.key} is {job.record.state} but has no handle")
    try:
        return handle_adapter(job.loaded).validate_json(text)
    except ValueError as error:
        raise WebApiError(
            f"the stored handle of job {job.record.key} can't be read by this version of plugin "
            f"{job.record.plugin}: {text}. The job was left alone; end it at the service if it is not wanted"
        ) from error


def _line_of(call: Call) -> Hashable:
    """Calls of one connection wait in one line: one that is slow to come holds no other up."""
    asked = call.request
    named = asked.connection if isinstance(asked.connection, str) else id(asked.connection)
    return asked.task_type, asked.plugin, named


def _waits_in_line(record: Record) -> bool:
    """Whether it is to be sent, and has nothing that others in the line wait for, as a place in a quota."""
    if record.quotas:
        return record.state is JobState.SLOT_REQUESTED
    return record.state in (JobState.INTENT, JobState.CREATING)


def _nothing_sent(state: JobState) -> Event:
    """The event that closes a record under which nothing was made."""
    return Event.NOTHING_MADE if state.job_may_exist else Event.GIVEN_UP
