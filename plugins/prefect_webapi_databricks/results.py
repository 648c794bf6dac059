"""What a run brought: the outputs of its tasks, several fetched at the same time."""

import asyncio
import math

from prefect_webapi_databricks.api import JobsApi
from prefect_webapi_databricks.models import DatabricksRun, Run, RunResult, TaskOutput, TaskRun

AT_ONCE = 8


async def result_of(api: JobsApi, run: Run, spec: DatabricksRun, size_bytes: int) -> RunResult:
    """No more outputs are fetched than may be returned: what is there is then too large, which the engine refuses."""
    wanted = spec.outputs_of
    tasks = {
        task.task_key: task
        for task in await api.tasks(run)
        if wanted is None or task.task_key in wanted
    }
    turn, left = asyncio.Semaphore(AT_ONCE), math.inf if size_bytes < 0 else size_bytes

    async def output(task: TaskRun) -> TaskOutput:
        nonlocal left
        async with turn:
            if left < 0:
                return TaskOutput(run_id=str(task.run_id))
            found = await api.output(task)
            left -= len(found.model_dump_json())
            return found

    outputs: dict[str, TaskOutput] = {}
    calls = await asyncio.gather(*map(output, tasks.values()), return_exceptions=True)
    for key, outcome in zip(tasks, calls, strict=True):
        if isinstance(outcome, BaseException):
            raise outcome
        outputs[key] = outcome
    return RunResult(run_id=str(run.run_id), url=run.run_page_url, outputs=outputs)
