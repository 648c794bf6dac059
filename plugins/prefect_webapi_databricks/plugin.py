"""Databricks Jobs API 2.2: `run-now` and `runs/submit` with an idempotency token; `runs/get`, `list` and `cancel`."""

from collections.abc import Sequence

from prefect_webapi import (
    AsyncPlugin,
    DeleteContext,
    GetContext,
    PhaseInfo,
    PluginConfig,
    RemoteUserError,
    ResourceRequirements,
    StatusContext,
    TaskExecutionContextReader,
    TaskInfo,
    TaskLog,
)
from prefect_webapi_databricks.api import PAGE, JobsApi
from prefect_webapi_databricks.blocks import Databricks
from prefect_webapi_databricks.models import DatabricksRun, Run, RunHandle, RunResult
from prefect_webapi_databricks.results import result_of

PHASES = {  # states, results and codes of termination: no word of one means something else in another
    "QUEUED": PhaseInfo.waiting_for_resources,
    "BLOCKED": PhaseInfo.queued,
    "WAITING": PhaseInfo.queued,
    "WAITING_FOR_RETRY": PhaseInfo.queued,
    "PENDING": PhaseInfo.initializing,
    "RUNNING": PhaseInfo.running,
    "TERMINATING": PhaseInfo.running,
    "SUCCESS": PhaseInfo.success,
    "SUCCESS_WITH_FAILURES": PhaseInfo.success,
    "CANCELED": PhaseInfo.aborted,
    "USER_CANCELED": PhaseInfo.aborted,
}
NEVER_RAN = ("UPSTREAM_FAILED", "UPSTREAM_CANCELED", "EXCLUDED", "DISABLED")
CROWDED = (  # another time may do, although Databricks counts these as the client's errors
    *("MAXIMUM_CONCURRENT_RUNS_REACHED", "SKIPPED", "WORKSPACE_RUN_LIMIT_EXCEEDED"),
    *("CLUSTER_REQUEST_LIMIT_EXCEEDED", "MAX_CONCURRENT_RUNS_EXCEEDED"),
    *("MAX_JOB_QUEUE_SIZE_EXCEEDED", "BREAKING_CHANGE"),
)
FAILURES = {
    **dict.fromkeys(("TIMEDOUT", *NEVER_RAN, "CLIENT_ERROR"), PhaseInfo.failure),
    **dict.fromkeys(CROWDED, PhaseInfo.retryable_failure),
    **dict.fromkeys(("INTERNAL_ERROR", "CLOUD_FAILURE"), PhaseInfo.system_retryable_failure),
    "FAILED": PhaseInfo.retryable_failure,  # and nobody says why
}


class DatabricksPlugin(AsyncPlugin[RunHandle, Run]):
    """Exactly once by key: a request that repeats an idempotency token is answered with the run that has it."""

    guarantee = "key"
    max_batch = PAGE

    def __init__(self, connection: Databricks) -> None:
        self._connection = connection
        self._api = JobsApi(connection)

    def get_config(self) -> PluginConfig:
        return self._connection.engine

    async def resource_requirements(self, ctx: TaskExecutionContextReader) -> ResourceRequirements:
        return ResourceRequirements(namespace=ctx.spec(DatabricksRun).quota)

    async def create(self, ctx: TaskExecutionContextReader) -> RunHandle:
        spec = ctx.spec(DatabricksRun)
        made = await self._api.create(spec.path, spec.request(ctx.task_execution_metadata))
        return RunHandle(run_id=str(made.run_id))

    async def get(self, ctx: GetContext[RunHandle]) -> Run:
        run = await self._api.run(ctx.resource_meta.run_id)
        return run.model_copy(update={"error": await self._api.why(run)}) if run.has_failed else run

    async def get_many(self, ctxs: Sequence[GetContext[RunHandle]]) -> Sequence[Run | None]:
        """What isn't among the newest that go on, or has ended, is read alone."""
        read = {str(run.run_id): run for run in await self._api.active() if not run.is_over}
        return [read.get(ctx.resource_meta.run_id) for ctx in ctxs]

    async def delete(self, ctx: DeleteContext[RunHandle]) -> None:
        run_id = ctx.resource_meta.run_id
        try:
            await self._api.cancel(run_id)
        except RemoteUserError:
            if not (await self._api.run(run_id)).is_over:
                raise

    def status(self, ctx: StatusContext[RunHandle, Run]) -> PhaseInfo:
        run = ctx.resource
        page = TaskLog(name=f"Databricks run {run.run_id}", uri=run.run_page_url)
        info = TaskInfo(logs=(page,) if page.uri else ())
        if not ctx.spec(DatabricksRun).has_made(run, ctx.task_execution_metadata):
            told = f"run {run.run_id} has this job's key, but was made from another spec; it is left alone"
            return PhaseInfo.failure("IdempotencyConflict", told, info=info)
        waits = "" if run.is_over or not run.code else f"{run.code}: "
        message = run.error or f"{waits}{run.told}"
        for word in run.words:
            if word == "SUCCESS_WITH_FAILURES" and self._connection.partial_success_fails:
                return PhaseInfo.failure(word, message, info=info)
            if word in PHASES:
                return PHASES[word](message, info=info)
            if word in FAILURES:
                code = "Timeout" if word == "TIMEDOUT" else run.code or word
                return FAILURES[word](code, message, info=info)
        return PhaseInfo.undefined(f"unknown state {' '.join(run.words)}", info=info)

    async def outputs(self, ctx: StatusContext[RunHandle, Run]) -> RunResult:
        spec = ctx.spec(DatabricksRun)
        return await result_of(self._api, ctx.resource, spec, ctx.max_dataset_size_bytes)

    async def aclose(self) -> None:
        await self._api.aclose()
