"""What crosses the border: the spec that users write, the handle, Snowflake's view of a statement."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.alias_generators import to_camel

from prefect_webapi import JobSpec, TaskExecutionMetadata
from prefect_webapi_snowflake.blocks import Snowflake

LONGEST_SECONDS = 604_800
TAG_CHARACTERS = 2000
_TYPES = {  # of bind variables; a bool is an int, so the order counts
    bool: "BOOLEAN",
    int: "FIXED",
    Decimal: "FIXED",
    float: "REAL",
    str: "TEXT",
    date: "TEXT",  # Snowflake reads ISO 8601 where a date or timestamp is wanted
}
_OURS = ("QUERY_TAG", "MULTI_STATEMENT_COUNT")


class StatementResult(BaseModel):
    """What one statement brought.

    Attributes:
        handle: the query id.
        columns: name to Snowflake's type; equal names are numbered.
        rows: None where they were not asked for. Dates, times and timestamps are ISO 8601; exact numbers with a scale
            are text.
        changed: rows that were inserted, updated or deleted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    handle: str
    columns: dict[str, str] = Field(default_factory=dict)
    rows: list[dict[str, Any]] | None = None
    changed: int | None = None


class SnowflakeResult(BaseModel):
    """What the task returns: one result per statement."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    results: list[StatementResult]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of the last statement."""
        return self.results[-1].rows or []


class SnowflakeJob(JobSpec[SnowflakeResult]):
    """A statement, or several in one session.

    Attributes:
        statement: SQL; several are parted by `;`.
        bindings: values for `?` in the statement, in order, bound by Snowflake: bool, int, float, Decimal, str, date
            or datetime.
        statement_count: how many there are; 0: any number.
        timeout_seconds: Snowflake cancels the statement after it; 0: after a week, its longest. None: the account's.
        parameters: of the session, such as ``{"TIMEZONE": "UTC"}``.
        rows: fetch the rows; False: only run it.
        warehouse, database, schema_name, role: None: the connection's.
    """

    statement: str = Field(min_length=1)
    bindings: list[Any] = Field(default_factory=list)
    statement_count: int = Field(default=1, ge=0)
    timeout_seconds: int | None = Field(default=None, ge=0, le=LONGEST_SECONDS)
    parameters: dict[str, str] = Field(default_factory=dict)
    rows: bool = True
    warehouse: str | None = None
    database: str | None = None
    schema_name: str | None = None
    role: str | None = None

    @field_validator("bindings")
    @classmethod
    def _have_types(cls, bindings: list[Any]) -> list[Any]:
        for nth, value in enumerate(bindings, start=1):
            if _type(value) is None:
                raise ValueError(
                    f"value {nth} is {value!r}: Snowflake needs its type. Give a bool, int, float, Decimal, str, date "
                    "or datetime; write NULL into the statement"
                )
        return bindings

    @model_validator(mode="after")
    def _can_be_sent(self) -> Self:
        if self.bindings and self.statement_count != 1:
            raise ValueError(
                "`bindings` go with one statement only: Snowflake binds none in several"
            )
        if ours := [name for name in self.parameters if name.upper() in _OURS]:
            raise ValueError(f"`parameters` holds {', '.join(ours)}, which is set for you")
        return self

    def as_request(self, here: Snowflake, job: TaskExecutionMetadata) -> dict[str, Any]:
        """The SQL API's body, with the places of `here` where the spec names none."""
        body = {
            "statement": self.statement,
            "timeout": self.timeout_seconds,
            "bindings": self.as_bindings(),
            "warehouse": self.warehouse or here.warehouse,
            "database": self.database or here.database,
            "schema": self.schema_name or here.schema_name,
            "role": self.role or here.role,
            "parameters": {
                **self.parameters,
                "query_tag": _tag(job),
                "MULTI_STATEMENT_COUNT": str(self.statement_count),
            },
        }
        return {name: value for name, value in body.items() if value is not None}

    def as_bindings(self) -> dict[str, dict[str, str]] | None:
        """The SQL API's `bindings`: every value is a text."""
        given = enumerate(self.bindings, start=1)
        return {str(n): {"type": _type(v) or "", "value": _text(v)} for n, v in given} or None


def _type(value: Any) -> str | None:
    return next((name for kind, name in _TYPES.items() if isinstance(value, kind)), None)


def _text(value: Any) -> str:
    if isinstance(value, date):
        return value.isoformat()
    return str(value).lower() if isinstance(value, bool) else str(value)


def _tag(job: TaskExecutionMetadata) -> str:
    """JSON with the job key, the runs and the task's tags, as far as there is room."""
    key = {"job_key": job.generated_name}
    whole = json.dumps({**job.labels, **key})
    return whole if len(whole) <= TAG_CHARACTERS else json.dumps(key)


class StatementHandle(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    statement: str


# --- Snowflake's answers: it may add fields, which are ignored ----------------------------------


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, alias_generator=to_camel, populate_by_name=True)


class Column(_Answer):
    name: str
    type: str
    scale: int | None = None


class ResultShape(_Answer):
    row_type: Sequence[Column] = ()
    partition_info: Sequence[Mapping[str, Any]] = ()


class StatementView(_Answer):
    """`http`: the status of the answer, which says more than its body. `data`: the first partition."""

    http: int
    statement_handle: str
    code: str = ""
    sql_state: str = ""
    message: str = ""
    created_on: int | None = None
    statement_handles: Sequence[str] = ()
    result_set_meta_data: ResultShape = ResultShape()
    data: Sequence[Sequence[str | None]] | None = None
    stats: Mapping[str, int] = Field(default_factory=dict[str, int])

    @property
    def handles(self) -> Sequence[str]:
        """Of its statements, which are one or more."""
        return self.statement_handles or [self.statement_handle]

    @property
    def changed(self) -> int | None:
        names = ("numRowsInserted", "numRowsUpdated", "numRowsDeleted")
        counts = [self.stats[name] for name in names if name in self.stats]
        return sum(counts) if counts else None

    @property
    def began_at(self) -> datetime | None:
        ms = self.created_on
        return None if ms is None else datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=ms)
