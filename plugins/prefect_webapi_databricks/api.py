"""Requests of the Jobs API, and what its answers hold of runs, their tasks and outputs."""

from collections.abc import Sequence
from typing import Any

from prefect_webapi import RemoteClient, RemoteError, RemoteUserError
from prefect_webapi.auth import ClientCredentials, TokenAuth
from prefect_webapi_databricks.blocks import Databricks
from prefect_webapi_databricks.errors import judge
from prefect_webapi_databricks.models import Run, TaskOutput, TaskRun

ROOT = "/api/2.2/jobs"
PAGE = 24
"""Most runs in an answer of `runs/list`."""


class JobsApi:
    """A client of one workspace."""

    def __init__(self, connection: Databricks) -> None:
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
        self._client = RemoteClient(
            f"{host}{ROOT}",
            token=connection.token,
            auth=TokenAuth(self._oauth) if self._oauth else None,
            judge=judge,
            allow_insecure=insecure,
        )

    async def create(self, path: str, body: Any) -> Run:
        """What is answered has the run's id."""
        return Run.model_validate(await self._client.post(path, json=body))

    async def run(self, run_id: str, page: str | None = None) -> Run:
        params = {"run_id": run_id, "page_token": page}
        return Run.model_validate(await self._client.get("/runs/get", params=params))

    async def active(self) -> Sequence[Run]:
        """The newest of the runs that go on."""
        params = {"active_only": "true", "limit": PAGE}
        page = await self._client.get("/runs/list", params=params)
        return [Run.model_validate(row) for row in page.get("runs", ())]

    async def cancel(self, run_id: str) -> None:
        await self._client.post("/runs/cancel", json={"run_id": int(run_id)})

    async def tasks(self, run: Run) -> list[TaskRun]:
        """All tasks of a run, of which an answer holds a hundred; the last attempt at a task comes last."""
        tasks = list(run.tasks)
        while run.next_page_token:
            run = await self.run(str(run.run_id), run.next_page_token)
            tasks += run.tasks
        return sorted(tasks, key=lambda task: task.attempt_number)

    async def output(self, task: TaskRun) -> TaskOutput:
        run_id = str(task.run_id)
        try:
            told = await self._client.get("/runs/get-output", params={"run_id": run_id})
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

    async def why(self, run: Run) -> str:
        """What the first task that failed said: the run itself only points to it."""
        try:
            for task in await self.tasks(run):
                if task.has_failed and (said := (await self.output(task)).error):
                    return f"task {task.task_key}: {said}"
        except RemoteError:
            pass  # the run's own message will do
        return ""

    async def aclose(self) -> None:
        await self._client.aclose()
        if self._oauth is not None:
            await self._oauth.aclose()
