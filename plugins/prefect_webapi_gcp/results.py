"""What a job brought: its table and its figures, and the rows of a query, page by page."""

from typing import Any

from prefect_webapi import RemoteClient, RemoteSystemError
from prefect_webapi.results import SizeLimit
from prefect_webapi_gcp.answers import JobView
from prefect_webapi_gcp.models import BigQueryJob, BigQueryResult, JobHandle
from prefect_webapi_gcp.rows import columns_of, record


async def result_of(
    api: RemoteClient, job: JobView, spec: BigQueryJob, size_bytes: int
) -> BigQueryResult:
    columns, rows = columns_of(job.statistics.query.schema_), None
    if job.handle is not None and spec.query is not None and spec.rows:
        columns, rows = await _rows(api, job.handle, SizeLimit(size_bytes))
    return BigQueryResult(
        job_id=job.job_reference.job_id,
        location=job.job_reference.location,
        table=job.table,
        columns=columns,
        rows=rows,
        bytes_processed=job.bytes_processed,
        affected_rows=job.statistics.query.num_dml_affected_rows,
    )


async def _rows(
    api: RemoteClient, handle: JobHandle, size: SizeLimit
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    params = {"location": handle.location, "formatOptions.useInt64Timestamp": "true"}
    while True:
        page = await api.get(handle.results, params=params)
        if not page["jobComplete"]:
            raise RemoteSystemError("the job is done, and its rows are not there yet")
        schema = page.get("schema", {})
        remedy = f"It is of {page['totalRows']} rows: set rows=False and use the table"
        rows += size.kept([record(schema["fields"], row) for row in page.get("rows", ())], remedy)
        if not page.get("pageToken"):
            return columns_of(schema), rows
        params["pageToken"] = page["pageToken"]
