"""Run tasks on Flyte connectors: sensors, queries, clusters, whatever a connector serves."""

import asyncio
from importlib import import_module
from typing import Any

from prefect_webapi import (
    ConfigurationError,
    Plugin,
    PluginEntry,
    sync_task_for,
    task_for,
)
from prefect_webapi_flyte.blocks import FlyteConnector
from prefect_webapi_flyte.models import (
    ConnectorJob,
    Container,
    Sql,
    StructuredDataset,
    TaskType,
)

__all__ = [
    "ConnectorJob",
    "Container",
    "FlyteConnector",
    "Sql",
    "StructuredDataset",
    "TaskType",
    "call_entry",
    "entry",
    "run_connector_call",
    "run_connector_call_sync",
    "run_connector_job",
    "run_connector_job_sync",
]

ASYNC, SYNC = "flyte-connector", "flyte-connector-call"


async def _load(name: str, connection: FlyteConnector) -> Plugin:
    try:
        plugin = await asyncio.to_thread(import_module, "prefect_webapi_flyte.plugin")
    except ModuleNotFoundError as missing:
        raise ConfigurationError(
            f'Flyte connectors need the package {missing.name}: pip install "prefect-webapi[flyte]"'
        ) from missing
    return getattr(plugin, name)(connection)


entry = PluginEntry(
    id=ASYNC,
    supported_task_types=[ASYNC],
    connection=FlyteConnector,
    spec=ConnectorJob,
    plugin_loader=lambda setup: _load("ConnectorPlugin", setup.connection),
)
call_entry = PluginEntry(
    id=SYNC,
    supported_task_types=[SYNC],
    connection=FlyteConnector,
    spec=ConnectorJob,
    plugin_loader=lambda setup: _load("ConnectorCallPlugin", setup.connection),
)
run_connector_job = task_for(ASYNC, ConnectorJob[dict[str, Any]], name="run connector job")
run_connector_job_sync = sync_task_for(
    ASYNC, ConnectorJob[dict[str, Any]], name="run connector job"
)
run_connector_call = task_for(SYNC, ConnectorJob[dict[str, Any]], name="run connector call")
run_connector_call_sync = sync_task_for(
    SYNC, ConnectorJob[dict[str, Any]], name="run connector call"
)
