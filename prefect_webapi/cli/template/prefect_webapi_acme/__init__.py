"""Run jobs on Acme."""

from prefect_webapi import PluginEntry, sync_task_for, task_for
from prefect_webapi_acme.blocks import Acme
from prefect_webapi_acme.models import AcmeJob, AcmeResult
from prefect_webapi_acme.plugin import AcmePlugin

__all__ = ["Acme", "AcmeJob", "AcmeResult", "entry", "run_acme_job", "run_acme_job_sync"]

entry = PluginEntry(
    id="acme",
    supported_task_types=["acme"],
    connection=Acme,
    spec=AcmeJob,
    plugin_loader=lambda setup: AcmePlugin(setup.connection),
)
run_acme_job = task_for("acme", AcmeJob, name="run Acme job")
run_acme_job_sync = sync_task_for("acme", AcmeJob, name="run Acme job")
