"""What is wrong with a configuration, all of it at once, in words that say what to do.

pydantic finds the faults; this module tells them to people: where, what was given, what is allowed,
and the remedy. A value that may be a secret is never shown. `explain` serves every model of the
package and of plugins: configurations, settings, specs, blocks.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from prefect_webapi.contract.duration import Between, format_duration
from prefect_webapi.contract.errors import ConfigurationError
from prefect_webapi.contract.secrecy import is_secret_type, looks_secret, mask_url

__all__ = [
    "Fault",
    "InvalidConfiguration",
    "explain",
    "faults_in",
    "near_miss",
    "validate",
]

ModelT = TypeVar("ModelT", bound=BaseModel)

_HIDDEN = "***"
_LONGEST_VALUE = 80
_NOTHING_GIVEN = ("missing", "contradiction")
"""Kinds of faults without a value: it is not there, or the fault lies between values that are right by themselves."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        path: the field, as the user wrote it: ``caching.size``, ``jobs[2].name``.
        problem: what is wrong, as the rest of a sentence.
        given: the value, shortened; empty where there is none, hidden where it may be a secret.
        allowed: the range, or the words to choose from; empty where the problem says it.
        remedy: what to do; empty where it is plain from the rest.
    """

    path: str
    problem: str
    given: str = ""
    allowed: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        facts = "; ".join(
            f"{word} {fact}"
            for word, fact in (("given", self.given), ("allowed", self.allowed))
            if fact
        )
        line = f"{self.path}: {self.problem}" + (f" ({facts})" if facts else "")
        return f"{line}. {self.remedy}" if self.remedy else line


class InvalidConfiguration(ConfigurationError):
    """Values that are not allowed: every fault of one configuration.

    Attributes:
        subject: what was read: a class or a file.
        faults: all that is wrong with it.
    """

    def __init__(self, subject: str, faults: Iterable[Fault]) -> None:
        self.subject = subject
        self.faults = tuple(faults)
        count = len(self.faults)
        lines = "".join(f"\n- {fault}" for fault in self.faults)
        super().__init__(f"{subject} has {count} fault{'s' if count != 1 else ''}:{lines}")


def explain(
    error: ValidationError,
    model: type[BaseModel] | None = None,
    *,
    subject: str | None = None,
    name: Callable[[str], str] = str,
) -> InvalidConfiguration:
    """Tell a validation error to people.

    Raise the answer outside the `except`: the original, which shows its input, must not be its cause.

    Args:
        model: the class that was validated; with it ranges are whole and unknown keys get a hint.
        subject: what was read; absent: the model's name.
        name: how a path is called where the user sets it, for example an environment variable.
    """
    found = faults_in(error, model, name=name)
    return InvalidConfiguration(subject or error.title, found)


def validate(model: type[ModelT], data: Any, *, subject: str | None = None) -> ModelT:
    """`data` as a `model`.

    Raises:
        InvalidConfiguration: with every fault.
    """
    try:
        return model.model_validate(data)
    except ValidationError as found:
        error = explain(found, model, subject=subject)
    raise error


def faults_in(
    error: ValidationError,
    model: type[BaseModel] | None = None,
    *,
    name: Callable[[str], str] = str,
) -> tuple[Fault, ...]:
    """The faults of a validation error, in its order; see `explain`."""
    return tuple(_fault(details, model, name) for details in error.errors(include_url=False))


def near_miss(word: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant."""
    by_plain = {_plain(each): each for each in known}
    close = difflib.get_close_matches(_plain(word), by_plain, n=1, cutoff=0.7)
    return by_plain[close[0]] if close else None


def _plain(word: str) -> str:
    return word.replace("_", "").replace("-", "").lower()


# --- one fault -------------------------------------------------------------------------------


def _fault(
    details: ErrorDetails, model: type[BaseModel] | None, name: Callable[[str], str]
) -> Fault:
    loc, kind, ctx = details["loc"], details["type"], details.get("ctx", {})
    place = _find(model, loc)
    path = name(_path(loc)) if loc else "(the whole)"
    hidden = any(isinstance(part, str) and looks_secret(part) for part in loc) or any(
        is_secret_type(each) for each in place.types
    )
    given = "" if kind in _NOTHING_GIVEN else _HIDDEN if hidden else _show(details["input"])
    problem = details["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    problem = problem[:1].lower() + problem[1:]
    if hidden and str(details["input"]):
        problem = problem.replace(str(details["input"]), _HIDDEN)

    match kind:
        case "greater_than_equal" | "greater_than" | "less_than_equal" | "less_than":
            allowed = _range(place.metadata) or _range_of_ctx(ctx)
            return Fault(path, "out of range", given, allowed, "Choose a value in that range.")
        case "duration_range":
            allowed = str(ctx.get("range", ""))
            return Fault(path, "out of range", given, allowed, "Choose a duration in that range.")
        case "missing":
            return Fault(path, "is missing", remedy="Give it a value.")
        case "extra_forbidden":
            return _unknown_key(path, loc, place)
        case "int_type" | "bool_type" | "float_type" | "string_type":
            return Fault(path, problem, given, _range(place.metadata), _without_quotes(details))
        case "literal_error" | "enum":
            allowed = str(ctx.get("expected", ""))
            return Fault(path, "not an allowed word", given, allowed, "Choose one of them.")
        case _:
            return Fault(path, problem, given, _range(place.metadata))


def _unknown_key(path: str, loc: tuple[int | str, ...], place: _Place) -> Fault:
    known = [
        field.alias if field.alias and "_" not in str(loc[-1]) else key
        for key, field in (place.owner.model_fields.items() if place.owner else ())
    ]
    meant = near_miss(str(loc[-1]), known)
    if meant is not None:
        return Fault(path, "unknown key", remedy=f"Did you mean `{meant}`?")
    remedy = f"Known here: {', '.join(known)}." if known else "Remove it."
    return Fault(path, "unknown key", remedy=remedy)


def _without_quotes(details: ErrorDetails) -> str:
    wanted, given = details["type"], details["input"]
    if wanted == "int_type" and isinstance(given, str) and re.fullmatch(r"-?[0-9]+", given):
        return f"Write {given} without quotes."
    if wanted == "bool_type" and isinstance(given, str):
        return "Write true or false without quotes."
    return ""


def _path(loc: Iterable[int | str]) -> str:
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".")


def _show(value: Any) -> str:
    if isinstance(value, BaseModel):
        return f"a {type(value).__name__}"
    if isinstance(value, timedelta):
        return format_duration(value)
    if isinstance(value, Mapping):
        entries = cast(Mapping[Any, Any], value)
        keys = ", ".join(str(key) for key in entries)
        return f"a mapping of {len(entries)}: {keys[:_LONGEST_VALUE]}"
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return f"a list of {len(cast(Sequence[Any], value))}"
    text = mask_url(repr(value))
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


# --- finding the field that a fault is about -------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a path leads: the model that owns the last key, and what that field says of itself."""

    owner: type[BaseModel] | None = None
    types: tuple[Any, ...] = ()
    metadata: tuple[Any, ...] = ()


def _find(model: type[BaseModel] | None, loc: tuple[int | str, ...]) -> _Place:
    place = _Place(types=(model,) if model else ())
    for part in loc:
        owner = next((each for each in place.types if _is_model(each)), None)
        field = _field(place.types, part)
        if field is not None:
            owner, info = field
            types_, metadata = _unpack(info.annotation)
            place = _Place(owner, types_, (*info.metadata, *metadata))
        elif owner is not None:
            place = _Place(owner)
        else:  # an index, a mapping's key, or the tag of a union
            inner = [_unpack(arg) for each in place.types for arg in get_args(each)[-1:]]
            if inner:
                place = _Place(
                    place.owner,
                    tuple(kind for types_, _ in inner for kind in types_),
                    tuple(fact for _, metadata in inner for fact in metadata),
                )
    return place


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _field(kinds: Iterable[Any], key: int | str) -> tuple[type[BaseModel], FieldInfo] | None:
    for kind in kinds:
        if _is_model(kind):
            for name, field in kind.model_fields.items():
                if key in (name, field.alias, field.validation_alias):
                    return kind, field
    return None


def _unpack(kind: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The plain types of an annotation, and what `Annotated` says about them."""
    if get_origin(kind) is Annotated:
        inner, *metadata = get_args(kind)
        types_, more = _unpack(inner)
        return types_, (*_flat(metadata), *more)
    if get_origin(kind) in (Union, types.UnionType):
        parts = [_unpack(arg) for arg in get_args(kind)]
        return (
            tuple(each for types_, _ in parts for each in types_),
            tuple(fact for _, metadata in parts for fact in metadata),
        )
    return (kind,), ()


def _flat(metadata: Iterable[Any]) -> Iterator[Any]:
    for fact in metadata:
        if isinstance(fact, FieldInfo):
            yield from fact.metadata
        else:
            yield fact


def _range(metadata: Iterable[Any]) -> str:
    low = high = ""
    for fact in metadata:
        match fact:
            case Between():
                return str(fact)
            case annotated_types.Ge(ge=bound):
                low = f"{bound}"
            case annotated_types.Gt(gt=bound):
                low = f"above {bound}"
            case annotated_types.Le(le=bound):
                high = f"{bound}"
            case annotated_types.Lt(lt=bound):
                high = f"below {bound}"
            case annotated_types.Interval():
                return _range(fact)
            case _:
                pass
    return _both(low, high)


def _range_of_ctx(ctx: Mapping[str, Any]) -> str:
    low = f"{ctx['ge']}" if "ge" in ctx else f"above {ctx['gt']}" if "gt" in ctx else ""
    high = f"{ctx['le']}" if "le" in ctx else f"below {ctx['lt']}" if "lt" in ctx else ""
    return _both(low, high)


def _both(low: str, high: str) -> str:
    if low and high:
        return f"{low} … {high}"
    if low:
        return low if low.startswith("above") else f"at least {low}"
    if high:
        return high if high.startswith("below") else f"at most {high}"
    return ""
