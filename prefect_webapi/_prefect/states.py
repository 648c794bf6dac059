"""Phases as Prefect states, and Prefect states as phases: the only mapping between the two.

What a task run shows while its job lives is an event (see `reports`); how it ends is a state that the
task's body returns, with our exception as its data, so that results, retries and names come out as they do
for any other task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, assert_never

from prefect.client.schemas.objects import State, StateType
from prefect.states import Cancelled, Completed, Crashed, Failed

from prefect_webapi.contract.errors import JobFailed
from prefect_webapi.contract.phase import ErrorKind, ExternalResource, Phase, PhaseInfo
from prefect_webapi.engine.request import Outcome

__all__ = [
    "CREATE_OUTCOME_UNKNOWN",
    "TIMEOUT",
    "Duty",
    "Reading",
    "Shown",
    "cancelled",
    "cancelling",
    "ending",
    "job_failed",
    "read_state",
    "shown",
]

TIMEOUT = "Timeout"
MOST_PARTS = 20
"""Parts of a job that are named in a state's message."""
CREATE_OUTCOME_UNKNOWN = "CreateOutcomeUnknown"

_STILL_UNKNOWN = (
    "Whether the service made the job could not be found out, so none was made again: look for a job "
    "of this name there, then settle it with `prefect-webapi jobs resolve {key}`."
)


# --- while the job lives ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shown:
    """What a task run shows of a job that is not over."""

    type: StateType
    name: str
    message: str


_NAMES = {
    Phase.NOT_READY: "NotReady",
    Phase.WAITING_FOR_RESOURCES: "RemoteWaitingForResources",
    Phase.QUEUED: "RemoteQueued",
    Phase.INITIALIZING: "RemoteInitializing",
    Phase.RUNNING: "Running",
    Phase.WAITING_FOR_CACHE: "WaitingForCache",
}


def shown(info: PhaseInfo, *, waiting_for_quota: bool) -> Shown | None:
    """What to show; None: leave what is shown.

    Waiting for a quota is PENDING, as it is no run time; all else is RUNNING.
    """
    if info.phase is Phase.WAITING_FOR_RESOURCES and waiting_for_quota:
        return Shown(StateType.PENDING, "AwaitingConcurrencySlot", _told(info))
    name = _NAMES.get(info.phase)
    return None if name is None else Shown(StateType.RUNNING, name, _told(info))


def cancelling(reason: str) -> Shown:
    """What to show while a delete is on its way."""
    return Shown(StateType.CANCELLING, "Cancelling", reason)


def _told(info: PhaseInfo) -> str:
    further = (more.reason for more in info.info.additional_reasons)
    parts = sorted(info.info.external_resources, key=lambda part: part.index)
    told = [_part(part) for part in parts[:MOST_PARTS]]
    if len(parts) > MOST_PARTS:
        told.append(f"and {len(parts) - MOST_PARTS} more")
    return "; ".join(text for text in (info.reason, *further, *told) if text)


def _part(part: ExternalResource) -> str:
    """Its id, and its phase where the service reports one."""
    is_told = part.phase is not Phase.UNDEFINED
    return f"{part.external_id}: {part.phase.name}" if is_told else part.external_id


# --- the end ---------------------------------------------------------------------------------------------


def ending(outcome: Outcome) -> State[Any]:
    """The state that a task run ends in."""
    info = outcome.info
    match info.phase:
        case Phase.SUCCESS:
            return Completed(message=_ended(outcome), data=outcome.value)
        case Phase.RETRYABLE_FAILURE | Phase.PERMANENT_FAILURE:
            return _failure(outcome)
        case Phase.ABORTED if outcome.stopped_by_us:
            return cancelled(outcome.info.reason or "cancelled", outcome)
        case Phase.ABORTED:
            return Failed(
                name="RemoteAborted",
                message=f"Stopped by somebody else at the service: {_ended(outcome)}",
                data=job_failed(outcome),
            )
        case (
            Phase.UNDEFINED
            | Phase.NOT_READY
            | Phase.WAITING_FOR_RESOURCES
            | Phase.QUEUED
            | Phase.INITIALIZING
            | Phase.RUNNING
            | Phase.WAITING_FOR_CACHE
        ):
            raise ValueError(f"{info.phase.name} is no end of a job ({outcome.job_key})")
        case _:
            assert_never(info.phase)


def _failure(outcome: Outcome) -> State[Any]:
    info = outcome.info
    code = info.err.code if info.err else ""
    failure, message = job_failed(outcome), _ended(outcome)
    if code == CREATE_OUTCOME_UNKNOWN:
        advice = _STILL_UNKNOWN.format(key=outcome.job_key)
        return Crashed(name=CREATE_OUTCOME_UNKNOWN, message=f"{message} {advice}", data=failure)
    if code == TIMEOUT:
        return Failed(name="TimedOut", message=message, data=failure)
    is_user = info.kind == "user"
    if info.phase is Phase.RETRYABLE_FAILURE:
        name = "RetryableFailure" if is_user else "SystemRetryableFailure"
        return Failed(name=name, message=message, data=failure)
    if is_user:
        return Failed(message=message, data=failure)
    make = Failed if outcome.settings.system_failures == "failed" else Crashed
    return make(name="SystemFailure", message=message, data=failure)


def cancelled(
    reason: str,
    outcome: Outcome | None = None,
    *,
    by: BaseException | None = None,
    was_admitted: bool = True,
) -> State[Any]:
    """The end of a task whose job was stopped at our request.

    Args:
        reason: why.
        outcome: how the job ended; None: not known yet, its delete goes on.
        by: what interrupted the task's body, so that its caller can be given it again.
        was_admitted: False: the engine had not been asked for a job yet.
    """
    if not was_admitted:
        remote = "No job had been asked for."
    elif outcome is None:
        remote = "The job had not ended yet; it is deleted in the background, and by the sweeper."
    elif not outcome.job_key:
        remote = "If there is a job, it is deleted in the background, and by the sweeper."
    elif outcome.info.phase is Phase.ABORTED:
        remote = f"Job {outcome.job_key} was stopped."
    else:
        remote = f"Remotely: {_ended(outcome)}"
    return Cancelled(message=f"{_sentence(reason)}{remote}", data=by)


def job_failed(outcome: Outcome) -> JobFailed:
    """The exception that a task raises, which knows whether another attempt may help."""
    return JobFailed(outcome.info, job_key=outcome.job_key, retryable=outcome.info.may_retry)


def _ended(outcome: Outcome) -> str:
    info = outcome.info
    when = info.info.occurred_at
    at = f" at {when.isoformat(timespec='seconds')}" if when else ""
    said = info.reason
    if info.err is not None:
        told = info.err.message or info.reason
        said = (
            f"{info.err.code} ({info.err.kind}): {told}"
            if told
            else f"{info.err.code} ({info.err.kind})"
        )
    return f"{_sentence(said)}Job {outcome.job_key} ended{at}."


def _sentence(text: str) -> str:
    """`text` with an end, so that another sentence may follow."""
    text = text.strip()
    return f"{text}{'' if text.endswith(('.', '!', '?', '…')) else '.'} " if text else ""


# --- and back ------------------------------------------------------------------------------------------------

Duty = Literal["none", "poll", "delete", "watch"]
"""What a Prefect state asks of the engine: nothing; read the job; delete it; leave it to a re-run."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What the state of a task run means for its job."""

    phase: Phase
    duty: Duty
    kind: ErrorKind = "unknown"


_READ_BY_NAME = {
    "AwaitingConcurrencySlot": Reading(Phase.WAITING_FOR_RESOURCES, "none"),
    "InfrastructurePending": Reading(Phase.INITIALIZING, "none"),
    "Submitting": Reading(Phase.INITIALIZING, "none"),
    **{
        name: Reading(phase, "poll")
        for phase, name in _NAMES.items()
        if phase is not Phase.NOT_READY
    },
}


def read_state(state: State[Any]) -> Reading:
    """What a task run's state says of its job. CRASHED says nothing: a re-run re-attaches."""
    by_name = _READ_BY_NAME.get(state.name or "")
    match state.type:
        case StateType.SCHEDULED | StateType.PENDING:
            return by_name or Reading(Phase.NOT_READY, "none")
        case StateType.RUNNING:
            return by_name or Reading(Phase.RUNNING, "poll")
        case StateType.PAUSED:
            return Reading(Phase.RUNNING, "poll")
        case StateType.CANCELLING:
            return Reading(Phase.ABORTED, "delete")
        case StateType.CANCELLED:
            return Reading(Phase.ABORTED, "delete")
        case StateType.COMPLETED:
            return Reading(Phase.SUCCESS, "none")
        case StateType.FAILED:
            return _read_failure(state)
        case StateType.CRASHED:
            return Reading(Phase.UNDEFINED, "watch")
        case _:
            assert_never(state.type)


def _read_failure(state: State[Any]) -> Reading:
    failure = getattr(state.data, "result", state.data)
    if isinstance(failure, JobFailed):
        return Reading(failure.info.phase, "delete", failure.info.kind)
    may_retry = state.name in ("RetryableFailure", "SystemRetryableFailure")
    phase = Phase.RETRYABLE_FAILURE if may_retry else Phase.PERMANENT_FAILURE
    return Reading(phase, "delete", "system" if state.name == "SystemRetryableFailure" else "user")
