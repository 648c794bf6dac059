"""Run AWS Step Functions executions and Amazon Athena queries."""

from prefect_webapi import PluginEntry, sync_task_for, task_for
from prefect_webapi_aws.athena import AthenaPlugin
from prefect_webapi_aws.athena_models import AthenaQuery, QueryResult
from prefect_webapi_aws.blocks import Athena, StepFunctions
from prefect_webapi_aws.step_functions import ExpressPlugin, StateMachineRun, StepFunctionsPlugin

__all__ = [
    "Athena",
    "AthenaQuery",
    "QueryResult",
    "StateMachineRun",
    "StepFunctions",
    "athena_entry",
    "express_entry",
    "run_express",
    "run_express_sync",
    "run_query",
    "run_query_sync",
    "run_state_machine",
    "run_state_machine_sync",
    "step_functions_entry",
]

step_functions_entry = PluginEntry(
    id="step-functions",
    supported_task_types=["step-functions"],
    connection=StepFunctions,
    spec=StateMachineRun,
    plugin_loader=lambda setup: StepFunctionsPlugin(setup.connection),
)
run_state_machine = task_for("step-functions", StateMachineRun, name="run state machine")
run_state_machine_sync = sync_task_for("step-functions", StateMachineRun, name="run state machine")

express_entry = PluginEntry(
    id="step-functions-express",
    supported_task_types=["step-functions-express"],
    connection=StepFunctions,
    spec=StateMachineRun,
    plugin_loader=lambda setup: ExpressPlugin(setup.connection),
)
run_express = task_for("step-functions-express", StateMachineRun, name="run express")
run_express_sync = sync_task_for("step-functions-express", StateMachineRun, name="run express")

athena_entry = PluginEntry(
    id="athena",
    supported_task_types=["athena"],
    connection=Athena,
    spec=AthenaQuery,
    plugin_loader=lambda setup: AthenaPlugin(setup.connection),
)
run_query = task_for("athena", AthenaQuery, name="run query")
run_query_sync = sync_task_for("athena", AthenaQuery, name="run query")
