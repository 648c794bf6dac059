"""Who calls: the chain of runs that a call stands in, and the engine's `Caller` made from it.

Owns the run key, the execution and the levels. Nothing here is drawn anew at a re-run: the ids of the
root flow run and of the Running states come from Prefect's server, so that the same call, made again after
a crash, meets its own job.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import UUID, uuid4

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State, StateType, TaskRun
from prefect.context import ContextModel, FlowRunContext, TaskRunContext

from prefect_webapi._prefect.api import api_address, told_by
from prefect_webapi.contract.errors import WebApiError
from prefect_webapi.engine.request import Caller

__all__ = [
    "Chain",
    "caller",
    "chain_here",
    "enclosing",
    "given_run_key",
    "own_task_run",
    "run_key",
    "running_state_of",
]

ContextT = TypeVar("ContextT", bound=ContextModel)

_run_key: ContextVar[str | None] = ContextVar("prefect_webapi_run_key", default=None)


@contextmanager
def run_key(key: str) -> Generator[None]:
    """Let a second start of a script meet the jobs of the first: calls inside use this run key.

    The root flow's name is part of the key. Two starts alive at once under one key share their jobs.
    It reaches tasks that are called or submitted inside. A task worker is another process, which it does not
    reach: `.delay` inside is refused, unless the task has an `idempotency_key`.
    """
    if not key:
        raise ValueError("run_key is empty; give a text that names this run, for example a date")
    token = _run_key.set(key)
    try:
        yield
    finally:
        _run_key.reset(token)


def given_run_key() -> str | None:
    """What `run_key(...)` says here; None outside of it."""
    return _run_key.get()


@dataclass(frozen=True, slots=True)
class Chain:
    """The runs around a call.

    Attributes:
        root_run / root_name: id and flow name of the root flow run; empty outside a flow.
        flow_run: id of the innermost flow run; empty outside a flow.
        execution: id of the Running state of the root flow run; outside a flow a nonce.
        levels: every other enclosing run, each with the id of its Running state.
    """

    execution: str
    root_run: str = ""
    root_name: str = ""
    flow_run: str = ""
    deployment: str = ""
    namespace: str = ""
    levels: tuple[tuple[str, str], ...] = ()
    run_key: str | None = None


# --- the one look into Prefect's private parts ----------------------------------------------------


def enclosing(context: ContextT) -> ContextT | None:
    """The context of the same kind that was current when this one was entered.

    `ContextModel._token` is private: Prefect keeps the token that it resets its variable with, and the
    token knows the value before.
    """
    token: Token[ContextT] | None = context._token  # pyright: ignore[reportPrivateUsage] # see above
    if token is None or token.old_value is Token.MISSING:
        return None
    return token.old_value


def _outwards(context: ContextT | None) -> Iterator[ContextT]:
    while context is not None:
        yield context
        context = enclosing(context)


# --- outside a flow an execution is a process ------------------------------------------------------


@dataclass(slots=True)
class _Nonce:
    pid: int = field(default_factory=os.getpid)
    text: str = field(default_factory=lambda: uuid4().hex)


_nonce = _Nonce()


def _process_nonce() -> str:
    global _nonce
    if _nonce.pid != os.getpid():
        _nonce = _Nonce()
    return _nonce.text


# --- the chain -------------------------------------------------------------------------------------


def own_task_run() -> TaskRun | None:
    """The task run that this code belongs to."""
    context = TaskRunContext.get()
    return None if context is None else context.task_run


def chain_here(*, own: UUID | None = None) -> Chain:
    """The chain of a call made here. `own` is the calling task run: it is no level.

    In a process that holds all enclosing contexts this asks nobody. Elsewhere (a pool process without a
    carried chain, a flow started by `run_deployment`) the outer runs are asked of Prefect's API, once.

    Raises:
        WebApiError: the outer runs can't be found out, so the call's identity isn't known.
    """
    tasks = _task_levels(own)
    flows = _flow_runs()
    if not flows:
        return Chain(execution=_process_nonce(), levels=tuple(tasks), run_key=given_run_key())
    outermost = flows[-1]
    upper = _upper(outermost) if outermost.parent_task_run_id is not None else None
    levels = list(tasks)
    if upper is None:
        root_id, root_name, execution = str(outermost.id), _root_name(), _state_id(outermost)
        inner = flows[:-1]
    else:
        root_id, root_name, execution = upper.root_run, upper.root_name, upper.execution
        inner = flows
    levels += [(str(run.id), _state_id(run)) for run in inner]
    levels += upper.levels if upper is not None else ()
    innermost = flows[0]
    return Chain(
        execution=execution,
        root_run=root_id,
        root_name=root_name,
        flow_run=str(innermost.id),
        deployment=str(outermost.deployment_id or ""),
        namespace=outermost.work_pool_name or "",
        levels=tuple(dict.fromkeys(levels)),
        run_key=given_run_key(),
    )


def _task_levels(own: UUID | None) -> list[tuple[str, str]]:
    runs = {c.task_run.id: c.task_run for c in _outwards(TaskRunContext.get())}
    return [
        (str(run.id), str(run.state.id) if run.state else "")
        for run in runs.values()
        if run.id != own
    ]


def _flow_runs() -> list[FlowRun]:
    """Flow runs around this call that this process holds, the innermost first."""
    runs = (c.flow_run for c in _outwards(FlowRunContext.get()))
    return list({run.id: run for run in runs if run is not None}.values())


def _root_name() -> str:
    """Name of the outermost flow that this process holds."""
    names = [c.flow.name for c in _outwards(FlowRunContext.get()) if c.flow is not None]
    return names[-1] if names else ""


def _state_id(run: FlowRun) -> str:
    if run.state is not None and run.state.is_running():
        return str(run.state.id)
    return _ask(lambda client: running_state_of(client.read_flow_run_states(run.id)))


def running_state_of(history: Iterable[State[Any]]) -> str:
    """Id of the Running state that the present execution began with, from a run's states in order.

    A Running that directly follows a Paused is the same execution going on in the same process.
    """
    found, last = "", None
    for state in history:
        was_paused = last is not None and last.type is StateType.PAUSED
        if state.type is StateType.RUNNING and not was_paused:
            found = str(state.id)
        last = state
    return found


# --- outer runs that this process does not hold ------------------------------------------------------

_known_upper: dict[tuple[UUID, str], Chain] = {}
_asking = threading.Lock()


def _upper(run: FlowRun) -> Chain:
    """The chain above a flow run whose parents live in another process."""
    known = (run.id, str(run.state.id) if run.state else "")
    with _asking:
        if known not in _known_upper:
            _known_upper[known] = _ask(lambda client: _climb(client, run))
        return _known_upper[known]


def _climb(client: SyncPrefectClient, run: FlowRun) -> Chain:
    levels: list[tuple[str, str]] = []
    while run.parent_task_run_id is not None:
        parent = client.read_task_run(run.parent_task_run_id)
        if parent.flow_run_id is None:
            break  # the flow was called in a task outside any flow: `run` is the root
        run = client.read_flow_run(parent.flow_run_id)
        levels.append((str(run.id), running_state_of(client.read_flow_run_states(run.id))))
    if levels:
        (_, execution), levels = levels[-1], levels[:-1]
    else:
        execution = running_state_of(client.read_flow_run_states(run.id))
    name = client.read_flow(run.flow_id).name
    return Chain(execution=execution, root_run=str(run.id), root_name=name, levels=tuple(levels))


AnswerT = TypeVar("AnswerT")


def _ask(question: Callable[[SyncPrefectClient], AnswerT]) -> AnswerT:
    try:
        with get_client(sync_client=True) as client:
            return question(client)
    except Exception as error:  # noqa: BLE001 - raised as ours; theirs shows the address with its password
        raise WebApiError(
            f"Prefect's API at {api_address()} did not say which flow runs this call stands in, so its job can't "
            f"be told from others and none is made: {told_by(error)}"
        ) from None


# --- the caller ----------------------------------------------------------------------------------------


def caller(
    task_run: TaskRun,
    *,
    chain: Chain,
    run_key: str | None,
    retries: int,
    idempotency_key: str | None = None,
) -> Caller:
    """Who asks for a job. `run_key` is the setting's; what `run_key(...)` said in the chain wins."""
    key = chain.run_key or run_key
    named = chain.root_run or str(task_run.id)
    if key:
        named = json.dumps(["run_key", key, chain.root_name])
    return Caller(
        run_key=named,
        execution=chain.execution,
        task_run=str(task_run.id),
        levels=dict(chain.levels),
        idempotency_key=idempotency_key,
        flow_run=chain.flow_run,
        root_run=chain.root_run,
        deployment=chain.deployment,
        namespace=chain.namespace or chain.deployment,
        labels=_labels(task_run.tags),
        max_attempts=retries + 1,
    )


def attempt_of(task_run: TaskRun) -> int:
    """Which attempt of the task run this is, as Prefect counts them: from 1."""
    return max(1, task_run.run_count)


def _labels(tags: Iterable[str]) -> dict[str, str]:
    """Tags as labels: `team:data` and `team=data` are name and value, any other tag is a name."""
    labels: dict[str, str] = {}
    for tag in sorted(tags):
        name, _, value = tag.partition(":" if ":" in tag else "=")
        labels[name.strip()] = value.strip() or "true"
    return labels
