"""The views that plugin methods get: the contract's Protocols, made from a request and a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, SecretStr

from prefect_webapi.contract.keys import Fingerprint, JobKey
from prefect_webapi.contract.task import JobSpec, TaskExecutionMetadata, TaskTemplate, result_type
from prefect_webapi.engine.request import JobRequest, Secrets

__all__ = [
    "NOTHING_PUT",
    "DeleteView",
    "GetView",
    "OutputSlot",
    "StatusView",
    "TaskView",
    "task_view",
]

ModelT = TypeVar("ModelT", bound=BaseModel)


class _NothingPut:
    __slots__ = ()


NOTHING_PUT = _NothingPut()


class OutputSlot:
    """Keeps what a plugin put last; visible to the engine only."""

    __slots__ = ("raw_output_prefix", "value")

    def __init__(self, raw_output_prefix: str) -> None:
        self.raw_output_prefix = raw_output_prefix
        self.value: Any = NOTHING_PUT

    def put(self, outputs: Any, /) -> None:
        self.value = outputs


@dataclass(frozen=True, slots=True)
class _TaskReader:
    request: JobRequest

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


@dataclass(frozen=True, slots=True)
class _InputReader:
    inputs: Mapping[str, Any]

    def get(self) -> Mapping[str, Any]:
        return dict(self.inputs)


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


@dataclass(frozen=True, slots=True)
class TaskView:
    """What `create`, `find`, `do` and `resource_requirements` may look at."""

    request: JobRequest
    secret_manager: _SecretManager
    output_writer: OutputSlot
    task_execution_metadata: TaskExecutionMetadata
    max_dataset_size_bytes: int

    @property
    def task_reader(self) -> _TaskReader:
        return _TaskReader(self.request)

    @property
    def input_reader(self) -> _InputReader:
        return _InputReader(self.request.inputs)

    def spec(self, model: type[ModelT], /) -> ModelT:
        spec: JobSpec[Any] = self.request.spec
        if isinstance(spec, model):
            return spec
        return model.model_validate(spec.model_dump(mode="json"))


def task_view(
    request: JobRequest,
    *,
    key: JobKey,
    fingerprint: Fingerprint,
    attempt: int,
    secrets: Secrets,
    connection: Any,
    max_dataset_size_bytes: int,
) -> TaskView:
    caller = request.caller
    labels = {"job_key": key, "flow_run_id": caller.flow_run, "task_run_id": caller.task_run}
    return TaskView(
        request=request,
        secret_manager=_SecretManager(secrets, connection),
        output_writer=OutputSlot(f"prefect-webapi/{key}"),
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
class DeleteView:
    resource_meta: Any
    reason: str


@dataclass(frozen=True, slots=True)
class StatusView:
    """A task view with a handle and a snapshot beside it."""

    task: TaskView
    resource_meta: Any
    resource: Any

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
