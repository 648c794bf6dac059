"""Snowflake's SQL API: `POST /api/v2/statements` with a request id of ours, its handle, `cancel`, partitions."""

import json
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from pydantic_core import to_json

from prefect_webapi import (
    AsyncPlugin,
    CreateResult,
    DeleteContext,
    ExternalResource,
    GetContext,
    PhaseInfo,
    PluginConfig,
    RemoteClient,
    RemoteSystemError,
    RemoteUserError,
    StatusContext,
    TaskExecutionContextReader,
    TaskInfo,
    TaskLog,
    error_of_status,
    path,
)
from prefect_webapi.auth import TokenAuth
from prefect_webapi_snowflake.auth import KeyPair
from prefect_webapi_snowflake.blocks import Snowflake
from prefect_webapi_snowflake.models import (
    SnowflakeJob,
    SnowflakeResult,
    StatementHandle,
    StatementResult,
    StatementView,
)
from prefect_webapi_snowflake.rows import names_of, records

STATEMENTS = ("api", "v2", "statements")
TOLD = (200, 202, 408, 422)
"""Answers about a statement, not about the request: they name it."""
TOO_LARGE = "391908"
"""The answer leaves out even the first partition."""
TIMED_OUT = "000630"
CANCELLED = "57014"
TAG_CHARACTERS = 2000
KINDS = {  # by the class of the SQLSTATE: its first two characters
    "08": PhaseInfo.system_retryable_failure,  # connection
    "40": PhaseInfo.retryable_failure,  # transaction rolled back
    "58": PhaseInfo.system_retryable_failure,  # error of the system
    "XX": PhaseInfo.system_retryable_failure,  # internal error
}


class _Budget:
    """How many bytes of rows may still be read; -1: any number."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._spent = 0

    def spend(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self._spent += len(to_json(rows))
        if 0 <= self._limit < self._spent:
            raise RemoteUserError(
                f"{self._spent} bytes of rows were read and there may be more, max_dataset_size_bytes is "
                f"{self._limit}. Set rows=False and keep the result in a table",
                code="OutputSizeExceeded",
            )
        return rows


class SnowflakePlugin(AsyncPlugin[StatementHandle, StatementView]):
    """Exactly once by key: the request id is made from the job key, and a repetition says `retry=true`.

    Snowflake then answers with the statement of the first request instead of running it again. How long it remembers
    a request is not published.
    """

    guarantee = "key"

    def __init__(self, connection: Snowflake) -> None:
        self._connection = connection
        auth, token, kind = None, connection.token, connection.token_type
        if connection.private_key is not None and connection.user is not None:
            key = (connection.private_key, connection.private_key_passphrase)
            auth = TokenAuth(KeyPair(connection.account, connection.user, *key))
            kind = "KEYPAIR_JWT"
        headers = {
            "Accept": "application/json",
            "User-Agent": "prefect-webapi",
            "X-Snowflake-Authorization-Token-Type": kind,
        }
        if connection.account_locator is not None:
            headers["Snowflake-Account"] = connection.account_locator
        self._api = RemoteClient(
            connection.url,
            token=token,
            auth=auth,
            headers=headers,
            allow_insecure=connection.settings.allow_insecure,
        )

    def get_config(self) -> PluginConfig:
        return self._connection.engine

    async def create(
        self, ctx: TaskExecutionContextReader
    ) -> CreateResult[StatementHandle, StatementView]:
        job, spec, here = ctx.task_execution_metadata, ctx.spec(SnowflakeJob), self._connection
        body = {
            "statement": spec.statement,
            "timeout": spec.timeout_seconds,
            "bindings": spec.as_bindings(),
            "warehouse": spec.warehouse or here.warehouse,
            "database": spec.database or here.database,
            "schema": spec.schema_name or here.schema_name,
            "role": spec.role or here.role,
            "parameters": {
                **spec.parameters,
                "query_tag": _tag(job.generated_name, dict(job.labels)),
                "MULTI_STATEMENT_COUNT": str(spec.statement_count),
            },
        }
        params = {
            "requestId": uuid5(NAMESPACE_URL, f"prefect-webapi:{job.generated_name}"),
            "async": "true",
            "retry": "true" if job.is_repeated else None,
        }
        given = {name: value for name, value in body.items() if value is not None}
        statement = await self._ask("POST", params=params, json=given)
        return CreateResult(StatementHandle(statement=statement.statement_handle), statement)

    async def get(self, ctx: GetContext[StatementHandle]) -> StatementView:
        return await self._ask("GET", ctx.resource_meta.statement)

    async def delete(self, ctx: DeleteContext[StatementHandle]) -> None:
        answer = await self._ask("POST", ctx.resource_meta.statement, "cancel")
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
        whole, wants_rows = ctx.resource, ctx.spec(SnowflakeJob).rows
        handles = whole.statement_handles or [whole.statement_handle]
        if not wants_rows:
            return SnowflakeResult(results=[StatementResult(handle=each) for each in handles])
        budget = _Budget(ctx.max_dataset_size_bytes)
        results: list[StatementResult] = []
        for handle in handles:
            single = handle == whole.statement_handle
            told = whole if single else await self._ask("GET", handle)
            if told.http != 200:
                raise RemoteSystemError(
                    f"the rows of statement {handle} are not there (HTTP {told.http}): {told.message}",
                    code=told.code,
                )
            results.append(await self._result(told, budget))
        return SnowflakeResult(results=results)

    async def aclose(self) -> None:
        await self._api.aclose()

    async def _result(self, told: StatementView, budget: _Budget) -> StatementResult:
        """With all partitions; the first came with the statement's end."""
        shape, handle = told.result_set_meta_data, told.statement_handle
        rows = budget.spend(records(shape.row_type, told.data or ()))
        first = 0 if told.code == TOO_LARGE else 1
        for nth in range(first, len(shape.partition_info)):
            more = await self._api.get(path(*STATEMENTS, handle), params={"partition": nth})
            rows += budget.spend(records(shape.row_type, more["data"]))
        kinds = zip(names_of(shape.row_type), shape.row_type, strict=True)
        return StatementResult(
            handle=handle,
            columns={name: column.type for name, column in kinds},
            rows=rows,
            changed=told.changed,
        )

    async def _ask(self, method: Any, *segments: str, **arguments: Any) -> StatementView:
        answer = await self._api.request(method, path(*STATEMENTS, *segments), **arguments)
        if answer.status in TOLD:
            body: Any = answer.json()
            if isinstance(body, dict) and "statementHandle" in body:
                return StatementView.model_validate({**body, "http": answer.status})
        raise error_of_status(answer, method) or RemoteSystemError(
            f"the answer (HTTP {answer.status}) names no statement: {answer.beginning!r}",
            code="UnreadableAnswer",
        )


def _tag(key: str, labels: dict[str, str]) -> str:
    """JSON with the job key, the runs and the task's tags, as far as there is room."""
    whole = json.dumps({**labels, "job_key": key})
    return whole if len(whole) <= TAG_CHARACTERS else json.dumps({"job_key": key})
