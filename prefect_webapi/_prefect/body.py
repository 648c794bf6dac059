"""What runs inside a task: describe the job, hand it to the engine, wait, return its end as a state.

One function per colour. An interrupt never passes silently: the job is deleted under a shield with a
deadline, or left on purpose, before the task ends.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast
from uuid import uuid4

import anyio
import anyio.to_thread
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.results import (
    ResultRecord,  # pyright: ignore[reportPrivateImportUsage] # it is in Prefect's own docs
    get_result_store,
)
from prefect.states import Crashed
from prefect.transactions import get_transaction
from pydantic import BaseModel, ValidationError

from prefect_webapi._prefect import service, states
from prefect_webapi._prefect.causes import (
    INTERRUPTS,
    Cause,
    cause_of,
    is_suspending,
    may_time_out,
)
from prefect_webapi._prefect.identity import Chain, attempt_of, caller, chain_here
from prefect_webapi._prefect.options import Options
from prefect_webapi._prefect.reports import TaskRunReporter
from prefect_webapi._prefect.rollback import undone_with_transaction
from prefect_webapi._prefect.service import Engine
from prefect_webapi.contract.errors import ConfigurationError, EngineClosed
from prefect_webapi.contract.faults import explain
from prefect_webapi.contract.keys import JobKey
from prefect_webapi.contract.task import JobSpec
from prefect_webapi.engine.request import Caller, JobRequest, Outcome, Overrides, Reporter

if TYPE_CHECKING:  # the engine itself is loaded by the first job
    from prefect_webapi.engine.host import Ticket, Waiting

__all__ = [
    "Call",
    "Job",
    "Unsaved",
    "driven",
    "request_of",
    "run_async",
    "run_sync",
    "until_stopped",
]

logger = logging.getLogger(__name__)

WaitT = TypeVar("WaitT", bound="Waiting")

STORE_SECONDS = 5.0
CANCEL_SECONDS = 25.0
"""Longest wait for the end of a cancelled job: a worker kills the process 30 s after it asked."""


@dataclass(frozen=True, slots=True)
class Unsaved:
    """A block that was never saved. It holds secrets, so it does not travel to another process."""

    block: Any

    def __reduce__(self) -> tuple[type[Unsaved], tuple[None]]:
        return Unsaved, (None,)

    def get(self) -> Any:
        if self.block is None:
            raise ConfigurationError(
                "the task's connection is a block that was never saved, and secrets don't travel to other "
                'processes. Save the block and name it: connection="NAME".'
            )
        return self.block


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a remote task is made of besides Prefect's options. Pickled with the task.

    Attributes:
        describe: the user's function, or the spec's class: arguments to spec.
        key: names the task in a job's identity; stable over edits of its file and its place.
        chain: the runs around the call, put on the copy that `submit` and `map` hand to a runner.
    """

    task_type: str
    describe: Callable[..., Any]
    key: str
    connection: str | Unsaved | None = None
    plugin: str | None = None
    idempotency_key: str | None = None
    deadline: timedelta | None = None
    on_exit: Literal["cancel", "leave"] = "cancel"
    reuse_results: bool | None = None
    on_unknown_create: Literal["fail", "retry"] | None = None
    chain: Chain | None = None


@dataclass(slots=True)
class Call(Generic[WaitT]):
    """One attempt of a task run that waits for its job, or its jobs.

    Attributes:
        ended: keys of the jobs that are over, but those whose end another run has had before.
    """

    engine: Engine
    ticket: WaitT
    reporter: TaskRunReporter
    job: Job
    who: Caller
    run: TaskRun
    ended: list[JobKey] = field(default_factory=list[JobKey])
    forget: Callable[[], None] | None = None

    def watch(self) -> None:
        """Watch over its flow runs until it is closed. Apart from its making: an interrupt has to find the call."""
        self.forget = self.engine.watch.add(
            self.ticket,
            (self.who.flow_run, self.who.root_run, *self.who.levels),
            self.run.id,
            leaves_job=self.job.on_exit == "leave",
        )
        undone_with_transaction(self.engine.host, self.ticket, lambda: self.ended)

    def ended_as(self, outcome: Outcome) -> Outcome:
        """A job is over; its outcome once more."""
        if not outcome.is_of_another_run:
            self.ended.append(outcome.job_key)
        self.reporter.ended(outcome)
        return outcome

    def close(self) -> None:
        """Nothing of ours touches the task run after this."""
        if self.forget is not None:
            self.forget()
        self.reporter.close()


async def run_async(
    job: Job, load: Callable[[], Options], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """The body of an async task. Outside its own task run it only returns the spec.

    Args:
        load: gives the process's settings, for its first job.
    """
    try:
        described = job.describe(*args, **kwargs)
        if inspect.isawaitable(described):
            described = await described
    except ValidationError as found:
        raise _explained(found) from None
    spec, context = _checked(job, described), _own_context(job)
    if context is None:
        return spec

    async def end(call: Call[Ticket]) -> State[Any]:
        return states.ending(call.ended_as(await call.ticket.outcome()))

    return await driven(load, lambda engine: _admit(job, spec, context, engine), end)


async def driven(
    load: Callable[[], Options],
    admit: Callable[[Engine], Call[WaitT]],
    end: Callable[[Call[WaitT]], Awaitable[State[Any]]],
) -> State[Any]:
    """Hand over, wait, and end as the remote side or an interrupt says.

    Args:
        end: waits, and tells the state to end in.
    """
    call: Call[WaitT] | None = None
    began = time.monotonic()
    service.listen()
    try:
        try:
            call = admit(service.started() or await anyio.to_thread.run_sync(service.start, load))
            call.watch()
            return await _told(await end(call))
        except INTERRUPTS as interrupt:
            cause = _interrupted(call, interrupt, began)
            outcome = await until_stopped(call) if call and not cause.leaves_job else None
            return await _told(_interrupted_end(call, cause, outcome, interrupt))
    except EngineClosed as error:
        return await _told(_left(error))
    finally:
        if call is not None:
            call.close()


def run_sync(
    job: Job, load: Callable[[], Options], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """The body of a sync task."""
    try:
        described = job.describe(*args, **kwargs)
    except ValidationError as found:
        raise _explained(found) from None
    spec, context = _checked(job, described), _own_context(job)
    if context is None:
        return spec
    call: Call[Ticket] | None = None
    began = time.monotonic()
    service.listen()
    try:
        try:
            call = _admit(job, spec, context, service.start(load))
            call.watch()
            outcome = call.ended_as(call.ticket.outcome_blocking(is_timed=may_time_out()))
            return _told_blocking(states.ending(outcome))
        except INTERRUPTS as interrupt:
            cause = _interrupted(call, interrupt, began)
            outcome = _until_stopped_blocking(call) if call and not cause.leaves_job else None
            return _told_blocking(_interrupted_end(call, cause, outcome, interrupt))
    except EngineClosed as error:
        return _told_blocking(_left(error))
    finally:
        if call is not None:
            call.close()


def _own_context(job: Job) -> TaskRunContext | None:
    """The context of the task run that this body is; None where somebody called the function itself."""
    context = TaskRunContext.get()
    own = getattr(context.task, "job", None) if context else None
    return context if isinstance(own, Job) and own.describe is job.describe else None


def _explained(found: ValidationError) -> Exception:
    return explain(found, subject=f"the spec ({found.title})")


def _checked(job: Job, described: Any) -> JobSpec[Any]:
    if isinstance(described, JobSpec):
        return cast(JobSpec[Any], described)
    kind = type(described).__name__
    raise ConfigurationError(
        f"the function of a {job.task_type!r} task describes its job: it must return a JobSpec, "
        f"and {job.key} returned {kind}"
    )


def _admit(job: Job, spec: JobSpec[Any], context: TaskRunContext, engine: Engine) -> Call[Ticket]:
    own = getattr(context.task, "job", job)  # with_options changed the task, not the function
    run: TaskRun = context.task_run
    who = caller(
        run,
        chain=own.chain or chain_here(own=run.id),
        run_key=engine.run_key,
        retries=context.task.retries,
        idempotency_key=own.idempotency_key,
    )
    reporter = TaskRunReporter(engine.display, deployment=who.deployment)
    try:
        request = request_of(
            own,
            spec,
            who,
            reporter,
            task_name=context.task.name,
            attempt=attempt_of(run),
            inputs=_inputs(context.parameters),
        )
        return Call(engine, engine.host.admit(request), reporter, own, who, run)
    except Exception:
        reporter.close()
        raise


def request_of(
    own: Job,
    spec: JobSpec[Any],
    who: Caller,
    reporter: Reporter,
    *,
    task_name: str,
    attempt: int,
    inputs: Mapping[str, Any],
) -> JobRequest:
    """What the engine is asked for."""
    connection = own.connection.get() if isinstance(own.connection, Unsaved) else own.connection
    return JobRequest(
        task_type=own.task_type,
        spec=spec,
        task_key=own.key,
        task_name=task_name,
        caller=who,
        reporter=reporter,
        connection="default" if connection is None else connection,
        plugin=own.plugin,
        attempt=attempt,
        inputs=inputs,
        options=Overrides(
            deadline=own.deadline,
            reuse_results=own.reuse_results,
            on_unknown_create=own.on_unknown_create,
            on_exit=own.on_exit,
        ),
    )


def _inputs(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.model_copy() if isinstance(value, BaseModel) else value
        for name, value in parameters.items()
    }


def _left(error: EngineClosed) -> State[Any]:
    return Crashed(message=str(error), data=error)


async def _told(state: State[Any]) -> State[Any]:
    """The end as Prefect gets it; it may be read in another process where results are persisted."""
    record = _apart(state)
    if record is not None:
        with anyio.move_on_after(STORE_SECONDS, shield=True), _not_vital():
            await get_result_store().apersist_result_record(record)
    return state


def _told_blocking(state: State[Any]) -> State[Any]:
    record = _apart(state)
    if record is not None:
        with _not_vital():
            get_result_store().persist_result_record(record)
    return state


def _apart(state: State[Any]) -> ResultRecord[Any] | None:
    """What a Crashed or Cancelled state holds, under a key of its own; None: Prefect keeps it rightly, or not at all.

    Prefect would store it as the result of the task's cache key, and hand it out as Completed from then on.
    """
    transaction = get_transaction()
    if not (state.is_crashed() or state.is_cancelled()) or transaction is None:
        return None
    is_kept, transaction.write_on_commit = transaction.write_on_commit, False
    if not is_kept:
        return None
    state.data = get_result_store().create_result_record(state.data, key=str(uuid4()))
    return state.data


@contextmanager
def _not_vital() -> Generator[None]:
    """The task run's state tells the end in any case."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a storage block may raise whatever its client raises
        logger.warning("how the job ended could not be stored for other processes: %s", error)


# --- interrupts ----------------------------------------------------------------------------------------


def _interrupted(call: Call[Any] | None, interrupt: BaseException, began: float) -> Cause:
    """Tell the engine what shall become of the job."""
    cause = cause_of(interrupt, heard=service.signal_since(began), told=service.reason_told_to)
    if call is None:
        return cause
    if call.job.on_exit == "leave" and not cause.is_task_timeout:
        cause = replace(cause, leaves_job=True)
    if cause.leaves_job:
        if is_suspending():
            call.ticket.pause(leaves=True)
        else:
            call.ticket.detach()
    else:
        call.ticket.cancel(cause.reason)
    return cause


def _interrupted_end(
    call: Call[Any] | None, cause: Cause, outcome: Outcome | None, interrupt: BaseException
) -> State[Any]:
    """The state to end in; or the interrupt goes on, where Prefect has its own end for it."""
    if cause.leaves_job or cause.is_task_timeout:
        raise interrupt
    return states.cancelled(cause.reason, outcome, by=interrupt, was_admitted=call is not None)


async def until_stopped(call: Call[Any]) -> Outcome | None:
    """How the job ended; None when that isn't known in time. The delete goes on in any case."""
    with anyio.CancelScope(shield=True), anyio.move_on_after(CANCEL_SECONDS):
        try:
            return call.ended_as(await call.ticket.outcome())
        except (Exception, asyncio.CancelledError):  # noqa: BLE001 - the interrupt counts, not what the engine met
            return None  # who cancels again, as `asyncio.run` does in the end, is in a hurry
    return None


def _until_stopped_blocking(call: Call[Ticket]) -> Outcome | None:
    try:
        return call.ended_as(call.ticket.outcome_blocking())
    except Exception:  # noqa: BLE001 - as above
        return None
