"""Rows as the SQL API sends them, every value a text, become values by their column's type.

Source: Snowflake's guide "Handling responses", data types in `jsonv2`. A text of another form (session parameters can
ask for one) stays as it is.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, time, timedelta, timezone
from decimal import Decimal, InvalidOperation
from typing import Any

from prefect_webapi_snowflake.models import Column

_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 - the zone is the column's


def names_of(columns: Sequence[Column]) -> list[str]:
    """Each once: a statement may name two columns alike."""
    return list(_each_once([column.name for column in columns]))


def _each_once(names: Sequence[str]) -> Iterator[str]:
    seen: Counter[str] = Counter()
    for name in names:
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name}_{seen[name]}"


def records(
    columns: Sequence[Column], data: Sequence[Sequence[str | None]]
) -> list[dict[str, Any]]:
    names = names_of(columns)
    return [
        {n: _value(c, cell) for n, c, cell in zip(names, columns, row, strict=True)} for row in data
    ]


def _value(column: Column, text: str | None) -> Any:
    if text is None:
        return None
    try:
        return _read(column, text)
    except (ValueError, InvalidOperation, OverflowError):
        return text


def _read(column: Column, text: str) -> Any:
    match column.type.lower():
        case "fixed":
            return text if column.scale else int(text)
        case "real":
            number = float(text)
            return number if math.isfinite(number) else text
        case "boolean":
            return {"true": True, "false": False, "1": True, "0": False}.get(text.lower(), text)
        case "variant" | "object" | "array":
            return json.loads(text)
        case "date":
            return (_EPOCH + timedelta(days=int(text))).date().isoformat()
        case "time":
            seconds, fraction = _split(text)
            return time.isoformat((_EPOCH + timedelta(seconds=seconds)).time()) + fraction
        case "timestamp_ntz":
            seconds, fraction = _split(text)
            return (_EPOCH + timedelta(seconds=seconds)).isoformat() + fraction
        case "timestamp_ltz":
            return _in_zone(text, UTC)
        case "timestamp_tz":
            seconds, minutes = text.split()
            return _in_zone(seconds, timezone(timedelta(minutes=int(minutes) - 1440)))
        case _:
            return text


def _in_zone(text: str, zone: timezone) -> str:
    seconds, fraction = _split(text)
    moment = (_EPOCH.replace(tzinfo=UTC) + timedelta(seconds=seconds)).astimezone(zone).isoformat()
    return moment[:19] + fraction + moment[19:]


def _split(text: str) -> tuple[int, str]:
    """Whole seconds, and the rest as it is written behind them: Snowflake knows nanoseconds, Python does not."""
    number = Decimal(text)
    whole = math.floor(number)
    rest = f"{number - whole:.9f}"[1:].rstrip("0")
    return whole, rest if rest != "." else ""
