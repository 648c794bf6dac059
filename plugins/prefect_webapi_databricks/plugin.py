"""Databricks Jobs API 2.2: `run-now` and `runs/submit` with an idempotency token; `runs/get`, `list` and `cancel`."""

import asyncio
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from prefect_webapi import (
    AlreadyExists,
    Answer,
    AsyncPlugin,
    AuthError,
    DeleteContext,
    GetContext,
    NotFound,
    PhaseInfo,
    PluginConfig,
    RemoteClient,
    RemoteError,
    RemoteSystemError,
    RemoteUserError,
    ResourceRequirements,
    StatusContext,
    TaskExecutionContextReader,
    TaskInfo,
    TaskLog,
    Throttled,
    error_of_status,
)
from prefect_webapi.auth import ClientCredentials, TokenAuth
from prefect_webapi_databricks.blocks import Databricks
from prefect_webapi_databricks.models import (
    DatabricksRun,
    Run,
    RunHandle,
    RunResult,
    TaskOutput,
    TaskRun,
)

API = "/api/2.2/jobs"
PAGE = 24
AT_ONCE = 8
"""So many outputs of one run are fetched at the same time."""

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
THROTTLED = ("RESOURCE_EXHAUSTED", "REQUEST_LIMIT_EXCEEDED")
NO_SUCH_RUN = re.compile(r"Run .* does not exist|Run: .* in job: .* doesn't exist")


class DatabricksPlugin(AsyncPlugin[RunHandle, Run]):
    """Exactly once by key: a request that repeats an idempotency token is answered with the run that has it."""

    guarantee = "key"
    max_batch = PAGE

    def __init__(self, connection: Databricks) -> None:
        self._connection = connection
        host, insecure = str(connection.host).rstrip("/"), connection.settings.allow_insecure
        self._oauth: ClientCredentials | None = None
        if connection.client_id is not None and connection.client_secret is not None:
            self._oauth = ClientCredentials(
                f"{host}/oidc/v1/token",
                connection.client_id,
                connection.client_secret,
                scope="all-apis",
                allow_insecure=insecure,
            )
        self._api = RemoteClient(
            host,
            token=connection.token,
            auth=TokenAuth(self._oauth) if self._oauth else None,
            judge=judge,
            allow_insecure=insecure,
        )

    def get_config(self) -> PluginConfig:
        return self._connection.engine

    async def resource_requirements(self, ctx: TaskExecutionContextReader) -> ResourceRequirements:
        return ResourceRequirements(namespace=ctx.spec(DatabricksRun).quota)

    async def create(self, ctx: TaskExecutionContextReader) -> RunHandle:
        spec = ctx.spec(DatabricksRun)
        body = spec.request(ctx.task_execution_metadata)
        made = Run.model_validate(await self._api.post(f"{API}/{spec.path}", json=body))
        return RunHandle(run_id=str(made.run_id))

    async def get(self, ctx: GetContext[RunHandle]) -> Run:
        run = await self._run(ctx.resource_meta.run_id)
        return run.model_copy(update={"error": await self._why(run)}) if run.has_failed else run

    async def get_many(self, ctxs: Sequence[GetContext[RunHandle]]) -> Sequence[Run | None]:
        """From the newest of the runs that go on; what isn't among them, or has ended, is read alone."""
        params = {"active_only": "true", "limit": PAGE}
        page = await self._api.get(f"{API}/runs/list", params=params)
        runs = [Run.model_validate(row) for row in page.get("runs", ())]
        read = {str(run.run_id): run for run in runs if not run.is_over}
        return [read.get(ctx.resource_meta.run_id) for ctx in ctxs]

    async def delete(self, ctx: DeleteContext[RunHandle]) -> None:
        run_id = ctx.resource_meta.run_id
        try:
            await self._api.post(f"{API}/runs/cancel", json={"run_id": int(run_id)})
        except RemoteUserError:
            if not (await self._run(run_id)).is_over:
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
        run, wanted = ctx.resource, ctx.spec(DatabricksRun).outputs_of
        tasks = {
            task.task_key: task
            for task in await self._tasks(run)
            if wanted is None or task.task_key in wanted
        }
        limit = ctx.max_dataset_size_bytes
        turn, left = asyncio.Semaphore(AT_ONCE), math.inf if limit < 0 else limit

        async def output(task: TaskRun) -> TaskOutput:
            nonlocal left
            async with turn:
                if left < 0:  # it is too large already, and will be refused
                    return TaskOutput(run_id=str(task.run_id))
                found = await self._output(task)
                left -= len(found.model_dump_json())
                return found

        found: dict[str, TaskOutput] = {}
        calls = await asyncio.gather(*map(output, tasks.values()), return_exceptions=True)
        for key, outcome in zip(tasks, calls, strict=True):
            if isinstance(outcome, BaseException):
                raise outcome
            found[key] = outcome
        return RunResult(run_id=str(run.run_id), url=run.run_page_url, outputs=found)

    async def aclose(self) -> None:
        await self._api.aclose()
        if self._oauth is not None:
            await self._oauth.aclose()

    # --- parts of an answer ------------------------------------------------------------------

    async def _run(self, run_id: str, page: str | None = None) -> Run:
        params = {"run_id": run_id, "page_token": page}
        return Run.model_validate(await self._api.get(f"{API}/runs/get", params=params))

    async def _tasks(self, run: Run) -> list[TaskRun]:
        """All tasks of a run, of which an answer holds a hundred; the last attempt at a task comes last."""
        tasks = list(run.tasks)
        while run.next_page_token:
            run = await self._run(str(run.run_id), run.next_page_token)
            tasks += run.tasks
        return sorted(tasks, key=lambda task: task.attempt_number)

    async def _why(self, run: Run) -> str:
        """What the first task that failed said: the run itself only points to it."""
        try:
            for task in await self._tasks(run):
                if task.has_failed and (said := (await self._output(task)).error):
                    return f"task {task.task_key}: {said}"
        except RemoteError:
            pass  # the run's own message will do
        return ""

    async def _output(self, task: TaskRun) -> TaskOutput:
        run_id = str(task.run_id)
        try:
            told = await self._api.get(f"{API}/runs/get-output", params={"run_id": run_id})
        except RemoteUserError as refused:  # tasks of some kinds have none
            return TaskOutput(run_id=run_id, error=refused.message)
        notebook: dict[str, Any] = told.get("notebook_output") or {}
        others = (v for k, v in told.items() if k.endswith("_output") and k != "notebook_output")
        return TaskOutput(
            run_id=run_id,
            result=notebook.get("result") or next(others, None),
            logs=told.get("logs"),
            truncated=bool(notebook.get("truncated") or told.get("logs_truncated")),
            error=told.get("error"),
        )


def judge(answer: Answer, method: str) -> RemoteError | None:
    """What an answer means by its error code, which says more than the HTTP status."""
    error = error_of_status(answer, method)
    if error is None:
        return None
    code = _code(answer)
    if code in THROTTLED:
        return error_of_status(replace(answer, status=429), method)
    if code == "RESOURCE_DOES_NOT_EXIST" or (
        code == "INVALID_PARAMETER_VALUE" and NO_SUCH_RUN.search(error.message)
    ):
        return NotFound(error.message, code=code)
    if isinstance(error, NotFound) and not code:  # not of Databricks: it tells nothing of the run
        return RemoteSystemError(error.message, code="HTTP404", job_may_exist=False)
    if isinstance(error, AlreadyExists):  # ABORTED: two requests have met, and the token tells
        return RemoteSystemError(error.message, code=code)
    if code and not isinstance(error, AuthError | NotFound | Throttled):
        error.code = code
    return error


def _code(answer: Answer) -> str:
    try:
        data = answer.json()
    except RemoteSystemError:
        return ""
    return str(cast(dict[str, Any], data).get("error_code", "")) if isinstance(data, dict) else ""
