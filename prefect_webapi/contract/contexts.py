"""The read-only views that plugin methods get. Protocols: the engine brings the objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel

from prefect_webapi.contract.task import TaskExecutionMetadata, TaskTemplate

__all__ = [
    "DataStore",
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

    async def path(self) -> str:
        """URI of the task as JSON in the result storage. Written by this call, not before."""
        ...


class InputReader(Protocol):
    """Reads the arguments of the task's call, futures of other tasks resolved."""

    def get(self) -> Mapping[str, Any]: ...

    @property
    def prefix(self) -> str:
        """Where `path` writes: a name in the result storage."""
        ...

    async def path(self) -> str:
        """URI of the arguments as JSON in the result storage. Written by this call, not before.

        Raises:
            BadTaskSpecification: an argument has no JSON form.
        """
        ...


class DataStore(Protocol):
    """Prefect's result storage, for what a plugin or its remote job keeps.

    Names are paths parted by `/`, best under the prefixes of `output_writer`: these are a job's own.
    """

    async def write(self, name: str, data: bytes, /) -> str:
        """Store under a name, replacing what was there; returns the URI to read it by. Raises `WebApiError`."""
        ...

    async def read(self, uri: str, /) -> bytes | None:
        """What was stored, in any process that has the storage; None if it is gone. Raises `WebApiError`."""
        ...

    async def uri(self, name: str, /) -> str:
        """The place that `write` would use, in words that services understand: `s3://…`, `file://…`.

        `prefect-block://<id>/<name>` for a storage that has no such words. Writes nothing. Raises `WebApiError`.
        """
        ...


class OutputWriter(Protocol):
    """Takes what the task shall return. Nothing is stored before the method has ended."""

    def put(self, outputs: Any, /) -> None:
        """Last call wins; visible only if the phase is a success."""
        ...

    @property
    def raw_output_prefix(self) -> str:
        """Where a job keeps data of its own: unique per attempt, constant within it.

        This and the others are names in the result storage; `data_store.uri` tells their URIs.
        """
        ...

    @property
    def output_prefix(self) -> str:
        """Where a job leaves its outputs, for services that want to be told."""
        ...

    @property
    def output_path(self) -> str: ...

    @property
    def error_path(self) -> str: ...

    @property
    def checkpoint_prefix(self) -> str:
        """Where this attempt keeps what the next one may go on from."""
        ...

    @property
    def previous_checkpoint_prefix(self) -> str | None:
        """The same of the attempt before; None: this is the first."""
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
    def data_store(self) -> DataStore: ...

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
