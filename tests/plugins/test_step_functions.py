"""AWS Step Functions: what every plugin must do, and the names, inputs, stops and types of executions."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import HttpUrl, SecretStr, ValidationError

from prefect_webapi import (
    AuthError,
    EngineSettings,
    NotFound,
    Phase,
    PluginConfig,
    RemoteClient,
    RemoteUserError,
)
from prefect_webapi.engine.contexts import DeleteView, GetView
from prefect_webapi.engine.host import Host
from prefect_webapi.engine.request import Outcome as Ended
from prefect_webapi_aws import StateMachineRun, StepFunctions, express_entry, step_functions_entry
from prefect_webapi_aws.sigv4 import AwsJson, Signer
from prefect_webapi_aws.step_functions import Execution, ExecutionHandle, StepFunctionsPlugin
from tests.plugins.suite import CANARY, MESSAGE, Outcome, OverHttp, Service
from tests.servers.aws import REGION, refused
from tests.servers.base import Fault, Reply
from tests.servers.step_functions import EXPRESS, MACHINE, StepFunctionsServer
from tests.support.engine import QUICK, Told, engine, run


@pytest.fixture(scope="module")
def server() -> Iterator[StepFunctionsServer]:
    with StepFunctionsServer() as server:
        yield server


def run_of(**given: Any) -> StateMachineRun:
    return StateMachineRun(state_machine_arn=MACHINE, input=given)


class TestStepFunctions(OverHttp):
    entry = step_functions_entry
    plugin_class = StepFunctionsPlugin
    rows = (
        (Execution(status="RUNNING"), Phase.RUNNING, None),
        (Execution(status="PENDING_REDRIVE"), Phase.RUNNING, None),
        (Execution(status="SUCCEEDED", output="{}"), Phase.SUCCESS, None),
        (Execution(status="SUCCEEDED"), Phase.SUCCESS, None),
        (Execution(status="FAILED"), Phase.RETRYABLE_FAILURE, "user"),
        (Execution(status="FAILED", error="Boom"), Phase.RETRYABLE_FAILURE, "user"),
        (Execution(status="FAILED", error="States.Runtime"), Phase.PERMANENT_FAILURE, "user"),
        (Execution(status="FAILED", error="States.Permissions"), Phase.PERMANENT_FAILURE, "user"),
        (
            Execution(status="FAILED", error="States.DataLimitExceeded"),
            Phase.PERMANENT_FAILURE,
            "user",
        ),
        (Execution(status="TIMED_OUT"), Phase.PERMANENT_FAILURE, "user"),
        (Execution(status="ABORTED"), Phase.ABORTED, None),
    )
    unknown = Execution(status="PONDERING")
    hints = False

    @pytest.fixture(scope="class")
    @classmethod
    def service(cls, server: StepFunctionsServer) -> StepFunctionsServer:
        return server

    def connection(
        self, service: StepFunctionsServer, engine: PluginConfig, settings: EngineSettings
    ) -> StepFunctions:
        return StepFunctions(
            region=REGION,
            access_key_id="test",
            secret_access_key=SecretStr(CANARY),
            session_token=SecretStr(CANARY),
            endpoint_url=HttpUrl(service.url),
            engine=engine,
            settings=settings,
        )

    def job(self, outcome: Outcome = "succeed", *, result: str = "done") -> StateMachineRun:
        match outcome:
            case "fail":
                return run_of(outcome="fail", error="Boom", message=MESSAGE)
            case "succeed":
                return run_of(result=result)
            case "never" | "queued":
                return run_of(outcome="never")

    def throttled(self, hint: float | None) -> Reply:
        return refused("ThrottlingException", "Rate exceeded")

    def unauthorized(self) -> Reply:
        return refused("ExpiredTokenException", "The security token included is expired")

    def unknown_handle(self) -> ExecutionHandle:
        return ExecutionHandle(arn=run_of().execution_arn("nobody"))

    def handle_of(self, name: str) -> ExecutionHandle:
        return ExecutionHandle(arn=run_of().execution_arn(name))

    @pytest.mark.parametrize("phase", ["never"])
    async def test_a_cancelled_job_is_over_at_the_service(
        self, service: Service, tmp_path: Path, phase: Literal["queued", "never"]
    ) -> None:
        """Executions are never queued: they run as soon as they are there."""
        await super().test_a_cancelled_job_is_over_at_the_service(service, tmp_path, phase)

    # --- names and inputs --------------------------------------------------------------------

    async def test_the_key_is_the_name_and_equal_data_are_equal_bytes(
        self, service: StepFunctionsServer, plugin: StepFunctionsPlugin
    ) -> None:
        """REQ-25: Step Functions compares the input's bytes."""
        made = await plugin.create(
            self.view(run_of(outcome="never", a={"d": "ü", "c": [1.5, None]}))
        )
        again = await plugin.create(
            self.view(run_of(a={"c": [1.5, None], "d": "ü"}, outcome="never"))
        )
        assert made.resource_meta == again.resource_meta
        first, second = (call.json for call in service.calls("create"))
        assert first == second
        assert first["name"] == "jkey" + "0" * 22
        assert first["input"] == '{"a":{"c":[1.5,null],"d":"ü"},"outcome":"never"}'

    async def test_an_execution_that_is_over_is_adopted(
        self, service: StepFunctionsServer, tmp_path: Path
    ) -> None:
        """REQ-34: its name can't be started again; its input shows that it is the same job."""
        for ledger in ("one", "two"):
            outcome = await self.named(service, tmp_path, ledger, self.job(result="once"))
            assert (outcome.info.phase, outcome.value) == (Phase.SUCCESS, "once")
        assert service.made() == 1
        assert [call.status for call in service.calls("create")] == [200, 400]

    async def test_an_execution_of_another_input_is_left_alone(
        self, service: StepFunctionsServer, tmp_path: Path
    ) -> None:
        """REQ-34."""
        await self.named(service, tmp_path, "one", self.job(result="mine"))
        outcome = await self.named(service, tmp_path, "two", self.job(result="yours"))
        assert outcome.info.err is not None
        assert outcome.info.err.code == "IdempotencyConflict"
        assert service.made() == 1

    async def named(
        self, service: StepFunctionsServer, folder: Path, ledger: str, spec: StateMachineRun
    ) -> Ended:
        """The outcome of a job whose key a user has given, in a ledger that knows of no other."""
        (folder / ledger).mkdir()
        with self.host(folder / ledger, service) as host:
            return await self.outcome(host, spec, idempotency_key="nightly")

    async def test_find_looks_for_the_name_and_tells_whose_it_is(
        self, service: StepFunctionsServer, plugin: StepFunctionsPlugin
    ) -> None:
        mine = self.view(self.job("never"))
        assert await plugin.find(mine) is None
        made = await plugin.create(mine)
        found = await plugin.find(mine)
        assert found is not None
        assert found.resource_meta == made.resource_meta
        assert found.fingerprint == "f" * 64
        other = await plugin.find(self.view(run_of(outcome="never", more=1)))
        assert other is not None
        assert other.fingerprint == "0" * 64

    def test_a_version_or_alias_does_not_change_the_arn_of_the_execution(self) -> None:
        arn = "arn:aws-cn:states:cn-north-1:123456789012:stateMachine:report"
        expected = "arn:aws-cn:states:cn-north-1:123456789012:execution:report:x"
        for qualified in (arn, f"{arn}:7", f"{arn}:PROD"):
            assert StateMachineRun(state_machine_arn=qualified).execution_arn("x") == expected

    # --- ends --------------------------------------------------------------------------------

    async def test_the_reason_is_the_cause_of_a_stop(
        self, service: StepFunctionsServer, plugin: StepFunctionsPlugin
    ) -> None:
        """REQ-44, REQ-43: a second stop changes nothing."""
        handle = (await plugin.create(self.view(self.job("never")))).resource_meta
        await plugin.delete(DeleteView(handle, "deadline of 10s exceeded"))
        await plugin.delete(DeleteView(handle, "again"))
        seen = await plugin.get(GetView(handle))
        told = (seen.status, seen.error, seen.cause)
        assert told == ("ABORTED", "StoppedByPrefect", "deadline of 10s exceeded")

    async def test_what_never_was_is_not_found(self, plugin: StepFunctionsPlugin) -> None:
        """REQ-43, REQ-58: so that a delete is done, and a read is not merely a failed one."""
        with pytest.raises(NotFound):
            await plugin.get(GetView(self.unknown_handle()))
        with pytest.raises(NotFound):
            await plugin.delete(DeleteView(self.unknown_handle(), "x"))

    async def test_the_output_is_data_and_the_failure_has_the_machines_own_name(
        self, service: StepFunctionsServer, tmp_path: Path
    ) -> None:
        with self.host(tmp_path, service) as host:
            good = await self.outcome(host, run_of(result={"rows": [1, 2]}), nth=1, task_run="1")
            bad = await self.outcome(host, self.job("fail"), nth=2, task_run="2")
        assert good.value == {"rows": [1, 2]}
        assert bad.info.err is not None
        assert (bad.info.err.code, bad.info.err.message) == ("Boom", MESSAGE)

    async def test_an_express_state_machine_is_refused_after_one_start(
        self, service: StepFunctionsServer, tmp_path: Path
    ) -> None:
        """REQ-33: what can be neither read nor stopped is not pretended to be a job; nothing starts it again."""
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, StateMachineRun(state_machine_arn=EXPRESS))
        assert outcome.info.phase is Phase.PERMANENT_FAILURE
        assert outcome.info.err is not None
        assert outcome.info.err.code == "ExpressStateMachine"
        assert "Use a STANDARD one, or `run_express`" in outcome.info.err.message
        assert len(service.times("create")) == 1

    async def test_too_many_executions_are_a_reason_to_wait(
        self, service: StepFunctionsServer, tmp_path: Path
    ) -> None:
        """REQ-39: not a failure of the job."""
        told = Told()
        service.spoil(Fault("create", refused("ExecutionLimitExceeded", "1,000,000 are open")))
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, self.job(), reporter=told)
        assert outcome.info.phase is Phase.SUCCESS
        assert any("1,000,000 are open" in reason for _, reason in told.phases)

    async def test_the_page_is_that_of_the_console(
        self, service: StepFunctionsServer, plugin: StepFunctionsPlugin
    ) -> None:
        info = self.judged(plugin, Execution(status="RUNNING")).info
        assert info.logs[0].uri == (
            f"https://{REGION}.console.aws.amazon.com/states/home?region={REGION}#/v2/executions/details/"
            f"arn%3Aaws%3Astates%3A{REGION}%3A123456789012%3Aexecution%3Areport%3Anobody"
        )
        assert info.logs[0].name == f"Execution {self.unknown_handle().arn}"

    # --- signatures --------------------------------------------------------------------------

    async def test_moto_takes_our_signature_and_no_other(
        self, service: StepFunctionsServer, plugin: StepFunctionsPlugin
    ) -> None:
        """SigV4 as another implementation checks it: of a key that it gave, over what came over the wire."""
        key, secret = service.moto.new_key("states:*")
        at = plugin._connection  # pyright: ignore[reportPrivateUsage] - where the service is
        with service.moto.checking_signatures():
            for told, expected in ((secret, None), (f"{secret}x", "SignatureDoesNotMatch")):
                signs = at.model_copy(
                    update={
                        "access_key_id": key,
                        "secret_access_key": SecretStr(told),
                        "session_token": None,
                    }
                )
                other = StepFunctionsPlugin(signs)
                if expected is None:
                    await other.create(self.view(self.job("never")))
                else:
                    with pytest.raises(AuthError) as caught:
                        await other.create(self.view(self.job("never")))
                    assert caught.value.code == expected
                await other.aclose()

    @pytest.mark.parametrize(
        ("operation", "fields", "code"),
        [
            ("StartExecution", {"stateMachineArn": MACHINE, "nam": "x"}, "ValidationException"),
            ("StartExecution", {"stateMachineArn": MACHINE, "name": 5}, "ValidationException"),
            ("StartExecution", {"name": "x"}, "ValidationException"),
            (
                "StartExecution",
                {"stateMachineArn": MACHINE, "name": "x" * 81},
                "ValidationException",
            ),
            ("BeginExecution", {}, "UnknownOperationException"),
        ],
    )
    async def test_the_server_refuses_what_aws_refuses(
        self, service: StepFunctionsServer, operation: str, fields: dict[str, Any], code: str
    ) -> None:
        """By botocore's own model of the service, before moto, which is content with less, sees it."""
        block = self.connection(service, PluginConfig(), EngineSettings())
        async with aclosing(AwsJson(block, "states", "AWSStepFunctions", "1.0")) as api:
            with pytest.raises(RemoteUserError) as caught:
                await api.call(operation, **fields)
        assert caught.value.code == code
        assert service.made() == 0

    async def test_the_server_wants_signed_json(self, service: StepFunctionsServer) -> None:
        block = self.connection(service, PluginConfig(), EngineSettings())
        wanted = {
            "Content-Type": "application/x-amz-json-1.0",
            "X-Amz-Target": "AWSStepFunctions.StartExecution",
        }
        for auth, headers, status in (
            (None, wanted, 403),
            (Signer(block, "athena"), wanted, 403),
            (Signer(block, "states"), {**wanted, "Content-Type": "application/json"}, 400),
        ):
            async with aclosing(RemoteClient(service.url, auth=auth, headers=headers)) as api:
                answer = await api.request("POST", "/", json={"stateMachineArn": MACHINE})
            assert answer.status == status, answer.text

    # --- what is wrong before any request ----------------------------------------------------

    async def test_the_connection_of_another_region_is_named(
        self, service: StepFunctionsServer, tmp_path: Path
    ) -> None:
        elsewhere = MACHINE.replace(REGION, "eu-west-1")
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, StateMachineRun(state_machine_arn=elsewhere))
        assert outcome.info.phase is Phase.PERMANENT_FAILURE
        assert outcome.info.err is not None
        assert "is in eu-west-1, the connection is for us-east-1" in outcome.info.err.message
        assert service.ops() == []


# --- EXPRESS ---------------------------------------------------------------------------------


@contextmanager
def express(server: StepFunctionsServer, folder: Path) -> Generator[Host]:
    """An engine with the synchronous plugin."""
    server.reset()
    at = StepFunctions(
        region=REGION,
        access_key_id="test",
        secret_access_key=SecretStr("secret"),
        endpoint_url=HttpUrl(server.url),
        settings=EngineSettings.load(QUICK),
    )
    with engine(folder, [express_entry], {"default": at}) as host:
        yield host


async def done(host: Host, machine: str = EXPRESS, **given: Any) -> Ended:
    spec = StateMachineRun(state_machine_arn=machine, input=given)
    return await run(host, spec, "step-functions-express")


async def test_an_express_execution_answers_with_its_end(
    server: StepFunctionsServer, tmp_path: Path
) -> None:
    """REQ-72: a failure comes with HTTP 200 too."""
    with express(server, tmp_path) as host:
        good = await done(host, result={"x": "ü"})
        bad = await done(host, outcome="fail", error="Boom", message=MESSAGE)
    assert (good.info.phase, good.value) == (Phase.SUCCESS, {"x": "ü"})
    assert ":express:report-express:" in good.info.info.external_resources[0].external_id
    assert bad.info.phase is Phase.RETRYABLE_FAILURE
    assert bad.info.err is not None
    assert (bad.info.err.code, bad.info.err.message) == ("Boom", MESSAGE)


async def test_a_standard_state_machine_is_not_called(
    server: StepFunctionsServer, tmp_path: Path
) -> None:
    with express(server, tmp_path) as host:
        outcome = await done(host, MACHINE)
    assert outcome.info.phase is Phase.PERMANENT_FAILURE
    assert outcome.info.err is not None
    assert outcome.info.err.code == "StateMachineTypeNotSupported"
    assert server.made() == 0


async def test_an_express_execution_whose_answer_is_lost_is_not_repeated(
    server: StepFunctionsServer, tmp_path: Path
) -> None:
    """REQ-33: it is not idempotent."""
    with express(server, tmp_path) as host:
        server.spoil(Fault("do", None, carried_out=True))
        outcome = await done(host, result=1)
    assert outcome.info.err is not None
    assert outcome.info.err.code == "OutcomeUnknown"
    assert (server.made(), len(server.times("do"))) == (1, 1)


async def test_a_throttled_express_execution_is_repeated(
    server: StepFunctionsServer, tmp_path: Path
) -> None:
    with express(server, tmp_path) as host:
        server.spoil(Fault("do", refused("ThrottlingException", "Rate exceeded"), times=2))
        outcome = await done(host, result=1)
    assert outcome.value == 1
    assert server.made() == 1


# --- what is wrong before any request --------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"state_machine_arn": "report"}, "'report' is no ARN of a state machine. Write it like"),
        ({"state_machine_arn": MACHINE, "input": {"x": "ü" * 140_000}}, "it has 280008 bytes"),
        ({"state_machine_arn": MACHINE, "input": {"x": float("nan")}}, "not JSON compliant"),
        ({"state_machine_arn": MACHINE, "input": {"x": object()}}, "valid JSON"),
        ({"state_machine_arn": MACHINE, "inputs": {}}, "Extra inputs"),
    ],
)
def test_a_spec_that_can_not_work_is_refused(given: dict[str, Any], told: str) -> None:
    """CASE-267: field, value and remedy, before any request."""
    with pytest.raises(ValidationError, match=told):
        StateMachineRun(**given)


def test_the_spec_survives_its_way_through_json() -> None:
    spec = run_of(a=[1, 1.0, True, None, "x"])
    again = StateMachineRun.model_validate(json.loads(spec.model_dump_json()))
    assert again.input_text == spec.input_text == '{"a":[1,1.0,true,null,"x"]}'
