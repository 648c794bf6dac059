"""Run jobs and one-time runs on Databricks."""

from prefect_webapi import PluginEntry, sync_task_for, task_for
from prefect_webapi_databricks.blocks import Databricks
from prefect_webapi_databricks.models import (
    DatabricksRun,
    RunJob,
    RunResult,
    SubmitRun,
    TaskOutput,
)
from prefect_webapi_databricks.plugin import DatabricksPlugin

__all__ = [
    "Databricks",
    "DatabricksRun",
    "RunJob",
    "RunResult",
    "SubmitRun",
    "TaskOutput",
    "entry",
    "run_job",
    "run_job_sync",
    "submit_run",
    "submit_run_sync",
]

entry = PluginEntry(
    id="databricks",
    supported_task_types=["databricks"],
    connection=Databricks,
    spec=DatabricksRun,
    plugin_loader=lambda setup: DatabricksPlugin(setup.connection),
)
run_job = task_for("databricks", RunJob, name="run databricks job")
run_job_sync = sync_task_for("databricks", RunJob, name="run databricks job")
submit_run = task_for("databricks", SubmitRun, name="submit databricks run")
submit_run_sync = sync_task_for("databricks", SubmitRun, name="submit databricks run")
