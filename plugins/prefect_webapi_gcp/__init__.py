"""Run jobs on BigQuery: queries, loads, copies and extracts."""

from prefect_webapi import PluginEntry, sync_task_for, task_for
from prefect_webapi_gcp.bigquery import BigQueryPlugin
from prefect_webapi_gcp.blocks import BigQuery
from prefect_webapi_gcp.models import BigQueryJob, BigQueryResult

__all__ = ["BigQuery", "BigQueryJob", "BigQueryResult", "entry", "run_query", "run_query_sync"]

entry = PluginEntry(
    id="bigquery",
    supported_task_types=["bigquery"],
    connection=BigQuery,
    spec=BigQueryJob,
    plugin_loader=lambda setup: BigQueryPlugin(setup.connection),
)
run_query = task_for("bigquery", BigQueryJob, name="run query")
run_query_sync = sync_task_for("bigquery", BigQueryJob, name="run query")
