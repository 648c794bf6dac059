"""Why a task's body was interrupted: the true reason, and whether its job shall end for it.

User intent ends the job: a cancelled flow run, a time-out, an interrupt. A process that merely has to go
(its worker hands the flow run back, or the flow run is suspended) leaves it to the next one.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

import anyio
from prefect._internal.control_listener import get_intent
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import TerminationSignal

__all__ = [
    "INTERRUPTS",
    "LEAVING_INTENTS",
    "Cause",
    "cause_of",
    "control_intent",
    "is_suspending",
    "may_time_out",
    "reason_of",
]

INTERRUPTS = (asyncio.CancelledError, TerminationSignal, KeyboardInterrupt)
"""What can break into a waiting body."""

LEAVING_INTENTS = ("reschedule", "relinquish")
_NEVER = -float("inf")


@dataclass(frozen=True, slots=True)
class Cause:
    """Why, in words for people and for the service.

    Attributes:
        leaves_job: the flow run goes on later, elsewhere: the job is left alone.
        is_task_timeout: Prefect's own scope waits for the interrupt, to end the task as TimedOut.
    """

    reason: str
    leaves_job: bool = False
    is_task_timeout: bool = False


def control_intent() -> str | None:
    """What a runner or worker said it will do with this process: cancel, reschedule, relinquish.

    Prefect's control listener is private; nothing public tells a cancelled flow run from a dying pod.
    """
    return get_intent()


def is_suspending() -> bool:
    """Whether the flow run around this call has been asked to suspend; private in Prefect as well."""
    context = FlowRunContext.get()
    return context is not None and context.flow_run_suspension_request.is_requested()


def may_time_out() -> bool:
    """Whether Prefect may raise a time-out in this thread: the task's, or that of the flow that called it here."""
    task, flow = TaskRunContext.get(), FlowRunContext.get()
    return _limit_of_task(task) is not None or _limit_of_flow(flow) is not None


def reason_of(heard: signal.Signals) -> str:
    """A signal as a reason."""
    if heard is signal.SIGINT:
        return "the process was interrupted (SIGINT)"
    return f"the process was asked to end ({heard.name})"


def cause_of(
    interrupt: BaseException,
    *,
    heard: signal.Signals | None = None,
    told: Callable[[UUID], str | None] = lambda _: None,
    now: datetime | None = None,
) -> Cause:
    """Why `interrupt` broke into the body that runs in this context.

    Args:
        heard: a signal that this process got while the body was waiting.
        told: why the jobs of a flow run were told to end, if they were: one that ended makes asyncio cancel the others.
    """
    intent = control_intent()
    if intent in LEAVING_INTENTS:
        return Cause(f"the worker gave the flow run back ({intent})", leaves_job=True)
    if is_suspending():
        return Cause("the flow run is suspended", leaves_job=True)
    at = now or datetime.now(UTC)
    if isinstance(interrupt, asyncio.CancelledError):
        task, flow = TaskRunContext.get(), FlowRunContext.get()
        limit = _limit_of_task(task)
        if task and _has_passed(task.start_time, limit, at) and _is_scope_over(interrupt):
            return Cause(f"the task's timeout_seconds={limit:g} passed", is_task_timeout=True)
        limit = _limit_of_flow(flow)
        if flow and _has_passed(flow.start_time, limit, at):
            # Whether by its scope or by a `cancel()`: `gather` passes the scope's on to tasks that aren't in it.
            return Cause(f"the flow's timeout_seconds={limit:g} passed")
    if intent == "cancel":
        return Cause("the flow run was cancelled")
    if isinstance(interrupt, TerminationSignal):
        heard = heard or signal.SIGTERM
    if isinstance(interrupt, KeyboardInterrupt):
        heard = heard or signal.SIGINT
    if heard:
        return Cause(reason_of(heard))
    flow = FlowRunContext.get()
    reason = told(flow.flow_run.id) if flow and flow.flow_run else None
    return Cause(reason or "the task was cancelled")


def _limit_of_task(context: TaskRunContext | None) -> float | None:
    return context.task.timeout_seconds if context else None


def _limit_of_flow(context: FlowRunContext | None) -> float | None:
    return context.flow.timeout_seconds if context and context.flow else None


def _has_passed(start: datetime, seconds: float | None, now: datetime) -> bool:
    # Prefect enters its scope just after it has made the context, so an earlier end isn't the scope's.
    return seconds is not None and now >= start + timedelta(seconds=seconds)


def _is_scope_over(interrupt: asyncio.CancelledError) -> bool:
    """Whether a cancel scope (a time-out among them) ended the wait, not somebody's `cancel()`."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return (
            type(interrupt) is not asyncio.CancelledError
        )  # sync: only Prefect's scopes raise one
    return anyio.current_effective_deadline() == _NEVER or (
        type(interrupt) is not asyncio.CancelledError
    )
