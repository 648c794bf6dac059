"""BigQuery's jobs over its REST API: `jobs.insert` with an id of ours, `get`, `list`, `cancel`, `getQueryResults`."""

from collections.abc import Sequence
from typing import Any

from prefect_webapi import (
    AsyncPlugin,
    CreateResult,
    DeleteContext,
    GetContext,
    PhaseInfo,
    PluginConfig,
    RemoteClient,
    StatusContext,
    TaskExecutionContextReader,
    TaskInfo,
    TaskLog,
)
from prefect_webapi.auth import TokenAuth
from prefect_webapi_gcp.answers import FIELDS, JobView
from prefect_webapi_gcp.auth import GoogleToken
from prefect_webapi_gcp.blocks import BigQuery
from prefect_webapi_gcp.models import BigQueryJob, BigQueryResult, JobHandle, jobs_in
from prefect_webapi_gcp.reasons import end_of, judge
from prefect_webapi_gcp.results import result_of

LISTED = {"projection": "full", "maxResults": 1000, "fields": f"jobs({FIELDS})"}
"""One page of `jobs.list`; what is not on it is read alone."""
PHASES = {
    "PENDING": PhaseInfo.queued,
    "RUNNING": PhaseInfo.running,
    "DONE": PhaseInfo.success,  # without a final error: `errors` are warnings then
}


class BigQueryPlugin(AsyncPlugin[JobHandle, JobView]):
    """Exactly once by key: the job key is the job's id, which BigQuery gives away once.

    A label keeps the fingerprint, so that a job met under our id is known to be ours. Dry runs make no job and are
    simply repeated.
    """

    guarantee = "key"
    max_batch = 200

    def __init__(self, connection: BigQuery) -> None:
        self._connection = connection
        self._api = RemoteClient(
            str(connection.endpoint),
            auth=TokenAuth(GoogleToken(connection.service_account_info)),
            judge=judge,
            allow_insecure=connection.settings.allow_insecure,
        )

    def get_config(self) -> PluginConfig:
        return self._connection.engine

    async def create(self, ctx: TaskExecutionContextReader) -> CreateResult[Any, JobView]:
        where, wanted = jobs_in(self._connection.project), self._wanted(ctx)
        body = ctx.spec(BigQueryJob).as_request(wanted, ctx.task_execution_metadata)
        made = await self._api.post(where, json=body, params={"fields": FIELDS})
        return JobView.model_validate(made).as_created

    async def find(self, ctx: TaskExecutionContextReader) -> CreateResult[Any, JobView]:
        return (await self._read(self._wanted(ctx))).as_created

    async def get(self, ctx: GetContext[JobHandle]) -> JobView:
        return await self._read(ctx.resource_meta)

    async def get_many(self, ctxs: Sequence[GetContext[JobHandle]]) -> Sequence[JobView | None]:
        params = {**LISTED, "minCreationTime": min(ctx.resource_meta.created_ms for ctx in ctxs)}
        page = await self._api.get(jobs_in(self._connection.project), params=params)
        read = {job.handle: job for job in map(JobView.model_validate, page.get("jobs", ()))}
        return [read.get(ctx.resource_meta) for ctx in ctxs]

    async def delete(self, ctx: DeleteContext[JobHandle]) -> None:
        params = {"location": ctx.resource_meta.location, "fields": "kind"}
        await self._api.post(f"{ctx.resource_meta.url_path}/cancel", params=params)

    def status(self, ctx: StatusContext[JobHandle, JobView]) -> PhaseInfo:
        job, told, read = ctx.resource, ctx.resource.status, ctx.resource.bytes_processed
        info = TaskInfo(
            logs=(TaskLog(name="BigQuery job", uri=job.handle.page),) if job.handle else (),
            occurred_at=job.changed_at,
            custom_info={"totalBytesProcessed": read} if read else {},
        )
        if told.state == "DONE" and (error := told.error_result) is not None:
            return end_of(error.reason)(error.message, info=info)
        if (phase := PHASES.get(told.state)) is None:
            return PhaseInfo.undefined(f"BigQuery says {told.state!r}", info=info)
        return phase("; ".join(each.message for each in told.errors), info=info)

    async def outputs(self, ctx: StatusContext[JobHandle, JobView]) -> BigQueryResult:
        job, spec = ctx.resource, ctx.spec(BigQueryJob)
        return await result_of(self._api, job, spec, ctx.max_dataset_size_bytes)

    async def aclose(self) -> None:
        await self._api.aclose()

    def _wanted(self, ctx: TaskExecutionContextReader) -> JobHandle:
        """The handle that the job has, or will have but for its age."""
        at, key = self._connection, ctx.task_execution_metadata.generated_name
        location = ctx.spec(BigQueryJob).location or at.location
        return JobHandle(project=at.project, location=location, job_id=key)

    async def _read(self, handle: JobHandle) -> JobView:
        params = {"location": handle.location, "fields": FIELDS}
        return JobView.model_validate(await self._api.get(handle.url_path, params=params))
