"""What an operator can set: Flyte's `PluginConfig`, and our `EngineSettings` beside it.

Both are the body of a plugin's block, so both round-trip through Prefect's JSON and fill its form.
Nothing here reads files or the environment.
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Annotated, Any, Literal, NoReturn, Self, cast

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from prefect_webapi.contract.duration import Between, GoDuration, format_duration
from prefect_webapi.contract.faults import Fault, InvalidConfiguration, validate
from prefect_webapi.contract.flags import FlagSet, flags_of

__all__ = [
    "DEFAULT_PLUGIN_CONFIG",
    "CachingConfig",
    "EngineFields",
    "EngineSettings",
    "Origin",
    "PluginConfig",
    "RateLimiterConfig",
    "ResourceQuotas",
    "read_mapping",
]


def _spoken(name: str, _: Any) -> str:
    return name.replace("_", " ").capitalize()


def _defaults_as_text(schema: dict[str, Any], model: type[BaseModel]) -> None:
    # pydantic writes a default `timedelta` as ISO 8601; a form must show what the field accepts.
    for name, field in model.model_fields.items():
        if isinstance(field.default, timedelta):
            for key in {name, field.alias} & schema["properties"].keys():
                schema["properties"][key]["default"] = format_duration(field.default)


class _Config(BaseModel):
    model_config = ConfigDict(
        alias_generator=to_camel,
        extra="forbid",
        field_title_generator=_spoken,
        frozen=True,
        json_schema_extra=cast(Any, _defaults_as_text),
        revalidate_instances="always",  # `model_copy(update=...)` checks nothing
        strict=True,
        validate_by_alias=True,
        validate_by_name=True,
    )

    @classmethod
    def load(cls, data: Mapping[str, Any] | str, *, base: Self | None = None) -> Self:
        """Read what Flyte wrote (YAML or JSON text, or a mapping) over a base, else the defaults.

        As in Go, what is missing or null keeps the base's value, in nested parts too; quotas of
        both are merged.

        Raises:
            InvalidConfiguration: every fault with path, given value, range and remedy.

        Source: SPEC REQ-06 to REQ-10.
        """
        given = read_mapping(data, cls.__name__) if isinstance(data, str) else data
        base = base or cls._base()
        return validate(cls, given if base is None else _over(base, given))

    @classmethod
    def _base(cls) -> Self | None:
        """What `load` starts from: nothing, where a value has no default."""
        return None


class RateLimiterConfig(_Config):
    """How fast one process may call."""

    qps: int = Field(
        ge=1, le=100_000, description="Calls per second and process, 1 to 100,000, on average."
    )
    burst: int = Field(
        ge=5, le=10_000, description="Calls that may leave at once after a pause, 5 to 10,000."
    )


class CachingConfig(_Config):
    """How jobs are watched."""

    size: int = Field(
        default=100_000,
        ge=10,
        le=500_000,
        description="Jobs that one process may track, 10 to 500,000.",
    )
    resync_interval: Annotated[GoDuration, Between(timedelta(seconds=5), timedelta(hours=1))] = (
        Field(
            default=timedelta(seconds=30),
            description="Longest time between two reads of a job, 5s to 1h.",
        )
    )
    workers: int = Field(
        default=10, ge=1, le=10_000, description="Reads in flight at once, 1 to 10,000."
    )
    max_system_failures: int = Field(
        default=5,
        ge=0,
        le=1_000_000,
        description="Failed reads in a row after which contact counts as lost, 0 to 1,000,000.",
    )


def _merge_list(given: Any) -> Any:
    """Flyte's list of one-key maps as one map; anything else as it is."""
    if not isinstance(given, list | tuple):
        return given
    merged: dict[Any, Any] = {}
    for entry in cast(Sequence[Any], given):
        pairs = cast(Mapping[Any, Any], entry).items() if isinstance(entry, Mapping) else ()
        if len(pairs) != 1:
            raise PydanticCustomError(
                "quota_list", "each entry of the list must be one namespace with its number of jobs"
            )
        ((namespace, jobs),) = pairs
        if namespace in merged:
            raise PydanticCustomError(
                "quota_repeated",
                "namespace {namespace} is listed twice; keep one of the entries",
                {"namespace": repr(namespace)},
            )
        merged[namespace] = jobs
    return merged


ResourceQuotas = dict[str, int]
"""Most live jobs per namespace, each at least 1."""

_Quotas = Annotated[
    dict[Annotated[str, Field(min_length=1)], Annotated[int, Field(ge=1)]],
    BeforeValidator(_merge_list),
]


def _find_model(value: Any) -> type[BaseModel] | None:
    if isinstance(value, str):
        try:
            value = pkgutil.resolve_name(value)
        except (ImportError, AttributeError, ValueError) as error:
            raise PydanticCustomError(
                "import_path",
                "{path} can't be imported ({why}); write package.module.Class",
                {"path": repr(value), "why": str(error)},
            ) from None
    if value is None or (isinstance(value, type) and issubclass(value, BaseModel)):
        return value
    raise PydanticCustomError(
        "model_type", "must be a pydantic model class, or its import path: package.module.Class"
    )


def _import_path(value: type[BaseModel] | None) -> str | None:
    return value and f"{value.__module__}.{value.__qualname__}"


_ModelClass = Annotated[
    type[BaseModel] | None,
    PlainValidator(_find_model),
    PlainSerializer(_import_path),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "null"}]}),
]


def _under_its_own_name(schema: dict[str, Any]) -> None:
    """Let the form show a field's own title and text, not those of its class: two of one class would look the same."""
    if "$ref" in schema:
        schema["allOf"] = [{"$ref": schema.pop("$ref")}]


class PluginConfig(_Config):
    """What controls the engine for one plugin: limits on calls, watching, quotas."""

    resource_quotas: _Quotas = Field(
        default={}, description="Most live jobs per namespace, each at least 1."
    )
    read_rate_limiter: RateLimiterConfig = Field(
        default=RateLimiterConfig(qps=30, burst=300),
        title="Read rate limiter",
        description="Limit on calls that read.",
        json_schema_extra=_under_its_own_name,
    )
    write_rate_limiter: RateLimiterConfig = Field(
        default=RateLimiterConfig(qps=20, burst=200),
        title="Write rate limiter",
        description="Limit on calls that create or delete.",
        json_schema_extra=_under_its_own_name,
    )
    caching: CachingConfig = Field(default=CachingConfig(), description="How jobs are watched.")
    resource_meta: _ModelClass = Field(
        default=None,
        description="Class of the handle as an import path; empty takes it from the plugin.",
    )

    @classmethod
    def _base(cls) -> Self:
        return cls()

    @classmethod
    def flag_set(cls, prefix: str = "", base: PluginConfig | None = None) -> FlagSet:
        """The eight flags; their defaults are the base's, else those of the package.

        `prefix` is put in front as it is: the caller supplies the dot.
        """
        return FlagSet(flags_of(base or DEFAULT_PLUGIN_CONFIG, prefix))


DEFAULT_PLUGIN_CONFIG = PluginConfig()

_TIMEOUT = Between(timedelta(milliseconds=10), timedelta(hours=1))
_YEAR = timedelta(days=365)
_SECOND = timedelta(seconds=1)


class EngineFields(BaseModel):
    """The fields of `EngineSettings`, shared with the settings that override them."""

    create_timeout: Annotated[GoDuration, _TIMEOUT] = Field(
        default=timedelta(seconds=60), description="Longest time for one create call, 10ms to 1h."
    )
    get_timeout: Annotated[GoDuration, _TIMEOUT] = Field(
        default=timedelta(seconds=30), description="Longest time for one read call, 10ms to 1h."
    )
    delete_timeout: Annotated[GoDuration, _TIMEOUT] = Field(
        default=timedelta(seconds=30), description="Longest time for one delete call, 10ms to 1h."
    )
    deadline: Annotated[GoDuration, Between(timedelta(milliseconds=10), 10 * _YEAR)] | None = Field(
        default=None,
        description="Longest life of a job from its admission, 10ms to 87600h; empty sets none.",
    )
    max_create_attempts: int = Field(
        default=10, ge=1, le=1_000, description="Most create calls for one job, 1 to 1,000."
    )
    on_unknown_create: Literal["fail", "retry"] = Field(
        default="fail",
        description=(
            "When it can't be known whether a create made a job: fail, or retry at the risk of "
            "a second job."
        ),
    )
    retry_base: Annotated[GoDuration, Between(timedelta(milliseconds=1), timedelta(hours=1))] = (
        Field(default=_SECOND, description="First pause between two tries, 1ms to 1h.")
    )
    retry_cap: Annotated[GoDuration, Between(timedelta(milliseconds=1), timedelta(days=1))] = Field(
        default=timedelta(seconds=60),
        validate_default=True,  # the first pause may have been raised above it
        description="Longest pause between two tries, 1ms to 24h, not below the first.",
    )
    max_retry_after: Annotated[GoDuration, Between(timedelta(0), timedelta(days=7))] = Field(
        default=timedelta(hours=1),
        description="Longest pause that a service may demand of us, 0s to 168h.",
    )
    visibility_delay: Annotated[GoDuration, Between(timedelta(0), timedelta(hours=1))] = Field(
        default=timedelta(seconds=60),
        description="How long a new job may be unreadable at the service, 0s to 1h.",
    )
    cancel_grace: Annotated[GoDuration, Between(timedelta(0), timedelta(hours=1))] = Field(
        default=timedelta(seconds=20),
        description=(
            "How long a cancelled task waits for its job to be gone, 0s to 1h; a worker kills "
            "the process after 30s."
        ),
    )
    cancel_on_pause: bool = Field(
        default=False, description="Whether pausing a flow run ends its jobs."
    )
    system_failures: Literal["crashed", "failed"] = Field(
        default="crashed", description="State of a task that failed by nobody's fault."
    )
    orphan_after: Annotated[GoDuration, Between(_SECOND, _YEAR)] = Field(
        default=timedelta(minutes=15),
        description="Age at which a job that nobody claims is ended, 1s to 8760h.",
    )
    reaper_horizon: Annotated[GoDuration, Between(_SECOND, _YEAR)] = Field(
        default=timedelta(days=7),
        description="How long the sweeper goes on with one job, 1s to 8760h.",
    )
    ledger_retention: Annotated[GoDuration, Between(timedelta(0), 10 * _YEAR)] = Field(
        default=timedelta(days=7),
        description="How long the record of a finished job is kept, 0s to 87600h.",
    )
    slot_lease: Annotated[GoDuration, Between(timedelta(seconds=60), timedelta(days=1))] = Field(
        default=timedelta(seconds=120),
        description="Life of a slot's lease if its holder dies, 60s to 24h.",
    )
    reuse_results: bool = Field(
        default=True,
        description="Whether a repeated run takes the stored result of a finished job.",
    )
    max_dataset_size_bytes: int = Field(
        default=10 * 1024 * 1024,
        ge=-1,
        le=2**50,
        description="Largest result in bytes of JSON, 0 to 1 PiB; -1 sets no limit.",
    )
    allow_insecure: bool = Field(
        default=False, description="Whether credentials may travel without TLS beyond this machine."
    )
    allow_plain_handle: bool = Field(
        default=False,
        description="Whether a handle may have fields whose names look like those of secrets.",
    )
    initial_interval: Annotated[
        GoDuration, Between(timedelta(milliseconds=10), timedelta(hours=1))
    ] = Field(default=_SECOND, description="First gap between two reads of a new job, 10ms to 1h.")
    shared_qps: int | None = Field(
        default=None,
        ge=1,
        le=1_000,
        description=(
            "Calls per second of all processes together that use this connection and one ledger, 1 to 1,000; empty: "
            "each process has its own limits only."
        ),
    )
    project: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description=(
            "Project that jobs count under where a plugin bounds projects; empty: the tag project:…, else the "
            "deployment."
        ),
    )
    pool: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description=(
            "Part of a project that jobs count under where a plugin bounds those; empty: the work pool."
        ),
    )
    abandon_after: Annotated[GoDuration, Between(_SECOND, _YEAR)] = Field(
        default=timedelta(hours=24),
        description=(
            "Age at which a job is ended whose flow run is not final but has no live process, "
            "1s to 8760h."
        ),
    )


Origin = Literal["block", "setting", "default"]


class EngineSettings(_Config, EngineFields):
    """Time-outs, retries, deadlines and clearing up for the jobs of one connection."""

    @field_validator("retry_cap")
    @classmethod
    def _cap_is_not_below_base(cls, cap: timedelta, info: ValidationInfo) -> timedelta:
        base: timedelta | None = info.data.get("retry_base")
        if base is not None and cap < base:
            raise PydanticCustomError(
                "retry_cap",
                "{cap} is below the first pause, {base}; raise this or lower that",
                {"cap": format_duration(cap), "base": format_duration(base)},
            )
        return cap

    @classmethod
    def _base(cls) -> Self:
        return cls()

    def overlaid(
        self, overrides: Mapping[str, Any], *, default: EngineSettings | None = None
    ) -> EngineSettings:
        """These settings of a block, with the process's own where the block says nothing.

        Raises:
            InvalidConfiguration: the mixture is not allowed.
        """
        origins = self.origins(overrides, default=default)
        chosen = {
            name: overrides[name] if origin == "setting" else getattr(self, name)
            for name, origin in origins.items()
        }
        return validate(EngineSettings, chosen)

    def origins(
        self, overrides: Mapping[str, Any], *, default: EngineSettings | None = None
    ) -> dict[str, Origin]:
        """Where each value comes from. Nearest wins: block, then setting, then default.

        A saved block holds every field, also those that nobody touched. So a block counts as saying
        something only where it differs from `default`, which is what its form was filled with.
        """
        unset = default or EngineSettings()

        def origin(name: str) -> Origin:
            if getattr(self, name) != getattr(unset, name):
                return "block"
            return "setting" if name in overrides else "default"

        return {name: origin(name) for name in EngineSettings.model_fields}


# --- reading text over a base ----------------------------------------------------------------


def _over(base: BaseModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` completed from `base`; keys stay as they were written, unknown ones included."""
    merged = dict(given)
    for name, field in type(base).model_fields.items():
        key = name if name in given else field.alias or name
        mine, theirs = getattr(base, name), merged.get(key)
        if key not in merged or (theirs is None and field.default is not None):
            merged[key] = mine  # null means something only where it is the default
        elif isinstance(theirs, Mapping):
            told = cast(Mapping[str, Any], theirs)
            if isinstance(mine, BaseModel):
                merged[key] = _over(mine, told)
            elif isinstance(mine, dict):
                merged[key] = {**mine, **told}
        elif isinstance(mine, dict) and isinstance(theirs, list):
            entries = cast(list[Any], theirs)
            maps = [cast(Mapping[Any, Any], each) for each in entries if isinstance(each, Mapping)]
            kept = cast(dict[str, int], mine).items()
            merged[key] = [
                *({name: jobs} for name, jobs in kept if not any(name in each for each in maps)),
                *entries,
            ]
    return merged


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        construct = cast(Any, self).construct_object
        _unique(
            construct(key, deep=True)
            for key, _ in node.value
            if key.tag != "tag:yaml.org,2002:merge"
        )
        return super().construct_mapping(node, deep=deep)


def _unique(keys: Iterable[Any]) -> None:
    seen: set[Any] = set()
    for key in keys:
        if key in seen:
            raise ValueError(f"key {key!r} is written twice; keep one of them")
        seen.add(key)


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _unique(key for key, _ in pairs)
    return dict(pairs)


def read_mapping(text: str, subject: str) -> Mapping[str, Any]:
    """YAML or JSON text as keys with values; `subject` is what the text describes.

    Raises:
        InvalidConfiguration: it is neither, holds something else, or writes a key twice.
    """
    try:
        if text.lstrip().startswith("{"):
            try:
                found: Any = json.loads(text, object_pairs_hook=_unique_pairs)
            except json.JSONDecodeError:
                found = yaml.load(text, _Loader)
        else:
            found = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        _refuse(subject, f"neither YAML nor JSON: {' '.join(str(error).split())}")
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        _refuse(subject, f"holds {type(found).__name__} where keys with values are expected")
    return cast(Mapping[str, Any], found)


def _refuse(subject: str, problem: str) -> NoReturn:
    raise InvalidConfiguration(subject, [Fault("(the text)", problem)]) from None
