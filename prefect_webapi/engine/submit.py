"""Make the job exist exactly once: place, permit, create, find, adopt; what a failure proves.

The order is always: write down that create is about to be sent, send it, write down what it brought.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from prefect_webapi.contract.errors import (
    AlreadyExists,
    LedgerUnavailable,
    NotFound,
    OutcomeUnknown,
    RemoteError,
    Throttled,
)
from prefect_webapi.contract.phase import PhaseInfo
from prefect_webapi.contract.plugin import (
    AsyncPlugin,
    CreateResult,
)
from prefect_webapi.engine.adapters import handle_adapter
from prefect_webapi.engine.calls import Calls, can_find, guarantee, is_sync
from prefect_webapi.engine.evidence import back_off, failure_of, judge
from prefect_webapi.engine.faults import fault_point
from prefect_webapi.engine.job import Ending, Job, lease_of, note_lease, persist, try_persist
from prefect_webapi.engine.machine import Event
from prefect_webapi.engine.services import Services
from prefect_webapi.ledger.records import JobState
from prefect_webapi.quotas import SlotLease, Waiting

__all__ = ["Alive", "Answered", "GivenUp", "Refused", "Stuck", "submit", "without_handle"]

logger = logging.getLogger(__name__)

FIND_FIRST_DELAY = 1.0
DO_TIMEOUT = timedelta(seconds=300)
"""Longest synchronous call; a task's deadline or time-out ends it earlier."""


@dataclass(frozen=True, slots=True)
class Alive:
    """The job exists and its handle is in the ledger. `snapshot`: create's answer held one."""

    snapshot: Any = None


@dataclass(frozen=True, slots=True)
class Refused:
    """The service surely made nothing (or nothing that goes on): the attempt is over."""

    info: PhaseInfo


@dataclass(frozen=True, slots=True)
class Stuck:
    """Whether a job exists is unknown: the attempt fails, the record and its place stay."""

    info: PhaseInfo


@dataclass(frozen=True, slots=True)
class Answered:
    """A synchronous call returned its terminal phase."""

    info: PhaseInfo


@dataclass(frozen=True, slots=True)
class GivenUp:
    """No longer wanted before anything can have reached the service."""


class _SearchFailed(Exception):
    """Whether a create that was sent made its job could not be found out."""


Submitted = Alive | Refused | Stuck | Answered | GivenUp


def outcome_unknown(job: Job, told: str) -> PhaseInfo:
    return PhaseInfo.system_failure(
        "CreateOutcomeUnknown",
        f"create was sent and its outcome is unknown ({told}). The service can't be asked by key, so nothing is "
        f"repeated: look for job {job.record.key} there, then settle the record; its place in the quota stays taken "
        "until then",
    )


async def submit(
    services: Services, calls: Calls, job: Job, *, unsent: bool, permitted: Callable[[], None]
) -> Submitted:
    """Bring a job from its first record to existence.

    Args:
        unsent: no create can have been sent for this record yet; False for a record of another process that may
            have died while sending.
        permitted: called, perhaps several times, when it need not wait for others any more.

    Raises:
        LedgerConflict: another process owns the job now.
        LedgerUnavailable: nothing was started that could not be remembered.
    """
    waits = job.record.state is JobState.SLOT_REQUESTED
    if waits and not await job.unless_ending(partial(_take_place, services, job)):
        return GivenUp()
    if is_sync(job.loaded):
        return await _do(services, calls, job, permitted, unsent=unsent)
    try:
        return await _create(services, calls, job, permitted, unsent=unsent)
    except _SearchFailed as failed:
        return await _in_doubt(services, job, f"the search for it failed too: {failed}")


async def _take_place(services: Services, job: Job) -> None:
    """Wait for the job's place in its quotas, and write it down with the lease."""
    # Where a lost answer can't be cleared up, create must not count as sent while it waits for its permit.
    event = Event.SENDING if guarantee(job.loaded) != "at-most-once" else Event.PLACE_GRANTED
    since = services.clock.now()

    async def turn(in_vain: bool) -> bool:
        try:
            return await services.store.is_next(job.record, services.clock.now(), waits=in_vain)
        except LedgerUnavailable:
            return False  # it waits anyway

    async def admit(slot: SlotLease) -> bool:
        fault_point("KP-04")
        lease = lease_of(slot)
        job.note("SLOT_HELD", services.clock.now())
        if not await try_persist(services, job, event, lease=lease):
            job.steps = job.steps[:-1]
            return False
        job.lease = lease
        return True

    def waiting(wait: Waiting) -> None:
        limits = ", ".join(f"{name}: limit {places}" for name, places in wait.limits.items())
        told = (
            f"quota {limits}, position {wait.position}, "
            f"waits for {wait.waited.total_seconds():.0f} s"
        )
        job.report_no_place(since, told)

    fault_point("KP-02")
    await services.quotas.acquire(
        job.record.quotas,
        weight=job.record.weight,
        holder=job.record.task_run,
        admit=admit,
        waiting=waiting,
        turn=turn,
        changed=job.lend,
        written=partial(note_lease, services, job),
    )
    fault_point("KP-05")


async def _create(
    services: Services, calls: Calls, job: Job, permitted: Callable[[], None], *, unsent: bool
) -> Submitted:
    loaded = job.loaded
    settings = loaded.settings
    promise = guarantee(loaded)
    on_unknown = job.request.options.on_unknown_create or settings.on_unknown_create
    searches = can_find(loaded)
    if not unsent:
        job.tries = max(job.tries, 1)
        if promise == "at-most-once" and not searches:
            if on_unknown == "fail" or job.is_unwanted:
                return await _in_doubt(services, job, "the process that sent it has ended")
            logger.warning(
                "create of job %s is sent again: a duplicate is accepted", job.record.key
            )
        elif searches and (promise != "key" or job.is_unwanted):
            permitted()  # a search may last
            found = await _find(services, calls, job)
            if found is not None:
                return await _adopt(services, calls, job, found)
            unsent = True  # it would be visible by now
            if job.is_swept:  # nobody is there who would want another
                job.end(job.orphaned or Ending("its create never arrived, and its run has ended"))
    failed = 0
    while True:
        if not await job.unless_ending(partial(calls.permit, loaded, "write")):
            if unsent or job.ending is None:
                return GivenUp()
            if promise == "at-most-once" and not searches:
                return await _in_doubt(services, job, "it was cancelled meanwhile")
            if searches:
                found = await _find(services, calls, job)
                if found is not None:
                    return await _adopt(services, calls, job, found)
                return GivenUp()
            # Only the key can tell: the repetition answers with the job, and then it is deleted.
            await calls.permit(loaded, "write")
        permitted()
        await _count_try(services, job)
        fault_point("KP-06")
        await _be_sure(services, job)
        try:
            made = await calls.create(loaded, job.view if unsent else job.view.repeated())
        except RemoteError as error:
            fault_point("KP-08")
            failed += 0 if isinstance(error, Throttled) else 1
            verdict = judge(
                error,
                promise,
                tries=failed,
                max_tries=settings.max_create_attempts,
                on_unknown=on_unknown,
            )
            unsent = unsent and not verdict.may_exist
            if isinstance(error, AlreadyExists):
                return await _adopt_existing(services, calls, job, error)
            match verdict.then:
                case "refused" if unsent:
                    return Refused(failure_of(error))
                case "refused":  # this one made nothing; an earlier one may have
                    found = await _find(services, calls, job) if searches else None
                    if found is not None:
                        return await _adopt(services, calls, job, found)
                    if searches:
                        return Refused(failure_of(error))
                    told = f"sent again, it was refused: {error.message}"
                    return await _in_doubt(services, job, told)
                case "stuck":
                    info = (
                        outcome_unknown(job, f"{error.code}: {error.message}")
                        if promise == "at-most-once" and on_unknown == "fail"
                        else failure_of(error)
                    )
                    await _note_stuck(services, job, info)
                    return Stuck(info)
                case "repeat":
                    if verdict.may_exist and promise == "at-most-once":
                        logger.warning(
                            "create of job %s is sent again after an unknown outcome: a duplicate is accepted",
                            job.record.key,
                        )
                    delay = back_off(max(1, failed), settings.retry_base, settings.retry_cap)
                    if isinstance(error, Throttled):
                        delay = 0.0  # the gate is closed for as long as the service asked
                        job.report(PhaseInfo.not_ready(f"the service throttles: {error.message}"))
                    await job.unless_ending(partial(services.clock.sleep, delay))
                    if verdict.may_exist and searches and promise != "key":
                        found = await _find(services, calls, job)
                        if found is not None:
                            return await _adopt(services, calls, job, found)
                        unsent = True
        else:
            fault_point("KP-08")
            return await _adopt(services, calls, job, made)


async def _count_try(services: Services, job: Job) -> None:
    """Write down that something is about to be sent, unless the record says so since it was made."""
    job.tries += 1
    if job.record.state is not JobState.CREATING or job.tries > 1:
        await persist(services, job, Event.SENDING)


async def _be_sure(services: Services, job: Job) -> None:
    """Ask the ledger once more whether the job is ours, if another process may have taken us for dead.

    Raises:
        LedgerConflict: it did; nothing was sent.
    """
    if not services.pulse.is_fresh(services.clock.now()):
        await persist(services, job, Event.SENDING)


async def _in_doubt(services: Services, job: Job, told: str) -> Stuck:
    """Whether the job exists can't be found out: that is written down, and nothing is repeated."""
    info = outcome_unknown(job, told)
    await _note_stuck(services, job, info)
    return Stuck(info)


async def _note_stuck(services: Services, job: Job, info: PhaseInfo) -> None:
    if job.record.state is not JobState.SUSPECT:
        await persist(services, job, Event.NO_ANSWER, phase=info, last_error=info.reason)


async def _adopt(
    services: Services, calls: Calls, job: Job, made: CreateResult[Any, Any]
) -> Submitted:
    """Write the handle down before anything else is done with it."""
    if made.fingerprint and not job.record.fingerprint.startswith(made.fingerprint):
        return _conflict(job)
    if made.resource_meta is None:
        if made.resource is not None:
            return Alive(made.resource)  # a job that is over already needs none
        return await without_handle(services, job)
    try:
        text = _storable(job, made.resource_meta)
    except ValueError as error:
        job.handle = made.resource_meta
        await _undo(calls, job, "its handle can't be stored")
        told = (
            f"the handle that create of plugin {job.record.plugin!r} returned can't be stored ({error}); the job was "
            "asked to end"
        )
        info = PhaseInfo.system_failure("HandleNotStorable", told)
        await _note_stuck(services, job, info)
        return Stuck(info)
    job.handle = made.resource_meta
    made_at = services.clock.now()
    job.note("QUEUED", made_at)
    try:
        await persist(
            services, job, Event.HANDLE_KNOWN, at=made_at, handle=text, created_remotely_at=made_at
        )
    except LedgerUnavailable:
        await _undo(calls, job, "its handle could not be written to the ledger")
        raise
    fault_point("KP-09")
    return Alive(made.resource)


def _storable(job: Job, handle: Any) -> str:
    """The handle as the ledger keeps it. Raises ValueError."""
    adapter = handle_adapter(job.loaded)
    text = adapter.dump_json(handle, warnings="error").decode()
    if job.loaded.mask.hits(text):
        raise ValueError("it holds a secret of the connection")
    adapter.validate_json(text)
    return text


async def _undo(calls: Calls, job: Job, reason: str) -> None:
    """A job that can't be remembered must not run on: it is ended while its handle is known."""
    try:
        await calls.permit(job.loaded, "write")
        await calls.delete(job.loaded, job.handle, reason, job)
    except RemoteError as error:
        logger.critical(
            "job %s runs and could be neither remembered nor ended: handle %s: %s",
            job.record.key,
            job.loaded.mask(str(job.handle)),
            error.message,
        )


async def without_handle(services: Services, job: Job) -> Stuck:
    """The author gave nothing to read or delete the job with."""
    info = PhaseInfo.system_failure(
        "NoHandle",
        "create returned None as the handle; return what `get` and `delete` need to name the job",
    )
    await _note_stuck(services, job, info)
    return Stuck(info)


async def _adopt_existing(
    services: Services, calls: Calls, job: Job, error: AlreadyExists
) -> Submitted:
    """Create met a job under our key: ours if what it was made from is ours."""
    found: CreateResult[Any, Any] | None = None
    if error.handle is not None:
        found = CreateResult(error.handle, fingerprint=error.fingerprint)
    elif can_find(job.loaded):
        found = await _find(services, calls, job)
    theirs = error.fingerprint or (found.fingerprint if found else None)
    # A key of ours is a hash over the fingerprint already; a key that the user gave is not.
    proven = job.request.caller.idempotency_key is None if theirs is None else True
    if found is None or not proven:
        return _conflict(job)
    return await _adopt(
        services, calls, job, CreateResult(found.resource_meta, found.resource, theirs)
    )


def _conflict(job: Job) -> Refused:
    info = PhaseInfo.failure(
        "IdempotencyConflict",
        f"the service has a job named {job.record.key} that was not made from this task's spec, or can't be shown to "
        "be. It is left alone; use another idempotency_key",
    )
    return Refused(info)


async def _find(services: Services, calls: Calls, job: Job) -> CreateResult[Any, Any] | None:
    """Look for the job until it would be visible; None: there is none.

    A service may need its visibility delay before it shows a new job, so "not found" is believed only when that
    time has passed since create was last sent. A search that fails says nothing.

    Raises:
        _SearchFailed: it failed as often as a create may.
    """
    plugin = job.loaded.plugin
    assert isinstance(plugin, AsyncPlugin)
    delay = plugin.visibility_delay
    visible = job.record.updated_at + (
        delay if delay is not None else job.loaded.settings.visibility_delay
    )
    settings = job.loaded.settings
    pause, failed = FIND_FIRST_DELAY, 0
    while True:
        try:
            found = await calls.find(job.loaded, job.view)
        except NotFound:
            found, failed = None, 0
        except RemoteError as error:
            logger.info("find of job %s failed: %s", job.record.key, error.message)
            failed += 1
            if failed >= settings.max_create_attempts and services.clock.now() >= visible:
                raise _SearchFailed(error.message) from error
            await services.clock.sleep(back_off(failed, settings.retry_base, settings.retry_cap))
            continue
        if found is not None:
            return found
        left = (visible - services.clock.now()).total_seconds()
        if left <= 0:
            return None
        await services.clock.sleep(min(pause, left + 0.01))
        pause *= 2


async def _do(
    services: Services, calls: Calls, job: Job, permitted: Callable[[], None], *, unsent: bool
) -> Submitted:
    """A synchronous service: one call that answers with the end."""
    loaded = job.loaded
    settings = loaded.settings
    promise = guarantee(loaded)
    if not unsent and (promise == "at-most-once" or job.is_unwanted):
        return _do_unknown("the process that sent it has ended")
    failed = 0
    while True:
        if not await job.unless_ending(partial(calls.permit, loaded, "write")):
            return GivenUp()
        permitted()
        await _count_try(services, job)
        fault_point("KP-38")
        await _be_sure(services, job)
        try:
            answer: list[PhaseInfo] = []
            wanted = await job.unless_ending(partial(_send, calls, job, answer), sends=True)
        except RemoteError as error:
            failed += 0 if isinstance(error, Throttled) else 1
            verdict = judge(
                error,
                promise,
                tries=failed,
                max_tries=settings.max_create_attempts,
                on_unknown="fail",
            )
            if verdict.then == "stuck" and isinstance(error, OutcomeUnknown):
                return _do_unknown(f"{error.code}: {error.message}")
            if verdict.then != "repeat":
                return Refused(failure_of(error))
            if not isinstance(error, Throttled):
                delay = back_off(failed, settings.retry_base, settings.retry_cap)
                await job.unless_ending(partial(services.clock.sleep, delay))
        else:
            if not answer:  # cancelled: the call was dropped, what it did is not known
                assert not wanted
                await calls.until_ended(job.view)
                return Answered(PhaseInfo.aborted("the call was cancelled"))
            info = answer[0]
            if not info.phase.is_terminal:
                info = PhaseInfo.system_failure(
                    "NonTerminalSyncPhase",
                    f"do returned {info.phase.name}; it must return a terminal phase",
                )
            return Answered(info)


async def _send(calls: Calls, job: Job, answer: list[PhaseInfo]) -> None:
    answer.append(await calls.do(job.loaded, job.view, DO_TIMEOUT))


def _do_unknown(told: str) -> Refused:
    info = PhaseInfo.system_failure(
        "OutcomeUnknown",
        f"the call was sent and its outcome is unknown ({told}); it is not repeated, since the plugin does not "
        "declare it idempotent",
    )
    return Refused(info)
