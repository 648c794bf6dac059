"""AWS Step Functions: one execution per job, named after the job key; EXPRESS ones are calls that answer at the end."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

from prefect_webapi import (
    AlreadyExists,
    AsyncPlugin,
    BadTaskSpecification,
    CreateResult,
    DeleteContext,
    ExternalResource,
    GetContext,
    JobSpec,
    NotFound,
    OutputWriter,
    PhaseInfo,
    PluginConfig,
    RemoteUserError,
    StatusContext,
    SyncPlugin,
    TaskExecutionContext,
    TaskExecutionContextReader,
    TaskInfo,
    TaskLog,
)
from prefect_webapi_aws.blocks import StepFunctions
from prefect_webapi_aws.sigv4 import AwsJson

INPUT_BYTES = 262_144
CAUSE_CHARACTERS = 32_768
EXPRESS_RUNS = timedelta(minutes=5)
"""The longest that an EXPRESS state machine may run."""
HOPELESS = frozenset(["States.Permissions", "States.DataLimitExceeded", "States.Runtime"])
"""Errors that the same input brings again."""
SOMEBODY_ELSES = "0" * 64
"""In the place of the fingerprint of an execution that was started with another input."""
_MACHINE = re.compile(
    r"(arn:aws[a-z-]*:states:([a-z0-9-]+):[0-9]{12}):stateMachine:([^:/\s]{1,80})(:[^:/\s]{1,80})?"
)


class StateMachineRun(JobSpec[Any]):
    """One execution of a state machine; the task returns its output.

    Attributes:
        state_machine_arn: may end with a version or an alias.
        input: what the execution gets; at most 256 KiB of JSON.
    """

    state_machine_arn: str
    input: JsonValue = Field(default_factory=dict)

    @field_validator("state_machine_arn")
    @classmethod
    def _well_formed(cls, arn: str) -> str:
        if _MACHINE.fullmatch(arn) is None:
            raise ValueError(
                f"{arn!r} is no ARN of a state machine. Write it like "
                "arn:aws:states:eu-central-1:123456789012:stateMachine:nightly"
            )
        return arn

    @field_validator("input")
    @classmethod
    def _fits(cls, value: JsonValue) -> JsonValue:
        size = len(_canonical(value).encode())
        if size > INPUT_BYTES:
            raise ValueError(
                f"it has {size} bytes, Step Functions takes {INPUT_BYTES}. Put the data into S3 and hand over where "
                "it is"
            )
        return value

    @property
    def input_text(self) -> str:
        """Equal data gives equal text: Step Functions compares the bytes."""
        return _canonical(self.input)

    @property
    def region(self) -> str:
        return self._parts[2]

    def execution_arn(self, name: str) -> str:
        return f"{self._parts[1]}:execution:{self._parts[3]}:{name}"

    @property
    def _parts(self) -> re.Match[str]:
        found = _MACHINE.fullmatch(self.state_machine_arn)
        assert found is not None
        return found


class ExecutionHandle(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    arn: str


class Execution(BaseModel):
    """Of DescribeExecution's answer. `input` and `output` are JSON; None where AWS keeps them back."""

    model_config = ConfigDict(frozen=True)

    status: str
    input: str | None = None
    output: str | None = None
    error: str | None = None
    cause: str | None = None


class StepFunctionsPlugin(AsyncPlugin[ExecutionHandle, Execution]):
    """Exactly once by key: the execution's name is the job key, and a state machine takes a name once in 90 days.

    Executions of EXPRESS state machines can be neither read nor stopped: such a state machine is refused, by the
    answer of its first start.
    """

    guarantee = "key"

    def __init__(self, connection: StepFunctions) -> None:
        self._connection = connection
        self._api = AwsJson(connection, "states", "AWSStepFunctions", "1.0")

    def get_config(self) -> PluginConfig:
        return self._connection.engine

    async def create(
        self, ctx: TaskExecutionContextReader
    ) -> CreateResult[ExecutionHandle, Execution]:
        run = ctx.spec(StateMachineRun)
        _check_region(run, self._connection)
        try:
            made = await self._api.call(
                "StartExecution",
                stateMachineArn=run.state_machine_arn,
                name=ctx.task_execution_metadata.generated_name,
                input=run.input_text,
            )
        except RemoteUserError as refused:
            if refused.code == "ExecutionAlreadyExists":
                raise AlreadyExists(refused.message) from None
            raise
        arn = made["executionArn"]
        if ":express:" in arn:
            raise RemoteUserError(
                f"{run.state_machine_arn} is an EXPRESS state machine: {arn} was started, but can be neither followed "
                "nor stopped. Use a STANDARD one, or `run_express` (task type step-functions-express)",
                code="ExpressStateMachine",
            )
        return CreateResult(ExecutionHandle(arn=arn), Execution(status="RUNNING"))

    async def find(
        self, ctx: TaskExecutionContextReader
    ) -> CreateResult[ExecutionHandle, Execution] | None:
        run, job = ctx.spec(StateMachineRun), ctx.task_execution_metadata
        arn = run.execution_arn(job.generated_name)
        try:
            seen = await self._described(arn)
        except NotFound:
            return None
        theirs = job.fingerprint if seen.input == run.input_text else SOMEBODY_ELSES
        return CreateResult(ExecutionHandle(arn=arn), seen, None if seen.input is None else theirs)

    async def get(self, ctx: GetContext[ExecutionHandle]) -> Execution:
        return await self._described(ctx.resource_meta.arn)

    async def delete(self, ctx: DeleteContext[ExecutionHandle]) -> None:
        await self._of_execution(
            "StopExecution",
            ctx.resource_meta.arn,
            error="StoppedByPrefect",
            cause=ctx.reason[:CAUSE_CHARACTERS],
        )

    def status(self, ctx: StatusContext[ExecutionHandle, Execution]) -> PhaseInfo:
        run, arn = ctx.resource, ctx.resource_meta.arn
        page = self._connection.console(f"states#/v2/executions/details/{quote(arn, safe='')}")
        info = TaskInfo(logs=(TaskLog(name=f"Execution {arn}", uri=page),))
        return _judged(run, info, ctx.output_writer)

    async def aclose(self) -> None:
        await self._api.aclose()

    async def _described(self, arn: str) -> Execution:
        return Execution.model_validate(await self._of_execution("DescribeExecution", arn))

    async def _of_execution(self, operation: str, arn: str, **fields: str) -> Any:
        try:
            return await self._api.call(operation, executionArn=arn, **fields)
        except RemoteUserError as refused:
            if refused.code == "ExecutionDoesNotExist":
                raise NotFound(refused.message) from None
            raise


class ExpressPlugin(SyncPlugin):
    """At most once: a start of an EXPRESS state machine is not idempotent, and can't be asked about later."""

    def __init__(self, connection: StepFunctions) -> None:
        self._connection = connection
        self._api = AwsJson(
            connection,
            "states",
            "AWSStepFunctions",
            "1.0",
            host="sync-states",
            longest=EXPRESS_RUNS,
        )

    def get_config(self) -> PluginConfig:
        return self._connection.engine

    async def do(self, ctx: TaskExecutionContext) -> PhaseInfo:
        run = ctx.spec(StateMachineRun)
        _check_region(run, self._connection)
        told = await self._api.call(
            "StartSyncExecution",
            stateMachineArn=run.state_machine_arn,
            name=ctx.task_execution_metadata.generated_name,
            input=run.input_text,
        )
        part = ExternalResource(external_id=told["executionArn"])
        info = TaskInfo(external_resources=(part,))
        return _judged(Execution.model_validate(told), info, ctx.output_writer)

    async def aclose(self) -> None:
        await self._api.aclose()


def _check_region(run: StateMachineRun, at: StepFunctions) -> None:
    if run.region != at.region:
        raise BadTaskSpecification(
            f"state_machine_arn is in {run.region}, the connection is for {at.region}: use the connection of that "
            "region"
        )


def _judged(run: Execution, info: TaskInfo, writer: OutputWriter) -> PhaseInfo:
    error, cause = run.error or "ExecutionFailed", run.cause or run.error or ""
    match run.status:
        case "RUNNING" | "PENDING_REDRIVE":
            return PhaseInfo.running(info=info)
        case "SUCCEEDED":
            if run.output is not None:
                writer.put(json.loads(run.output))
            return PhaseInfo.success(info=info)
        case "FAILED" if error in HOPELESS:
            return PhaseInfo.failure(error, cause, info=info)
        case "FAILED":
            return PhaseInfo.retryable_failure(error, cause, info=info)
        case "TIMED_OUT":
            told = cause or "the execution took longer than its state machine allows"
            return PhaseInfo.failure("Timeout", told, info=info)
        case "ABORTED":
            return PhaseInfo.aborted(cause, info=info)
        case other:
            return PhaseInfo.undefined(f"unknown status {other}", info=info)


def _canonical(value: JsonValue) -> str:
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
