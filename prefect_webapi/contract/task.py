"""What a task asks for: the spec an author's users write, and the views of it plugins read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Generic, NewType, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from prefect_webapi.contract.keys import fit_name

__all__ = [
    "JobSpec",
    "ResourceConstraintsSpec",
    "ResourceNamespace",
    "ResourceRequirements",
    "TaskExecutionMetadata",
    "TaskTemplate",
    "result_type",
]

O = TypeVar("O")
ResourceNamespace = NewType("ResourceNamespace", str)


class JobSpec(BaseModel, Generic[O]):
    """What a remote job shall do: one subclass per task type; `O` is what the task returns.

    Immutable; unknown fields are refused. Everything in it becomes part of the job's fingerprint, so
    secrets don't belong here: they live in the connection's block.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)


def result_type(spec: type[JobSpec[Any]]) -> Any:
    """`O` of a spec class: what its task returns; `Any` where the class names none."""
    given: dict[Any, Any] = {}  # what generic subclasses were told their variables to be
    for cls in spec.__mro__:
        meta: Mapping[str, Any] = getattr(cls, "__pydantic_generic_metadata__", {})
        origin: Any = meta.get("origin")
        if origin is JobSpec:
            returns = meta["args"][0]
            while isinstance(returns, TypeVar):
                returns = given.pop(returns, Any)
            return NoneType if returns is None else returns
        if origin is not None:
            variables = origin.__pydantic_generic_metadata__["parameters"]
            given.update(zip(variables, meta["args"], strict=True))
    return Any


class TaskTemplate(BaseModel):
    """The task as data. Every `read()` gives a copy: changing it changes nothing else.

    Attributes:
        type: the task type.
        custom: the spec's fields as JSON.
        interface: declared inputs and outputs, name to type's name.
    """

    type: str
    task_type_version: int = 0
    id: str = ""
    interface: dict[str, dict[str, str]] = Field(default_factory=dict)
    custom: dict[str, Any] = Field(default_factory=dict)
    config: dict[str, str] = Field(default_factory=dict)
    sql: dict[str, str] | None = None
    container: dict[str, Any] | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)


def _no_text() -> Mapping[str, str]:
    return {}


@dataclass(frozen=True, slots=True)
class TaskExecutionMetadata:
    """Who asks, and under which name.

    Attributes:
        generated_name: the job key: 26 characters of `[a-z0-9]`, the first a letter. The same in every
            repetition of one attempt, whatever crashed; another for another attempt or job. Hand it
            to the service as idempotency key or as the job's name.
        id: the task run's id; owner_id: the flow run's id. Empty outside a flow.
        namespace: the work pool, or the deployment's name.
        fingerprint: 64 hexadecimal digits over what `create` sends. Services with room for labels
            should keep (a part of) it, so that a job met under our name is known to be ours.
        labels: for tagging the remote job: flow run, task run and job key, and the task's tags.
        attempt: counts from 1.
        is_repeated: a create with this name may have arrived before, in this process or another; for services that
            want to be told.
    """

    generated_name: str
    fingerprint: str
    id: str = ""
    owner_id: str = ""
    namespace: str = ""
    labels: Mapping[str, str] = field(default_factory=_no_text)
    annotations: Mapping[str, str] = field(default_factory=_no_text)
    attempt: int = 1
    max_attempts: int = 1
    environment_variables: Mapping[str, str] = field(default_factory=_no_text)
    security_identity: str = ""
    interruptible: bool = False
    is_repeated: bool = False

    def generated_name_with(self, min_length: int, max_length: int) -> str:
        """The job key, of a length between both (bounds included); see `fit_name`."""
        return fit_name(self.generated_name, min_length, max_length)


class ResourceConstraintsSpec(BaseModel):
    """Further bounds inside a namespace, in places; None: no bound at that level.

    Attributes:
        project_scope: most places that one project's jobs take; namespace_scope: that those of one project in one
            work pool take. Jobs that name different numbers for one scope: the latest counts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    project_scope: int | None = Field(default=None, ge=1)
    namespace_scope: int | None = Field(default=None, ge=1)


class ResourceRequirements(BaseModel):
    """Which quota a job counts against.

    Attributes:
        namespace: a key of `resource_quotas`; sub-namespaces are parted by `:`.
        constraints: further bounds inside it.
        places: how many places the job takes, of the quota and of each bound.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    namespace: str = "default"
    constraints: ResourceConstraintsSpec = ResourceConstraintsSpec()
    places: int = Field(default=1, ge=1)
