"""Plugins for the moods of a service: keys honoured, search only, neither; and a synchronous one."""

from __future__ import annotations

import json
import time
from typing import Any, ClassVar
from urllib.request import Request, urlopen

from prefect_webapi import (
    AsyncPlugin,
    CreateResult,
    GetContext,
    PhaseInfo,
    PluginConfig,
    PluginEntry,
    RemoteClient,
    StatusContext,
    SyncPlugin,
    TaskExecutionContext,
    TaskExecutionContextReader,
    path,
)
from prefect_webapi.contract.plugin import Guarantee
from prefect_webapi_jobserver import JobServer, JobServerPlugin, ReportJob
from prefect_webapi_jobserver.models import JobHandle, JobView
from prefect_webapi_jobserver.plugin import PHASES


class _Posting(JobServerPlugin):
    """POST /jobs: the server chooses the name, and makes a job each time."""

    async def create(self, ctx: TaskExecutionContextReader) -> JobHandle:
        job = ctx.task_execution_metadata
        made = await self._api.post(
            "/jobs",
            json={
                "spec": ctx.spec(ReportJob).model_dump(mode="json"),
                "fingerprint": job.fingerprint,
                "labels": dict(job.labels),
                "key": job.generated_name,
            },
        )
        return JobHandle(name=made["name"])


class SearchPlugin(_Posting):
    """Exactly once by search."""

    guarantee: Guarantee = "search"

    async def find(
        self, ctx: TaskExecutionContextReader
    ) -> CreateResult[JobHandle, JobView] | None:
        found = await self._api.get(
            "/jobs", params={"key": ctx.task_execution_metadata.generated_name}
        )
        if not found:
            return None
        return CreateResult(JobHandle(name=found[0]["name"]))


class NeitherPlugin(_Posting):
    """At most once: no key, no search."""

    guarantee: Guarantee = "at-most-once"
    find = AsyncPlugin[JobHandle, JobView].find


class SinglePlugin(JobServerPlugin):
    """Keys honoured, no batch reads, no search."""

    max_batch: int = 1
    find = AsyncPlugin[JobHandle, JobView].find


class BlockingPlugin(SinglePlugin):
    """Reads with a blocking client; `seconds` is how long a read takes at least."""

    seconds: ClassVar[float] = 0.0

    def get(self, ctx: GetContext[JobHandle]) -> JobView:  # pyright: ignore[reportIncompatibleMethodOverride] - authors may block
        time.sleep(self.seconds)
        request = Request(
            f"{str(self._connection.base_url).rstrip('/')}{path('jobs', ctx.resource_meta.name)}",
            headers={"Authorization": f"Bearer {self._connection.token.get_secret_value()}"},
        )
        with urlopen(request, timeout=20) as answer:
            return JobView.model_validate_json(answer.read())


class OutputsPlugin(JobServerPlugin):
    """The result is fetched after the success, not taken from the snapshot."""

    def status(self, ctx: StatusContext[JobHandle, JobView]) -> PhaseInfo:
        return PHASES.get(ctx.resource.state, PhaseInfo.undefined)(ctx.resource.message)

    async def outputs(self, ctx: StatusContext[JobHandle, JobView]) -> Any:
        job = await self.get(ctx)
        return {"uri": job.link, "data": job.result}


class CleanupPlugin(JobServerPlugin):
    """A running job with a message counts as failed although it goes on."""

    def status(self, ctx: StatusContext[JobHandle, JobView]) -> PhaseInfo:
        job = ctx.resource
        if job.state == "running" and job.message:
            return PhaseInfo.retryable_failure("Hangs", job.message, cleanup=True)
        return super().status(ctx)


class DoPlugin(SyncPlugin):
    """One call: makes the job and answers what it was told to."""

    def __init__(self, connection: JobServer) -> None:
        self._connection = connection
        self._api = RemoteClient(str(connection.base_url), token=connection.token)

    def get_config(self) -> PluginConfig:
        return self._connection.engine

    async def do(self, ctx: TaskExecutionContext) -> PhaseInfo:
        job = ctx.task_execution_metadata
        spec = ctx.spec(ReportJob)
        made = await self._api.post(
            "/jobs",
            json={"spec": spec.model_dump(mode="json"), "key": job.generated_name},
        )
        if spec.outcome == "fail":
            return PhaseInfo.failure("JobFailed", spec.message)
        if spec.outcome == "never":
            return PhaseInfo.running("not terminal")
        ctx.output_writer.put({"uri": made["link"], "data": spec.result})
        return PhaseInfo.success()

    async def aclose(self) -> None:
        await self._api.aclose()


class IdempotentDoPlugin(DoPlugin):
    idempotent: ClassVar[bool] = True


class BlockingDoPlugin(DoPlugin):
    """The same with a blocking client."""

    def do(self, ctx: TaskExecutionContext) -> PhaseInfo:  # pyright: ignore[reportIncompatibleMethodOverride] - authors may block
        job, spec = ctx.task_execution_metadata, ctx.spec(ReportJob)
        sent = Request(
            f"{self._connection.base_url}jobs",
            data=json.dumps(
                {"spec": spec.model_dump(mode="json"), "key": job.generated_name}
            ).encode(),
            headers={
                "Authorization": f"Bearer {self._connection.token.get_secret_value()}",
                "Content-Type": "application/json",
            },
        )
        with urlopen(sent, timeout=20) as answer:
            made = json.load(answer)
        ctx.output_writer.put({"uri": made["link"], "data": spec.result})
        return PhaseInfo.success()


def entry(kind: type[Any], task_type: str) -> PluginEntry[JobServer]:
    """A plugin entry for tests; its id is its task type."""
    return PluginEntry(
        id=task_type,
        supported_task_types=[task_type],
        connection=JobServer,
        spec=ReportJob,
        plugin_loader=lambda setup: kind(setup.connection),
    )


KEYS = entry(JobServerPlugin, "keys")
SINGLE = entry(SinglePlugin, "single")
SEARCH = entry(SearchPlugin, "search")
NEITHER = entry(NeitherPlugin, "neither")
BLOCKING = entry(BlockingPlugin, "blocking")
OUTPUTS = entry(OutputsPlugin, "outputs")
DO = entry(DoPlugin, "do")
IDEMPOTENT_DO = entry(IdempotentDoPlugin, "idempotent-do")
BLOCKING_DO = entry(BlockingDoPlugin, "blocking-do")
CLEANUP = entry(CleanupPlugin, "cleanup")
ALL = (
    *(KEYS, SINGLE, SEARCH, NEITHER, BLOCKING, OUTPUTS, CLEANUP),
    *(DO, IDEMPOTENT_DO, BLOCKING_DO),
)

__all__ = [
    "ALL",
    "BLOCKING",
    "BLOCKING_DO",
    "CLEANUP",
    "DO",
    "IDEMPOTENT_DO",
    "KEYS",
    "NEITHER",
    "OUTPUTS",
    "SEARCH",
    "SINGLE",
    "entry",
]
