"""Templates in data: `{{ .inputs.day }}` in a request that is described, not programmed.

A string that is one template becomes the value itself, with its type; inside a text a value becomes text. So a body is
built as data, and no value can break out of its place. A value is never looked at for templates, and the template that
is rendered is never changed. A value may be a mapping: `{{ .inputs }}` is all of them. Source: SPEC REQ-70.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, cast
from urllib.parse import quote

from prefect_webapi.contract.contexts import TaskExecutionContextReader
from prefect_webapi.contract.errors import (
    BadTaskSpecification,
    ConfigurationError,
    RemoteError,
    RemoteSystemError,
    WebApiError,
)

__all__ = [
    "STORAGE",
    "as_text",
    "encoded",
    "job_values",
    "names_in",
    "render",
    "render_path",
    "render_text",
    "storage_values",
]

_TEMPLATE = re.compile(r"\{\{\s*[.$]([^\s{}.]+(?:\.[^\s{}.]+)*)\s*\}\}")
_BEGINNING = re.compile(r"\{\{\s*[.$].{0,40}")


async def _previous_checkpoint(ctx: TaskExecutionContextReader) -> str:
    prefix = ctx.output_writer.previous_checkpoint_prefix
    return "" if prefix is None else await ctx.data_store.uri(prefix)


STORAGE: Mapping[str, Callable[[TaskExecutionContextReader], Awaitable[str]]] = {
    "inputPrefix": lambda ctx: ctx.data_store.uri(ctx.input_reader.prefix),
    "input": lambda ctx: ctx.input_reader.path(),
    "taskTemplatePath": lambda ctx: ctx.task_reader.path(),
    "outputPrefix": lambda ctx: ctx.data_store.uri(ctx.output_writer.output_prefix),
    "rawOutputDataPrefix": lambda ctx: ctx.data_store.uri(ctx.output_writer.raw_output_prefix),
    "checkpointOutputPrefix": lambda ctx: ctx.data_store.uri(ctx.output_writer.checkpoint_prefix),
    "prevCheckpointPrefix": _previous_checkpoint,
}
"""Names of places in the result storage, and how their URIs are found: `input` and `taskTemplatePath` write a file."""


def job_values(ctx: TaskExecutionContextReader, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What templates may name of a job: its inputs, and what the engine knows of it."""
    job = ctx.task_execution_metadata
    return {
        "inputs": inputs,
        "perRetryUniqueKey": job.generated_name,
        "fingerprint": job.fingerprint,
        "labels": dict(job.labels),
    }


async def storage_values(ctx: TaskExecutionContextReader, template: Any) -> dict[str, str]:
    """Those of `STORAGE` that the template names; the others are not looked up.

    Raises:
        RemoteSystemError: the storage can't be reached; nothing was sent to the service.
        BadTaskSpecification: what it should write has no JSON form.
    """
    named = {name.lower() for name in names_in(template)}
    try:
        return {name: await find(ctx) for name, find in STORAGE.items() if name.lower() in named}
    except (RemoteError, ConfigurationError):
        raise
    except WebApiError as error:
        raise RemoteSystemError(str(error), code="NoStorage", job_may_exist=False) from error


def names_in(template: Any) -> Iterator[str]:
    """Every name that the template asks for: `inputs.day`.

    Raises:
        ValueError: something begins like a template and is none, or a key of a mapping holds one.
    """
    match template:
        case str():
            yield from _TEMPLATE.findall(template)
            if broken := _BEGINNING.search(_TEMPLATE.sub(" ", template)):
                raise ValueError(
                    f"{broken[0]!r} is no template. Write it like {{{{ .inputs.day }}}}"
                )
        case Mapping():
            for key, value in cast(Mapping[Any, Any], template).items():
                if isinstance(key, str) and _BEGINNING.search(key):
                    raise ValueError(f"the key {key!r} can't be a template")
                yield from names_in(value)
        case list() | tuple():
            for value in cast(list[Any], template):
                yield from names_in(value)
        case _:
            pass


def render(template: Any, values: Mapping[str, Any]) -> Any:
    """A copy of the template with values in their places.

    Raises:
        BadTaskSpecification: it names what has no value.
    """
    match template:
        case str():
            whole = _TEMPLATE.fullmatch(template)
            return _value(whole[1], values) if whole else render_text(template, values)
        case Mapping():
            entries = cast(Mapping[Any, Any], template).items()
            return {key: render(value, values) for key, value in entries}
        case list() | tuple():
            return [render(value, values) for value in cast(list[Any], template)]
        case _:
            return template


def render_text(
    template: str, values: Mapping[str, Any], encode: Callable[[str], str] = str
) -> str:
    """As `render`, for a place that takes only text; `encode` is applied to each value."""
    return _TEMPLATE.sub(lambda found: encode(as_text(_value(found[1], values))), template)


def render_path(template: str, values: Mapping[str, Any]) -> str:
    """A path; each value stays inside its segment, whatever it holds."""
    return "/".join(_segment(segment, values) for segment in template.split("/"))


def as_text(value: Any) -> str:
    """A string as it is, anything else as JSON."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise BadTaskSpecification(f"a value has no JSON form: {error}") from None


def encoded(text: str) -> str:
    """For a place in an address."""
    return quote(text, safe="")


def _segment(template: str, values: Mapping[str, Any]) -> str:
    segment = render_text(template, values, encoded)
    if segment != template and segment in ("", ".", ".."):
        raise BadTaskSpecification(f"{segment!r} can't be part of a path", code="InvalidId")
    return segment


def _value(name: str, values: Mapping[str, Any]) -> Any:
    """Names count in any case, unless two differ in nothing else."""
    found: Any = values
    for part in name.split("."):
        known = cast(dict[str, Any], found if isinstance(found, Mapping) else {})
        same = [key for key in known if key.lower() == part.lower()]
        key = part if part in known else same[0] if len(same) == 1 else None
        if key is None:
            there = ", ".join(sorted(known)) or "nothing"
            raise BadTaskSpecification(
                f"the template {{{{ .{name} }}}} has no value: there is no {part!r} among: {there}. "
                "Give the job that input, or correct the template",
                code="NoTemplateValue",
            )
        found = known[key]
    return found
