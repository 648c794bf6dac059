"""Rows as the API sends them, every value a text, become values by their column's type."""

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def columns_of(schema: Mapping[str, Any]) -> dict[str, str]:
    return {field["name"]: field["type"] for field in schema.get("fields", ())}


def record(fields: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> dict[str, Any]:
    """A row, or a value of type RECORD, as JSON holds it. Source: REST reference, `jobs.getQueryResults`."""
    cells = zip(fields, row["f"], strict=True)
    return {field["name"]: _value(field, cell["v"]) for field, cell in cells}


def _value(field: Mapping[str, Any], raw: Any) -> Any:
    if field.get("mode") == "REPEATED":
        return [_one(field, item["v"]) for item in raw]
    return _one(field, raw)


def _one(field: Mapping[str, Any], raw: Any) -> Any:
    if raw is None:
        return None
    match field["type"]:
        case "INTEGER" | "INT64":
            return int(raw)
        case "FLOAT" | "FLOAT64":
            number = float(raw)
            return number if math.isfinite(number) else raw
        case "BOOLEAN" | "BOOL":
            return raw == "true"
        case "TIMESTAMP":  # microseconds, as `useInt64Timestamp` asks
            return (_EPOCH + timedelta(microseconds=int(raw))).isoformat()
        case "RECORD" | "STRUCT":
            return record(field["fields"], raw)
        case "JSON":
            return json.loads(raw)
        case _:
            return raw
