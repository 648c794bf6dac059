"""Time spans as Go writes them: ``1m30s``.

`durationpy` does the sums. It takes more than Go, though (days, weeks, months, years, anything
between two parts), and what it prints is not what Go prints and drops digits. So Go's grammar is
checked here first, and the text is made here. A `timedelta` counts microseconds: what is finer is
rounded to them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any

import durationpy
from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

__all__ = ["Between", "GoDuration", "format_duration", "parse_duration"]

_GRAMMAR = re.compile(r"[+-]?(?:0|(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:ns|us|µs|μs|ms|s|m|h))+)")
_LONGEST = timedelta(microseconds=(2**63 - 1) // 1000)  # Go counts nanoseconds in 64 bits
_HOW = 'write a number with a unit (ns, us, ms, s, m, h), for example "30s" or "1h30m"'


def parse_duration(text: str) -> timedelta:
    """Read Go's text; empty text is 0, as in Flyte's configurations.

    Raises:
        ValueError: not in Go's grammar (there are no days in it), or beyond its 292 years.
    """
    if not text:
        return timedelta()
    if not _GRAMMAR.fullmatch(text):
        raise ValueError(f"{text!r} is not a duration: {_HOW}")
    try:
        span = durationpy.from_str(text)
    except durationpy.DurationError:
        span = timedelta.max
    if abs(span) > _LONGEST:
        raise ValueError(f"{text!r} is longer than a duration can be (about 292 years)")
    return span


def format_duration(span: timedelta) -> str:
    """Go's canonical text: ``1h0m0s``, ``1m30s``, ``1.5s``, ``250ms``, ``0s``."""
    micros = span // timedelta(microseconds=1)
    sign, micros = ("-", -micros) if micros < 0 else ("", micros)
    if micros < 1_000:
        return f"{sign}{micros}µs" if micros else "0s"
    if micros < 1_000_000:
        return f"{sign}{_decimal(micros, 1_000)}ms"
    minutes, rest = divmod(micros, 60_000_000)
    hours, minutes = divmod(minutes, 60)
    whole = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return f"{sign}{whole}{_decimal(rest, 1_000_000)}s"


def _decimal(amount: int, unit: int) -> str:
    whole, rest = divmod(amount, unit)
    digits = f"{rest:0{len(str(unit)) - 1}}".rstrip("0")
    return f"{whole}.{digits}" if digits else str(whole)


def _read(value: Any) -> timedelta:
    if isinstance(value, timedelta):
        return value
    if isinstance(value, str):
        try:
            return parse_duration(value)
        except ValueError as error:
            raise PydanticCustomError("duration", "{why}", {"why": str(error)}) from None
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise PydanticCustomError(
            "duration_number",
            "a bare number is refused: Go reads it as nanoseconds, people mean seconds; {how}",
            {"how": _HOW},
        )
    raise PydanticCustomError("duration", "this is not a duration: {how}", {"how": _HOW})


class _GoText:
    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            _read,
            serialization=core_schema.plain_serializer_function_ser_schema(
                format_duration, return_schema=core_schema.str_schema()
            ),
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"type": "string"}


GoDuration = Annotated[timedelta, _GoText]
"""A `timedelta` in Python; Go's text in JSON, YAML, dumps and forms; never a bare number."""


@dataclass(frozen=True, slots=True)
class Between:
    """Bounds of a `GoDuration`, both included; None: open on that side."""

    low: timedelta
    high: timedelta | None = None

    def __str__(self) -> str:
        low = format_duration(self.low)
        return f"at least {low}" if self.high is None else f"{low} … {format_duration(self.high)}"

    def check(self, span: timedelta) -> timedelta:
        if span < self.low or (self.high is not None and span > self.high):
            raise PydanticCustomError(
                "duration_range",
                "{given} is out of range: {range}",
                {"given": format_duration(span), "range": str(self)},
            )
        return span

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))
