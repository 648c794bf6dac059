"""Run reports on a job server. The skeleton of a plugin: copy this folder and change the four methods."""

from prefect_webapi import PluginEntry, sync_task_for, task_for
from prefect_webapi_jobserver.blocks import JobServer
from prefect_webapi_jobserver.models import Report, ReportJob
from prefect_webapi_jobserver.plugin import JobServerPlugin

__all__ = ["JobServer", "Report", "ReportJob", "entry", "run_job", "run_job_sync"]

entry = PluginEntry(
    id="job-server",
    supported_task_types=["job-server"],
    connection=JobServer,
    spec=ReportJob,
    plugin_loader=lambda setup: JobServerPlugin(setup.connection),
)
run_job = task_for("job-server", ReportJob, name="run job")
run_job_sync = sync_task_for("job-server", ReportJob, name="run job")
