"""Acme: a job is made by POST with an idempotency key, read and deleted by its id."""

from functools import partial

from prefect_webapi import (
    AsyncPlugin,
    CreateResult,
    DeleteContext,
    ExternalResource,
    GetContext,
    PhaseInfo,
    PluginConfig,
    RemoteClient,
    RemoteUserError,
    StatusContext,
    TaskExecutionContextReader,
    TaskInfo,
    path,
)
from prefect_webapi_acme.blocks import Acme
from prefect_webapi_acme.models import AcmeHandle, AcmeJob, AcmeView

PHASES = {  # CHANGE: every state of the service's API reference
    "queued": PhaseInfo.queued,
    "running": PhaseInfo.running,
    "done": PhaseInfo.success,
    "failed": partial(PhaseInfo.retryable_failure, "JobFailed"),
    "cancelled": PhaseInfo.aborted,
}


class AcmePlugin(AsyncPlugin[AcmeHandle, AcmeView]):
    """Exactly once by key: Acme answers a repeated `Idempotency-Key` with the job that has it."""

    guarantee = "key"  # CHANGE: or "search" with a method `find`; or "at-most-once"

    def __init__(self, connection: Acme) -> None:
        self._connection = connection
        self._api = RemoteClient(
            str(connection.base_url),
            token=connection.token,  # CHANGE: or headers=..., auth=..., as the service wants it
            allow_insecure=connection.settings.allow_insecure,
        )

    def get_config(self) -> PluginConfig:
        return self._connection.engine

    async def create(self, ctx: TaskExecutionContextReader) -> CreateResult[AcmeHandle, AcmeView]:
        made = await self._api.post(
            path("v1", "jobs"),  # CHANGE
            json=ctx.spec(AcmeJob).model_dump(mode="json"),  # CHANGE: the body it wants
            headers={"Idempotency-Key": ctx.task_execution_metadata.generated_name},  # CHANGE
        )
        return CreateResult(AcmeHandle(id=made["id"]), AcmeView.model_validate(made))  # CHANGE

    async def get(self, ctx: GetContext[AcmeHandle]) -> AcmeView:
        job = await self._api.get(path("v1", "jobs", ctx.resource_meta.id))  # CHANGE
        return AcmeView.model_validate(job)

    async def delete(self, ctx: DeleteContext[AcmeHandle]) -> None:
        try:
            await self._api.delete(path("v1", "jobs", ctx.resource_meta.id))  # CHANGE
        except RemoteUserError as refused:
            if refused.code != "HTTP409":  # CHANGE: how it says that the job is over
                raise

    def status(self, ctx: StatusContext[AcmeHandle, AcmeView]) -> PhaseInfo:
        job = ctx.resource
        if job.status == "done":
            ctx.output_writer.put({"text": job.output})  # CHANGE: the fields of AcmeResult
        info = TaskInfo(
            external_resources=(ExternalResource(external_id=ctx.resource_meta.id),),
        )
        return PHASES.get(job.status, PhaseInfo.undefined)(job.message or job.status, info=info)

    async def aclose(self) -> None:
        await self._api.aclose()
