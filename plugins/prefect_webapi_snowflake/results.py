"""What statements brought: their rows, partition by partition."""

from prefect_webapi import RemoteSystemError
from prefect_webapi.results import SizeLimit
from prefect_webapi_snowflake.api import SqlApi
from prefect_webapi_snowflake.models import SnowflakeResult, StatementResult, StatementView
from prefect_webapi_snowflake.rows import names_of, records

TOO_LARGE = "391908"
"""The answer leaves out even the first partition."""
REMEDY = "Set rows=False and keep the result in a table"


async def results_of(api: SqlApi, whole: StatementView, size: SizeLimit) -> SnowflakeResult:
    """Of each statement in its order."""
    results: list[StatementResult] = []
    for handle in whole.handles:
        told = whole if handle == whole.statement_handle else await api.ask("GET", handle)
        if told.http != 200:
            raise RemoteSystemError(
                f"the rows of statement {handle} are not there (HTTP {told.http}): {told.message}",
                code=told.code,
            )
        results.append(await _result(api, told, size))
    return SnowflakeResult(results=results)


async def _result(api: SqlApi, told: StatementView, size: SizeLimit) -> StatementResult:
    """With all partitions; the first came with the statement's end."""
    shape, handle = told.result_set_meta_data, told.statement_handle
    rows = size.kept(records(shape.row_type, told.data or ()), REMEDY)
    first = 0 if told.code == TOO_LARGE else 1
    for nth in range(first, len(shape.partition_info)):
        more = await api.partition(handle, nth)
        rows += size.kept(records(shape.row_type, more), REMEDY)
    kinds = zip(names_of(shape.row_type), shape.row_type, strict=True)
    return StatementResult(
        handle=handle,
        columns={name: column.type for name, column in kinds},
        rows=rows,
        changed=told.changed,
    )
