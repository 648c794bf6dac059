"""Flyte connectors: against flytekit's own server, with a proxy in between that counts, cuts and refuses."""

from __future__ import annotations

import asyncio
import base64
import re
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, cast

import flyteidl.admin.agent_pb2 as pb
import flyteidl.core.literals_pb2 as literals
import grpc
import pytest
from cryptography.fernet import Fernet
from flyteidl.core.execution_pb2 import TaskExecution, TaskLog
from google.protobuf.json_format import MessageToDict
from hypothesis import given, settings
from hypothesis import strategies as st
from prefect.blocks.core import Block
from pydantic import BaseModel, SecretStr, ValidationError

from prefect_webapi import (
    CachingConfig,
    ConfigurationError,
    EngineSettings,
    HandleNotStorable,
    Phase,
    PhaseInfo,
    PluginConfig,
    RemoteError,
    RemoteSystemError,
)
from prefect_webapi.contract.plugin import PluginEntry
from prefect_webapi.engine.contexts import DeleteView, GetView, StatusView
from prefect_webapi.engine.host import Host
from prefect_webapi.engine.request import Outcome as Ended
from prefect_webapi_flyte import (
    ConnectorJob,
    Container,
    FlyteConnector,
    Sql,
    StructuredDataset,
    call_entry,
    entry,
    task_types,
)
from prefect_webapi_flyte.literals import literal_map, python_of
from prefect_webapi_flyte.models import ConnectorHandle, TaskType
from prefect_webapi_flyte.plugin import ConnectorPlugin
from tests.plugins.suite import (
    CANARY,
    MESSAGE,
    WITHIN,
    BlockSuite,
    Op,
    Outcome,
    PluginSuite,
    Service,
    contents,
)
from tests.servers.base import Fault, Reply
from tests.servers.flyte_connector import NONSENSE, FlyteConnectorServer, refusal
from tests.support.engine import QUICK, Told, engine, request
from tests.support.waiting import eventually
from tests.support.wire import free_port, garbled
from tests.support.witness import records

REPOSITORY = Path(__file__).parents[2]
KEY = f"{CANARY}{'A' * (43 - len(CANARY))}="
"""Fernet takes any 32 bytes."""
Flyte, Code = TaskExecution, grpc.StatusCode


@pytest.fixture(scope="module")
def connector() -> Iterator[FlyteConnectorServer]:
    """One for all: flytekit takes seconds to import."""
    with FlyteConnectorServer(token=CANARY) as server:
        yield server


@pytest.fixture
def server(connector: FlyteConnectorServer) -> Iterator[FlyteConnectorServer]:
    connector.reset()
    yield connector
    connector.reset()


def block_of(server: FlyteConnectorServer, **fields: Any) -> FlyteConnector:
    given: dict[str, Any] = {
        "token": SecretStr(CANARY),
        "handle_key": SecretStr(KEY),
        "tls": False,
        **fields,
    }
    return FlyteConnector(address=server.url, **given)


def sleeper(outputs: dict[str, str] | None = None, **custom: Any) -> ConnectorJob[Any]:
    return ConnectorJob(task_type="sleeper", custom=custom, outputs=outputs or {})


@contextmanager
def host(
    folder: Path,
    block: FlyteConnector,
    plugin: PluginEntry[Any] = entry,
    speed: float = 1.0,
    **times: Any,
) -> Generator[Host]:
    block = block.model_copy(
        update={
            "settings": EngineSettings.load(
                {**QUICK, "deadline": "60s", **times}, base=block.settings
            ),
            "engine": PluginConfig(caching=CachingConfig(resync_interval=timedelta(seconds=5))),
        }
    )
    with engine(folder, [plugin], {"default": block}, speed=speed) as running:
        yield running


def asked(
    running: Host, spec: ConnectorJob[Any], plugin: PluginEntry[Any] = entry, **call: Any
) -> Any:
    return running.admit(request(spec, task_type=plugin.supported_task_types[0], **call))


async def outcome(
    running: Host, spec: ConnectorJob[Any], plugin: PluginEntry[Any] = entry, **call: Any
) -> Ended:
    async with asyncio.timeout(WITHIN):
        return await asked(running, spec, plugin, **call).outcome()


def code_of(ended: Ended) -> str:
    assert ended.info.err is not None
    return ended.info.err.code


def told_by(ended: Ended) -> str:
    assert ended.info.err is not None
    return ended.info.err.message


class TestFlyteConnectorBlock(BlockSuite):
    @pytest.fixture
    def block(self) -> type[Block]:
        return FlyteConnector


class TestFlyteConnector(PluginSuite):
    entry = entry
    plugin_class = ConnectorPlugin
    rows = (
        (pb.Resource(), Phase.UNDEFINED, None),
        (pb.Resource(phase=Flyte.QUEUED), Phase.QUEUED, None),
        (pb.Resource(phase=Flyte.RUNNING), Phase.RUNNING, None),
        (pb.Resource(phase=Flyte.SUCCEEDED), Phase.SUCCESS, None),
        (pb.Resource(phase=Flyte.ABORTED), Phase.ABORTED, None),
        (pb.Resource(phase=Flyte.FAILED), Phase.PERMANENT_FAILURE, "user"),
        (pb.Resource(phase=Flyte.INITIALIZING), Phase.INITIALIZING, None),
        (pb.Resource(phase=Flyte.WAITING_FOR_RESOURCES), Phase.WAITING_FOR_RESOURCES, None),
        (pb.Resource(phase=Flyte.RETRYABLE_FAILED), Phase.RETRYABLE_FAILURE, "user"),
        (pb.Resource(state=pb.PENDING), Phase.INITIALIZING, None),
        (pb.Resource(state=pb.RUNNING), Phase.RUNNING, None),
        (pb.Resource(state=pb.SUCCEEDED), Phase.SUCCESS, None),
        (pb.Resource(state=pb.PERMANENT_FAILURE), Phase.PERMANENT_FAILURE, "user"),
        (
            pb.Resource(state=pb.RETRYABLE_FAILURE, message="out of memory"),
            Phase.RETRYABLE_FAILURE,
            "user",
        ),
    )
    unknown = pb.Resource(phase=cast(Any, 99))

    @pytest.fixture(scope="class")
    @classmethod
    def service(cls, connector: FlyteConnectorServer) -> Service:
        return connector

    def connection(self, service: FlyteConnectorServer, engine: Any, settings: Any) -> Any:
        engine = engine.model_copy(
            update={
                "caching": CachingConfig(
                    resync_interval=timedelta(seconds=5), max_system_failures=2
                )
            }
        )
        return block_of(service, engine=engine, settings=settings)

    def job(self, outcome: Outcome = "succeed", *, result: str = "done") -> ConnectorJob[Any]:
        match outcome:
            case "fail":
                return sleeper(fail="user", message=MESSAGE)
            case "never":
                return sleeper(seconds=600)
            case "queued":
                return sleeper(queue_s=600)
            case "succeed":
                return sleeper(seconds=0.1, result=result)

    def throttled(self, hint: float | None) -> Reply:
        return refusal(Code.RESOURCE_EXHAUSTED, "less", retry_after=hint)

    def unauthorized(self) -> Reply:
        return refusal(Code.UNAUTHENTICATED, "the token is no longer valid")

    def unknown_handle(self) -> ConnectorHandle:
        meta = Fernet(KEY).encrypt(b'{"job_id": "nobody", "auth_token": ""}')
        return ConnectorHandle(
            task_type="sleeper",
            task_type_version=0,
            output_prefix="",
            is_encrypted=True,
            opaque_meta=meta.decode(),
        )

    # --- what the wire brings ----------------------------------------------------------------

    @pytest.mark.parametrize("op", ["create", "get"])
    async def test_a_message_without_sense_makes_no_second_job_and_loses_none(
        self, service: FlyteConnectorServer, tmp_path: Path, op: Op
    ) -> None:
        """CASE-254: although its status is OK. Whether a job was made nobody knows, and no connector can be asked."""
        service.spoil(Fault(op, NONSENSE, carried_out=True))
        with self.host(tmp_path, service) as running:
            ended = await self.outcome(running, self.job(result="the figures"))
        assert service.made() == 1
        if op == "create":
            assert code_of(ended) == "CreateOutcomeUnknown"
        else:
            assert "the figures" in str(ended.value)

    @pytest.mark.parametrize("name", ["9007199254740993001", "a/b ?#%&\u00fc'"])
    async def test_what_a_connector_gave_comes_back_byte_by_byte(
        self, service: FlyteConnectorServer, plugin: ConnectorPlugin, name: str
    ) -> None:
        """CASE-256, CASE-257: whatever ids are in it, after a stay in the ledger."""
        meta = f'{{"job_id": "{name}", "auth_token": ""}}'.encode()
        handle = self.unknown_handle().model_copy(
            update={"opaque_meta": Fernet(KEY).encrypt(meta).decode()}
        )
        handle = ConnectorHandle.model_validate_json(handle.model_dump_json())
        for call in (plugin.get(GetView(handle)), plugin.delete(DeleteView(handle, "enough"))):
            with suppress(RemoteError):
                await call
        get, delete = service.seen
        assert pb.GetTaskRequest.FromString(get.body).resource_meta == meta
        assert pb.DeleteTaskRequest.FromString(delete.body).resource_meta == meta

    # --- what a resource says ----------------------------------------------------------------

    @pytest.mark.parametrize(
        ("phase", "kind", "origin", "judged"),
        [
            (Flyte.FAILED, "RECOVERABLE", "USER", (Phase.RETRYABLE_FAILURE, "user")),
            (Flyte.FAILED, "NON_RECOVERABLE", "SYSTEM", (Phase.PERMANENT_FAILURE, "system")),
            (Flyte.FAILED, "NON_RECOVERABLE", "UNKNOWN", (Phase.PERMANENT_FAILURE, "user")),
            (
                Flyte.RETRYABLE_FAILED,
                "NON_RECOVERABLE",
                "USER",
                (Phase.PERMANENT_FAILURE, "user"),
            ),
            (
                Flyte.RETRYABLE_FAILED,
                "RECOVERABLE",
                "SYSTEM",
                (Phase.RETRYABLE_FAILURE, "system"),
            ),
        ],
    )
    def test_what_the_error_says_goes_before_the_phase(
        self, plugin: Any, phase: Any, kind: str, origin: str, judged: tuple[Phase, str]
    ) -> None:
        """SPEC 6.6: code, kind and origin of `agent_error`."""
        error = pb.AgentError(code="OOMKilled", kind=kind, origin=cast(Any, origin))
        info = self.judged(plugin, pb.Resource(phase=phase, agent_error=error, message=MESSAGE))
        assert (info.phase, info.kind) == judged
        assert info.err is not None
        assert (info.err.code, info.err.message) == ("OOMKilled", MESSAGE)

    def test_an_old_state_of_zero_ends_the_job_before_another_is_made(self, plugin: Any) -> None:
        """The zero is a failure, and also what a connector says that says nothing."""
        assert self.judged(plugin, pb.Resource(message="lost")).cleanup_on_failure
        assert not self.judged(plugin, pb.Resource(phase=Flyte.FAILED)).cleanup_on_failure

    def test_links_and_details_are_shown(self, plugin: Any) -> None:
        resource = pb.Resource(
            phase=Flyte.RUNNING,
            log_links=[
                TaskLog(uri="https://x/1", name="Driver", message_format=TaskLog.JSON),
                TaskLog(uri="https://x/2", HideOnceFinished=True, message_format=cast(Any, 7)),
            ],
        )
        resource.log_links[0].ttl.FromTimedelta(timedelta(hours=1))
        resource.custom_info.update({"cluster": "c-1", "nodes": 3})
        info = self.judged(plugin, resource).info
        driver, other = info.logs
        assert (driver.name, driver.uri, driver.message_format) == ("Driver", "https://x/1", "json")
        assert driver.ttl == timedelta(hours=1)
        assert (other.name, other.message_format, other.hide_once_finished) == (
            "Log",
            "unknown",
            True,
        )
        assert info.custom_info == {"cluster": "c-1", "nodes": 3}
        (job,) = info.external_resources
        assert (job.external_id, job.phase) == ("jkey" + "0" * 22, Phase.RUNNING)

    @pytest.mark.parametrize(
        ("declared", "literal", "complaint"),
        [
            ("integer", None, "no output 'x'"),
            ("integer", literal_map({"x": "4"}), "'x' is string, declared is integer"),
            ("list[integer]", literal_map({"x": [1.5]}), r"list\[float\], declared is list"),
            (
                None,
                literals.LiteralMap(
                    literals={
                        "x": literals.Literal(
                            scalar=literals.Scalar(binary=literals.Binary(value=b"1"))
                        )
                    }
                ),
                "'x' is a literal of kind binary",
            ),
            (
                None,
                literals.LiteralMap(literals={"x": literals.Literal()}),
                "'x' is an empty literal",
            ),
        ],
    )
    def test_outputs_that_are_not_what_was_declared_are_the_users_fault(
        self, plugin: Any, declared: str | None, literal: Any, complaint: str
    ) -> None:
        spec = sleeper(outputs={"x": declared} if declared else {})
        resource = pb.Resource(phase=Flyte.SUCCEEDED, outputs=literal)
        info: PhaseInfo = plugin.status(
            StatusView(self.view(spec), self.unknown_handle(), resource)
        )
        assert info.phase is Phase.PERMANENT_FAILURE
        assert info.err is not None
        assert info.err.code == "OutputsInvalid"
        assert re.search(complaint, info.err.message)

    def test_an_empty_list_is_of_each_type(self, plugin: Any) -> None:
        spec = sleeper(outputs={"x": "list[integer]"})
        resource = pb.Resource(phase=Flyte.SUCCEEDED, outputs=literal_map({"x": []}))
        view = StatusView(self.view(spec), self.unknown_handle(), resource)
        assert plugin.status(view).phase is Phase.SUCCESS
        assert view.output_writer.value == {"x": []}


# --- statuses of gRPC ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "phase", "kind"),
    [
        (Code.INVALID_ARGUMENT, Phase.PERMANENT_FAILURE, "user"),
        (Code.FAILED_PRECONDITION, Phase.PERMANENT_FAILURE, "user"),
        (Code.OUT_OF_RANGE, Phase.PERMANENT_FAILURE, "user"),
        (Code.UNIMPLEMENTED, Phase.PERMANENT_FAILURE, "user"),
        (Code.NOT_FOUND, Phase.PERMANENT_FAILURE, "user"),
        (Code.PERMISSION_DENIED, Phase.PERMANENT_FAILURE, "user"),
    ],
)
async def test_a_create_that_is_refused_keeps_the_status(
    server: FlyteConnectorServer, tmp_path: Path, code: grpc.StatusCode, phase: Phase, kind: str
) -> None:
    """SPEC 6.6, Errors: nothing was made, so nothing is in doubt."""
    server.spoil(Fault("create", refusal(code, MESSAGE), times=2))
    with host(tmp_path, block_of(server)) as running:
        ended = await outcome(running, sleeper())
    assert (ended.info.phase, ended.info.kind, code_of(ended)) == (phase, kind, code.name)
    assert MESSAGE in told_by(ended)
    assert server.made() == 0


@pytest.mark.parametrize(
    "code",
    [
        Code.UNAVAILABLE,
        Code.DEADLINE_EXCEEDED,
        Code.ABORTED,
        Code.INTERNAL,
        Code.UNKNOWN,
        Code.ALREADY_EXISTS,
    ],
)
async def test_a_create_in_doubt_is_never_repeated(
    server: FlyteConnectorServer, tmp_path: Path, code: grpc.StatusCode
) -> None:
    """REQ-33: the job was made, and no status of these says that it was not."""
    server.spoil(Fault("create", refusal(code, MESSAGE), carried_out=True))
    with host(tmp_path, block_of(server)) as running:
        ended = await outcome(running, sleeper(seconds=600))
    assert code_of(ended) == "CreateOutcomeUnknown"
    assert code.name in told_by(ended)
    assert MESSAGE in told_by(ended)
    assert (server.made(), len(server.times("create"))) == (1, 1)


async def test_whoever_accepts_a_second_job_may_have_it(
    server: FlyteConnectorServer, tmp_path: Path
) -> None:
    """REQ-33, `on_unknown_create`."""
    server.spoil(Fault("create", refusal(Code.INTERNAL, MESSAGE), carried_out=True))
    with host(tmp_path, block_of(server), onUnknownCreate="retry") as running:
        ended = await outcome(running, sleeper())
    assert ended.info.phase is Phase.SUCCESS
    assert server.made() == 2


async def test_a_connectors_exception_is_told_without_its_traceback(
    server: FlyteConnectorServer, tmp_path: Path
) -> None:
    with host(tmp_path, block_of(server)) as running:
        ended = await outcome(running, sleeper(create_error=MESSAGE))
    assert f"INTERNAL: RuntimeError: {MESSAGE}" in told_by(ended)
    assert "Traceback" not in told_by(ended)


async def test_a_message_that_is_too_large_for_the_connector_is_the_users_fault(
    server: FlyteConnectorServer, tmp_path: Path
) -> None:
    """RESOURCE_EXHAUSTED too, but no throttle: it would be repeated until the deadline."""
    with host(tmp_path, block_of(server)) as running:
        ended = await outcome(running, sleeper(payload="x" * 5_000_000))
    assert (code_of(ended), ended.info.kind) == ("RESOURCE_EXHAUSTED", "user")
    assert len(server.times("create")) == 1


async def test_each_call_has_a_deadline(server: FlyteConnectorServer, tmp_path: Path) -> None:
    """REQ-71: the connector is told when nobody waits any more."""
    times: dict[str, Any] = {"createTimeout": "40s", "getTimeout": "20s", "deleteTimeout": "10s"}
    with host(tmp_path, block_of(server), **times) as running:
        ticket = asked(running, sleeper(seconds=600), reporter=(told := Told()))
        await eventually(lambda: "RUNNING" in told.names, within=WITHIN)
        ticket.cancel("seen")
        await ticket.outcome()
    for op, most in {"create": 40, "get": 20, "delete": 10}.items():
        assert most - 10 < float(server.calls(op)[0].headers["deadline"]) <= most


async def test_a_create_that_takes_too_long_is_in_doubt(
    server: FlyteConnectorServer, tmp_path: Path
) -> None:
    with host(tmp_path, block_of(server), createTimeout="1s") as running:
        ended = await outcome(running, sleeper(seconds=600, create_delay_s=5))
    assert code_of(ended) == "CreateOutcomeUnknown"
    assert (server.made(), len(server.times("create"))) == (1, 1)


async def test_a_type_that_the_connector_lost_is_no_job_that_is_gone(
    server: FlyteConnectorServer, tmp_path: Path
) -> None:
    """NOT_FOUND speaks of the task type: believed of the job, it would bring a second one."""
    with host(tmp_path, block_of(server), speed=10, visibilityDelay="0s") as running:
        ticket = asked(running, sleeper(seconds=2), reporter=(told := Told()))
        await eventually(lambda: "RUNNING" in told.names, within=WITHIN)
        server.spoil(Fault("get", refusal(Code.NOT_FOUND, "no such type"), times=3))
        ended = await ticket.outcome()
    assert ended.info.phase is Phase.SUCCESS, ended.info


async def test_after_a_delete_that_fails_the_reads_decide(
    server: FlyteConnectorServer, tmp_path: Path
) -> None:
    """SPEC 6.6: flytekit says INTERNAL for anything, also for a job that has ended."""
    with host(tmp_path, block_of(server)) as running:
        spec = sleeper(seconds=2, delete_error=True)
        ticket = asked(running, spec, reporter=(told := Told()))
        await eventually(lambda: "RUNNING" in told.names, within=WITHIN)
        ticket.cancel("no longer needed")
        ended = await ticket.outcome()
        assert ended.info.phase is Phase.ABORTED
        await eventually(lambda: server.live() == 0, within=WITHIN)
    assert len(server.times("delete")) > 1


# --- handles ---------------------------------------------------------------------------------


def test_without_a_key_the_plugin_does_not_start(server: FlyteConnectorServer) -> None:
    """SPEC 7.5."""
    with pytest.raises(HandleNotStorable, match="handle_key"):
        ConnectorPlugin(block_of(server, handle_key=None))


def test_what_is_no_key_is_refused(server: FlyteConnectorServer) -> None:
    with pytest.raises(ConfigurationError, match="generate_key") as refused:
        ConnectorPlugin(block_of(server, handle_key=SecretStr(f"{KEY},hunter2-hunter2")))
    assert "hunter2" not in str(refused.value)


async def test_the_connectors_token_is_not_in_the_ledger(
    server: FlyteConnectorServer, tmp_path: Path
) -> None:
    """REQ-62: the handle is the connector's own, and flytekit's connectors put tokens into it."""
    with host(tmp_path, block_of(server)) as running:
        ended = await outcome(running, sleeper())
    assert ended.info.phase is Phase.SUCCESS, ended.info
    (job,) = server.jobs()
    assert not [text[:99] for text in contents(tmp_path) if job["token"] in text]
    (record,) = await records(tmp_path)
    assert record.handle is not None
    handle = ConnectorHandle.model_validate_json(record.handle)
    assert job["token"].encode() in Fernet(KEY).decrypt(handle.opaque_meta)


async def test_whoever_has_no_secrets_in_handles_may_do_without_a_key(
    server: FlyteConnectorServer, tmp_path: Path
) -> None:
    allowed = EngineSettings(allow_plain_handle=True)
    with host(tmp_path, block_of(server, handle_key=None, settings=allowed)) as running:
        ended = await outcome(running, sleeper())
    assert ended.info.phase is Phase.SUCCESS, ended.info
    (record,) = await records(tmp_path)
    assert record.handle is not None
    handle = ConnectorHandle.model_validate_json(record.handle)
    assert server.jobs()[0]["token"].encode() in base64.b64decode(handle.opaque_meta)


async def test_a_new_key_reads_with_the_old_one_beside_it(
    server: FlyteConnectorServer, tmp_path: Path
) -> None:
    """REQ-63: keys are changed while jobs live."""
    new = Fernet.generate_key().decode()
    with host(tmp_path, block_of(server)) as running:
        asked(running, sleeper(seconds=600), execution="one")
        await eventually(lambda: server.times("get"), within=WITHIN)
    (record,) = await records(tmp_path)
    assert record.handle is not None
    view = GetView(ConnectorHandle.model_validate_json(record.handle))
    both = ConnectorPlugin(block_of(server, handle_key=SecretStr(f"{new}, {KEY}")))
    assert (await both.get(view)).phase == Flyte.RUNNING
    await both.aclose()
    alone = ConnectorPlugin(block_of(server, handle_key=SecretStr(new)))
    with pytest.raises(RemoteSystemError, match="handle_key"):
        await alone.get(view)
    await alone.aclose()


# --- discovery -------------------------------------------------------------------------------


async def test_the_connectors_task_types_are_discovered(server: FlyteConnectorServer) -> None:
    assert await task_types(block_of(server)) == (
        TaskType("adder", 0, True),
        TaskType("echo", 0, True),
        TaskType("sensor", 0, False),  # flytekit's own
        TaskType("sleeper", 0, False),
    )


async def test_an_unknown_task_type_is_told_beside_the_known_ones(
    server: FlyteConnectorServer, tmp_path: Path
) -> None:
    """They don't vanish when one discovery fails; and no create waits for any."""
    with host(tmp_path, block_of(server)) as running:
        for nth in range(2):
            spec = ConnectorJob[Any](task_type="sleeper", task_type_version=nth + 1)
            ended = await outcome(running, spec, nth=nth, task_run=str(nth))
            assert (code_of(ended), ended.info.kind) == ("NOT_FOUND", "user")
            assert "it serves: adder (calls), echo (calls), sensor, sleeper" in told_by(ended)
            server.spoil(Fault("discover", refusal(Code.UNAVAILABLE, "not now")))
    assert server.ops() == ["create", "discover", "create", "discover"]


@pytest.mark.parametrize(
    ("plugin", "task_type", "advice"),
    [(entry, "adder", "run_connector_call"), (call_entry, "sleeper", "run_connector_job")],
)
async def test_a_task_type_of_the_other_sort_is_told(
    server: FlyteConnectorServer,
    tmp_path: Path,
    plugin: PluginEntry[Any],
    task_type: str,
    advice: str,
) -> None:
    """The connector says INTERNAL, which alone would leave the outcome in doubt."""
    with host(tmp_path, block_of(server), plugin) as running:
        ended = await outcome(running, ConnectorJob(task_type=task_type), plugin)
    assert ended.info.phase is Phase.PERMANENT_FAILURE
    assert ended.info.kind == "user"
    assert advice in told_by(ended)


async def test_what_was_once_discovered_proves_nothing_of_a_create_in_doubt(
    server: FlyteConnectorServer, tmp_path: Path
) -> None:
    server.spoil(Fault("discover", refusal(Code.UNAVAILABLE, "not now")))
    with host(tmp_path, block_of(server)) as running:
        ended = await outcome(running, ConnectorJob(task_type="adder"))
    assert code_of(ended) == "CreateOutcomeUnknown"


# --- what is sent ----------------------------------------------------------------------------


async def test_a_job_carries_its_key_and_all_that_was_asked_for(
    server: FlyteConnectorServer, tmp_path: Path
) -> None:
    """REQ-67: the key in name, label, annotation and environment."""
    spec = ConnectorJob[Any](
        task_type="sleeper",
        custom={"seconds": 0.1, "deep": {"list": [1, None, "x"]}},
        config={"warehouse": "wh"},
        target=Sql(statement="select 1", dialect="ANSI"),
        inputs={"n": 3, "tables": [StructuredDataset(uri="s3://b/t", format="parquet")]},
        outputs={"result": "string", "slept": "float"},
    )
    labels = {"team": "data", "odd name!": "and odd value", "flow_run_id": "f1"}
    block = block_of(server, output_prefix="s3://bucket/flyte/")
    with host(tmp_path, block) as running:
        ended = await outcome(running, spec, labels=labels)
    assert ended.value == {"result": "", "slept": 0.1}
    (record,) = await records(tmp_path)
    sent = pb.CreateTaskRequest.FromString(server.calls("create")[0].body)
    about, key = sent.task_execution_metadata, record.key
    assert about.task_execution_id.node_execution_id.execution_id.name == key
    assert about.environment_variables["PREFECT_WEBAPI_JOB_KEY"] == key
    assert about.labels["job_key"] == about.annotations["job_key"] == key
    assert about.labels["team"] == "data"
    assert "odd name!" not in about.labels
    assert about.annotations["odd name!"] == "and odd value"
    assert about.annotations["fingerprint"] == record.fingerprint
    assert server.jobs()[0]["labels"]["job_key"] == key
    assert sent.output_prefix == f"s3://bucket/flyte/{key}"
    template = sent.template
    assert MessageToDict(template.custom) == spec.custom
    assert dict(template.config) == {"warehouse": "wh"}
    assert (template.sql.statement, template.sql.dialect) == ("select 1", template.sql.ANSI)
    inputs = MessageToDict(template.interface.inputs)["variables"]
    assert inputs["n"]["type"] == {"simple": "INTEGER"}
    assert "structuredDatasetType" in inputs["tables"]["type"]["collectionType"]
    read = pb.GetTaskRequest.FromString(server.calls("get")[0].body)
    assert (read.task_type, read.task_category.name) == ("sleeper", "sleeper")
    assert read.output_prefix == sent.output_prefix


async def test_a_job_may_bring_a_container(server: FlyteConnectorServer, tmp_path: Path) -> None:
    container = Container(image="img:1", command=("run",), args=("a", "b"), env={"A": "1"})
    with host(tmp_path, block_of(server)) as running:
        await outcome(running, ConnectorJob[Any](task_type="sleeper", target=container))
    sent = pb.CreateTaskRequest.FromString(server.calls("create")[0].body).template.container
    assert (sent.image, list(sent.command), list(sent.args)) == ("img:1", ["run"], ["a", "b"])
    assert [(each.key, each.value) for each in sent.env] == [("A", "1")]


class Nap(BaseModel):
    result: str
    slept: timedelta


async def test_a_model_of_ones_own_is_made_of_the_outputs(
    server: FlyteConnectorServer, tmp_path: Path
) -> None:
    with host(tmp_path, block_of(server)) as running:
        spec = ConnectorJob[Nap](task_type="sleeper", custom={"seconds": 0.1, "result": "rested"})
        ended = await outcome(running, spec)
    assert ended.value == Nap(result="rested", slept=timedelta(seconds=0.1))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"inputs": {"x": b"bytes"}}, "input 'x': bytes has no Flyte literal"),
        ({"inputs": {"x": {1: 2}}}, "input 'x': dict has no Flyte literal"),
        ({"inputs": {"x": [1, "a"]}}, r"different types \(integer, string\)"),
        ({"inputs": {"x": 2**63}}, "64 bits"),
        ({"inputs": {"x": datetime(2031, 1, 1)}}, "no time zone"),  # noqa: DTZ001 - that is the point
        ({"outputs": {"x": "list[int]"}}, r"'list\[int\]' is no type"),
        ({"custom": {"a": [{"b": 2**53 + 1}]}}, "give it as text"),
        ({"custom": {"a": {1, 2}}}, "custom"),
        ({"task_type": ""}, "task_type"),
        ({"sqll": "select 1"}, "sqll"),
    ],
)
def test_what_can_not_be_sent_is_refused_before_anything_is(
    fields: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValidationError, match=complaint):
        ConnectorJob[Any].model_validate({"task_type": "sleeper", **fields})


@pytest.mark.parametrize("address", ["http://host:80", "host", "host:x", "", "dns://host:80"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValidationError, match="host:port"):
        FlyteConnector(address=address)


async def test_a_token_in_the_clear_is_refused_beyond_this_machine() -> None:
    """CASE-258: unless the block allows it."""
    key, token = SecretStr(KEY), SecretStr(CANARY)
    given: dict[str, Any] = {"address": "far.example.com:80", "handle_key": key}
    with pytest.raises(ConfigurationError, match="allow_insecure"):
        ConnectorPlugin(FlyteConnector(**given, tls=False, token=token))
    allowed = EngineSettings(allow_insecure=True)
    good: list[dict[str, Any]] = [
        {"tls": False},
        {"tls": True, "token": token},
        {"tls": False, "token": token, "settings": allowed},
    ]
    for fields in good:
        await ConnectorPlugin(FlyteConnector(**given, **fields)).aclose()


async def test_a_connector_over_tls_is_believed_only_if_it_is_trusted(
    server: FlyteConnectorServer,
) -> None:
    """And the token goes with the call."""
    block = FlyteConnector(address=server.secure_url, token=SecretStr(CANARY))
    with pytest.raises(RemoteSystemError, match="UNAVAILABLE"):
        await task_types(block)
    assert server.ops() == []
    roots = server.certificate.decode()
    assert await task_types(block.model_copy(update={"root_certificates": roots}))


@pytest.mark.parametrize("tls", [True, False])
async def test_a_connector_that_can_not_be_reached_is_asked_again(
    server: FlyteConnectorServer, tmp_path: Path, tls: bool
) -> None:
    """CASE-259, CASE-260: no handshake, or nobody there: nothing was sent, so no outcome is unknown."""
    port = free_port()
    block = block_of(server, tls=tls).model_copy(update={"address": f"127.0.0.1:{port}"})
    async with garbled(port if tls else 0) as heard:
        with host(tmp_path, block, createTimeout="600ms", maxCreateAttempts=3) as running:
            ended = await outcome(running, sleeper())
    assert ended.info.phase is Phase.RETRYABLE_FAILURE, ended.info
    assert (code_of(ended), ended.info.kind) == ("UNAVAILABLE", "system")
    assert "nothing was sent" in told_by(ended)
    assert bool(heard) == tls
    assert server.ops() == []


# --- calls -----------------------------------------------------------------------------------


def call(task_type: str = "adder", **custom: Any) -> ConnectorJob[Any]:
    return ConnectorJob(task_type=task_type, custom=custom)


@pytest.mark.parametrize("splits", [False, True])
async def test_a_call_answers_at_once(
    server: FlyteConnectorServer, tmp_path: Path, splits: bool
) -> None:
    """REQ-72, and SPEC 6.6: the outputs may be a message of their own."""
    server.splits = splits
    with host(tmp_path, block_of(server), call_entry) as running:
        ended = await outcome(running, call(a=1, b=2), call_entry)
    assert ended.value == {"sum": 3}
    assert server.ops() == ["do"]


async def test_a_call_that_fails_says_the_connectors_own_words(
    server: FlyteConnectorServer, tmp_path: Path
) -> None:
    with host(tmp_path, block_of(server), call_entry) as running:
        ended = await outcome(running, call(fail=MESSAGE), call_entry)
    assert ended.info.phase is Phase.PERMANENT_FAILURE
    assert told_by(ended) == MESSAGE


@pytest.mark.parametrize("reply", [None, refusal(Code.INTERNAL, MESSAGE)])
async def test_a_call_whose_answer_is_lost_is_not_repeated(
    server: FlyteConnectorServer, tmp_path: Path, reply: Reply | None
) -> None:
    server.spoil(Fault("do", reply, carried_out=True))
    with host(tmp_path, block_of(server), call_entry) as running:
        ended = await outcome(running, call(a=1, b=2), call_entry)
    assert code_of(ended) == "OutcomeUnknown"
    assert len(server.times("do")) == 1


async def test_a_call_whose_answer_never_ends_is_cut_off(
    server: FlyteConnectorServer, tmp_path: Path
) -> None:
    """CASE-236: counted while it is read."""
    server.is_endless = True
    with host(tmp_path, block_of(server), call_entry, maxDatasetSizeBytes=1000) as running:
        ended = await outcome(running, call(a=1, b=2), call_entry)
    assert (code_of(ended), ended.info.kind) == ("OutputSizeExceeded", "user")


async def test_a_call_that_is_cancelled_is_dropped(
    server: FlyteConnectorServer, tmp_path: Path
) -> None:
    """And the connector hears of it: the process, which waits for nobody, ends at once."""
    with host(tmp_path, block_of(server), call_entry) as running:
        ticket = asked(running, call(a=1, b=2, seconds=60), call_entry)
        await eventually(lambda: server.times("do"), within=WITHIN)
        ticket.cancel("no longer needed")
        async with asyncio.timeout(WITHIN):
            ended = await ticket.outcome()
        await eventually(lambda: server.dropped == ["do"], within=WITHIN)
    assert ended.info.phase is Phase.ABORTED


async def test_a_call_that_is_throttled_is_repeated(
    server: FlyteConnectorServer, tmp_path: Path
) -> None:
    server.spoil(Fault("do", refusal(Code.RESOURCE_EXHAUSTED, "less"), times=2))
    with host(tmp_path, block_of(server), call_entry) as running:
        ended = await outcome(running, call(a=1, b=2), call_entry)
    assert ended.value == {"sum": 3}
    assert len(server.times("do")) == 3


async def test_flytekit_reads_and_writes_the_same_values(
    server: FlyteConnectorServer, tmp_path: Path
) -> None:
    """There and back through flytekit's own idea of literals."""
    inputs = {
        "none": None,
        "yes": True,
        "big": 2**63 - 1,
        "half": 0.5,
        "text": "ünï",
        "list": [[1, 2], [3]],
        "map": {"a": {"b": "c"}},
    }
    spec = ConnectorJob[Any](task_type="echo", inputs=inputs)
    with host(tmp_path, block_of(server), call_entry) as running:
        ended = await outcome(running, spec, call_entry)
    assert ended.value == inputs


class Times(BaseModel):
    at: datetime
    took: timedelta
    table: StructuredDataset


async def test_times_and_tables_come_back_as_what_they_are(
    server: FlyteConnectorServer, tmp_path: Path
) -> None:
    zone = timezone(timedelta(hours=5, minutes=30))
    inputs: dict[str, Any] = {
        "at": datetime(2031, 5, 6, 7, 8, 9, 123456, zone),
        "took": timedelta(days=3, microseconds=7),
        "table": StructuredDataset(uri="bq://p:d.t"),
    }
    spec = ConnectorJob[Times](task_type="echo", inputs=inputs)
    with host(tmp_path, block_of(server), call_entry) as running:
        ended = await outcome(running, spec, call_entry)
    assert ended.value == Times(**inputs)


SCALARS: Any = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(),
    st.datetimes(timezones=st.just(UTC)),
    st.timedeltas(timedelta(days=-100_000), timedelta(days=100_000)),
    st.builds(StructuredDataset, uri=st.text(), format=st.text()),
)
VALUES: Any = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@settings(max_examples=50)
@given(VALUES)
def test_every_value_comes_back_from_its_literal(value: Any) -> None:
    back = python_of(literal_map({"x": value}).literals["x"])
    assert (back, type(back)) == (value, type(value))


# --- the package -----------------------------------------------------------------------------


def test_the_package_comes_without_its_library() -> None:
    """And says what to install when it is needed; REQ-52."""
    program = """
import asyncio, sys
sys.modules["grpc"] = sys.modules["flyteidl"] = None
import prefect_webapi_flyte as flyte
from prefect_webapi import ConfigurationError
class Setup:
    connection = flyte.FlyteConnector(address="localhost:1")
for entry in (flyte.entry, flyte.call_entry):
    try:
        asyncio.run(entry.plugin_loader(Setup()))
    except ConfigurationError as error:
        assert 'prefect-webapi[flyte]' in str(error), error
    else:
        raise SystemExit("loaded")
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY)
