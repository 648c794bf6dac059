"""The connector's three gRPC services: calls with deadlines, statuses as our errors, discovery."""

import asyncio
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import anyio
import anyio.to_thread
import flyteidl.admin.agent_pb2 as pb
import flyteidl.service.agent_pb2_grpc as services  # pyright: ignore[reportMissingTypeStubs] # generated code
import grpc
import grpc.aio
from flyteidl.core.literals_pb2 import LiteralMap
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from prefect_webapi import (
    AuthError,
    ConfigurationError,
    OutcomeUnknown,
    RemoteError,
    RemoteSystemError,
    RemoteUserError,
    Throttled,
)
from prefect_webapi_flyte.blocks import FlyteConnector
from prefect_webapi_flyte.models import ConnectorJob, TaskType

__all__ = ["Connector"]

CONNECT_SECONDS = 10.0
CALL_TIMEOUT = timedelta(minutes=5)
ENVELOPE = 8 * 1024  # links, messages and details
_OPTIONS = (
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.max_receive_message_length", -1),  # results are measured by the engine
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.service_config_disable_resolution", 1),  # DNS could order that creates are repeated
)


class Connector:
    """The channels to a connector; bound to the event loop that makes it.

    Raises:
        ConfigurationError: the token would travel in the clear.
    """

    def __init__(self, block: FlyteConnector) -> None:
        self._address, self._settings = block.address, block.settings
        host = block.address.removeprefix("dns:///").rpartition(":")[0]
        local = host in ("localhost", "127.0.0.1", "[::1]")
        if block.token and not (block.tls or local or self._settings.allow_insecure):
            raise ConfigurationError(
                f"tls=False would send the token to {host} in the clear. Use TLS, or set allow_insecure in the "
                "block's settings if the network is yours"
            )
        self._channel: grpc.aio.Channel = _channel(grpc.aio, block)
        self._line: grpc.Channel = _channel(grpc, block)
        self._readers = anyio.CapacityLimiter(block.engine.caching.workers)
        token = block.token.get_secret_value() if block.token else ""
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._jobs: Any = services.AsyncAgentServiceStub(self._channel)
        self._calls: Any = services.SyncAgentServiceStub(self._line)
        self._about: Any = services.AgentMetadataServiceStub(self._channel)
        self._known: tuple[TaskType, ...] = ()

    async def create(self, request: pb.CreateTaskRequest) -> bytes:
        left = await self._connected(self._settings.create_timeout)
        answer = await self._ask(self._jobs.CreateTask, request, left)
        return answer.resource_meta

    async def get(self, request: pb.GetTaskRequest) -> pb.Resource:
        answer = await self._ask(self._jobs.GetTask, request, self._settings.get_timeout)
        return answer.resource

    async def delete(self, request: pb.DeleteTaskRequest) -> None:
        await self._ask(self._jobs.DeleteTask, request, self._settings.delete_timeout)

    async def execute(self, header: pb.CreateRequestHeader, inputs: LiteralMap) -> pb.Resource:
        """Both messages there, all messages back: the outputs may come after the resource.

        Not by grpc.aio, which loses the status of a stream that is refused while it still writes.
        """
        messages = (
            pb.ExecuteTaskSyncRequest(header=header),
            pb.ExecuteTaskSyncRequest(inputs=inputs),
        )
        left = await self._connected(CALL_TIMEOUT)
        call = self._calls.ExecuteTaskSync(
            iter(messages), timeout=_seconds(left), metadata=self._metadata
        )
        try:
            return await anyio.to_thread.run_sync(
                _merged,
                call,
                header.max_dataset_size_bytes,
                abandon_on_cancel=True,
                limiter=self._readers,
            )
        except grpc.RpcError as error:
            raise _error_of(error) from error
        finally:
            call.cancel()  # which ends the thread, if nobody waits any more

    async def task_types(self) -> tuple[TaskType, ...]:
        """What the connector says it serves, by name."""
        request = pb.ListAgentsRequest()
        answer = await self._ask(self._about.ListAgents, request, self._settings.get_timeout)
        found = {
            TaskType(name=kind.name, version=kind.version, is_sync=agent.is_sync)
            for agent in answer.agents
            for kind in (
                agent.supported_task_categories
                or (pb.TaskCategory(name=name) for name in agent.supported_task_types)
            )
        }
        self._known = tuple(sorted(found))
        return self._known

    async def explained(
        self, error: RemoteError, job: ConnectorJob[Any], *, is_sync: bool
    ) -> RemoteError:
        """A refused task in better words, where discovery has them; it is asked only now, so that no create waits.

        A connector that only calls answers INTERNAL to a create, and the other way round: that it made nothing is
        believed if its list, read now, says so.
        """
        if error.code not in ("NOT_FOUND", "INTERNAL"):
            return error
        try:
            await self.task_types()
        except RemoteError:
            if error.code == "INTERNAL":
                return error  # what was known before proves nothing
        modes = {
            kind.is_sync
            for kind in self._known
            if (kind.name, kind.version) == (job.task_type, job.task_type_version)
        }
        if modes == {not is_sync}:
            how = "run_connector_job" if is_sync else "run_connector_call"
            told = f"the connector runs {job.task_type} by {how}"
        elif error.code == "NOT_FOUND":
            served = ", ".join(map(str, self._known)) or "nothing that could be read"
            told = (
                f"the connector at {self._address} does not serve task type {job.task_type} "
                f"of version {job.task_type_version}; it serves: {served}"
            )
        else:
            return error
        return RemoteUserError(f"{told} ({error.message})", code=error.code)

    async def aclose(self) -> None:
        self._line.close()
        await self._channel.close()

    async def _connected(self, limit: timedelta) -> timedelta:
        """Wait for a connection; returns what is left of the limit.

        Without this, UNAVAILABLE would not tell whether a create was sent.
        """
        began = time.monotonic()
        try:
            async with asyncio.timeout(min(CONNECT_SECONDS, limit.total_seconds() / 2)):
                await self._channel.channel_ready()
        except TimeoutError:
            raise RemoteSystemError(
                f"no connection to the connector at {self._address}: nothing was sent",
                code="UNAVAILABLE",
                job_may_exist=False,
            ) from None
        return limit - timedelta(seconds=time.monotonic() - began)

    async def _ask(self, method: Any, request: Any, limit: timedelta) -> Any:
        try:
            return await method(request, timeout=_seconds(limit), metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise _error_of(error) from error


def _channel(stack: Any, block: FlyteConnector) -> Any:
    """Of either of grpc's stacks, which have the same functions."""
    if not block.tls:
        return stack.insecure_channel(block.address, options=_OPTIONS)
    roots = block.root_certificates
    trust = grpc.ssl_channel_credentials(roots.encode() if roots else None)
    return stack.secure_channel(block.address, trust, options=_OPTIONS)


def _merged(answers: Iterable[pb.ExecuteTaskSyncResponse], most: int) -> pb.Resource:
    """What all messages say, counted while they come: `most` bytes of JSON are at most eight times as many here.

    Raises:
        RemoteUserError: the result is too large, and who knows whether it ends.
    """
    resource, size = pb.Resource(), 0
    for answer in answers:
        size += answer.ByteSize()
        if 0 <= most < size // 8 - ENVELOPE:
            raise RemoteUserError(
                f"the result has more bytes than max_dataset_size_bytes, {most}",
                code="OutputSizeExceeded",
            )
        resource.MergeFrom(answer.header.resource)
        resource.outputs.MergeFrom(answer.outputs)
    return resource


def _seconds(limit: timedelta) -> float:
    """A little less than the engine's own, so that the answer is DEADLINE_EXCEEDED.

    grpc.aio turns a cancellation into one of its own, from which nobody can tell that time was up.
    """
    return 0.95 * limit.total_seconds()


def _error_of(error: Any) -> RemoteError:
    """What a gRPC status means. flytekit's servers say INTERNAL whatever went wrong, so it proves nothing."""
    code: grpc.StatusCode = error.code()
    details: str = error.details() or ""
    # flytekit sends a traceback, and at its end the message
    told = f"{code.name}: {details.rpartition('Message:')[2].strip()}"
    match code:
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in details:
            return RemoteUserError(
                f"{told}: the connector takes no message of that size", code=code.name
            )
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Throttled(told, retry_after=_retry_after(error), code=code.name)
        case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
            return AuthError(told, code=code.name)
        case (
            grpc.StatusCode.INVALID_ARGUMENT
            | grpc.StatusCode.FAILED_PRECONDITION
            | grpc.StatusCode.OUT_OF_RANGE
            | grpc.StatusCode.UNIMPLEMENTED
            | grpc.StatusCode.NOT_FOUND  # no such task type; never: no such job
        ):
            return RemoteUserError(told, code=code.name)
        case _:
            return OutcomeUnknown(told, code=code.name)


def _retry_after(error: Any) -> timedelta | None:
    """From the trailer in which gRPC's servers put the details of a status."""
    for name, value in error.trailing_metadata() or ():
        if name == "grpc-status-details-bin" and isinstance(value, bytes):
            with suppress(DecodeError):  # it throttles, whatever it adds
                for detail in Status.FromString(value).details:
                    info = RetryInfo()
                    if detail.Unpack(info):
                        return info.retry_delay.ToTimedelta()
    return None
