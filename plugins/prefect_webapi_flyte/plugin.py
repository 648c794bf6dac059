"""Flyte connectors: create, get and delete of jobs, and calls that answer at once."""

import base64
import re
from collections.abc import Callable
from typing import Any

import flyteidl.admin.agent_pb2 as pb
import flyteidl.core.execution_pb2 as execution_pb2
import flyteidl.core.identifier_pb2 as identifier_pb2
import flyteidl.core.tasks_pb2 as tasks_pb2
from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from flyteidl.core.literals_pb2 import KeyValuePair
from google.protobuf.json_format import MessageToDict

from prefect_webapi import (
    AsyncPlugin,
    ConfigurationError,
    DeleteContext,
    ExternalResource,
    GetContext,
    HandleNotStorable,
    PhaseInfo,
    PluginConfig,
    RemoteError,
    RemoteSystemError,
    ResourceRequirements,
    StatusContext,
    SyncPlugin,
    TaskExecutionContext,
    TaskExecutionContextReader,
    TaskInfo,
    TaskLog,
)
from prefect_webapi_flyte.blocks import FlyteConnector
from prefect_webapi_flyte.connector import Connector
from prefect_webapi_flyte.literals import literal_map, python_of, variables
from prefect_webapi_flyte.models import (
    ConnectorHandle,
    ConnectorJob,
    Container,
    Sql,
    fits,
    type_name,
)

Job = ConnectorJob[Any]
Flyte = execution_pb2.TaskExecution
PHASES: dict[int, Callable[..., PhaseInfo]] = {
    Flyte.QUEUED: PhaseInfo.queued,
    Flyte.WAITING_FOR_RESOURCES: PhaseInfo.waiting_for_resources,
    Flyte.INITIALIZING: PhaseInfo.initializing,
    Flyte.RUNNING: PhaseInfo.running,
    Flyte.SUCCEEDED: PhaseInfo.success,
    Flyte.ABORTED: PhaseInfo.aborted,
}
STATES: dict[int, int] = {  # of connectors that are older than phases
    pb.PENDING: Flyte.INITIALIZING,
    pb.RUNNING: Flyte.RUNNING,
    pb.SUCCEEDED: Flyte.SUCCEEDED,
    pb.PERMANENT_FAILURE: Flyte.FAILED,
    pb.RETRYABLE_FAILURE: Flyte.RETRYABLE_FAILED,
}
FAILURES = {  # may a new attempt help, is it the service's fault
    (False, False): PhaseInfo.failure,
    (False, True): PhaseInfo.system_failure,
    (True, False): PhaseInfo.retryable_failure,
    (True, True): PhaseInfo.system_retryable_failure,
}
LOG_FORMATS = ("unknown", "csv", "json")
LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


class _OnConnector:
    def __init__(self, connection: FlyteConnector) -> None:
        self._block = connection
        self._connector = Connector(connection)

    def get_config(self) -> PluginConfig:
        return self._block.engine

    async def resource_requirements(self, ctx: TaskExecutionContextReader) -> ResourceRequirements:
        return ResourceRequirements(namespace=ctx.spec(Job).quota)

    async def aclose(self) -> None:
        await self._connector.aclose()


class ConnectorPlugin(_OnConnector, AsyncPlugin[ConnectorHandle, pb.Resource]):
    """At most once: the protocol has no key and no search. Each job carries its job key in name, labels and
    environment, for a connector that can look there.
    """

    guarantee = "at-most-once"

    def __init__(self, connection: FlyteConnector) -> None:
        self._vault = _vault(connection)
        super().__init__(connection)

    async def create(self, ctx: TaskExecutionContextReader) -> ConnectorHandle:
        job = ctx.spec(Job)
        request = pb.CreateTaskRequest(
            inputs=literal_map(job.inputs),
            template=_template(job, ctx, self._block),
            output_prefix=_output_prefix(ctx, self._block),
            task_execution_metadata=_metadata(ctx, self._block),
        )
        try:
            meta = await self._connector.create(request)
        except RemoteError as error:
            raise await self._connector.explained(error, job, is_sync=False) from error
        kept = self._vault.encrypt(meta) if self._vault else base64.b64encode(meta)
        return ConnectorHandle(
            task_type=job.task_type,
            task_type_version=job.task_type_version,
            output_prefix=request.output_prefix,
            is_encrypted=self._vault is not None,
            opaque_meta=kept.decode(),
        )

    async def get(self, ctx: GetContext[ConnectorHandle]) -> pb.Resource:
        handle = ctx.resource_meta
        return await self._connector.get(
            pb.GetTaskRequest(output_prefix=handle.output_prefix, **self._of(handle))
        )

    async def delete(self, ctx: DeleteContext[ConnectorHandle]) -> None:
        await self._connector.delete(pb.DeleteTaskRequest(**self._of(ctx.resource_meta)))

    def status(self, ctx: StatusContext[ConnectorHandle, pb.Resource]) -> PhaseInfo:
        return judge(ctx.resource, ctx)

    def _of(self, handle: ConnectorHandle) -> dict[str, Any]:
        return {
            "task_type": handle.task_type,  # old connectors look here
            "task_category": pb.TaskCategory(
                name=handle.task_type, version=handle.task_type_version
            ),
            "resource_meta": self._opened(handle),
        }

    def _opened(self, handle: ConnectorHandle) -> bytes:
        if not handle.is_encrypted:
            return base64.b64decode(handle.opaque_meta)
        try:
            if self._vault:
                return self._vault.decrypt(handle.opaque_meta)
        except InvalidToken:
            pass
        raise RemoteSystemError(
            "the job's handle was encrypted with a key that handle_key of the connection does not hold any more. Add "
            "it after the new one until the job is over",
            code="HandleKeyMissing",
        )


class ConnectorCallPlugin(_OnConnector, SyncPlugin):
    """At most once: a call whose answer is lost is not repeated."""

    async def do(self, ctx: TaskExecutionContext) -> PhaseInfo:
        job = ctx.spec(Job)
        header = pb.CreateRequestHeader(
            template=_template(job, ctx, self._block),
            output_prefix=_output_prefix(ctx, self._block),
            task_execution_metadata=_metadata(ctx, self._block),
            max_dataset_size_bytes=ctx.max_dataset_size_bytes,
        )
        try:
            resource = await self._connector.execute(header, literal_map(job.inputs))
        except RemoteError as error:
            raise await self._connector.explained(error, job, is_sync=True) from error
        return judge(resource, ctx)


def judge(resource: pb.Resource, ctx: TaskExecutionContext) -> PhaseInfo:
    """What a connector's answer says of the job."""
    told = _judged(resource, ctx)
    name = ctx.task_execution_metadata.generated_name
    details = TaskInfo(
        logs=tuple(map(_log, resource.log_links)),
        custom_info=MessageToDict(resource.custom_info),
        external_resources=(ExternalResource(external_id=name, phase=told.phase),),
    )
    return told.model_copy(
        update={"info": details.model_copy(update={"occurred_at": told.info.occurred_at})}
    )


def _judged(resource: pb.Resource, ctx: TaskExecutionContext) -> PhaseInfo:
    phase = _phase(resource)
    if phase in (Flyte.FAILED, Flyte.RETRYABLE_FAILED):
        return _failure(resource, phase)
    if phase == Flyte.SUCCEEDED:
        try:
            ctx.output_writer.put(_outputs(resource, ctx.spec(Job).outputs))
        except ValueError as error:
            return PhaseInfo.failure("OutputsInvalid", str(error))
    return PHASES.get(phase, PhaseInfo.undefined)(resource.message)


def _phase(resource: pb.Resource) -> int:
    if resource.phase or resource == pb.Resource():  # zero is a failure among the old states
        return resource.phase
    return STATES.get(resource.state, Flyte.UNDEFINED)


def _failure(resource: pb.Resource, phase: int) -> PhaseInfo:
    error = resource.agent_error
    retryable = phase == Flyte.RETRYABLE_FAILED
    if resource.HasField("agent_error"):
        retryable = error.kind == pb.AgentError.RECOVERABLE
    is_system = error.origin == execution_pb2.ExecutionError.SYSTEM
    return FAILURES[retryable, is_system](
        error.code or Flyte.Phase.Name(Flyte.Phase.ValueType(phase)),
        resource.message or "the connector gives no reason",
        cleanup=not resource.phase,  # an old state's zero may mean that nothing was said
    )


def _outputs(resource: pb.Resource, declared: dict[str, str]) -> dict[str, Any]:
    """Values by name.

    Raises:
        ValueError: one has no value in Python, or isn't what the job declares.
    """
    values: dict[str, Any] = {}
    for name, literal in resource.outputs.literals.items():
        try:
            values[name] = python_of(literal)
        except ValueError as error:
            raise ValueError(f"output {name!r} {error}") from error
    for name, kind in declared.items():
        if name not in values:
            raise ValueError(
                f"the connector gave no output {name!r}, which the job declares as {kind}"
            )
        if not fits(values[name], kind):
            raise ValueError(f"output {name!r} is {type_name(values[name])}, declared is {kind}")
    return values


def _log(log: execution_pb2.TaskLog) -> TaskLog:
    known = log.message_format < len(LOG_FORMATS)
    return TaskLog(
        name=log.name or "Log",
        uri=log.uri,
        message_format=LOG_FORMATS[log.message_format] if known else "unknown",
        ttl=log.ttl.ToTimedelta() if log.HasField("ttl") else None,
        show_while_pending=log.ShowWhilePending,
        hide_once_finished=log.HideOnceFinished,
    )


# --- what a create sends ---------------------------------------------------------------------


def _template(
    job: Job, ctx: TaskExecutionContextReader, block: FlyteConnector
) -> tasks_pb2.TaskTemplate:
    template = tasks_pb2.TaskTemplate(
        id=_identifier(ctx, block),
        type=job.task_type,
        task_type_version=job.task_type_version,
        config=job.config,
    )
    template.metadata.SetInParent()  # flytekit's servers can't read a template without
    template.interface.inputs.CopyFrom(
        variables({name: type_name(value) for name, value in job.inputs.items()})
    )
    template.interface.outputs.CopyFrom(variables(job.outputs))
    template.custom.update(job.custom)
    match job.target:
        case Sql(statement=statement, dialect=dialect):
            template.sql.CopyFrom(tasks_pb2.Sql(statement=statement, dialect=dialect))
        case Container(image=image, command=command, args=args, env=given):
            env = [KeyValuePair(key=key, value=value) for key, value in given.items()]
            template.container.CopyFrom(
                tasks_pb2.Container(image=image, command=command, args=args, env=env)
            )
        case None:
            pass
    return template


def _identifier(
    ctx: TaskExecutionContextReader, block: FlyteConnector
) -> identifier_pb2.Identifier:
    return identifier_pb2.Identifier(
        resource_type=identifier_pb2.TASK,
        project=block.project,
        domain=block.domain,
        name=ctx.task_reader.read().id,
        version=ctx.task_execution_metadata.fingerprint[:16],
    )


def _output_prefix(ctx: TaskExecutionContextReader, block: FlyteConnector) -> str:
    prefix = block.output_prefix.rstrip("/")
    return f"{prefix}/{ctx.task_execution_metadata.generated_name}" if prefix else ""


def _metadata(ctx: TaskExecutionContextReader, block: FlyteConnector) -> pb.TaskExecutionMetadata:
    """Who asks. The job key stands wherever a connector may look for something to tell jobs apart by."""
    job = ctx.task_execution_metadata
    execution = identifier_pb2.WorkflowExecutionIdentifier(
        project=block.project, domain=block.domain, name=job.generated_name
    )
    return pb.TaskExecutionMetadata(
        task_execution_id=identifier_pb2.TaskExecutionIdentifier(
            task_id=_identifier(ctx, block),
            node_execution_id=identifier_pb2.NodeExecutionIdentifier(
                node_id="n0", execution_id=execution
            ),
            retry_attempt=job.attempt - 1,
        ),
        namespace=job.namespace,
        labels={  # what Kubernetes takes; the rest is in the annotations
            name: value
            for name, value in job.labels.items()
            if LABEL.fullmatch(name) and LABEL.fullmatch(value)
        },
        annotations={**job.annotations, **job.labels, "fingerprint": job.fingerprint},
        environment_variables={
            **job.environment_variables,
            "PREFECT_WEBAPI_JOB_KEY": job.generated_name,
        },
        k8s_service_account=job.security_identity,
        max_attempts=job.max_attempts,
        interruptible=job.interruptible,
    )


def _vault(block: FlyteConnector) -> MultiFernet | None:
    """What keeps the connector's bytes, which may hold a token, out of the ledger's sight.

    Raises:
        ConfigurationError: there is no key, and nobody allowed to do without, or it is none.
    """
    if block.handle_key is None:
        if block.settings.allow_plain_handle:
            return None
        raise HandleNotStorable(
            "what a connector gives to find its jobs again may hold a token, and is stored. Give the block a "
            "handle_key (`Fernet.generate_key()` of the package cryptography makes one), or set allow_plain_handle "
            "in its settings if your connectors put no secret there"
        )
    keys = block.handle_key.get_secret_value().split(",")
    try:
        return MultiFernet([Fernet(key.strip()) for key in keys])
    except ValueError as error:
        raise ConfigurationError(
            "handle_key is no Fernet key: 32 bytes in URL-safe Base64. `Fernet.generate_key()` makes one"
        ) from error
