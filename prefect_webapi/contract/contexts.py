"""The read-only views that plugin methods get. Protocols: the engine brings the objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel

from prefect_webapi.contract.task import TaskExecutionMetadata, TaskTemplate

__all__ = [
    "DeleteContext",
    "GetContext",
    "InputReader",
    "MetricsScope",
    "OutputWriter",
    "PluginSetupContext",
    "SecretManager",
    "StatusContext",
    "TaskExecutionContext",
    "TaskExecutionContextReader",
    "TaskReader",
]

M_co = TypeVar("M_co", covariant=True)
R_co = TypeVar("R_co", covariant=True)
C_co = TypeVar("C_co", covariant=True)
ModelT = TypeVar("ModelT", bound=BaseModel)


class SecretManager(Protocol):
    """Looks a secret up: Prefect Secret block, field of the connection, environment variable."""

    async def get(self, key: str, /) -> str:
        """The secret's present value, never cached by the engine.

        Raises:
            SecretNotFound: names the key and the places searched.
        """
        ...


class TaskReader(Protocol):
    """Reads the task as data."""

    def read(self) -> TaskTemplate:
        """A fresh copy at each call."""
        ...


class InputReader(Protocol):
    """Reads the arguments of the task's call, futures of other tasks resolved."""

    def get(self) -> Mapping[str, Any]: ...


class OutputWriter(Protocol):
    """Takes what the task shall return. Nothing is stored before the method has ended."""

    def put(self, outputs: Any, /) -> None:
        """Last call wins; visible only if the phase is a success."""
        ...

    @property
    def raw_output_prefix(self) -> str:
        """A name for storage of one's own: unique per attempt, constant within it."""
        ...


class MetricsScope(Protocol):
    """Counters and histograms under the plugin's prefix. Labels must have few values."""

    def count(self, name: str, amount: float = 1, /, **labels: str) -> None: ...

    def observe(self, name: str, value: float, /, **labels: str) -> None: ...


class PluginSetupContext(Protocol[C_co]):
    """What a plugin is made from."""

    @property
    def connection(self) -> C_co:
        """The block's value."""
        ...

    @property
    def metrics_scope(self) -> MetricsScope: ...


class TaskExecutionContextReader(Protocol):
    """What `create`, `find` and `resource_requirements` may look at."""

    @property
    def secret_manager(self) -> SecretManager: ...

    @property
    def task_reader(self) -> TaskReader: ...

    @property
    def input_reader(self) -> InputReader: ...

    @property
    def output_writer(self) -> OutputWriter: ...

    @property
    def task_execution_metadata(self) -> TaskExecutionMetadata: ...

    def spec(self, model: type[ModelT], /) -> ModelT:
        """The spec as `model`: the same data as ``task_reader.read().custom``, validated."""
        ...


class TaskExecutionContext(TaskExecutionContextReader, Protocol):
    """What `do` and `status` may look at."""

    @property
    def max_dataset_size_bytes(self) -> int:
        """Largest result in bytes of JSON; -1: no limit. Count while you read, not after."""
        ...


class GetContext(Protocol[M_co]):
    """All that a read needs: works in a process that never saw the task."""

    @property
    def resource_meta(self) -> M_co:
        """The handle that `create` returned."""
        ...


class DeleteContext(GetContext[M_co], Protocol[M_co]):
    """A handle and why its job shall end."""

    @property
    def reason(self) -> str:
        """The true reason; hand it to the service where it has a field for it."""
        ...


class StatusContext(TaskExecutionContext, GetContext[M_co], Protocol[M_co, R_co]):
    """A handle, the last snapshot and the task."""

    @property
    def resource(self) -> R_co:
        """What the last `get` (or `create`) returned."""
        ...
