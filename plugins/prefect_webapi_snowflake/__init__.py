"""Run SQL on Snowflake."""

from prefect_webapi import PluginEntry, sync_task_for, task_for
from prefect_webapi_snowflake.blocks import Snowflake
from prefect_webapi_snowflake.models import SnowflakeJob, SnowflakeResult, StatementResult
from prefect_webapi_snowflake.plugin import SnowflakePlugin

__all__ = [
    "Snowflake",
    "SnowflakeJob",
    "SnowflakeResult",
    "StatementResult",
    "entry",
    "run_statement",
    "run_statement_sync",
]

entry = PluginEntry(
    id="snowflake",
    supported_task_types=["snowflake"],
    connection=Snowflake,
    spec=SnowflakeJob,
    plugin_loader=lambda setup: SnowflakePlugin(setup.connection),
)
run_statement = task_for("snowflake", SnowflakeJob, name="run statement")
run_statement_sync = sync_task_for("snowflake", SnowflakeJob, name="run statement")
