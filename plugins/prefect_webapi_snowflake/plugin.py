"""Snowflake's SQL API: `POST /api/v2/statements` with a request id of ours, its handle, `cancel`, partitions."""

from uuid import NAMESPACE_URL, uuid5

from prefect_webapi import (
    AsyncPlugin,
    CreateResult,
    DeleteContext,
    ExternalResource,
    GetContext,
    PhaseInfo,
    PluginConfig,
    RemoteSystemError,
    StatusContext,
    TaskExecutionContextReader,
    TaskInfo,
    TaskLog,
)
from prefect_webapi.results import SizeLimit
from prefect_webapi_snowflake.api import SqlApi
from prefect_webapi_snowflake.blocks import Snowflake
from prefect_webapi_snowflake.models import (
    SnowflakeJob,
    SnowflakeResult,
    StatementHandle,
    StatementResult,
    StatementView,
)
from prefect_webapi_snowflake.results import results_of

TIMED_OUT = "000630"
CANCELLED = "57014"
KINDS = {  # by the class of the SQLSTATE: its first two characters
    "08": PhaseInfo.system_retryable_failure,  # connection
    "40": PhaseInfo.retryable_failure,  # transaction rolled back
    "58": PhaseInfo.system_retryable_failure,  # error of the system
    "XX": PhaseInfo.system_retryable_failure,  # internal error
}


class SnowflakePlugin(AsyncPlugin[StatementHandle, StatementView]):
    """Exactly once by key: the request id is made from the job key, and a repetition says `retry=true`.

    Snowflake then answers with the statement of the first request instead of running it again. How long it remembers
    a request is not published.
    """

    guarantee = "key"

    def __init__(self, connection: Snowflake) -> None:
        self._connection = connection
        self._api = SqlApi(connection)

    def get_config(self) -> PluginConfig:
        return self._connection.engine

    async def create(
        self, ctx: TaskExecutionContextReader
    ) -> CreateResult[StatementHandle, StatementView]:
        job = ctx.task_execution_metadata
        params = {
            "requestId": uuid5(NAMESPACE_URL, f"prefect-webapi:{job.generated_name}"),
            "async": "true",
            "retry": "true" if job.is_repeated else None,
        }
        body = ctx.spec(SnowflakeJob).as_request(self._connection, job)
        made = await self._api.ask("POST", params=params, json=body)
        return CreateResult(StatementHandle(statement=made.statement_handle), made)

    async def get(self, ctx: GetContext[StatementHandle]) -> StatementView:
        return await self._api.ask("GET", ctx.resource_meta.statement)

    async def delete(self, ctx: DeleteContext[StatementHandle]) -> None:
        answer = await self._api.ask("POST", ctx.resource_meta.statement, "cancel")
        if answer.http == 422 and (await self.get(ctx)).http == 202:  # else it is over
            raise RemoteSystemError(answer.message, code=answer.code)

    def status(self, ctx: StatusContext[StatementHandle, StatementView]) -> PhaseInfo:
        told = ctx.resource
        handle, page = told.statement_handle, self._connection.page_of(told.statement_handle)
        info = TaskInfo(
            logs=(TaskLog(name=f"Query {handle}", uri=page),) if page else (),
            external_resources=() if page else (ExternalResource(external_id=handle),),
            occurred_at=told.began_at,
        )
        match told.http:
            case 200:
                return PhaseInfo.success(info=info)
            case 202:  # the API does not tell queued from running
                return PhaseInfo.running(info=info)
            case 408:
                return PhaseInfo.failure("Timeout", told.message, info=info)
            case 422 if told.code == TIMED_OUT:
                return PhaseInfo.failure("Timeout", told.message, info=info)
            case 422 if told.sql_state == CANCELLED:
                return PhaseInfo.aborted(told.message, info=info)
            case 422:
                kind = KINDS.get(told.sql_state[:2], PhaseInfo.failure)
                return kind(told.code or "Unknown", told.message, info=info)
            case http:
                return PhaseInfo.undefined(f"Snowflake answers with HTTP {http}", info=info)

    async def outputs(self, ctx: StatusContext[StatementHandle, StatementView]) -> SnowflakeResult:
        if ctx.spec(SnowflakeJob).rows:
            size = SizeLimit(ctx.max_dataset_size_bytes)
            return await results_of(self._api, ctx.resource, size)
        results = [StatementResult(handle=handle) for handle in ctx.resource.handles]
        return SnowflakeResult(results=results)

    async def aclose(self) -> None:
        await self._api.aclose()
