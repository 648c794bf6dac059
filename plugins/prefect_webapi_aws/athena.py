"""Amazon Athena: one query per job; the job key is in its ClientRequestToken."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

from prefect_webapi import (
    AlreadyExists,
    AsyncPlugin,
    CreateResult,
    DeleteContext,
    GetContext,
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
from prefect_webapi.results import SizeLimit
from prefect_webapi_aws.athena_models import (
    AthenaError,
    AthenaQuery,
    Query,
    QueryHandle,
    QueryResult,
)
from prefect_webapi_aws.athena_rows import with_rows
from prefect_webapi_aws.blocks import Athena
from prefect_webapi_aws.sigv4 import AwsJson

PAGE_ROWS = 1000


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
        size = SizeLimit(ctx.max_dataset_size_bytes)
        return await with_rows(result, query, self._pages(handle), size)

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
