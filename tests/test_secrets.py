"""Secrets reach the service and nothing else: where they come from, how they change, where they never show."""

from __future__ import annotations

import asyncio
import logging
import traceback
import uuid
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle  # pyright: ignore[reportMissingTypeStubs]
import pytest
from prefect import flow
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import Artifact, TaskRun
from prefect.context import FlowRunContext
from prefect.settings import PREFECT_API_KEY, PREFECT_API_URL, temporary_settings
from prometheus_client import REGISTRY, generate_latest
from pydantic import BaseModel, SecretStr
from pydantic.types import Secret as PydanticSecret

from prefect_webapi import (
    CreateResult,
    DeleteContext,
    GetContext,
    JobFailed,
    Phase,
    PhaseInfo,
    PluginConfig,
    PluginEntry,
    ResourceRequirements,
    StatusContext,
    TaskExecutionContextReader,
    path,
    register,
    task_for,
)
from prefect_webapi.clock import Clock
from prefect_webapi.contract.errors import (
    ConfigurationError,
    HandleNotStorable,
    LedgerUnavailable,
    WebApiError,
)
from prefect_webapi.contract.secrecy import Mask, secrets_in
from prefect_webapi.ledger.sql import SqlStore
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi.testing.engine import engine as given_secrets
from prefect_webapi.testing.jobserver.faults import Op
from prefect_webapi_jobserver import JobServer, JobServerPlugin, ReportJob, run_job
from prefect_webapi_jobserver.models import JobHandle, JobView
from tests.support.engine import at, block, engine, request, run
from tests.support.jobserver import TOKEN
from tests.support.plugins import ALL, SinglePlugin, entry
from tests.support.prefect import PrefectServer, free_port, prefect_leaks
from tests.support.waiting import eventually


def canary(of: str) -> str:
    """A secret that nobody else has; what it is of is its last part, which may be shown."""
    return f"canary-{uuid.uuid4().hex}-{of}"


def with_token(
    server: EmbeddedJobServer, token: str, config: dict[str, Any] | None = None, **settings: Any
) -> JobServer:
    return block(server, config, **settings).model_copy(update={"token": SecretStr(token)})


def pickled(value: Any) -> bytes:
    data: bytes = cloudpickle.dumps(value)  # pyright: ignore[reportUnknownMemberType]
    return data


def this_flow_run() -> str:
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    return str(context.flow_run.id)


# --- the right one at the right place ----------------------------------------------------------------


async def test_the_blocks_token_is_what_the_service_gets(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-223: another one is refused, and said to be, without being shown."""
    blocks = {"good": block(job_server), "bad": with_token(job_server, canary("bad"))}
    with engine(tmp_path, ALL, blocks) as host:
        good = await run(host, ReportJob(seconds=0), connection="good")
        bad = await run(host, ReportJob(seconds=0), connection="bad")
    assert good.info.phase is Phase.SUCCESS
    assert bad.info.err is not None
    assert bad.info.err.code == "Unauthorized"
    assert "canary" not in str(bad)
    by_job = {create.name: create.status for create in job_server.log("create")}
    assert by_job == {good.job_key: 201, bad.job_key: 401}
    assert job_server.stats().created == 1


async def test_a_rotated_token_is_used_by_the_next_call(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-227, REQ-63: created with the old one, read and deleted with the new ones."""
    blocks = {"default": block(job_server)}
    with engine(tmp_path, ALL, blocks) as host:
        ticket = host.admit(request(ReportJob(outcome="never"), task_type="single"))
        await eventually(lambda: job_server.log("get"), within=5)
        for_reads, for_writes = canary("reads"), canary("writes")
        blocks["default"] = with_token(job_server, for_reads)
        job_server.behave(token=for_reads)
        seen = len(job_server.log())

        def reads() -> list[int | None]:
            return [get.status for get in job_server.log("get", since=seen)]

        await eventually(lambda: 401 in reads() and reads()[-1] == 200, within=15)
        refused = reads().count(401)
        blocks["default"] = with_token(job_server, for_writes)
        job_server.behave(token=for_writes)
        ticket.cancel("enough")
        outcome = await ticket.outcome()
    assert outcome.info.phase is Phase.ABORTED
    assert refused == 1
    assert [delete.status for delete in job_server.log("delete")] in ([401, 202], [202])
    assert job_server.stats().created == 1
    assert job_server.stats().live == 0


async def test_two_tenants_never_meet(job_server: EmbeddedJobServer, tmp_path: Path) -> None:
    """CASE-228: each endpoint sees its own token only, and one that throttles holds up nobody else."""
    other_token = canary("other")
    with EmbeddedJobServer(token=other_token) as other:
        blocks = {"ours": block(job_server), "theirs": with_token(other, other_token)}
        job_server.fault("get", status=429, retry_after="1.5")
        with engine(tmp_path, ALL, blocks) as host:
            ours = [
                host.admit(
                    request(ReportJob(day=n, seconds=0.05), task_type="single", connection=to)
                )
                for n in range(3)
                for to in ("ours", "theirs")
            ]
            outcomes = await asyncio.gather(*(ticket.outcome() for ticket in ours))
        assert all(outcome.info.phase is Phase.SUCCESS for outcome in outcomes)
        for nth, server in enumerate([job_server, other]):
            created = {create.name for create in server.log("create")}
            assert created == {outcome.job_key for outcome in outcomes[nth::2]}
            assert 401 not in {call.status for call in server.log()}
        reads = other.log("get")
        assert reads[-1].mono - reads[0].mono < 1.0
        assert job_server.log("get")[-1].mono - job_server.log("get")[0].mono > 1.4


class TokenHandle(JobHandle):
    token: str = ""


class PasswordHandle(JobHandle):
    db_password: str = ""


class Inner(BaseModel):
    value: SecretStr = SecretStr("")


class SecretHandle(JobHandle):
    inner: Inner = Inner()


def _tempted(handle: type[JobHandle]) -> PluginEntry[JobServer]:
    class Tempted(JobServerPlugin):
        def get_config(self) -> PluginConfig:
            return self._connection.engine.model_copy(update={"resource_meta": handle})

    return entry(Tempted, "tempted")


@pytest.mark.parametrize(
    ("handle", "field"),
    [
        (TokenHandle, "TokenHandle.token"),
        (PasswordHandle, "PasswordHandle.db_password"),
        (SecretHandle, "SecretHandle.inner.value"),
    ],
)
async def test_a_handle_that_could_hold_a_secret_is_refused_before_any_request(
    job_server: EmbeddedJobServer, tmp_path: Path, handle: type[JobHandle], field: str
) -> None:
    """CASE-229."""
    tempted = at(tmp_path, job_server, entries=[_tempted(handle)])
    with tempted as host, pytest.raises(HandleNotStorable) as refused:
        await run(host, ReportJob(), "tempted")
    assert field in str(refused.value)
    assert "connection's block" in str(refused.value)
    assert not job_server.log()


# --- looking a secret up --------------------------------------------------------------------------------


class LookingPlugin(SinglePlugin):
    """Looks up the secret that `kind` names, and tells the service which one it got."""

    async def create(self, ctx: TaskExecutionContextReader) -> JobHandle:
        spec, job = ctx.spec(ReportJob), ctx.task_execution_metadata
        secret = await ctx.secret_manager.get(spec.kind)
        body = {
            "spec": spec.model_dump(mode="json"),
            "fingerprint": job.fingerprint,
            "labels": {"secret_of": secret.rpartition("-")[2]},
        }
        await self._api.put(path("jobs", job.generated_name), json=body)
        return JobHandle(name=job.generated_name)


class LookingManyPlugin(LookingPlugin):
    """Reads its jobs together."""

    max_batch = JobServerPlugin.max_batch


LOOKING = entry(LookingPlugin, "looking")


async def test_a_missing_secret_fails_the_task_for_good_before_create(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-224: retries would not help."""
    with at(tmp_path, job_server, entries=[LOOKING]) as host:
        outcome = await run(host, ReportJob(kind="JOB_TOKEN"), "looking", max_attempts=3)
    assert outcome.info.phase is Phase.PERMANENT_FAILURE
    assert outcome.info.kind == "user"
    assert outcome.info.err is not None
    assert outcome.info.err.code == "SecretNotFound"
    assert "'JOB_TOKEN'" in outcome.info.err.message
    assert "nowhere" in outcome.info.err.message
    assert not job_server.log()


look = task_for("looking", ReportJob, name="look")


@pytest.fixture
def connection() -> str:
    """Name of a block of this test's own."""
    return f"secrets-{uuid.uuid4().hex[:8]}"


@prefect_leaks
async def test_secrets_are_looked_up_in_a_secret_block_then_the_connection_then_the_environment(
    engine_here: Path,
    job_server: EmbeddedJobServer,
    connection: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CASE-224, REQ-61: nearest first; one that is nowhere is named with the places, and has no job."""
    register(LOOKING)
    variable = f"CANARY_{uuid.uuid4().hex[:8]}".upper()
    token = canary("connection")
    job_server.behave(token=token)
    await with_token(job_server, token).asave(connection)
    monkeypatch.setenv(variable, canary("environment"))
    monkeypatch.setenv("token", canary("environment"))

    @flow
    async def lookups() -> JobFailed:
        task = look.with_options(connection=connection, retries=2)
        await task(kind=variable, seconds=0, day=1)
        await task(kind="token", seconds=0, day=2)
        secret: Any = Secret(value=canary("secret"))  # pyright: ignore[reportUnknownVariableType, reportArgumentType]
        await secret.asave(variable.lower().replace("_", "-"))
        await task(kind=variable, seconds=0, day=3)
        with pytest.raises(JobFailed) as failed:
            await task(kind="no_such.secret", seconds=0)
        return failed.value

    failure = await lookups()
    assert [create.body["labels"]["secret_of"] for create in job_server.log("create")] == [
        "environment",
        "connection",
        "secret",
    ]
    assert not failure.retryable
    for place in (
        "secret 'no_such.secret' was not found",
        "Secret block 'no-such-secret'",
        "field 'no_such.secret' of the connection's block JobServer",
        "environment variable 'no_such.secret'",
    ):
        assert place in str(failure)
    assert "canary" not in str(failure)


# --- nowhere else -------------------------------------------------------------------------------------------


class CarelessPlugin(SinglePlugin):
    """An author who puts the token into the text of an exception, in the method that `kind` names.

    ``chain``: the text is tame; what led to it is not, nor is its note.
    """

    def _fail(self, method: str, kind: str) -> None:
        token = self._connection.token.get_secret_value()
        if kind == method:
            raise ValueError(f"bad token {token}")
        if kind == "chain":
            tame = RuntimeError("*** is all it says")
            tame.add_note(f"was {token}")
            raise tame from KeyError(token)

    async def create(
        self, ctx: TaskExecutionContextReader
    ) -> JobHandle | CreateResult[JobHandle, JobView]:
        self._fail("create", ctx.spec(ReportJob).kind)
        return await super().create(ctx)

    async def resource_requirements(self, ctx: TaskExecutionContextReader) -> ResourceRequirements:
        self._fail("requirements", ctx.spec(ReportJob).kind)
        return ResourceRequirements()

    async def get(self, ctx: GetContext[JobHandle]) -> Any:
        job = await super().get(ctx)
        self._fail("get", job.message)
        return job

    def status(self, ctx: StatusContext[JobHandle, Any]) -> PhaseInfo:
        self._fail("status", ctx.resource.message)
        return super().status(ctx)

    async def delete(self, ctx: DeleteContext[JobHandle]) -> None:
        self._fail("delete", "delete" if "careless" in ctx.reason else "")
        await super().delete(ctx)


CARELESS = entry(CarelessPlugin, "careless")
careless = task_for("careless", ReportJob, name="careless")


class Places:
    """Everything that outlives a run or leaves the process, to be searched for a text."""

    def __init__(self) -> None:
        self._parts: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, place: str, content: object) -> None:
        self._parts[place].append(str(content))

    def add_files(self, place: str, *roots: Path) -> None:
        for root in roots:
            for file in sorted(root.rglob("*")) if root.is_dir() else [root]:
                if file.is_file():
                    self.add(place, file.read_bytes().decode("latin-1"))

    def that_have(self, text: str) -> list[str]:
        return [place for place in self._parts if self.has(place, text)]

    def has(self, place: str, text: str) -> bool:
        return any(text in part for part in self._parts[place])


@pytest.fixture
def everything_logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG):
        yield caplog


@prefect_leaks
async def test_a_secret_shows_nowhere_after_runs_that_went_well_and_wrong(
    engine_here: Path,
    prefect_api: PrefectServer,
    job_server: EmbeddedJobServer,
    connection: str,
    everything_logged: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """CASE-225, CASE-226, REQ-62: the service echoes it, in errors and in answers, and an author tells it.

    Each place is shown to be searched; Prefect's files are its data base with events and artifacts, and its results.
    """
    register(CARELESS)
    token, rotated, password = canary("token"), canary("rotated"), canary("password")
    job_server.behave(token=token)
    no_patience = {"caching": {"maxSystemFailures": 0}, "resourceQuotas": {"default": 99}}
    first = with_token(job_server, token, no_patience, maxCreateAttempts=2)
    await first.asave(connection)
    places, told = Places(), list[str]()
    mark = f"mark-{uuid.uuid4().hex}"  # what every place shall have

    async def failing(task: Any, **spec: Any) -> None:
        try:
            await task(**spec)
        except WebApiError as failure:
            told.append(str(failure))
            places.add("traceback", "".join(traceback.format_exception(failure)))
            places.add("pickled exception", pickled(failure))
            places.add("repr", repr(failure) + repr(vars(failure)))
        else:
            raise AssertionError("it did not fail")

    @flow(persist_result=True)
    async def runs() -> tuple[str, Any]:
        good = run_job.with_options(connection=connection)
        bad = careless.with_options(connection=connection)
        report = await good(seconds=0.5, result=mark)  # long enough for its link to be shown
        await failing(good, seconds=0, outcome="fail", message=f"no figures {mark}")
        job_server.fault("create", status=500, echo_authorization=True, times=2)
        await failing(good, seconds=0, day=1)
        job_server.fault("create", status=400, echo_authorization=True)
        await failing(good, seconds=0, day=2)
        job_server.fault("create", status=403, echo_authorization=True, times=2)
        await failing(good, seconds=0, day=3)
        await failing(bad, kind="create", seconds=0, day=4)
        for nth, method in enumerate(["get", "status"]):
            await failing(bad, outcome="never", message=method, day=5 + nth)
        await failing(bad, kind="chain", day=7)
        await failing(bad, kind="requirements", day=8)
        # Answers that are fine but for what they tell.
        told_by_job = {"message": f"running as {token}", "link": f"http://x.example.com/{token}"}
        job_server.fault("get", patch=told_by_job, times=None)
        await failing(good, seconds=0.3, outcome="fail", day=9)
        job_server.clear_faults()
        job_server.fault("get", patch={"result": {"deep": [f"made with {token}"]}}, times=None)
        assert (await good(seconds=0.05, day=10)).data == {"deep": ["made with ***"]}
        job_server.clear_faults()
        job_server.fault("get", status=200, echo_authorization=True)
        await failing(good, seconds=0.05, day=11)
        inline = good.with_options(connection=first)
        inline.submit(seconds=0, day=12).result()
        cancelled = asyncio.ensure_future(good(outcome="never", day=13))
        await eventually(lambda: job_server.stats().live == 1, within=10)
        cancelled.cancel()
        await asyncio.wait([cancelled])
        return this_flow_run(), report

    address = prefect_api.api_url.replace("://", f"://ann:{password}@")
    with temporary_settings({PREFECT_API_URL: address, PREFECT_API_KEY: password}):
        flow_run, _ = await runs()
    # A live job, so that the ledger's log has not been folded into its file; and a token that has changed.
    async with asyncio.TaskGroup() as group:
        live = group.create_task(run_job.with_options(connection=connection)(outcome="never"))
        await eventually(lambda: job_server.stats().live == 1, within=10)
        second = with_token(job_server, rotated, no_patience)
        await second.asave(connection, overwrite=True)
        job_server.behave(token=rotated)
        [job] = [job for job in job_server.jobs() if job.state == "running"]
        files = [Path(f"{engine_here}{suffix}") for suffix in ("", "-wal", "-shm")]
        assert all(file.exists() for file in files)
        places.add_files("ledger", *files)
        seen = len(job_server.log())
        await eventually(
            lambda: 200 in {get.status for get in job_server.log(since=seen)}, within=15
        )
        job_server.end(job.name, "succeeded")
        await live

    places.add("metrics", generate_latest(REGISTRY).decode())
    places.add("repr", f"{first!r} {first} {run_job!r} {JobServerPlugin(first)!r}")
    await _from_prefect(places, flow_run, mark)
    places.add_files("Prefect's files", prefect_api.home)
    places.add("log", everything_logged.text)
    for record in everything_logged.records:
        places.add("log", record.__dict__)
    out, err = capfd.readouterr()
    places.add("console", out + err)

    assert places.that_have(token) == []
    assert places.that_have(rotated) == []
    assert places.that_have(password) == []
    for place in ("ledger", "states", "logs", "Prefect's files", "traceback"):
        assert place in places.that_have(mark), place
    assert places.has("ledger", job.name)
    assert places.has("metrics", 'plugin="careless"')
    assert places.has("artifacts", "/ui/jobs/")
    assert sum("***" in text for text in told) == 9
    for method in ("create", "get", "status", "resource_requirements"):
        assert any(f"{method} of plugin 'careless'" in text for text in told)
    assert "no access with" in told[1]


async def _from_prefect(places: Places, flow_run: str, mark: str) -> None:
    """What its API tells of the run, as soon as it tells all."""
    run_id = uuid.UUID(flow_run)
    async with get_client() as client:

        async def logs() -> str:
            found = await client.read_logs(
                LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run_id])), limit=200
            )
            return "\n".join(log.message for log in found)

        async def complete() -> str | None:
            text = await logs()
            return text if mark in text and "Finished in state" in text else None

        places.add("logs", await eventually(complete, within=40, every=0.2))
        places.add("flow run", (await client.read_flow_run(run_id)).model_dump_json())

        async def ended() -> list[TaskRun]:
            wanted = FlowRunFilter(id=FlowRunFilterId(any_=[run_id]))
            found = await client.read_task_runs(flow_run_filter=wanted)
            done = len(found) >= 15 and all(
                r.state is not None and r.state.is_final() for r in found
            )
            return found if done else []

        for task_run in await eventually(ended, within=40, every=0.2):
            places.add("task runs", task_run.model_dump_json())
            for state in await client.read_task_run_states(task_run.id):
                places.add("states", state.model_dump_json())

        async def links() -> list[Artifact]:
            of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
            found = await client.read_artifacts(artifact_filter=of_run)
            return found if any(artifact.type == "markdown" for artifact in found) else []

        for artifact in await eventually(links, within=40, every=0.2):
            places.add("artifacts", artifact.model_dump_json())


async def test_an_unreachable_ledger_is_told_without_its_password(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """CASE-225, REQ-62: nor do logs at DEBUG or the exceptions that led to it show it."""
    password = canary("ledger")
    url = f"postgresql+asyncpg://ann:{password}@127.0.0.1:{free_port()}/jobs"
    store = SqlStore(url, clock=Clock(1000))
    with caplog.at_level(logging.DEBUG), pytest.raises(LedgerUnavailable) as unavailable:
        await store.open()
    for text in (*traceback.format_exception(unavailable.value), repr(store), caplog.text):
        assert password not in text
    assert "ann" in str(unavailable.value) or "127.0.0.1" in str(unavailable.value)


@pytest.mark.parametrize("op", ["get", "batch", "delete"])
async def test_a_secret_that_a_job_was_given_is_in_no_text_of_a_later_call(
    job_server: EmbeddedJobServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    op: Op,
) -> None:
    """`create` has got it; the service echoes it when the job is read or deleted."""
    secret = canary(f"job-{op}")
    monkeypatch.setenv("DB_PASSWORD", secret)
    many = entry(LookingManyPlugin, "looking")
    blocks = {"default": block(job_server, {"caching": {"maxSystemFailures": 1}})}
    spec = ReportJob(kind="DB_PASSWORD", outcome="never")
    told = {"message": f"the job with password {secret} can't be had now"}
    plugin = many if op == "batch" else LOOKING
    with given_secrets(tmp_path, [plugin], blocks, speed=20) as host:
        ticket = host.admit(request(spec, task_type="looking"))
        host.admit(request(spec.model_copy(update={"day": 1}), task_type="looking"))
        await eventually(lambda: job_server.log("batch" if op == "batch" else "get"), within=20)
        job_server.fault(op, status=500, times=None if op != "delete" else 2, body=told)
        if op == "delete":
            ticket.cancel("enough")
        outcome = await asyncio.wait_for(ticket.outcome(), 30)
        job_server.clear_faults()
    places = Places()
    places.add("outcome", str(outcome.info))
    places.add("log", caplog.text)
    places.add_files("ledger", tmp_path)
    assert "the job with password ***" in outcome.info.reason + caplog.text
    assert places.that_have(secret) == []


class Deep(BaseModel):
    by_name: dict[str, SecretStr]
    whole: PydanticSecret[dict[str, Any]]
    several: list[SecretStr]
    number: PydanticSecret[int]


def test_secrets_are_found_wherever_they_lie() -> None:
    """REQ-62: nested, in mappings and lists, structures as a whole; in text all, in data those that can be told."""
    deep = Deep(
        by_name={"a": SecretStr("first-canary")},
        whole=PydanticSecret({"user": "second-canary", "deeper": ["third-canary"], "port": 5}),
        several=[SecretStr("fourth/canary"), SecretStr("short")],
        number=PydanticSecret(987654321),
    )
    mask = Mask(secrets_in(deep))
    text = "first-canary second-canary third-canary fourth%2Fcanary short 987654321 port 5"
    assert mask(text) == "*** *** *** *** *** *** port 5"
    data = {"short": ["first-canary", {"x": "a fourth/canary", "n": 5}], "third-canary": None}
    assert mask.data(data) == {"short": ["***", {"x": "a ***", "n": 5}], "***": None}
    assert mask.hits('{"x": "second-canary"}')
    assert not mask.hits('{"short": 5}')


async def test_a_handle_that_turns_out_to_hold_a_secret_is_not_kept(
    job_server: EmbeddedJobServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """CASE-229: its type looked harmless; the job is asked to end and the place in the ledger says why."""

    class Telling(SinglePlugin):
        async def create(
            self, ctx: TaskExecutionContextReader
        ) -> JobHandle | CreateResult[JobHandle, JobView]:
            await super().create(ctx)
            return JobHandle(name=f"?token={self._connection.token.get_secret_value()}")

    token = canary("handle")
    job_server.behave(token=token)
    blocks = {"default": with_token(job_server, token)}
    with caplog.at_level(logging.DEBUG), engine(tmp_path, [entry(Telling, "telling")], blocks) as h:
        outcome = await run(h, ReportJob(outcome="never"), "telling")
    assert outcome.info.err is not None
    assert outcome.info.err.code == "HandleNotStorable"
    assert "create of plugin 'telling'" in outcome.info.reason
    places = Places()
    places.add_files("ledger", tmp_path)
    for record in caplog.records:
        if record.name.startswith(
            "prefect_webapi"
        ):  # httpx shows the address that the author made of it
            places.add("log", record.getMessage())
    assert places.that_have(token) == []
    assert job_server.stats().created == 1


def test_a_pickled_task_holds_no_secret(job_server: EmbeddedJobServer) -> None:
    """CASE-231: nor does a block that was never saved travel with it; what arrives says so."""
    token = canary("pickled")
    inline = run_job.with_options(connection=with_token(job_server, token))
    assert token not in repr(inline)
    assert token not in repr(inline.job)
    data = pickled(inline)
    assert b"run job" in data
    assert token.encode() not in data
    arrived = cloudpickle.loads(data)
    with pytest.raises(ConfigurationError, match="never saved"):
        arrived.job.connection.get()
    assert TOKEN.encode() not in pickled(run_job.with_options(connection="saved"))
