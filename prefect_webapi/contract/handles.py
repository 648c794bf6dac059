"""Whether a plugin's handles can be kept: written down, read back, and free of secrets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args, get_origin, get_type_hints, is_typeddict

from pydantic import BaseModel, TypeAdapter
from pydantic.errors import PydanticUserError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from prefect_webapi.contract.config import EngineSettings, PluginConfig
from prefect_webapi.contract.errors import HandleNotStorable
from prefect_webapi.contract.plugin import AsyncPlugin, Plugin, handle_type
from prefect_webapi.contract.secrecy import is_secret_type, looks_secret

__all__ = ["check_handle_type"]


def check_handle_type(plugin: Plugin, config: PluginConfig, settings: EngineSettings) -> None:
    """Refuse a plugin whose handles could not be kept, before it makes any request.

    The type decides; a type that says nothing (`Any`) passes.

    Raises:
        HandleNotStorable: a part can't be written as JSON or read back from it, or is a secret by
            type, or by name while `allow_plain_handle` is off.

    Source: SPEC REQ-13, CASE 023.
    """
    if not isinstance(plugin, AsyncPlugin):
        return
    kind = handle_type(type(plugin), config)
    owner = f"the handle {_name(kind)} of {type(plugin).__name__}"
    for path, name, part in _parts(kind, _name(kind), set()):
        if is_secret_type(part):
            raise HandleNotStorable(
                f"{owner} holds a secret in {path}. Handles are stored in plain text: keep the "
                "secret in the connection's block and read it there."
            )
        if looks_secret(name) and not settings.allow_plain_handle:
            raise HandleNotStorable(
                f"{owner} has a field that looks like a secret: {path}. Keep secrets in the "
                "connection's block; if this one is none, rename it or set `allow_plain_handle`."
            )
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(kind)
        for mode in ("serialization", "validation"):
            adapter.json_schema(mode=mode, schema_generator=_Storable)
    except (PydanticUserError, NameError, TypeError) as error:
        why = str(error).splitlines()[0]
        raise HandleNotStorable(
            f"{owner} can't be written as JSON and read back: {why} Give it plain fields, enough to "
            "read and delete the job after a restart."
        ) from error


class _Storable(GenerateJsonSchema):
    """Fails on what has no form in JSON, but trusts a type that brings functions of its own."""

    def function_plain_schema(self, schema: Any) -> JsonSchemaValue:
        return {}

    def ser_schema(self, schema: Any) -> JsonSchemaValue | None:
        if schema["type"].startswith("function-"):
            return {}
        return super().ser_schema(schema)


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))


def _parts(kind: Any, path: str, seen: set[Any]) -> Iterator[tuple[str, str, Any]]:
    """Each part of a type: its path, its own name, its type."""
    yield path, "", kind
    if get_origin(kind) is not None:
        for arg in get_args(kind):
            yield from _parts(arg, path, seen)
    if isinstance(kind, type) and kind not in seen:
        seen.add(kind)
        for name, part in _fields(kind).items():
            yield f"{path}.{name}", name, part
            yield from _parts(part, f"{path}.{name}", seen)


def _fields(kind: type[Any]) -> dict[str, Any]:
    if issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    if dataclasses.is_dataclass(kind) or is_typeddict(kind) or hasattr(kind, "_fields"):
        return get_type_hints(kind)
    return {}
