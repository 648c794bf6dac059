"""Amazon Athena: one query per job; the job key is in its ClientRequestToken."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from itertools import chain, repeat
from typing import Any, Literal

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
from pydantic_core import to_json

from prefect_webapi import (
    AlreadyExists,
    AsyncPlugin,
    CreateResult,
    DeleteContext,
    GetContext,
    JobSpec,
    NotFound,
    PhaseInfo,
    PluginConfig,
    RemoteError,
    RemoteUserError,
    StatusContext,
    TaskExecutionContextReader,
    TaskInfo,
    TaskLog,
)
from prefect_webapi_aws.blocks import Athena
from prefect_webapi_aws.sigv4 import AwsJson

QUERY_BYTES = 262_144
PARAMETER_CHARACTERS = 1024
PAGE_ROWS = 1000

Parameter = StrictStr | StrictBool | StrictInt | StrictFloat | None


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


class AthenaPlugin(AsyncPlugin[QueryHandle, Query]):
    """Exactly once by key: Athena answers a ClientRequestToken that it knows with the query that has it."""

    guarantee = "key"
    max_batch = 50

    def __init__(self, connection: Athena) -> None:
        self._connection = connection
        self._api = AwsJson(connection, "athena", "AmazonAthena", "1.1")
        self._has_batches = True

    def get_config(self) -> PluginConfig:
        return self._connection.engine

    async def create(self, ctx: TaskExecutionContextReader) -> CreateResult[QueryHandle, Query]:
        query, job = ctx.spec(AthenaQuery), ctx.task_execution_metadata
        work_group = query.work_group or self._connection.work_group
        location = query.output_location or self._connection.output_location
        context = {"Database": query.database, "Catalog": query.catalog}
        # Under one token Athena compares neither of these: a query with others must not be taken for this one.
        # Of the spec, not of the connection: an edit of its block must not make the same job a second query.
        uncompared = json.dumps([query.literals, query.work_group, query.catalog])
        try:
            made = await self._api.call(
                "StartQueryExecution",
                QueryString=query.query,
                ClientRequestToken=f"{job.generated_name}-{hashlib.sha256(uncompared.encode()).hexdigest()}",
                QueryExecutionContext={k: v for k, v in context.items() if v} or None,
                ResultConfiguration={"OutputLocation": location} if location else None,
                WorkGroup=work_group,
                ExecutionParameters=query.literals,
            )
        except RemoteUserError as refused:
            if "dempotent parameters do not match" in refused.message:
                raise AlreadyExists(refused.message) from None
            raise
        return CreateResult(QueryHandle(id=made["QueryExecutionId"]), Query(state="QUEUED"))

    async def get(self, ctx: GetContext[QueryHandle]) -> Query:
        answer = await self._of_query("GetQueryExecution", ctx.resource_meta)
        return Query.model_validate(answer["QueryExecution"])

    async def get_many(self, ctxs: Sequence[GetContext[QueryHandle]]) -> Sequence[Query | None]:
        ids = [ctx.resource_meta.id for ctx in ctxs]
        if not self._has_batches:
            return [None] * len(ids)
        try:
            answer = await self._api.call("BatchGetQueryExecution", QueryExecutionIds=ids)
        except RemoteError as refused:
            # Servers that imitate Athena lack it, and it needs a permission of its own.
            if refused.code not in ("UnknownOperationException", "AccessDeniedException"):
                raise
            self._has_batches = False
            return [None] * len(ids)
        read = {
            row["QueryExecutionId"]: Query.model_validate(row) for row in answer["QueryExecutions"]
        }
        return [read.get(each) for each in ids]

    async def delete(self, ctx: DeleteContext[QueryHandle]) -> None:
        await self._of_query("StopQueryExecution", ctx.resource_meta)

    def status(self, ctx: StatusContext[QueryHandle, Query]) -> PhaseInfo:
        query, name = ctx.resource, ctx.resource_meta.id
        page = self._connection.console(f"athena#/query-editor/history/{name}")
        info = TaskInfo(
            logs=(TaskLog(name=f"Query {name}", uri=page),),
            custom_info={"DataScannedInBytes": query.scanned_bytes} if query.scanned_bytes else {},
        )
        match query.state:
            case "QUEUED":
                return PhaseInfo.queued(query.reason, info=info)
            case "RUNNING":
                return PhaseInfo.running(query.reason, info=info)
            case "SUCCEEDED":
                return PhaseInfo.success(info=info)
            case "FAILED":
                return _failed(query, info)
            case "CANCELLED":
                return PhaseInfo.aborted(query.reason, info=info)
            case other:
                return PhaseInfo.undefined(f"unknown state {other}", info=info)

    async def outputs(self, ctx: StatusContext[QueryHandle, Query]) -> QueryResult:
        handle, query = ctx.resource_meta, ctx.resource
        result = QueryResult(query_execution_id=handle.id, location=query.location)
        if ctx.spec(AthenaQuery).result == "location":
            return result
        columns: tuple[Column, ...] = ()
        rows: list[list[Any]] = []
        written, size, limit = None, 0, ctx.max_dataset_size_bytes
        async for page in self._pages(handle):
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
                size += len(to_json(values))
                if 0 <= limit < size:
                    raise RemoteUserError(
                        f"the result is larger than max_dataset_size_bytes, which is {limit}. Return less, or use "
                        f'result="location" and read it from {query.location}',
                        code="OutputSizeExceeded",
                    )
                rows.append(values)
        return result.model_copy(update={"columns": columns, "rows": rows, "update_count": written})

    async def aclose(self) -> None:
        await self._api.aclose()

    async def _pages(self, handle: QueryHandle) -> AsyncIterator[dict[str, Any]]:
        token = None
        while True:
            page = await self._of_query(
                "GetQueryResults", handle, MaxResults=PAGE_ROWS, NextToken=token
            )
            yield page
            token = page.get("NextToken")
            if not token:
                return

    async def _of_query(self, operation: str, handle: QueryHandle, **fields: Any) -> Any:
        try:
            return await self._api.call(operation, QueryExecutionId=handle.id, **fields)
        except RemoteUserError as refused:
            if refused.code == "QUERY_EXECUTION_NOT_FOUND" or "was not found" in refused.message:
                raise NotFound(refused.message) from None
            raise


def _failed(query: Query, info: TaskInfo) -> PhaseInfo:
    """Category 1 is the system's fault; the user's is 2, and what has none or another."""
    error = query.error or AthenaError(category=2)
    message = query.reason or error.message
    named = re.match(r"[A-Z][A-Z_]+(?=:)", message)  # TABLE_NOT_FOUND: line 1:15: …
    code = named[0] if named else f"AthenaError{error.type}"
    failures = _SYSTEM if error.category == 1 else _USER
    return failures[error.retryable](code, message, info=info)


_SYSTEM = {True: PhaseInfo.system_retryable_failure, False: PhaseInfo.system_failure}
_USER = {True: PhaseInfo.retryable_failure, False: PhaseInfo.failure}


def _columns(found: Mapping[str, Any]) -> tuple[Column, ...]:
    described = found.get("ResultSetMetadata", {}).get("ColumnInfo", ())
    return tuple(Column(name=each["Name"], type=each["Type"]) for each in described)


def _literal(value: Parameter) -> str:
    """Athena takes the text of a parameter for an expression where it can: only a quoted one is surely text."""
    match value:
        case None:
            return "NULL"
        case bool():
            return str(value).upper()
        case int() | float():
            return repr(value).upper()
        case str():
            return "'" + value.replace("'", "''") + "'"


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
