"""Job server: PUT, GET and DELETE /jobs/{name}; the name is the idempotency key."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from prefect_webapi import (
    AsyncPlugin,
    CreateResult,
    DeleteContext,
    GetContext,
    NotFound,
    PhaseInfo,
    PluginConfig,
    RemoteClient,
    RemoteSystemError,
    RemoteUserError,
    ResourceRequirements,
    StatusContext,
    TaskExecutionContextReader,
    TaskInfo,
    TaskLog,
    path,
)
from prefect_webapi_jobserver.blocks import JobServer
from prefect_webapi_jobserver.models import JobHandle, JobView, ReportJob

PHASES = {  # every state of the server's API reference, section "Job states"
    "queued": PhaseInfo.queued,
    "initializing": PhaseInfo.initializing,
    "running": PhaseInfo.running,
    "succeeded": PhaseInfo.success,
    "failed": partial(PhaseInfo.retryable_failure, "JobFailed"),
    "cancelled": PhaseInfo.aborted,
}


class JobServerPlugin(AsyncPlugin[JobHandle, JobView]):
    """Exactly once by key: PUT with a known name answers with the job that has it."""

    guarantee = "key"
    max_batch = 50

    def __init__(self, connection: JobServer) -> None:
        self._connection = connection
        self._api = RemoteClient(
            str(connection.base_url),
            token=connection.token,
            allow_insecure=connection.settings.allow_insecure,
        )

    def get_config(self) -> PluginConfig:
        return self._connection.engine

    async def resource_requirements(self, ctx: TaskExecutionContextReader) -> ResourceRequirements:
        return ResourceRequirements(namespace=ctx.spec(ReportJob).quota)

    async def create(
        self, ctx: TaskExecutionContextReader
    ) -> JobHandle | CreateResult[JobHandle, JobView]:
        job = ctx.task_execution_metadata
        body = {
            "spec": ctx.spec(ReportJob).model_dump(mode="json"),
            "fingerprint": job.fingerprint,
            "labels": dict(job.labels),
        }
        return _result(await self._api.put(path("jobs", job.generated_name), json=body))

    async def find(
        self, ctx: TaskExecutionContextReader
    ) -> CreateResult[JobHandle, JobView] | None:
        name = ctx.task_execution_metadata.generated_name
        try:
            return _result(await self._api.get(path("jobs", name)))
        except NotFound:
            return None

    async def get(self, ctx: GetContext[JobHandle]) -> JobView:
        return JobView.model_validate(await self._api.get(path("jobs", ctx.resource_meta.name)))

    async def get_many(
        self, ctxs: Sequence[GetContext[JobHandle]]
    ) -> Sequence[JobView | RemoteSystemError | None]:
        names = [ctx.resource_meta.name for ctx in ctxs]
        rows = await self._api.get("/jobs", params={"names": ",".join(names)})
        read = {row["name"]: self._row(row) for row in rows}
        return [read.get(name) for name in names]  # None: not mentioned

    def _row(self, row: dict[str, Any]) -> JobView | RemoteSystemError:
        if "error" in row:
            return RemoteSystemError(row["error"])
        return JobView.model_validate(row)

    async def delete(self, ctx: DeleteContext[JobHandle]) -> None:
        try:
            await self._api.delete(
                path("jobs", ctx.resource_meta.name), params={"reason": ctx.reason}
            )
        except RemoteUserError as refused:
            if refused.code != "HTTP409":  # 409: the job has ended by itself
                raise

    def status(self, ctx: StatusContext[JobHandle, JobView]) -> PhaseInfo:
        job = ctx.resource
        info = TaskInfo(logs=(TaskLog(name="Job", uri=job.link),) if job.link else ())
        if job.state == "succeeded":
            ctx.output_writer.put({"uri": f"{job.link}#report", "data": job.result})
        return PHASES.get(job.state, PhaseInfo.undefined)(job.message, info=info)

    async def aclose(self) -> None:
        await self._api.aclose()


def _result(answer: Any) -> CreateResult[JobHandle, JobView]:
    job = JobView.model_validate(answer)
    return CreateResult(JobHandle(name=job.name), job, job.fingerprint or None)
