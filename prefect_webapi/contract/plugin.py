"""The two classes an author may implement, and the entry that announces a plugin."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

from prefect_webapi.contract.config import PluginConfig
from prefect_webapi.contract.contexts import (
    DeleteContext,
    GetContext,
    PluginSetupContext,
    StatusContext,
    TaskExecutionContext,
    TaskExecutionContextReader,
)
from prefect_webapi.contract.phase import PhaseInfo
from prefect_webapi.contract.task import JobSpec, ResourceRequirements

__all__ = [
    "AsyncPlugin",
    "CreateResult",
    "Guarantee",
    "OptionalMethod",
    "Plugin",
    "PluginEntry",
    "PluginLoader",
    "SyncPlugin",
    "handle_type",
    "overrides",
]

M = TypeVar("M")
R = TypeVar("R")
C = TypeVar("C")

Guarantee = Literal["key", "search", "at-most-once"]
OptionalMethod = Literal["find", "get_many", "outputs"]


@dataclass(frozen=True, slots=True)
class CreateResult(Generic[M, R]):
    """What `create` or `find` learned.

    Attributes:
        resource_meta: the handle; small, serialisable, without secrets.
        resource: the first snapshot, if the answer holds one: `status` runs on it at once.
        fingerprint: what the service keeps of the job's fingerprint (16 hexadecimal digits or more);
            None: it keeps none.
    """

    resource_meta: M
    resource: R | None = None
    fingerprint: str | None = None


class _Plugin(ABC):
    @abstractmethod
    def get_config(self) -> PluginConfig:
        """What controls limits, polling and quotas. Cheap; asked again when the block changes."""

    async def resource_requirements(self, ctx: TaskExecutionContextReader) -> ResourceRequirements:
        """Which quota the job counts against. Asked once, before the slot; makes no write call."""
        return ResourceRequirements()

    async def aclose(self) -> None:
        """Release clients and sockets. Called once, after the last call has ended."""
        return


class AsyncPlugin(_Plugin, Generic[M, R]):
    """A remote service whose jobs are created, read, judged and deleted by separate calls.

    `M` is the handle: what is enough to read and delete a job after a restart; people are shown all
    of its fields but those called `opaque…` and those that look like secrets. pydantic must be able
    to serialise it and it holds no secret. `R` is the snapshot: what the last read learned; it is
    never stored.

    Methods may be plain functions instead of coroutines: the engine runs them in a thread.

    Attributes:
        guarantee: what the service offers against a second job after a lost answer. ``key``: it honours
            the job key; ``search``: `find` can look a job up by the job key; ``at-most-once``: neither, so
            an unknown outcome is never repeated.
        max_batch: most jobs per `get_many`; 1: no batch reads.
        visibility_delay: how long a new job may be unreadable; None: the setting.
        lacks: optional methods that the class has and this instance can't serve: where data describe the
            service, they also say what it offers.
    """

    guarantee: Guarantee = "at-most-once"
    max_batch: int = 1
    visibility_delay: timedelta | None = None
    lacks: Collection[OptionalMethod] = ()

    @abstractmethod
    async def create(self, ctx: TaskExecutionContextReader) -> CreateResult[M, R] | M:
        """Make the job named ``ctx.task_execution_metadata.generated_name``; return its handle.

        Called at least once per job, always with the same name. Anything slow before the request delays
        every job.

        Raises:
            RemoteError: one of its subclasses says what happened and whether a job may exist.
        """

    @abstractmethod
    async def get(self, ctx: GetContext[M]) -> R:
        """Read the job. Raise on every failure; raise `NotFound` if the service knows no such job."""

    @abstractmethod
    async def delete(self, ctx: DeleteContext[M]) -> None:
        """Ask the service to end the job. Called at least once; over or unknown is success."""

    @abstractmethod
    def status(self, ctx: StatusContext[M, R]) -> PhaseInfo:
        """Judge the snapshot. No network, no storage; `ctx.output_writer` takes a result."""

    async def get_many(self, ctxs: Sequence[GetContext[M]]) -> Sequence[R | Exception | None]:
        """Read up to `max_batch` jobs: same order, same length. None: not mentioned, read it alone."""
        raise NotImplementedError

    async def find(self, ctx: TaskExecutionContextReader) -> CreateResult[M, R] | None:
        """Look the job up by its key after a `create` of unknown outcome; None: there is none."""
        raise NotImplementedError

    async def outputs(self, ctx: StatusContext[M, R]) -> Any:
        """Fetch the result of a job that succeeded. Overridden where it isn't in the snapshot."""
        raise NotImplementedError


class SyncPlugin(_Plugin):
    """A remote service that answers with the result: one call, `do`.

    Attributes:
        idempotent: a repeated `do` with the same job key does no harm.
    """

    idempotent: ClassVar[bool] = False

    @abstractmethod
    async def do(self, ctx: TaskExecutionContext) -> PhaseInfo:
        """Do the work and return a terminal phase; ``ctx.output_writer`` takes the result."""


Plugin = AsyncPlugin[Any, Any] | SyncPlugin
PluginLoader = Callable[[PluginSetupContext[C]], Awaitable[Plugin] | Plugin]


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginEntry(Generic[C]):
    """What a plugin package announces; an entry point of group `prefect_webapi.plugins` names it.

    Attributes:
        id: unique name; enabling, disabling and metrics use it.
        supported_task_types: at least one.
        connection: the block class that holds address, credentials, `engine` and `settings`.
        spec: the spec class of its jobs.
        plugin_loader: makes the plugin; called lazily, once per connection and revision of it.
        is_default: serves task types that nobody supports; at most one entry.
        default_for_task_types: task types for which this one is taken among several.
    """

    id: str
    supported_task_types: Sequence[str]
    connection: type[C]
    spec: type[JobSpec[Any]]
    plugin_loader: PluginLoader[C]
    is_default: bool = False
    default_for_task_types: Sequence[str] = ()


def overrides(plugin: AsyncPlugin[Any, Any], method: OptionalMethod) -> bool:
    """Whether the author implements this optional method, and this instance can serve it."""
    implements = getattr(type(plugin), method) is not getattr(AsyncPlugin, method)
    return implements and method not in plugin.lacks


def handle_type(plugin: type[AsyncPlugin[Any, Any]], config: PluginConfig) -> Any:
    """The type a stored handle is read back as: the configuration's, else the generic argument's."""
    if config.resource_meta is not None:
        return config.resource_meta
    for cls in plugin.__mro__:
        for base in getattr(cls, "__orig_bases__", ()):
            if getattr(base, "__origin__", None) is AsyncPlugin:
                meta = get_args(base)[0]
                return Any if isinstance(meta, TypeVar) else meta
    return Any
