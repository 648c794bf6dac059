"""Run jobs on any service with a job API over HTTP: what it looks like is described as data."""

from prefect_webapi import PluginEntry, sync_task_for, task_for
from prefect_webapi_http.blocks import HttpJobApi
from prefect_webapi_http.models import HttpJob, JobApi
from prefect_webapi_http.plugin import HttpJobPlugin

__all__ = ["HttpJob", "HttpJobApi", "JobApi", "entry", "run_http_job", "run_http_job_sync"]

entry = PluginEntry(
    id="http",
    supported_task_types=["http-job"],
    connection=HttpJobApi,
    spec=HttpJob,
    plugin_loader=lambda setup: HttpJobPlugin(setup.connection),
)
run_http_job = task_for("http-job", HttpJob, name="run http job")
run_http_job_sync = sync_task_for("http-job", HttpJob, name="run http job")
