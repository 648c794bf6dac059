"""The table of phases and Prefect states, both ways."""

import pickle
from datetime import UTC, datetime
from typing import Any

import pytest
from prefect.client.schemas.objects import State, StateType
from prefect.states import Failed

from prefect_webapi._prefect import states
from prefect_webapi._prefect.states import Reading
from prefect_webapi.contract.config import EngineSettings
from prefect_webapi.contract.errors import JobFailed
from prefect_webapi.contract.keys import Fingerprint, JobKey
from prefect_webapi.contract.phase import (
    ExternalResource,
    Phase,
    PhaseInfo,
    ReasonInfo,
    TaskInfo,
)
from prefect_webapi.engine.request import Outcome

KEY = JobKey("jabc")
T = StateType


def outcome(info: PhaseInfo, **more: Any) -> Outcome:
    return Outcome(job_key=KEY, fingerprint=Fingerprint("f"), info=info, **more)


@pytest.mark.parametrize(
    ("info", "kind", "name"),
    [
        (PhaseInfo.not_ready("r"), T.RUNNING, "NotReady"),
        (PhaseInfo.waiting_for_resources("r"), T.RUNNING, "RemoteWaitingForResources"),
        (PhaseInfo.queued("r"), T.RUNNING, "RemoteQueued"),
        (PhaseInfo.initializing("r"), T.RUNNING, "RemoteInitializing"),
        (PhaseInfo.running("r"), T.RUNNING, "Running"),
        (PhaseInfo.waiting_for_cache("r"), T.RUNNING, "WaitingForCache"),
    ],
)
def test_a_phase_of_a_live_job_shows_under_its_name(
    info: PhaseInfo, kind: StateType, name: str
) -> None:
    """CASE-091."""
    shown = states.shown(info, waiting_for_quota=False)
    assert shown == states.Shown(kind, name, "r")


def test_waiting_for_a_quota_is_pending_under_prefects_own_word() -> None:
    """CASE-091."""
    shown = states.shown(PhaseInfo.waiting_for_resources("2 of 2"), waiting_for_quota=True)
    assert shown == states.Shown(T.PENDING, "AwaitingConcurrencySlot", "2 of 2")


def test_an_undefined_phase_shows_nothing() -> None:
    """CASE-094: no event."""
    assert states.shown(PhaseInfo.undefined("?"), waiting_for_quota=False) is None


def test_parts_of_a_job_are_listed_by_their_index() -> None:
    """CASE-103."""
    parts = tuple(
        ExternalResource(external_id=f"part-{n}", index=n, phase=Phase.RUNNING) for n in (2, 0, 1)
    )
    info = TaskInfo(external_resources=parts, additional_reasons=(ReasonInfo(reason="slow"),))
    shown = states.shown(PhaseInfo.running("busy", info=info), waiting_for_quota=False)
    assert shown is not None
    assert shown.message == "busy; slow; part-0: RUNNING; part-1: RUNNING; part-2: RUNNING"


def test_a_part_without_a_phase_of_its_own_is_named_alone() -> None:
    """An id that people can look up, and no riddle behind it."""
    info = PhaseInfo.running(
        "busy", info=TaskInfo(external_resources=(ExternalResource(external_id="K-17"),))
    )
    shown = states.shown(info, waiting_for_quota=False)
    assert shown is not None
    assert shown.message == "busy; K-17"


def test_of_very_many_parts_only_some_are_named() -> None:
    parts = tuple(ExternalResource(external_id=f"p{n}", index=n) for n in range(1_000))
    info = PhaseInfo.running(info=TaskInfo(external_resources=parts))
    shown = states.shown(info, waiting_for_quota=False)
    assert shown is not None
    assert shown.message.endswith("and 980 more")


@pytest.mark.parametrize(
    ("info", "kind", "name", "retryable"),
    [
        (PhaseInfo.retryable_failure("C", "m"), T.FAILED, "RetryableFailure", True),
        (PhaseInfo.system_retryable_failure("C", "m"), T.FAILED, "SystemRetryableFailure", True),
        (PhaseInfo.failure("C", "m"), T.FAILED, "Failed", False),
        (PhaseInfo.system_failure("C", "m"), T.CRASHED, "SystemFailure", False),
        (PhaseInfo.failure("Timeout", "m"), T.FAILED, "TimedOut", False),
        (PhaseInfo.retryable_failure("Timeout", "m"), T.FAILED, "TimedOut", True),
        (PhaseInfo.aborted("m"), T.FAILED, "RemoteAborted", False),
        (
            PhaseInfo.system_failure("CreateOutcomeUnknown", "m"),
            T.CRASHED,
            "CreateOutcomeUnknown",
            False,
        ),
    ],
)
def test_a_failure_ends_the_task_under_its_name_with_our_exception(
    info: PhaseInfo, kind: StateType, name: str, retryable: bool
) -> None:
    """CASE-091, CASE-106, CASE-107."""
    state = states.ending(outcome(info))
    assert (state.type, state.name) == (kind, name)
    assert isinstance(state.data, JobFailed)
    assert (state.data.job_key, state.data.retryable) == (KEY, retryable)
    assert "m" in (state.message or "")
    assert KEY in (state.message or "")
    assert pickle.loads(pickle.dumps(state.data)).info == info


def test_a_setting_makes_system_failures_fail_instead_of_crash() -> None:
    """CASE-106."""
    settings = EngineSettings(system_failures="failed")
    state = states.ending(outcome(PhaseInfo.system_failure("C", "m"), settings=settings))
    assert (state.type, state.name) == (T.FAILED, "SystemFailure")


def test_a_success_carries_the_result() -> None:
    """CASE-091."""
    state = states.ending(outcome(PhaseInfo.success("fine"), value={"n": 1}))
    assert (state.type, state.name, state.data) == (T.COMPLETED, "Completed", {"n": 1})


def test_code_kind_and_time_of_the_end_are_in_the_message() -> None:
    """CASE-108."""
    at = datetime(2026, 11, 24, 16, 0, tzinfo=UTC)
    info = PhaseInfo.failure("OutOfMemory", "it was too big", info=TaskInfo(occurred_at=at))
    message = states.ending(outcome(info)).message or ""
    assert message.startswith("OutOfMemory (user): it was too big. Job jabc ended at 2026-11-24T16")
    assert "+00:00" in message


def test_a_failure_without_an_error_counts_as_the_systems() -> None:
    """CASE-100."""
    state = states.ending(outcome(PhaseInfo(phase=Phase.PERMANENT_FAILURE)))
    assert state.name == "SystemFailure"
    assert "Unknown (system)" in (state.message or "")


def test_a_job_stopped_by_us_ends_the_task_as_cancelled() -> None:
    """CASE-110."""
    state = states.ending(outcome(PhaseInfo.aborted("user asked"), stopped_by_us=True))
    assert (state.type, state.name, state.data) == (T.CANCELLED, "Cancelled", None)
    assert (state.message or "").startswith("user asked. Job jabc was stopped")


def test_a_job_that_succeeded_before_its_delete_is_told_with_the_cancellation() -> None:
    """CASE-117."""
    state = states.cancelled("user asked", outcome(PhaseInfo.success("done")))
    assert state.type is T.CANCELLED
    assert "Remotely: done. Job jabc ended" in (state.message or "")


def test_a_phase_of_a_live_job_is_no_end() -> None:
    with pytest.raises(ValueError, match="RUNNING is no end"):
        states.ending(outcome(PhaseInfo.running()))


@pytest.mark.parametrize(
    ("state", "reading"),
    [
        (State(type=T.SCHEDULED, name="Late"), Reading(Phase.NOT_READY, "none")),
        (State(type=T.SCHEDULED, name="AwaitingRetry"), Reading(Phase.NOT_READY, "none")),
        (
            State(type=T.SCHEDULED, name="AwaitingConcurrencySlot"),
            Reading(Phase.WAITING_FOR_RESOURCES, "none"),
        ),
        (
            State(type=T.PENDING, name="AwaitingConcurrencySlot"),
            Reading(Phase.WAITING_FOR_RESOURCES, "none"),
        ),
        (State(type=T.PENDING), Reading(Phase.NOT_READY, "none")),
        (State(type=T.PENDING, name="InfrastructurePending"), Reading(Phase.INITIALIZING, "none")),
        (State(type=T.RUNNING), Reading(Phase.RUNNING, "poll")),
        (State(type=T.RUNNING, name="Retrying"), Reading(Phase.RUNNING, "poll")),
        (State(type=T.RUNNING, name="RemoteQueued"), Reading(Phase.QUEUED, "poll")),
        (State(type=T.PAUSED, name="Suspended"), Reading(Phase.RUNNING, "poll")),
        (State(type=T.CANCELLING), Reading(Phase.ABORTED, "delete")),
        (State(type=T.CANCELLED), Reading(Phase.ABORTED, "delete")),
        (State(type=T.COMPLETED, name="Cached"), Reading(Phase.SUCCESS, "none")),
        (State(type=T.CRASHED), Reading(Phase.UNDEFINED, "watch")),
        (Failed(), Reading(Phase.PERMANENT_FAILURE, "delete", "user")),
        (
            Failed(name="SystemRetryableFailure"),
            Reading(Phase.RETRYABLE_FAILURE, "delete", "system"),
        ),
    ],
)
def test_a_prefect_state_says_what_its_job_needs(state: State[Any], reading: Reading) -> None:
    """CASE-091, backwards."""
    assert states.read_state(state) == reading


def test_a_failure_in_a_states_data_tells_its_kind() -> None:
    state = states.ending(outcome(PhaseInfo.system_retryable_failure("C", "m")))
    assert states.read_state(state) == Reading(Phase.RETRYABLE_FAILURE, "delete", "system")
