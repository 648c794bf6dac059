"""What crosses the border of the Athena plugin: spec, result, handle, and a query as it is read."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import (
    AliasPath,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    field_validator,
)

from prefect_webapi import JobSpec

QUERY_BYTES = 262_144
PARAMETER_CHARACTERS = 1024

Exact = Annotated[Decimal, Field(strict=True, allow_inf_nan=False)]
Parameter = StrictStr | StrictBool | StrictInt | Exact | StrictFloat | None


class Column(BaseModel):
    model_config = ConfigDict(frozen=True)

    name: str
    type: str


class QueryResult(BaseModel):
    """What the task returns.

    Attributes:
        location: where the result is in S3; None: where Athena keeps it itself.
        rows: booleans, whole numbers and floating ones as such, everything else as Athena's text, NULL as None.
        update_count: rows that the statement has written.
    """

    model_config = ConfigDict(frozen=True)

    query_execution_id: str
    location: str | None = None
    columns: tuple[Column, ...] = ()
    rows: list[list[Any]] = Field(default_factory=list[list[Any]])
    update_count: int | None = None

    def records(self) -> list[dict[str, Any]]:
        """The rows by column name; of two columns of one name the last is kept."""
        names = [column.name for column in self.columns]
        return [dict(zip(names, row, strict=False)) for row in self.rows]


class AthenaQuery(JobSpec[QueryResult]):
    """One SQL statement.

    Attributes:
        parameters: values for the question marks of `query`, in their order; text arrives as text, whatever is in it.
        database, catalog: where names in the query are looked up.
        work_group, output_location: None: those of the connection.
        result: ``location``: the task returns where the result is, and no rows.
    """

    query: str = Field(min_length=1)
    parameters: tuple[Parameter, ...] = ()
    database: str | None = None
    catalog: str | None = None
    work_group: str | None = Field(default=None, pattern=r"^[a-zA-Z0-9._-]{1,128}$")
    output_location: str | None = Field(default=None, pattern=r"^s3://[^/]+(/.*)?$")
    result: Literal["rows", "location"] = "rows"

    @field_validator("query")
    @classmethod
    def _query_fits(cls, query: str) -> str:
        if len(query.encode()) > QUERY_BYTES:
            raise ValueError(f"it has {len(query.encode())} bytes, Athena takes {QUERY_BYTES}")
        return query

    @field_validator("parameters")
    @classmethod
    def _parameters_fit(cls, parameters: tuple[Parameter, ...]) -> tuple[Parameter, ...]:
        for nth, value in enumerate(parameters):
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"number {nth} is {value}: SQL has no literal for it")
            if len(_literal(value)) > PARAMETER_CHARACTERS:
                raise ValueError(
                    f"number {nth} has {len(_literal(value))} characters as a literal, Athena takes "
                    f"{PARAMETER_CHARACTERS}"
                )
        return parameters

    @property
    def literals(self) -> list[str] | None:
        return [_literal(value) for value in self.parameters] or None


class QueryHandle(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str


class AthenaError(BaseModel):
    model_config = ConfigDict(frozen=True, validate_by_name=True, validate_by_alias=True)

    category: int = Field(default=0, validation_alias="ErrorCategory")
    type: int = Field(default=0, validation_alias="ErrorType")
    retryable: bool = Field(default=False, validation_alias="Retryable")
    message: str = Field(default="", validation_alias="ErrorMessage")


class Query(BaseModel):
    """Of a QueryExecution."""

    model_config = ConfigDict(frozen=True, validate_by_name=True, validate_by_alias=True)

    state: str = Field(validation_alias=AliasPath("Status", "State"))
    reason: str = Field(default="", validation_alias=AliasPath("Status", "StateChangeReason"))
    error: AthenaError | None = Field(
        default=None, validation_alias=AliasPath("Status", "AthenaError")
    )
    kind: str = Field(default="", validation_alias="StatementType")
    scanned_bytes: int = Field(
        default=0, validation_alias=AliasPath("Statistics", "DataScannedInBytes")
    )
    location: str | None = Field(
        default=None, validation_alias=AliasPath("ResultConfiguration", "OutputLocation")
    )


def _literal(value: Parameter) -> str:
    """Athena takes the text of a parameter for an expression where it can: only a quoted one is surely text."""
    match value:
        case None:
            return "NULL"
        case bool():
            return str(value).upper()
        case int() | float():
            return repr(value).upper()
        case Decimal():
            return f"{value:f}"  # with an exponent it would be a floating number
        case str():
            return "'" + value.replace("'", "''") + "'"
