"""The command-line flags of a configuration: names, types, defaults and help, for a parser of argparse."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from pydantic import BaseModel

from prefect_webapi.contract.duration import format_duration

__all__ = ["Flag", "FlagSet", "flags_of"]


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag.

    Attributes:
        name: with the prefix, without leading dashes: ``caching.size``.
        path: of the field, without the prefix, parted by dots.
        type: `int`, or `str` for a duration in Go's text.
        default: of that type.
    """

    name: str
    path: str
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

    def add_to(self, parser: ArgumentParser) -> None:
        """Have a parser take these flags; one that is not given leaves nothing in its namespace."""
        for flag in self._flags.values():
            told = f"{flag.help} Default: {flag.default}.".replace("%", "%%")
            parser.add_argument(
                f"--{flag.name}", type=flag.type, default=SUPPRESS, metavar="VALUE", help=told
            )

    def given(self, parsed: Namespace) -> Mapping[str, Any]:
        """What was given, as `PluginConfig.load` takes it, to be laid over a base."""
        found: dict[str, Any] = {}
        for flag in self._flags.values():
            if flag.name in parsed:
                *above, field = flag.path.split(".")
                part = found
                for name in above:
                    part = part.setdefault(name, {})
                part[field] = getattr(parsed, flag.name)
        return found


def flags_of(config: BaseModel, prefix: str = "", path: str = "") -> Iterator[Flag]:
    """A flag for each number and duration in `config`, nested ones joined by dots.

    `prefix` is put in front of names as it is: the caller supplies the dot. `path` is that of `config` itself.
    """
    for name, field in type(config).model_fields.items():
        place, told = f"{path}{field.alias or name}", field.description or ""
        value = getattr(config, name)
        match value:
            case BaseModel():
                yield from flags_of(value, prefix, f"{place}.")
            case timedelta():
                yield Flag(f"{prefix}{place}", place, str, format_duration(value), told)
            case int():
                yield Flag(f"{prefix}{place}", place, int, value, told)
            case _:
                pass  # quotas and the handle's type have none, as in Flyte
