"""Run tasks on Flyte connectors: sensors, queries, clusters, whatever a connector serves."""

import asyncio
from importlib import import_module
from typing import Any

from prefect_webapi import (
    ConfigurationError,
    Plugin,
    PluginEntry,
    PluginSetupContext,
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
    "task_types",
]

ASYNC, SYNC = "flyte-connector", "flyte-connector-call"


async def _library(module: str) -> Any:
    """A module that needs grpc; importing it takes a while."""
    try:
        return await asyncio.to_thread(import_module, f"prefect_webapi_flyte.{module}")
    except ModuleNotFoundError as missing:
        raise ConfigurationError(
            f'Flyte connectors need the package {missing.name}: pip install "prefect-webapi[flyte]"'
        ) from missing


async def _load_job(setup: PluginSetupContext[FlyteConnector]) -> Plugin:
    return (await _library("plugin")).ConnectorPlugin(setup.connection)


async def _load_call(setup: PluginSetupContext[FlyteConnector]) -> Plugin:
    return (await _library("plugin")).ConnectorCallPlugin(setup.connection)


async def task_types(connection: FlyteConnector) -> tuple[TaskType, ...]:
    """What a connector says it serves, by name.

    Raises:
        RemoteError: it can't be asked.
    """
    connector = (await _library("connector")).Connector(connection)
    try:
        return await connector.task_types()
    finally:
        await connector.aclose()


entry = PluginEntry(
    id=ASYNC,
    supported_task_types=[ASYNC],
    connection=FlyteConnector,
    spec=ConnectorJob,
    plugin_loader=_load_job,
)
call_entry = PluginEntry(
    id=SYNC,
    supported_task_types=[SYNC],
    connection=FlyteConnector,
    spec=ConnectorJob,
    plugin_loader=_load_call,
)
run_connector_job = task_for(ASYNC, ConnectorJob[dict[str, Any]], name="run connector job")
run_connector_job_sync = sync_task_for(
    ASYNC, ConnectorJob[dict[str, Any]], name="run connector job"
)
run_connector_call = task_for(SYNC, ConnectorJob[dict[str, Any]], name="run connector call")
run_connector_call_sync = sync_task_for(
    SYNC, ConnectorJob[dict[str, Any]], name="run connector call"
)
