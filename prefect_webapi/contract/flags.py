"""The command-line flags of a configuration: names, types, defaults and help; no parser."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

from pydantic import BaseModel

from prefect_webapi.contract.duration import format_duration

__all__ = ["Flag", "FlagSet", "flags_of"]


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag.

    Attributes:
        name: with the prefix, without leading dashes: ``caching.size``.
        type: `int`, or `str` for a duration in Go's text.
        default: of that type.
    """

    name: str
    type: type[int] | type[str]
    default: int | str
    help: str


class FlagSet(Mapping[str, Flag]):
    """Flags by name, in the order of the configuration's fields."""

    __slots__ = ("_flags",)

    def __init__(self, flags: Iterable[Flag]) -> None:
        self._flags = {flag.name: flag for flag in flags}

    def __getitem__(self, name: str) -> Flag:
        return self._flags[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._flags)

    def __len__(self) -> int:
        return len(self._flags)

    def __repr__(self) -> str:
        return f"FlagSet({', '.join(self._flags)})"


def flags_of(config: BaseModel, prefix: str = "") -> Iterator[Flag]:
    """A flag for each number and duration in `config`, nested ones joined by dots.

    `prefix` is put in front as it is: the caller supplies the dot.
    """
    for name, field in type(config).model_fields.items():
        flag, told = f"{prefix}{field.alias or name}", field.description or ""
        value = getattr(config, name)
        match value:
            case BaseModel():
                yield from flags_of(value, f"{flag}.")
            case timedelta():
                yield Flag(flag, str, format_duration(value), told)
            case int():
                yield Flag(flag, int, value, told)
            case _:
                pass  # quotas and the handle's type have none, as in Flyte
