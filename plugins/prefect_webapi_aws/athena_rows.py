"""Rows as Athena sends them, every value a text, become values by their column's type."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping
from itertools import chain, repeat
from typing import Any

from prefect_webapi.results import SizeLimit
from prefect_webapi_aws.athena_models import Column, Query, QueryResult


async def with_rows(
    result: QueryResult, query: Query, pages: AsyncIterator[Mapping[str, Any]], size: SizeLimit
) -> QueryResult:
    """The result with the rows of all pages of `GetQueryResults`."""
    columns: tuple[Column, ...] = ()
    rows: list[list[Any]] = []
    written = None
    remedy = f'Return less, or use result="location" and read it from {query.location}'
    async for page in pages:
        written, found = page.get("UpdateCount"), page["ResultSet"]
        texts = [
            [each.get("VarCharValue") for each in row["Data"]]
            for row in found["Rows"]
            if row.get("Data")  # a DROP TABLE has rows of nothing
        ]
        if not columns:
            columns = _columns(found)
            if query.kind in ("DML", "") and texts[:1] == [[c.name for c in columns]]:
                del texts[0]  # of a SELECT, the first row is the head of the table
        for row in texts:
            # DESCRIBE names several columns and gives one text.
            kinds = chain((column.type for column in columns), repeat("varchar"))
            values = [_value(text, kind) for text, kind in zip(row, kinds, strict=False)]
            rows.append(size.kept(values, remedy))
    return result.model_copy(update={"columns": columns, "rows": rows, "update_count": written})


def _columns(found: Mapping[str, Any]) -> tuple[Column, ...]:
    described = found.get("ResultSetMetadata", {}).get("ColumnInfo", ())
    return tuple(Column(name=each["Name"], type=each["Type"]) for each in described)


def _value(text: str | None, kind: str) -> Any:
    if text is None:
        return None
    match kind:
        case "boolean":
            return text == "true"
        case "tinyint" | "smallint" | "integer" | "bigint":
            return int(text)
        case "float" | "double" | "real" if math.isfinite(number := float(text)):
            return number
        case _:
            return text  # JSON has no NaN, and exact decimals stay exact
