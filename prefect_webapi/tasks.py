"""Remote jobs as Prefect tasks: the decorator, the undecorated forms, and the task class behind them.

The decorated function only describes a job. The task runs it once per attempt, hands the spec to the engine and
returns what the job returned; retries, names, tags, `.submit`, `.map` and `.delay` are those of any Prefect task.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine, Iterable
from copy import copy
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    Literal,
    ParamSpec,
    Protocol,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
    overload,
)

from prefect.assets import Asset
from prefect.blocks.core import Block
from prefect.cache_policies import NO_CACHE, CachePolicy
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import (
    CancelledRun,
    CrashedRun,
    FailedRun,
    UnfinishedRun,
)
from prefect.futures import PrefectFuture
from prefect.results import (
    ResultRecord,  # pyright: ignore[reportPrivateImportUsage] # it is in Prefect's own docs
    ResultSerializer,
    ResultStorage,
)
from prefect.tasks import StateHookCallable, Task, TaskRunNameValueOrCallable
from prefect.transactions import Transaction
from prefect.utilities.annotations import NotSet
from pydantic import BaseModel

from prefect_webapi._prefect import service
from prefect_webapi._prefect.body import Job, Unsaved, run_async, run_sync
from prefect_webapi._prefect.identity import chain_here, given_run_key, run_key
from prefect_webapi._prefect.options import Options
from prefect_webapi.contract.errors import ConfigurationError, WebApiError
from prefect_webapi.contract.task import JobSpec

__all__ = [
    "Decorate",
    "JobOptions",
    "RemoteTask",
    "TaskOptions",
    "run_key",
    "sync_task_for",
    "task_for",
    "webapi_task",
]

P = ParamSpec("P")
O = TypeVar("O")
A = TypeVar("A")
T = TypeVar("T")

RetryCondition = Callable[[Task[..., Any], TaskRun, State[Any]], Any]


class TaskOptions(TypedDict, total=False):
    """Prefect's own options of a task, passed on as they are."""

    name: str
    description: str
    tags: Iterable[str]
    version: str
    cache_policy: CachePolicy
    cache_key_fn: Callable[[TaskRunContext, dict[str, Any]], str | None]
    cache_expiration: timedelta
    task_run_name: TaskRunNameValueOrCallable
    retries: int
    retry_delay_seconds: float | int | list[float] | Callable[[int], list[float]]
    retry_jitter_factor: float
    retry_condition_fn: RetryCondition
    persist_result: bool
    result_storage: ResultStorage
    result_storage_key: str
    result_serializer: ResultSerializer
    cache_result_in_memory: bool
    timeout_seconds: float
    log_prints: bool
    refresh_cache: bool
    on_completion: list[StateHookCallable]
    on_failure: list[StateHookCallable]
    on_running: list[StateHookCallable]
    on_rollback: list[Callable[[Transaction], None]]
    on_commit: list[Callable[[Transaction], None]]
    viz_return_value: Any
    asset_deps: list[str | Asset]


class JobOptions(TaskOptions, total=False):
    """Ours beside Prefect's; what is absent is taken from the block, then from the settings.

    Attributes:
        connection: a block document's name, or a block; absent: the document `default`.
        plugin: plugin id, where several serve the task type.
        idempotency_key: names the job: equal keys meet the same job, in every run.
        deadline: longest life of the job, counted from its admission.
        on_exit: what becomes of the job when the task is cancelled; `leave` lets it run on.
        reuse_results: whether a repeated run takes the stored result of a finished job.
        on_unknown_create: when it can't be known whether a job was made: fail, or retry at the risk of two.
    """

    connection: Block | str | None
    plugin: str
    idempotency_key: str
    deadline: timedelta
    on_exit: Literal["cancel", "leave"]
    reuse_results: bool
    on_unknown_create: Literal["fail", "retry"]


_OURS = frozenset(JobOptions.__annotations__) - frozenset(TaskOptions.__annotations__)


@dataclass
class OwnRun(CachePolicy):
    """A persisted result serves its own task run and no other.

    Stands in for NO_CACHE, in whose place a task worker puts INPUTS + TASK_SOURCE + RUN_ID: by that, the second of two
    equal calls delayed in one flow run would be given the first one's result.
    """

    def compute_key(
        self,
        task_ctx: TaskRunContext,
        inputs: dict[str, Any],
        flow_parameters: dict[str, Any],
        **kwargs: Any,
    ) -> str | None:
        return str(task_ctx.task_run.id) if task_ctx.persist_result else None


class RemoteTask(Task[P, O], Generic[P, O]):
    """A task whose work is a remote job.

    Made by `webapi_task`, `task_for` and `sync_task_for`. It is a Prefect task in all respects; calling it
    gives the job's result, or raises `JobFailed`. Its `fn` called by itself returns the spec, which is
    how its description is tested.
    """

    job: Job

    def __init__(self, fn: Callable[P, O], *, job: Job, **options: Any) -> None:
        self.job = job
        own = cast(RetryCondition | None, options.pop("retry_condition_fn", None))
        if "cache_policy" not in options and "cache_key_fn" not in options:
            options["cache_policy"] = NO_CACHE  # the ledger is the memory
        super().__init__(fn, retry_condition_fn=retry_condition(own), **options)
        self._keep_results_apart()

    def with_options(  # pyright: ignore[reportIncompatibleMethodOverride] # the same options, and ours
        self, **options: Unpack[JobOptions]
    ) -> RemoteTask[P, O]:
        """A copy of this task with some options changed; it stays a remote task.

        Raises:
            ConfigurationError: an option that is fixed when the task is made.
        """
        given: dict[str, Any] = {**options}
        fixed = sorted({"version", "on_rollback", "on_commit"} & given.keys())
        if fixed:
            raise ConfigurationError(f"{', '.join(fixed)}: give it where the task is made")
        ours = {name: given.pop(name) for name in _OURS & given.keys()}
        own = cast(RetryCondition | None, given.pop("retry_condition_fn", None))
        if own is not None:
            given["retry_condition_fn"] = retry_condition(own)
        base: Task[P, O] = copy(self)
        if "cache_key_fn" in given and "cache_policy" not in given:
            base._user_cache_policy = NotSet  # else Prefect warns of our NO_CACHE
        changed = Task[P, O].with_options(base, **given)
        task = copy(self)
        task.__dict__.update(changed.__dict__)
        task.job = _with(self.job, ours)
        task._keep_results_apart()
        return task

    def _keep_results_apart(self) -> None:
        if self.cache_policy == NO_CACHE:
            self.cache_policy = OwnRun()

    @overload
    def submit(
        self: RemoteTask[P, Coroutine[Any, Any, A]], *args: P.args, **kwargs: P.kwargs
    ) -> PrefectFuture[A]: ...
    @overload
    def submit(self: RemoteTask[P, O], *args: P.args, **kwargs: P.kwargs) -> PrefectFuture[O]: ...
    @overload
    def submit(
        self: RemoteTask[..., Coroutine[Any, Any, A]],
        *args: Any,
        wait_for: Iterable[PrefectFuture[Any]],
        return_state: Literal[False] = False,
        **kwargs: Any,
    ) -> PrefectFuture[A]: ...
    @overload
    def submit(
        self: RemoteTask[..., O],
        *args: Any,
        wait_for: Iterable[PrefectFuture[Any]],
        return_state: Literal[False] = False,
        **kwargs: Any,
    ) -> PrefectFuture[O]: ...
    @overload
    def submit(
        self: RemoteTask[..., Coroutine[Any, Any, A]],
        *args: Any,
        return_state: Literal[True],
        wait_for: Iterable[PrefectFuture[Any]] | None = None,
        **kwargs: Any,
    ) -> State[A]: ...
    @overload
    def submit(
        self: RemoteTask[..., O],
        *args: Any,
        return_state: Literal[True],
        wait_for: Iterable[PrefectFuture[Any]] | None = None,
        **kwargs: Any,
    ) -> State[O]: ...
    def submit(self, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] # async tasks typed anew
        """Run the task through the flow's task runner, as Prefect does; returns a future."""
        return cast(Any, Task).submit(self._carrying_chain(), *args, **kwargs)

    if not TYPE_CHECKING:  # Prefect's overloads are right for these two

        def map(self, *args: Any, **kwargs: Any) -> Any:
            """Submit one run per element, as Prefect does; returns the futures."""
            return Task.map(self._carrying_chain(), *args, **kwargs)

        def apply_async(self, *args: Any, **kwargs: Any) -> Any:
            """Schedule a run for a task worker, as Prefect does (`delay` is short for it); returns a future.

            Raises:
                ConfigurationError: inside `run_key(...)`, which does not reach another process, without an
                    `idempotency_key` on the task.
            """
            if given_run_key() is not None and self.job.idempotency_key is None:
                raise ConfigurationError(
                    f"run_key({given_run_key()!r}) does not reach task {self.name!r}, which runs in a task worker: a "
                    "second start would not meet its job. Name the job with "
                    "with_options(idempotency_key=...), or delay it outside of run_key."
                )
            return super().apply_async(*args, **kwargs)

        def __call__(
            self, *args: Any, return_state: bool = False, wait_for: Any = None, **kwargs: Any
        ) -> Any:
            """Run the task here; returns the job's result or raises, unless `return_state`."""
            from prefect.utilities.visualization import get_task_viz_tracker  # brings graphviz

            if return_state or get_task_viz_tracker():
                return super().__call__(
                    *args, return_state=return_state, wait_for=wait_for, **kwargs
                )
            ended = super().__call__(*args, return_state=True, wait_for=wait_for, **kwargs)
            return _unwrap_later(ended) if self.isasync else unwrap(ended)

    def _carrying_chain(self) -> RemoteTask[P, O]:
        """The copy that goes to a task runner: it knows its place, also in another process."""
        service.listen()
        if FlowRunContext.get() is None:
            return self
        try:
            chain = chain_here()
        except WebApiError:
            return self  # the task finds out by itself, or says why not
        task = copy(self)
        task.job = replace(self.job, chain=chain)
        return task


class Decorate(Protocol):
    """What `webapi_task(...)` returns: turns a function that describes a job into a task."""

    @overload
    def __call__(
        self, fn: Callable[P, Coroutine[Any, Any, JobSpec[O]]], /
    ) -> RemoteTask[P, Coroutine[Any, Any, O]]: ...
    @overload
    def __call__(self, fn: Callable[P, JobSpec[O]], /) -> RemoteTask[P, O]: ...


def webapi_task(task_type: str, /, **options: Unpack[JobOptions]) -> Decorate:
    """Make a task of a function that describes a job of this type.

    The function returns the plugin's spec and does nothing else; it runs once per attempt. An `async def`
    makes an async task, a plain function a sync one.
    """

    def decorate(fn: Callable[..., Any], /) -> RemoteTask[..., Any]:
        body = _async_body if inspect.iscoroutinefunction(fn) else _sync_body
        return _remote_task(task_type, fn, fn.__qualname__, body, options)

    return cast(Decorate, decorate)


def task_for(
    task_type: str, spec: Callable[P, JobSpec[O]], /, **options: Unpack[JobOptions]
) -> RemoteTask[P, Coroutine[Any, Any, O]]:
    """An async task whose parameters are the spec's fields."""
    return _remote_task(task_type, spec, _name_of(spec), _async_body, options)


def sync_task_for(
    task_type: str, spec: Callable[P, JobSpec[O]], /, **options: Unpack[JobOptions]
) -> RemoteTask[P, O]:
    """A sync task whose parameters are the spec's fields."""
    return _remote_task(task_type, spec, _name_of(spec), _sync_body, options)


# --- making a task ------------------------------------------------------------------------------------


def _name_of(spec: Callable[..., Any]) -> str:
    return getattr(spec, "__qualname__", type(spec).__qualname__)


def _remote_task(
    task_type: str,
    describe: Callable[..., Any],
    key: str,
    body: Callable[[Job], Callable[..., Any]],
    options: JobOptions,
) -> RemoteTask[..., Any]:
    prefects: dict[str, Any] = {**options}
    ours = {name: prefects.pop(name) for name in _OURS & prefects.keys()}
    job = _with(Job(task_type=task_type, describe=describe, key=key), ours)
    return RemoteTask[..., Any](body(job), job=job, **prefects)


def _with(job: Job, ours: dict[str, Any]) -> Job:
    if "connection" in ours:
        ours["connection"] = _reference(ours["connection"])
    return replace(job, **ours)


def _reference(connection: Block | str | None) -> str | Unsaved | None:
    """How a task names its connection: a saved block by its document, so that no secret is in the task."""
    if not isinstance(connection, Block):
        return connection
    name: str | None = connection._block_document_name  # pyright: ignore[reportPrivateUsage] # no public way
    return f"{connection.get_block_type_slug()}/{name}" if name else Unsaved(connection)


def _async_body(job: Job) -> Callable[..., Any]:
    @functools.wraps(job.describe, updated=())
    async def body(*args: Any, **kwargs: Any) -> Any:
        return await run_async(job, load_settings, args, kwargs)

    return _known_to_prefect(body, job.describe)


def _sync_body(job: Job) -> Callable[..., Any]:
    @functools.wraps(job.describe, updated=())
    def body(*args: Any, **kwargs: Any) -> Any:
        return run_sync(job, load_settings, args, kwargs)

    return _known_to_prefect(body, job.describe)


def _known_to_prefect(body: Callable[..., Any], describe: Callable[..., Any]) -> Callable[..., Any]:
    body.__signature__ = _signature(describe)  # a class hides its own
    if inspect.isfunction(describe):  # Prefect's task key then tells our bodies apart by theirs
        body.__prefect_task_source__ = describe  # pyright: ignore[reportFunctionMemberAccess] # Prefect's own mark
    return body


def _signature(describe: Callable[..., Any]) -> inspect.Signature:
    """Of a spec class, with the values of its default factories: Prefect passes every default on as an argument."""
    signature = inspect.signature(describe)
    if not isinstance(describe, type) or not issubclass(describe, BaseModel):
        return signature
    made = {
        name: field.get_default(call_default_factory=True)
        for name, field in describe.model_fields.items()
        if field.default_factory is not None
    }
    parameters = [
        each.replace(default=made.get(each.name, each.default))
        for each in signature.parameters.values()
    ]
    return signature.replace(parameters=parameters)


def load_settings() -> Options:
    from prefect_webapi.settings import WebApiSettings

    return WebApiSettings.load()


# --- retries -------------------------------------------------------------------------------------------


def may_help(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether another attempt may help: what the failure says of itself, else yes, as in Prefect."""
    failure = _data(state)
    retryable = getattr(failure, "retryable", None)
    if isinstance(retryable, bool):
        return retryable
    return not isinstance(failure, ConfigurationError)


def retry_condition(own: RetryCondition | None) -> RetryCondition:
    """Our condition, and the user's after it: a plain function, as Prefect wants one."""
    if own is None:
        return may_help

    def both(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> Any:
        return may_help(task, task_run, state) and own(task, task_run, state)

    return both


# --- ends ------------------------------------------------------------------------------------------------


async def _unwrap_later(ended: Coroutine[Any, Any, State[T]]) -> T:
    return unwrap(await ended)


def unwrap(ended: State[T]) -> T:
    """The result of a task that ended in this state, or its exception."""
    data = _data(ended)
    if ended.is_completed():
        return data
    if isinstance(data, BaseException):
        # An interrupt of the body comes back as itself: whoever is being cancelled stays so.
        raise data
    if not ended.is_final():
        raise UnfinishedRun(f"Run is in {ended.type.name} state, its result is not available.")
    wrapper = (
        CancelledRun if ended.is_cancelled() else CrashedRun if ended.is_crashed() else FailedRun
    )
    raise wrapper(ended.message or f"Run ended in {ended.name}.")


def _data(state: State[Any]) -> Any:
    data: Any = state.data
    return cast(Any, data).result if isinstance(data, ResultRecord) else data
