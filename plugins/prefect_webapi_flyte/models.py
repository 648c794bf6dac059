"""What crosses the border: the specs that users write, their values and types, the handle."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any, Generic, Literal, TypeVar, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

from prefect_webapi import JobSpec

O = TypeVar("O")
SIMPLE_TYPES = ("none", "integer", "float", "string", "boolean", "datetime", "duration")


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StructuredDataset(_Value):
    """A table that lies somewhere; `format` as in Flyte: parquet, csv."""

    uri: str
    format: str = ""


class Sql(_Value):
    statement: str
    dialect: Literal["UNDEFINED", "ANSI", "HIVE", "OTHER"] = "UNDEFINED"


class Container(_Value):
    image: str
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    env: dict[str, str] = Field(default_factory=dict)


def type_name(value: Any) -> str:
    """A value's Flyte type in words, `list[integer]` for example.

    Raises:
        ValueError: Flyte knows no literal for it that comes back as the same value.
    """
    match value:
        case None:
            return "none"
        case bool():
            return "boolean"
        case int() if -(2**63) <= value < 2**63:
            return "integer"
        case float():
            return "float"
        case str():
            return "string"
        case datetime() if value.tzinfo is not None:
            return "datetime"
        case timedelta():
            return "duration"
        case StructuredDataset():
            return "structured_dataset"
        case list():
            return f"list[{_common(cast(list[Any], value))}]"
        case dict() if all(isinstance(key, str) for key in cast(dict[Any, Any], value)):
            return f"map[{_common(cast(dict[str, Any], value).values())}]"
        case int():
            raise ValueError(f"{value} does not fit into 64 bits; give it as text")
        case datetime():
            raise ValueError(f"{value.isoformat()} has no time zone; give it one")
        case _:
            raise ValueError(
                f"{type(value).__name__} has no Flyte literal; give one of {', '.join(SIMPLE_TYPES)}, a "
                "StructuredDataset, or a list or dict of these"
            )


def _common(values: Iterable[Any]) -> str:
    names = sorted({type_name(value) for value in values}) or ["none"]
    if len(names) > 1:
        raise ValueError(
            f"its elements are of different types ({', '.join(names)}); Flyte's collections have one. Put mixed "
            "data into `custom`"
        )
    return names[0]


def fits(value: Any, declared: str) -> bool:
    """Whether a value is of the declared type; an empty collection is of each, wherever it lies."""
    collection, _, inner = declared.removesuffix("]").partition("[")
    match collection, value:
        case "list", list():
            return all(fits(each, inner) for each in cast(list[Any], value))
        case "map", dict():
            return all(fits(each, inner) for each in cast(dict[str, Any], value).values())
        case _, list() | dict():
            return False
        case _:
            return type_name(value) == declared


def _convertible(inputs: dict[str, Any]) -> dict[str, Any]:
    for name, value in inputs.items():
        try:
            type_name(value)
        except ValueError as error:
            raise ValueError(f"input {name!r}: {error}.") from None
    return inputs


def _known_type(name: str) -> str:
    inner = name
    while inner.startswith(("list[", "map[")) and inner.endswith("]"):
        inner = inner.partition("[")[2][:-1]
    if inner not in (*SIMPLE_TYPES, "structured_dataset"):
        raise ValueError(
            f"{name!r} is no type. Give one of {', '.join(SIMPLE_TYPES)}, structured_dataset, `list[…]` or `map[…]`."
        )
    return name


def _exact(custom: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
    """Refuse numbers that the wire, where each is a double, would change."""
    for number in _integers(list(custom.values())):
        if abs(number) > 2**53:
            raise ValueError(f"{number} is not exact as Flyte's JSON number; give it as text.")
    return custom


def _integers(value: JsonValue) -> Iterator[int]:
    match value:
        case dict():
            for each in value.values():
                yield from _integers(each)
        case list():
            for each in value:
                yield from _integers(each)
        case int():
            yield value
        case _:
            pass


class ConnectorJob(JobSpec[O], Generic[O]):
    """A task for a connector, run as a job or as a call; `O`: a dict of its outputs, or a model of them.

    Attributes:
        task_type, task_type_version: as the connector calls it; see `task_types`.
        custom, config, target: parts of Flyte's task template; which of them count is the connector's affair.
        inputs: values by name. Types: those of `type_name`.
        outputs: types by name; declared ones are checked. None declared: whatever comes is taken.
        quota: the quota of the connection's block that the job counts against.
    """

    task_type: str = Field(min_length=1)
    task_type_version: int = Field(default=0, ge=0, lt=2**31)
    custom: Annotated[Mapping[str, JsonValue], AfterValidator(_exact)] = Field(default_factory=dict)
    config: dict[str, str] = Field(default_factory=dict)
    target: Sql | Container | None = None
    inputs: Annotated[dict[str, Any], AfterValidator(_convertible)] = Field(default_factory=dict)
    outputs: dict[str, Annotated[str, AfterValidator(_known_type)]] = Field(default_factory=dict)
    quota: str = "default"


@dataclass(frozen=True, slots=True, order=True)
class TaskType:
    """What a connector says it serves."""

    name: str
    version: int
    is_sync: bool

    def __str__(self) -> str:
        version = f" (version {self.version})" if self.version else ""
        return f"{self.name}{version}{' (calls)' if self.is_sync else ''}"


class ConnectorHandle(_Value):
    """Enough to read and delete a job.

    Attributes:
        opaque_meta: what the connector gave, which may hold a token: encrypted, or in Base64 where plain ones are
            allowed. Its name keeps it out of what people are shown.
    """

    task_type: str
    task_type_version: int
    output_prefix: str
    is_encrypted: bool
    opaque_meta: str
