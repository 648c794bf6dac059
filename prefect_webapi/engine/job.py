"""A job in this process: the record it owns, who waits for it, and what may be forgotten at any moment."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

import anyio
from pydantic import SecretStr

from prefect_webapi.contract.errors import LedgerConflict, LedgerError, LedgerUnavailable
from prefect_webapi.contract.keys import Fingerprint, JobKey, job_key
from prefect_webapi.contract.phase import Phase, PhaseInfo, TaskInfo
from prefect_webapi.engine import machine
from prefect_webapi.engine.adapters import handle_adapter
from prefect_webapi.engine.call import Call
from prefect_webapi.engine.contexts import NOTHING_PUT, TaskView, task_view
from prefect_webapi.engine.machine import Event
from prefect_webapi.engine.request import JobRequest
from prefect_webapi.engine.services import Services
from prefect_webapi.ledger.records import (
    JobState,
    Lease,
    Move,
    MoveResult,
    Record,
)
from prefect_webapi.poller import Watched
from prefect_webapi.quotas import SlotLease
from prefect_webapi.registry import Loaded

__all__ = [
    "Ending",
    "Job",
    "lease_of",
    "note_lease",
    "persist",
    "slot_of",
    "try_persist",
    "view_of",
]

logger = logging.getLogger(__name__)

LEDGER_PATIENCE = timedelta(minutes=2)
"""How long a write that must not be lost is repeated while the ledger can't be reached."""


_LEFT_OUT = ""
"""In place of the text of a handle: no JSON is empty."""


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a job shall end although it is not over.

    Attributes:
        reason: the true one; reaches the service, the ledger and people.
        info: how the job counts once it is gone; None: as aborted at our request.
    """

    reason: str
    info: PhaseInfo | None = None

    def final(self, seen: PhaseInfo | None = None) -> PhaseInfo:
        """The phase to deliver; `seen`: what the service said at last, if that tells more."""
        if self.info is not None:
            return self.info
        told = self.reason
        if seen is not None and seen.phase is not Phase.ABORTED:
            told = f"{told}; the remote job had ended as {seen.phase.name} before the cancel took effect"
        return PhaseInfo.aborted(told)


@lru_cache(maxsize=256)
def _plain(phase: Phase, version: int, reason: str) -> PhaseInfo:
    return PhaseInfo(phase=phase, version=version, reason=reason).model_copy(
        update={"info": TaskInfo()}
    )


def _without_time(info: PhaseInfo) -> PhaseInfo:
    """What it says, time aside: thousands of jobs say the same, and then they share it."""
    bare = info.model_copy(update={"info": info.info.model_copy(update={"occurred_at": None})})
    plain = _plain(info.phase, info.version, info.reason)
    return plain if bare == plain else bare


class Job:
    """One record that this process drives. Changed on the runtime's loop only.

    Attributes:
        is_new: its record was made with it, so that nothing can have been sent before.
        is_swept: the sweeper has it driven, although no call waits for it.
        closes: its record is closed with its end; False: the end waits there for a caller to come back.
        is_guess: its connection was named by a person, so that its service knows no such job proves nothing.
        failure: what stopped it in the engine.
        last: what people were told of it last, without its time.
        orphaned: why it ends as soon as it is seen alive: nobody wants it any more.
    """

    __slots__ = (
        "_services",
        "_view",
        "_writers",
        "_writing",
        "calls",
        "closes",
        "delete_taken",
        "delete_tries",
        "ending",
        "failure",
        "grace",
        "handle",
        "holds_capacity",
        "is_deleting",
        "is_finishing",
        "is_guess",
        "is_left",
        "is_new",
        "is_sending",
        "is_swept",
        "last",
        "lease",
        "loaded",
        "missing_since",
        "orphaned",
        "record",
        "request",
        "scope",
        "steps",
        "timer",
        "tries",
        "watched",
    )

    def __init__(
        self,
        services: Services,
        record: Record,
        request: JobRequest,
        loaded: Loaded,
        *,
        is_new: bool = False,
    ) -> None:
        self._services = services
        self._view: TaskView | None = None
        self._writing: asyncio.Lock | None = None
        self._writers = 0
        self.record = record
        self.request = request
        self.loaded = loaded
        self.calls: tuple[Call, ...] = ()
        self.handle: Any = None
        self.last: PhaseInfo | None = None
        self.lease: Lease | None = record.details.lease
        self.ending: Ending | None = None
        self.orphaned: Ending | None = None
        self.scope: anyio.CancelScope | None = None
        self.watched: Watched | None = None
        self.missing_since: float | None = None
        self.steps = record.details.steps
        self.timer: asyncio.TimerHandle | None = None
        self.grace: asyncio.TimerHandle | None = None
        self.holds_capacity = False
        self.is_deleting = False
        self.is_finishing = False
        self.is_left = False
        self.is_new = is_new
        self.is_sending = False
        self.is_swept = False
        self.is_guess = False
        self.failure: Exception | None = None
        self.closes = True
        self.delete_taken = False
        self.tries = record.details.tries
        self.delete_tries = record.details.delete_tries

    @property
    def view(self) -> TaskView:
        """What the plugin's methods see of it."""
        if self._view is None:
            record = self.record
            before = record.attempt - 1
            self._view = view_of(
                self._services,
                self.loaded,
                self.request,
                record.key,
                record.fingerprint,
                record.attempt,
                previous=job_key(record.base, record.ordinal, before) if before else None,
            )
        return self._view

    @property
    def key(self) -> JobKey:
        return self.record.key

    @property
    def given(self) -> Sequence[SecretStr]:
        return self._view.given if self._view is not None else ()

    @asynccontextmanager
    async def writing(self) -> AsyncGenerator[None]:
        """A delete and an end may come at once: the second one's write builds on the first one's."""
        lock = self._writing = self._writing or asyncio.Lock()
        self._writers += 1
        try:
            async with lock:
                yield
        finally:
            self._writers -= 1
            if not self._writers:  # most jobs rest most of the time
                self._writing = None

    def drop_view(self) -> None:
        """Its view can be made again, unless the author's code has put or got something."""
        view = self._view
        if view is not None and not view.given and view.output_writer.value is NOTHING_PUT:
            self._view = None

    def rest(self) -> None:
        """Drop what can be made again: of many thousand jobs most only wait for their next read."""
        self.drop_view()
        if self._writers or self.handle is None:
            return
        record, details = self.record, self.record.details
        text = record.handle
        if text != _LEFT_OUT and text == self._handle_text():
            text = _LEFT_OUT
        if text != record.handle or details.steps is not self.steps:
            # The steps are written with the next move; until then one history is enough.
            details = replace(details, steps=self.steps)
            self.record = replace(record, handle=text, details=details)

    @property
    def shown(self) -> Record:
        """The record with the text of its handle, which a job at rest does without."""
        if self.record.handle != _LEFT_OUT:
            return self.record
        return replace(self.record, handle=self._handle_text() or None)

    def _handle_text(self) -> str:
        try:
            return handle_adapter(self.loaded).dump_json(self.handle).decode()
        except Exception as error:  # noqa: BLE001 - what an author has done to it; this is for display
            logger.debug("the handle of job %s can't be shown: %s", self.key, type(error).__name__)
            return ""

    def report(self, info: PhaseInfo, *, waiting_for_quota: bool = False) -> None:
        """Tell people how it stands."""
        self.request.reporter.phase(self.shown, info, waiting_for_quota=waiting_for_quota)

    def report_no_place(self, since: datetime, told: str) -> None:
        """Tell people that it waits for a place in its quotas."""
        self.note("WAITING_FOR_RESOURCES", since, told)
        info = PhaseInfo.waiting_for_resources(told)
        self.told(info)
        self.report(info, waiting_for_quota=True)

    def serve(self, call: Call) -> None:
        """Have a call wait for it. What only the sweeper looked after is this call's from now on."""
        self.calls = (*self.calls, call)
        call.job = self
        if self.is_swept:
            self.is_swept, self.orphaned, self.closes = False, None, True
            self.request = call.request
            seen, self._view = self._view, None
            if seen is not None:
                # It may have ended already, with a result that is about to be kept.
                self.view.output_writer.put(seen.output_writer.value)
                self.view.secret_manager.given.extend(seen.given)

    @property
    def is_awaited(self) -> bool:
        return self.is_swept or any(call.is_waiting for call in self.calls)

    @property
    def takes_callers(self) -> bool:
        """Whether who asks for the job now waits for this one, and does not get an attempt of its own."""
        if self.is_left or self.record.details.orphaned:
            return False
        return self.ending is None or (self.is_swept and self.ending is not self.orphaned)

    @property
    def is_unwanted(self) -> bool:
        return self.ending is not None or self.orphaned is not None

    @property
    def is_creating(self) -> bool:
        """Whether create (or do), or the search for what it made, is under way."""
        waits = self.scope is not None and not self.is_sending
        return self.record.state is JobState.CREATING and not waits

    @property
    def slot(self) -> SlotLease | None:
        """Its lease as the quotas know it."""
        return slot_of(self.lease) if self.lease else None

    def lend(self, slot: SlotLease) -> None:
        """The lease that the job has from now on."""
        self.lease = lease_of(slot)

    def told(self, info: PhaseInfo) -> None:
        """Remember what people were told of it."""
        self.last = _without_time(info)

    def note(self, name: str, at: datetime, reason: str = "") -> None:
        """Add to the history that people see."""
        self.steps = self.steps.then(name, at, reason)

    async def unless_ending(
        self, wait: Callable[[], Awaitable[Any]], *, sends: bool = False
    ) -> bool:
        """Do `wait()`, dropped as soon as the job shall end or be left. Whether it is still wanted.

        Args:
            sends: it sends something: who leaves the job awaits the answer.
        """
        if self.ending is not None or (self.is_left and not sends):
            return False
        self.is_sending = sends
        try:
            with anyio.CancelScope() as self.scope:
                await wait()
        finally:
            self.scope = None
            self.is_sending = False
        return self.ending is None and (sends or not self.is_left)

    def end(self, ending: Ending) -> bool:
        """Note that the job shall end; whether this is news."""
        if self.ending is not None:
            return False
        self.ending = ending
        if self.scope is not None:
            self.scope.cancel()
        return True

    def leave(self) -> None:
        """Start nothing more for it in this process; what was sent is awaited."""
        self.is_left = True
        if self.scope is not None and not self.is_sending:
            self.scope.cancel()

    def stop_timers(self) -> None:
        for timer in (self.timer, self.grace):
            if timer is not None:
                timer.cancel()
        self.timer = self.grace = None


def view_of(
    services: Services,
    loaded: Loaded,
    request: JobRequest,
    key: JobKey,
    fingerprint: Fingerprint,
    attempt: int,
    *,
    previous: JobKey | None = None,
) -> TaskView:
    """What a plugin's methods see of a request under this key."""
    return task_view(
        request,
        key=key,
        fingerprint=fingerprint,
        attempt=attempt,
        previous=previous,
        secrets=services.secrets,
        store=services.outputs,
        connection=loaded.connection.value,
        max_dataset_size_bytes=loaded.settings.max_dataset_size_bytes,
    )


def lease_of(slot: SlotLease) -> Lease:
    """As the ledger keeps it."""
    return Lease(id=slot.id, until=slot.until, part=slot.part)


def slot_of(lease: Lease) -> SlotLease:
    """As the quotas know it."""
    return SlotLease(id=lease.id, until=lease.until, part=lease.part)


async def note_lease(services: Services, job: Job, slot: SlotLease) -> bool:
    """Write down that the job has this lease now; False: the ledger may still name another one."""
    async with job.writing():
        old, now = job.record, services.clock.now()
        if old.state.is_over:
            return True
        kept = replace(old.details, lease=lease_of(slot))
        try:
            result = await services.store.move(Move(old=old, state=old.state, at=now, details=kept))
        except LedgerError:
            return False
        if result is MoveResult.OK:
            job.record = replace(old, updated_at=now, details=kept)
        return result is MoveResult.OK


async def persist(services: Services, job: Job, event: Event, **details: Any) -> None:
    """Write down where `event` takes the job, before anything is done about it.

    `details` are fields of `Details`; `handle` and `cancel_reason` go to their columns, and `at` is when, if not now.
    While the ledger can't be reached the write is repeated for `LEDGER_PATIENCE`.

    Raises:
        LedgerConflict: another process owns the job now: stop quietly.
        LedgerUnavailable: patience ended; memory and record are as before.
    """
    if not await try_persist(services, job, event, **details):
        quotas = " or ".join(job.record.quotas)
        raise LedgerConflict(f"quota {quotas} has no room for a job that holds its place")


async def try_persist(services: Services, job: Job, event: Event, **details: Any) -> bool:
    """As `persist`; False: the quota's admission count is full and nothing was changed."""
    async with job.writing():
        return await _persist(services, job, event, details)


async def _persist(services: Services, job: Job, event: Event, details: dict[str, Any]) -> bool:
    old = job.record
    state = machine.next_state(old.state, event)
    handle = details.pop("handle", None)
    cancel_reason = details.pop("cancel_reason", None)
    at = details.pop("at", None) or services.clock.now()
    known = {"steps": job.steps, "tries": job.tries, "delete_tries": job.delete_tries}
    kept = replace(old.details, **details, **known)
    move = Move(
        old=old,
        state=state,
        at=at,
        handle=handle,
        cancel_reason=cancel_reason,
        details=kept,
        count=machine.place_change(old.state, state),
    )
    match await _move(services, move):
        case MoveResult.FULL:
            return False
        case MoveResult.LOST:
            services.metrics.count("ledger_conflicts_total", plugin=old.plugin)
            raise LedgerConflict(f"job {old.key} is driven by another process now")
        case MoveResult.OK:
            job.record = replace(
                old,
                state=state,
                updated_at=at,
                handle=handle or old.handle,
                cancel_reason=cancel_reason or old.cancel_reason,
                details=kept,
            )
            return True


async def _move(services: Services, move: Move) -> MoveResult:
    clock = services.clock
    give_up = clock.monotonic() + LEDGER_PATIENCE.total_seconds()
    delay = 0.2
    while True:
        try:
            return await services.store.move(move)
        except LedgerUnavailable:
            if clock.monotonic() + delay > give_up or not move.old.state.job_may_exist:
                raise
        await clock.sleep(delay)
        delay = min(delay * 2, 10.0)
