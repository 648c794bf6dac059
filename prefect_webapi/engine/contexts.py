"""The views that plugin methods get: the contract's Protocols, made from a request and a record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, SecretStr
from pydantic_core import PydanticSerializationError, to_json

from prefect_webapi.contract.contexts import DataStore
from prefect_webapi.contract.errors import BadTaskSpecification
from prefect_webapi.contract.keys import Fingerprint, JobKey
from prefect_webapi.contract.task import JobSpec, TaskExecutionMetadata, TaskTemplate, result_type
from prefect_webapi.engine.request import JobRequest, Secrets

__all__ = [
    "NOTHING_PUT",
    "DeleteView",
    "GetView",
    "OutputSlot",
    "ReadView",
    "StatusView",
    "TaskView",
    "ViewSource",
    "storage_prefix",
    "task_view",
]

ModelT = TypeVar("ModelT", bound=BaseModel)


class _NothingPut:
    __slots__ = ()


NOTHING_PUT = _NothingPut()


def storage_prefix(key: JobKey) -> str:
    """Where everything of an attempt lies in the result storage."""
    return f"prefect-webapi/{key}"


class OutputSlot:
    """Keeps what a plugin put last; visible to the engine only."""

    __slots__ = ("_prefix", "_previous", "value")

    def __init__(self, key: JobKey, previous: JobKey | None) -> None:
        self._prefix = storage_prefix(key)
        self._previous = previous
        self.value: Any = NOTHING_PUT

    def put(self, outputs: Any, /) -> None:
        self.value = outputs

    @property
    def raw_output_prefix(self) -> str:
        return f"{self._prefix}/raw"

    @property
    def output_prefix(self) -> str:
        return f"{self._prefix}/outputs"

    @property
    def output_path(self) -> str:
        return f"{self.output_prefix}/outputs.json"

    @property
    def error_path(self) -> str:
        return f"{self.output_prefix}/error.json"

    @property
    def checkpoint_prefix(self) -> str:
        return f"{self._prefix}/checkpoints"

    @property
    def previous_checkpoint_prefix(self) -> str | None:
        return None if self._previous is None else f"{storage_prefix(self._previous)}/checkpoints"


@dataclass(frozen=True, slots=True)
class _TaskReader:
    request: JobRequest
    store: DataStore
    prefix: str

    def read(self) -> TaskTemplate:
        spec = self.request.spec
        returns = result_type(type(spec))
        return TaskTemplate(
            type=self.request.task_type,
            id=self.request.task_key,
            custom=spec.model_dump(mode="json"),
            interface={
                "inputs": {name: type(value).__name__ for name, value in spec},
                "outputs": {} if returns is type(None) else {"result": str(returns)},
            },
        )

    async def path(self) -> str:
        name = f"{self.prefix}/task.json"
        await self.store.write(name, self.read().model_dump_json().encode())
        return await self.store.uri(name)


@dataclass(frozen=True, slots=True)
class _InputReader:
    inputs: Mapping[str, Any]
    store: DataStore
    prefix: str

    def get(self) -> Mapping[str, Any]:
        return dict(self.inputs)

    async def path(self) -> str:
        try:
            data = to_json(self.get())
        except PydanticSerializationError as error:
            raise BadTaskSpecification(f"the task's arguments have no JSON form: {error}") from None
        name = f"{self.prefix}/inputs.json"
        await self.store.write(name, data)
        return await self.store.uri(name)


@dataclass(frozen=True, slots=True)
class _SecretManager:
    """`given`: what it handed out, so that it can be kept out of texts."""

    secrets: Secrets
    connection: Any
    given: list[SecretStr] = field(default_factory=list[SecretStr])

    async def get(self, key: str, /) -> str:
        value = await self.secrets.get(key, self.connection)
        self.given.append(SecretStr(value))
        return value


class ViewSource(Protocol):
    """Has a task view, or makes it when it is asked for: most reads of a job need none."""

    @property
    def view(self) -> TaskView: ...

    @property
    def given(self) -> Sequence[SecretStr]:
        """Secrets that the author's code has got through the view."""
        ...

    @property
    def request(self) -> JobRequest: ...

    @property
    def key(self) -> JobKey: ...


@dataclass(frozen=True, slots=True)
class TaskView:
    """What `create`, `find`, `do` and `resource_requirements` may look at."""

    request: JobRequest
    data_store: DataStore
    secret_manager: _SecretManager
    output_writer: OutputSlot
    task_execution_metadata: TaskExecutionMetadata
    max_dataset_size_bytes: int

    @property
    def view(self) -> TaskView:
        return self

    @property
    def key(self) -> JobKey:
        return JobKey(self.task_execution_metadata.generated_name)

    @property
    def given(self) -> Sequence[SecretStr]:
        return self.secret_manager.given

    @property
    def task_reader(self) -> _TaskReader:
        return _TaskReader(self.request, self.data_store, self._prefix)

    @property
    def input_reader(self) -> _InputReader:
        return _InputReader(self.request.inputs, self.data_store, f"{self._prefix}/inputs")

    @property
    def _prefix(self) -> str:
        return storage_prefix(self.key)

    def spec(self, model: type[ModelT], /) -> ModelT:
        spec: JobSpec[Any] = self.request.spec
        if isinstance(spec, model):
            return spec
        return model.model_validate(spec.model_dump(mode="json"))

    def repeated(self) -> TaskView:
        """The same, for a create that may have been sent before."""
        told = replace(self.task_execution_metadata, is_repeated=True)
        return replace(self, task_execution_metadata=told)


def task_view(
    request: JobRequest,
    *,
    key: JobKey,
    fingerprint: Fingerprint,
    attempt: int,
    secrets: Secrets,
    store: DataStore,
    connection: Any,
    max_dataset_size_bytes: int,
    previous: JobKey | None = None,
) -> TaskView:
    caller = request.caller
    labels = {"job_key": key, "flow_run_id": caller.flow_run, "task_run_id": caller.task_run}
    return TaskView(
        request=request,
        data_store=store,
        secret_manager=_SecretManager(secrets, connection),
        output_writer=OutputSlot(key, previous),
        task_execution_metadata=TaskExecutionMetadata(
            generated_name=key,
            fingerprint=fingerprint,
            id=caller.task_run,
            owner_id=caller.flow_run,
            namespace=caller.namespace,
            labels={**caller.labels, **{k: v for k, v in labels.items() if v}},
            attempt=attempt,
            max_attempts=max(attempt, caller.max_attempts),
        ),
        max_dataset_size_bytes=max_dataset_size_bytes,
    )


@dataclass(frozen=True, slots=True)
class GetView:
    """A handle and nothing else: reads work in a process that never saw the task."""

    resource_meta: Any


@dataclass(frozen=True, slots=True)
class ReadView(GetView):
    """A `GetView` that knows for which job it is. Plugins see the handle only."""

    source: ViewSource = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class DeleteView:
    resource_meta: Any
    reason: str


@dataclass(frozen=True, slots=True)
class StatusView:
    """A task view with a handle and a snapshot beside it."""

    source: ViewSource
    resource_meta: Any
    resource: Any

    @property
    def task(self) -> TaskView:
        return self.source.view

    @property
    def given(self) -> Sequence[SecretStr]:
        return self.source.given

    @property
    def secret_manager(self) -> _SecretManager:
        return self.task.secret_manager

    @property
    def task_reader(self) -> _TaskReader:
        return self.task.task_reader

    @property
    def input_reader(self) -> _InputReader:
        return self.task.input_reader

    @property
    def data_store(self) -> DataStore:
        return self.task.data_store

    @property
    def output_writer(self) -> OutputSlot:
        return self.task.output_writer

    @property
    def task_execution_metadata(self) -> TaskExecutionMetadata:
        return self.task.task_execution_metadata

    @property
    def max_dataset_size_bytes(self) -> int:
        return self.task.max_dataset_size_bytes

    def spec(self, model: type[ModelT], /) -> ModelT:
        return self.task.spec(model)
