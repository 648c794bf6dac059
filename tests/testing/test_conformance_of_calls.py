"""The contract of a `SyncPlugin`: what applies to one call is tried, what is about jobs is said to be left out."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar
from uuid import uuid4

import pytest
from pydantic import HttpUrl, SecretStr

from prefect_webapi import (
    AuthError,
    EngineSettings,
    JobSpec,
    PhaseInfo,
    PluginConfig,
    PluginEntry,
    RemoteClient,
    RemoteError,
    RemoteSystemError,
    RemoteUserError,
    TaskExecutionContext,
    Throttled,
)
from prefect_webapi.testing import EmbeddedJobServer, Reply, Service, certify
from prefect_webapi.testing.conformance.certificate import Verdict
from prefect_webapi.testing.conformance.contract import CHECKS
from prefect_webapi.testing.conformance.service import Fate
from prefect_webapi.testing.conformance.trial import Trial
from prefect_webapi_aws import StateMachineRun, StepFunctions, express_entry
from prefect_webapi_flyte import ConnectorJob, FlyteConnector, call_entry
from prefect_webapi_jobserver import JobServer, ReportJob
from tests.plugins.suite import CANARY, MESSAGE
from tests.servers.aws import REGION, refused
from tests.servers.flyte_connector import FlyteConnectorServer
from tests.servers.step_functions import EXPRESS, StepFunctionsServer
from tests.support.plugins import DoPlugin
from tests.testing.conforming import JobServerService
from tests.testing.test_conformance import told

CHECK = {check.name: check for check in CHECKS}
OF_CALLS = {check.name for check in CHECKS if check.of_calls}


class Calls(JobServerService):
    """The job server, which makes the job of a call and answers at once."""

    states = ()
    patience = 5

    def spec(self, fate: Fate) -> ReportJob | None:  # pyright: ignore[reportIncompatibleMethodOverride] - it has no jobs that run
        match fate:
            case "succeeds":
                return ReportJob(seconds=0.0, result="the figures")
            case "fails":
                return ReportJob(seconds=0.0, outcome="fail", message=self.failure)
            case _:
                return None


def entry_of(plugin: type[DoPlugin]) -> PluginEntry[JobServer]:
    return PluginEntry(
        id="calls",
        supported_task_types=["calls"],
        connection=JobServer,
        spec=ReportJob,
        plugin_loader=lambda setup: plugin(setup.connection),
    )


class Call(DoPlugin):
    """PUT with the key as the job's name: the service answers with the job that has it."""

    idempotent: ClassVar[bool] = True

    async def do(self, ctx: TaskExecutionContext) -> PhaseInfo:
        return await self.put(ctx, ctx.task_execution_metadata.generated_name)

    async def put(self, ctx: TaskExecutionContext, name: str) -> PhaseInfo:
        spec = ctx.spec(ReportJob)
        made = await self._api.put(f"/jobs/{name}", json={"spec": spec.model_dump(mode="json")})
        if spec.outcome == "fail":
            return PhaseInfo.failure("JobFailed", spec.message)
        ctx.output_writer.put({"uri": made["link"], "data": spec.result})
        return PhaseInfo.success()


class Modest(Call):
    """Keeps the key, and does not say so."""

    idempotent: ClassVar[bool] = False


@pytest.mark.chaos
def test_a_call_that_is_idempotent_keeps_all_that_applies_to_calls() -> None:
    """REQ-33: a repeated call is the same work; the checks of jobs are named as not implemented."""
    certificate = certify(entry_of(Call), Calls())
    assert certificate.conforms, told(certificate)
    assert {each.check for each in certificate.of(Verdict.HOLDS)} == OF_CALLS
    left_out = certificate.of(Verdict.NOT_IMPLEMENTED)
    assert {each.check for each in left_out} == CHECK.keys() - OF_CALLS
    assert {"a SyncPlugin makes no job" in each.told for each in left_out} == {True}
    assert "guarantee 'key'; optional methods: none" in certificate.text()


@pytest.mark.parametrize(
    ("plugin", "met", "verdict", "words"),
    [
        (Call, "the same job was met again", Verdict.HOLDS, ""),
        (DoPlugin, "ends as OutcomeUnknown", Verdict.NOT_IMPLEMENTED, "`idempotent` is False"),
        (Modest, "ends as OutcomeUnknown", Verdict.NOT_IMPLEMENTED, "it could be claimed"),
    ],
)
def test_a_call_whose_answer_is_lost_comes_to_what_the_plugin_claims(
    job_server: EmbeddedJobServer, plugin: type[DoPlugin], met: str, verdict: Verdict, words: str
) -> None:
    """CASE-215: once more where it is idempotent, else never. A claim that could be made is told."""
    checks = [replace(CHECK[name], after=()) for name in ("lost-answer", "repeated-create")]
    with Trial(entry_of(plugin), Calls(job_server), checks) as trial:
        lost, repeated = (trial.finding(check) for check in checks)
    assert lost.verdict is Verdict.HOLDS, lost.told
    assert met in lost.told
    assert repeated.verdict is verdict, repeated.told
    assert words in repeated.told
    assert ("could be claimed" in repeated.told) == (plugin is Modest)


# --- calls that do one thing wrong ----------------------------------------------------------------


class SendsNoKey(Call):
    async def do(self, ctx: TaskExecutionContext) -> PhaseInfo:
        return await self.put(ctx, str(uuid4()))


class DoesItTwice(Call):
    async def do(self, ctx: TaskExecutionContext) -> PhaseInfo:
        name = ctx.task_execution_metadata.generated_name
        await self._api.put(f"/jobs/{name}-x", json={"spec": {}})
        return await super().do(ctx)


class KeepsTheReason(Call):
    async def do(self, ctx: TaskExecutionContext) -> PhaseInfo:
        done = await super().do(ctx)
        return PhaseInfo.failure("Failed", "something went wrong") if done.err else done


class GivesNoResult(Call):
    async def do(self, ctx: TaskExecutionContext) -> PhaseInfo:
        await super().do(ctx)
        return PhaseInfo.running("soon")


class SaysThatNothingWasDone(Call):
    """Of an answer that it does not understand."""

    async def do(self, ctx: TaskExecutionContext) -> PhaseInfo:
        try:
            return await super().do(ctx)
        except RemoteSystemError as error:
            if error.code != "HTTP502":
                raise
            raise RemoteUserError(error.message) from error


class ThinksThatItMayBeDone(Call):
    async def do(self, ctx: TaskExecutionContext) -> PhaseInfo:
        try:
            return await super().do(ctx)
        except RemoteError as error:
            if error.job_may_exist or not isinstance(error, RemoteSystemError):
                raise
            raise RemoteSystemError(error.message, job_may_exist=True) from error


class KeepsTheHint(Call):
    async def do(self, ctx: TaskExecutionContext) -> PhaseInfo:
        try:
            return await super().do(ctx)
        except Throttled:
            raise Throttled("less, please") from None


class TakesARefusalForTheUsersFault(Call):
    async def do(self, ctx: TaskExecutionContext) -> PhaseInfo:
        try:
            return await super().do(ctx)
        except AuthError as error:
            raise RemoteUserError(error.message) from error


class GoesInTheClear(Call):
    def __init__(self, connection: JobServer) -> None:
        self._connection = connection
        self._api = RemoteClient(
            str(connection.base_url), token=connection.token, allow_insecure=True
        )


BROKEN = (
    (GivesNoResult, "result", "let `do` tell SUCCESS"),
    (DoesItTwice, "one-create", "was asked to do 1 times for one task"),
    (KeepsTheReason, "failure", "told 'something went wrong'"),
    (SendsNoKey, "repeated-create", "leave `idempotent` at False"),
    (SaysThatNothingWasDone, "nonsense-answer", "though it claims 'key'"),
    (ThinksThatItMayBeDone, "refused-connection", "job_may_exist=False"),
    (KeepsTheHint, "throttle-create", "asked to wait 1 s"),
    (TakesARefusalForTheUsersFault, "auth-refresh", "raise `AuthError`"),
    (GoesInTheClear, "cleartext", "ready to send its credentials"),
)


@pytest.mark.parametrize(
    ("plugin", "check", "words"), BROKEN, ids=[each[0].__name__ for each in BROKEN]
)
def test_a_wrong_call_fails_the_check_that_is_meant_for_it(
    job_server: EmbeddedJobServer, plugin: type[DoPlugin], check: str, words: str
) -> None:
    meant = replace(CHECK[check], after=())
    with Trial(entry_of(plugin), Calls(job_server), [meant]) as trial:
        finding = trial.finding(meant)
    assert finding.verdict is Verdict.FAILS, finding.told
    assert words in finding.told
    assert CANARY not in finding.told


# --- the calls of the package ---------------------------------------------------------------------


class Express(Service):
    """EXPRESS state machines, which answer with the end of the execution."""

    failure = MESSAGE
    result = "done"

    def __init__(self) -> None:
        self.server = StepFunctionsServer()

    @contextmanager
    def start(self) -> Generator[str]:
        with self.server:
            yield self.server.url

    def connection(self, url: str, engine: PluginConfig, settings: EngineSettings) -> StepFunctions:
        return StepFunctions(
            region=REGION,
            access_key_id="test",
            secret_access_key=SecretStr(CANARY),
            endpoint_url=HttpUrl(url),
            engine=engine,
            settings=settings,
        )

    def spec(self, fate: Fate) -> JobSpec[Any] | None:
        given: dict[Fate, dict[str, str]] = {
            "succeeds": {"result": "done"},
            "fails": {"outcome": "fail", "error": "Boom", "message": MESSAGE},
        }
        if fate not in given:
            return None
        return StateMachineRun(state_machine_arn=EXPRESS, input=dict(given[fate]))

    def made(self) -> int:
        return self.server.made()

    def live(self) -> int:
        return self.server.live()

    def throttled(self, seconds: float | None) -> Reply:
        return as_reply(refused("ThrottlingException", "Rate exceeded"))

    def unauthorized(self) -> Reply:
        return as_reply(refused("ExpiredTokenException", "The security token is expired"))


def as_reply(reply: Any) -> Reply:
    return Reply(reply.status, reply.content, reply.headers)


class FlyteCalls(Service):
    """A connector's `ExecuteTaskSync`, over gRPC."""

    failure = MESSAGE
    speaks_http = False
    result: Any = MappingProxyType({"sum": 3})

    def __init__(self) -> None:
        self.server = FlyteConnectorServer(token=CANARY)

    @contextmanager
    def start(self) -> Generator[str]:
        with self.server:
            yield self.server.url

    def connection(self, url: str, engine: PluginConfig, settings: EngineSettings) -> Any:
        return FlyteConnector(
            address=url, token=SecretStr(CANARY), tls=False, engine=engine, settings=settings
        )

    def spec(self, fate: Fate) -> JobSpec[Any] | None:
        match fate:
            case "succeeds":
                return ConnectorJob(task_type="adder", custom={"a": 1, "b": 2})
            case "fails":
                return ConnectorJob(task_type="adder", custom={"fail": MESSAGE})
            case _:
                return None

    def made(self) -> int:
        return len(self.server.calls("do"))

    def live(self) -> int:
        return 0


OURS: dict[str, tuple[PluginEntry[Any], Callable[[], Service], set[str]]] = {
    "step-functions-express": (express_entry, Express, {"repeated-create"}),
    "flyte-connector-call": (
        call_entry,
        FlyteCalls,
        {"repeated-create"} | {check.name for check in CHECKS if check.on_the_wire},
    ),
}


@pytest.mark.chaos
@pytest.mark.parametrize("name", OURS)
def test_the_calls_of_the_package_keep_the_contract(name: str) -> None:
    entry, service, left_out = OURS[name]
    certificate = certify(entry, service())
    assert certificate.conforms, told(certificate)
    assert {each.check for each in certificate.of(Verdict.HOLDS)} == OF_CALLS - left_out
    assert certificate.subject.guarantee == "at-most-once"


def test_which_checks_are_of_calls_is_not_left_to_chance() -> None:
    assert sorted(OF_CALLS) == sorted(
        {
            "result",
            "one-create",
            "failure",
            "repeated-create",
            "lost-answer",
            "nonsense-answer",
            "lost-request",
            "refused-connection",
            "throttle-create",
            "auth-refresh",
            "auth-refused",
            "redirect",
            "cleartext",
            "secrets",
        }
    )
