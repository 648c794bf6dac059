"""Databricks: the suite with a token and with OAuth, and what is this vendor's own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prefect.blocks.core import Block
from pydantic import HttpUrl, SecretStr, ValidationError

from prefect_webapi import (
    Answer,
    AuthError,
    EngineSettings,
    NotFound,
    Phase,
    PhaseInfo,
    PluginConfig,
    RemoteClient,
    RemoteError,
    RemoteSystemError,
    RemoteUserError,
    Throttled,
)
from prefect_webapi.engine.contexts import DeleteView, GetView, StatusView, TaskView
from prefect_webapi_databricks import (
    Databricks,
    DatabricksRun,
    RunJob,
    SubmitRun,
    entry,
)
from prefect_webapi_databricks.errors import judge
from prefect_webapi_databricks.models import Run, RunHandle
from prefect_webapi_databricks.plugin import DatabricksPlugin
from tests.plugins.suite import CANARY, MESSAGE, BlockSuite, Outcome, OverHttp, Row
from tests.servers.base import Fault, Reply
from tests.servers.databricks import FIRST_RUN_ID, JOB_ID, TOKEN, DatabricksServer
from tests.support.engine import QUICK, Told, engine, request
from tests.support.waiting import eventually

REPOSITORY = Path(__file__).parents[2]
KEY, FINGERPRINT = "jkey" + "0" * 22, "f" * 64  # those of the suite
CLIENT = "5d1c7b0e-service-principal"
WITHIN = 20.0


class TestDatabricksBlock(BlockSuite):
    @pytest.fixture
    def block(self) -> type[Block]:
        return Databricks


# --- what a run tells ------------------------------------------------------------------------


def told(
    state: str = "TERMINATED",
    result: str = "",
    *,
    life: str | None = None,
    code: str = "",
    kind: str = "",
    message: str = "",
) -> Run:
    """A run as API 2.2 shows it: `status`, and the deprecated `state` beside it."""
    over = state == "TERMINATED"
    details = {"termination_details": {"code": code, "type": kind, "message": message}}
    return Run.model_validate(
        {
            "run_id": 7,
            "state": {"life_cycle_state": life or state, "result_state": result},
            "status": {"state": state, **(details if over else {})},
        }
    )


def told_by_2_1(life: str, result: str = "") -> Run:
    state = {"life_cycle_state": life, "result_state": result}
    return Run.model_validate({"run_id": 7, "state": state})


CLIENT_CODES = (
    *("RUN_EXECUTION_ERROR", "INVALID_CLUSTER_REQUEST", "INVALID_RUN_CONFIGURATION"),
    *("UNAUTHORIZED_ERROR", "LIBRARY_INSTALLATION_ERROR", "RESOURCE_NOT_FOUND", "CLUSTER_ERROR"),
    *("FEATURE_DISABLED", "REPOSITORY_CHECKOUT_FAILED", "STORAGE_ACCESS_ERROR", "DRIVER_ERROR"),
    *("MAX_SPARK_CONTEXTS_EXCEEDED", "CLUSTER_TERMINATED_BY_USER", "BUDGET_POLICY_LIMIT_EXCEEDED"),
)
CODES_TO_RETRY = (
    *("WORKSPACE_RUN_LIMIT_EXCEEDED", "CLUSTER_REQUEST_LIMIT_EXCEEDED", "BREAKING_CHANGE"),
    *("MAX_CONCURRENT_RUNS_EXCEEDED", "MAX_JOB_QUEUE_SIZE_EXCEEDED"),
)
ROWS: tuple[Row, ...] = (
    (told("QUEUED"), Phase.WAITING_FOR_RESOURCES, None),
    (told("BLOCKED"), Phase.QUEUED, None),
    (told("WAITING"), Phase.QUEUED, None),
    (told("PENDING"), Phase.INITIALIZING, None),
    (told("RUNNING"), Phase.RUNNING, None),
    (told("TERMINATING"), Phase.RUNNING, None),
    (told(result="SUCCESS", code="SUCCESS", kind="SUCCESS"), Phase.SUCCESS, None),
    (told(result="SUCCESS_WITH_FAILURES"), Phase.SUCCESS, None),
    (told(result="TIMEDOUT", code="CANCELED"), Phase.PERMANENT_FAILURE, "user"),
    (told(result="CANCELED", code="USER_CANCELED", kind="CLIENT_ERROR"), Phase.ABORTED, None),
    (told(result="CANCELED", code="CANCELED"), Phase.ABORTED, None),
    (told(result="UPSTREAM_FAILED"), Phase.PERMANENT_FAILURE, "user"),
    (told(result="UPSTREAM_CANCELED"), Phase.PERMANENT_FAILURE, "user"),
    (told(result="EXCLUDED"), Phase.PERMANENT_FAILURE, "user"),
    (told(result="DISABLED", code="DISABLED"), Phase.PERMANENT_FAILURE, "user"),
    (told(result="MAXIMUM_CONCURRENT_RUNS_REACHED"), Phase.RETRYABLE_FAILURE, "user"),
    (told(result="FAILED"), Phase.RETRYABLE_FAILURE, "user"),
    (told(result="FAILED", kind="CLOUD_FAILURE"), Phase.RETRYABLE_FAILURE, "system"),
    (told(result="FAILED", code="CLOUD_FAILURE"), Phase.RETRYABLE_FAILURE, "system"),
    (told(result="FAILED", kind="INTERNAL_ERROR"), Phase.RETRYABLE_FAILURE, "system"),
    (told(life="INTERNAL_ERROR", kind="INTERNAL_ERROR"), Phase.RETRYABLE_FAILURE, "system"),
    (told(life="SKIPPED", code="SKIPPED", kind="CLIENT_ERROR"), Phase.RETRYABLE_FAILURE, "user"),
    *(
        (told(result="FAILED", code=c, kind="CLIENT_ERROR"), Phase.PERMANENT_FAILURE, "user")
        for c in CLIENT_CODES
    ),
    *(
        (told(result="FAILED", code=c, kind="CLIENT_ERROR"), Phase.RETRYABLE_FAILURE, "user")
        for c in CODES_TO_RETRY
    ),
    # a run whose task has failed, as workspaces show it
    (
        told(
            result="FAILED", life="INTERNAL_ERROR", code="RUN_EXECUTION_ERROR", kind="CLIENT_ERROR"
        ),
        Phase.PERMANENT_FAILURE,
        "user",
    ),
    # without the deprecated part
    (told(life="", code="SUCCESS", kind="SUCCESS"), Phase.SUCCESS, None),
    (told(life="", code="SUCCESS_WITH_FAILURES"), Phase.SUCCESS, None),
    (told(life="", code="USER_CANCELED"), Phase.ABORTED, None),
    (
        told(life="", code="RUN_EXECUTION_ERROR", kind="CLIENT_ERROR"),
        Phase.PERMANENT_FAILURE,
        "user",
    ),
    (told(life="", code="INTERNAL_ERROR"), Phase.RETRYABLE_FAILURE, "system"),
    # with nothing else
    (told_by_2_1("WAITING_FOR_RETRY"), Phase.QUEUED, None),
    (told_by_2_1("TERMINATED", "SUCCESS"), Phase.SUCCESS, None),
    (told_by_2_1("INTERNAL_ERROR"), Phase.RETRYABLE_FAILURE, "system"),
    (told_by_2_1("INTERNAL_ERROR", "FAILED"), Phase.RETRYABLE_FAILURE, "user"),
    (told_by_2_1("SKIPPED"), Phase.RETRYABLE_FAILURE, "user"),
    (told_by_2_1("SKIPPED", "UPSTREAM_FAILED"), Phase.PERMANENT_FAILURE, "user"),
)


def notebook(key: str = "main", **does: str) -> dict[str, Any]:
    """A task whose notebook does what its parameters say."""
    task = {"notebook_path": "/Shared/anything", "base_parameters": does}
    return {"task_key": key, "notebook_task": task}


class TestDatabricks(OverHttp):
    """With a personal access token."""

    entry = entry
    plugin_class = DatabricksPlugin
    rows = ROWS
    unknown = told("HIBERNATED")

    @pytest.fixture(scope="class")
    @classmethod
    def service(cls) -> Iterator[DatabricksServer]:
        with DatabricksServer(token=CANARY) as server:
            server.secrets[CLIENT] = CANARY
            yield server

    def connection(
        self, service: DatabricksServer, engine: PluginConfig, settings: EngineSettings
    ) -> Databricks:
        return Databricks(
            host=HttpUrl(service.url), token=SecretStr(CANARY), engine=engine, settings=settings
        )

    def job(self, outcome: Outcome = "succeed", *, result: str = "done") -> SubmitRun:
        match outcome:
            case "fail":
                return SubmitRun(tasks=[notebook(**{"raise": MESSAGE})])
            case "never":
                return SubmitRun(tasks=[notebook(seconds="600")])
            case "queued":
                return SubmitRun(tasks=[notebook(queued="600")])
            case "succeed":
                return SubmitRun(tasks=[notebook(exit=result)])

    def throttled(self, hint: float | None) -> Reply:
        body = {"error_code": "REQUEST_LIMIT_EXCEEDED", "message": "Too many requests."}
        return Reply(429, body, {} if hint is None else {"Retry-After": f"{hint:g}"})

    def unauthorized(self) -> Reply:
        return Reply(403, {"error_code": 403, "message": "Invalid access token."})

    def unknown_handle(self) -> RunHandle:
        return RunHandle(run_id="7")

    def handle_of(self, name: str) -> RunHandle:
        return RunHandle(run_id=name)


class TestDatabricksOAuth(TestDatabricks):
    """As a service principal: what differs is where the token comes from, so only what looks at it is run again."""

    has_tokens = True

    def connection(
        self, service: DatabricksServer, engine: PluginConfig, settings: EngineSettings
    ) -> Databricks:
        return Databricks(
            host=HttpUrl(service.url),
            client_id=CLIENT,
            client_secret=SecretStr(CANARY),
            engine=engine,
            settings=settings,
        )

    async def test_the_token_is_asked_for_as_the_vendor_says(
        self, service: DatabricksServer, tmp_path: Path
    ) -> None:
        with self.host(tmp_path, service) as host:
            await self.outcome(host, self.job())
        (asked,) = service.calls("token")
        assert asked.path == "/oidc/v1/token"
        assert asked.body == b"grant_type=client_credentials&scope=all-apis"

    async def test_a_wrong_secret_ends_the_task(
        self, service: DatabricksServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(service.secrets, CLIENT, "another")
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, self.job())
        assert outcome.info.phase is Phase.PERMANENT_FAILURE
        assert "invalid_client" in outcome.info.reason
        assert service.made() == 0


_ABOUT_TOKENS = ("token", "credential", "secret", "first_call")
for _name in dir(OverHttp):
    if _name.startswith("test_") and not any(word in _name for word in _ABOUT_TOKENS):
        setattr(TestDatabricksOAuth, _name, None)


# --- the plugin by itself --------------------------------------------------------------------


@pytest.fixture(scope="module")
def _server() -> Iterator[DatabricksServer]:
    with DatabricksServer() as server:
        yield server


@pytest.fixture
def server(_server: DatabricksServer) -> DatabricksServer:
    _server.reset()
    return _server


def workspace(server: DatabricksServer, **fields: Any) -> Databricks:
    return Databricks(host=HttpUrl(server.url), token=SecretStr(TOKEN), **fields)


@pytest.fixture
async def plugin(server: DatabricksServer) -> AsyncIterator[DatabricksPlugin]:
    plugin = DatabricksPlugin(workspace(server))
    yield plugin
    await plugin.aclose()


def task_of(spec: DatabricksRun, **metadata: Any) -> TaskView:
    view = TestDatabricks().view(spec)
    job = replace(view.task_execution_metadata, **metadata)
    return replace(view, task_execution_metadata=job)


async def ended(plugin: DatabricksPlugin, handle: RunHandle) -> Run:
    seen: list[Run] = []

    async def is_over() -> bool:
        seen.append(await plugin.get(GetView(handle)))
        return seen[-1].is_over

    await eventually(is_over, within=WITHIN)
    return seen[-1]


def judged(plugin: DatabricksPlugin, task: TaskView, run: Run) -> PhaseInfo:
    return plugin.status(StatusView(task, RunHandle(run_id=str(run.run_id)), run))


async def test_a_one_time_run_carries_key_fingerprint_and_labels(
    server: DatabricksServer, plugin: DatabricksPlugin
) -> None:
    """CASE-223, REQ-25, REQ-67: in the token, the name and the tags; only labels that every cloud takes."""
    tasks = [notebook()]
    spec = SubmitRun(
        tasks=tasks, run_name="nightly", tags={"team": "a"}, more={"timeout_seconds": 60}
    )
    labels = {"job_key": KEY, "flow_run_id": "run-1", "task_run_id": "t", "größe": "a b"}
    await plugin.create(task_of(spec, labels=labels))
    (sent,) = server.requests()
    assert sent == {
        "tasks": tasks,
        "run_name": f"nightly [{KEY} {FINGERPRINT[:16]}]",
        "tags": {"team": "a", "job_key": KEY, "flow_run_id": "run-1", "task_run_id": "t"},
        "timeout_seconds": 60,
        "idempotency_token": KEY,
    }


async def test_a_saved_job_runs_with_its_parameters_and_gives_each_tasks_output(
    server: DatabricksServer, plugin: DatabricksPlugin
) -> None:
    task = task_of(RunJob(job_id=JOB_ID, job_parameters={"exit": "42 rows"}))
    handle = await plugin.create(task)
    (sent,) = server.requests()
    assert sent["job_id"] == JOB_ID
    assert sent["idempotency_token"] == KEY
    run = await ended(plugin, handle)
    info = judged(plugin, task, run)
    assert info.phase is Phase.SUCCESS
    (page,) = info.info.logs
    assert page.name == f"Databricks run {handle.run_id}"
    assert page.uri.startswith(server.url)
    result = await plugin.outputs(StatusView(task, handle, run))
    assert {key: output.result for key, output in result.outputs.items()} == {
        "load": "42 rows",
        "report": "42 rows",
    }
    assert result.url == run.run_page_url


async def test_ids_that_no_float_can_hold_stay_exact(
    server: DatabricksServer, plugin: DatabricksPlugin
) -> None:
    """CASE-256."""
    handle = await plugin.create(task_of(SubmitRun(tasks=[notebook(seconds="600")])))
    assert int(handle.run_id) > FIRST_RUN_ID > 2**53
    assert float(handle.run_id) != int(handle.run_id)
    again = RunHandle.model_validate_json(handle.model_dump_json())
    await plugin.delete(DeleteView(again, "done"))
    assert (await ended(plugin, again)).run_id == int(handle.run_id)


async def test_the_outputs_of_more_tasks_than_an_answer_holds_are_found(
    server: DatabricksServer, plugin: DatabricksPlugin
) -> None:
    """100 tasks to a page; what the spec does not ask for is not fetched."""
    tasks = [notebook(f"task_{nth}", exit=str(nth)) for nth in range(203)]
    spec = SubmitRun(tasks=tasks, outputs_of=["task_7", "task_202"])
    handle = await plugin.create(task_of(spec))
    run = await ended(plugin, handle)
    assert len(run.tasks) == 100
    result = await plugin.outputs(StatusView(task_of(spec), handle, run))
    assert {key: output.result for key, output in result.outputs.items()} == {
        "task_7": "7",
        "task_202": "202",
    }
    assert len(server.calls("outputs")) == 2


async def test_no_more_outputs_are_fetched_than_are_wanted(
    server: DatabricksServer, plugin: DatabricksPlugin
) -> None:
    """CASE-235: counted while they come; what is there is too large already, which the engine refuses."""
    tasks = [notebook(f"task_{nth}", exit="x" * 500) for nth in range(40)]
    task = replace(task_of(SubmitRun(tasks=tasks)), max_dataset_size_bytes=1000)
    handle = await plugin.create(task)
    result = await plugin.outputs(StatusView(task, handle, await ended(plugin, handle)))
    assert len(server.calls("outputs")) < 20
    assert len(result.model_dump_json()) > 1000


async def test_outputs_that_are_throttled_are_fetched_again(
    server: DatabricksServer, tmp_path: Path
) -> None:
    """The run itself is not repeated."""
    server.spoil(Fault("outputs", Reply(429, {"error_code": "RESOURCE_EXHAUSTED"}), skip=3))
    block = workspace(server, settings=EngineSettings.load(QUICK))
    spec = SubmitRun(tasks=[notebook(f"task_{nth}", exit=str(nth)) for nth in range(10)])
    with engine(tmp_path, [entry], {"default": block}) as host:
        async with asyncio.timeout(WITHIN):
            outcome = await host.admit(request(spec, task_type="databricks")).outcome()
    assert outcome.info.phase is Phase.SUCCESS, outcome.info
    assert {k: v.result for k, v in outcome.value.outputs.items()} == {
        f"task_{nth}": str(nth) for nth in range(10)
    }
    assert server.made() == 1


async def test_a_task_without_output_does_not_spoil_the_others(
    server: DatabricksServer, plugin: DatabricksPlugin
) -> None:
    condition = {"op": "EQUAL_TO", "left": "1", "right": "1"}
    tasks = [{"task_key": "is_due", "condition_task": condition}, notebook(exit="done")]
    handle = await plugin.create(task := task_of(SubmitRun(tasks=tasks)))
    result = await plugin.outputs(StatusView(task, handle, await ended(plugin, handle)))
    assert result.outputs["main"].result == "done"
    assert "not supported" in (result.outputs["is_due"].error or "")


async def test_outputs_of_other_kinds_and_logs_are_handed_on(
    server: DatabricksServer, plugin: DatabricksPlugin
) -> None:
    handle = await plugin.create(task := task_of(SubmitRun(tasks=[notebook()])))
    run = await ended(plugin, handle)
    answers = (
        {"sql_output": {"query_output": {"warehouse_id": "w"}}, "metadata": {}},
        {"logs": "read 3 rows", "logs_truncated": True},
        {"notebook_output": {"result": "long", "truncated": True}},
    )
    for body in answers:
        server.spoil(Fault("outputs", Reply(200, body)))
    found = [(await plugin.outputs(StatusView(task, handle, run))).outputs["main"] for _ in answers]
    assert [(each.result, each.logs, each.truncated) for each in found] == [
        ({"query_output": {"warehouse_id": "w"}}, None, False),
        (None, "read 3 rows", True),
        ("long", None, True),
    ]


async def test_a_failure_names_the_task_and_what_it_said(
    server: DatabricksServer, plugin: DatabricksPlugin
) -> None:
    """The run only says `Workload failed`; what can't be read does not hide that it failed."""
    tasks = [notebook("good"), {**notebook("bad", **{"raise": MESSAGE})}, notebook("later")]
    tasks[2]["depends_on"] = [{"task_key": "bad"}]
    handle = await plugin.create(task := task_of(SubmitRun(tasks=tasks)))
    error = judged(plugin, task, await ended(plugin, handle)).err
    assert error is not None
    assert (error.code, error.message) == ("RUN_EXECUTION_ERROR", f"task bad: {MESSAGE}")
    server.spoil(Fault("outputs", Reply(500, {"error_code": "INTERNAL_ERROR"})))
    error = judged(plugin, task, await plugin.get(GetView(handle))).err
    assert error is not None
    assert "Task bad failed with message" in error.message


async def test_the_last_attempt_at_a_task_is_the_one_that_counts(
    server: DatabricksServer, plugin: DatabricksPlugin
) -> None:
    """Databricks lists the attempts of a task that it repeats side by side."""
    attempts = [{"run_id": n, "task_key": "main", "attempt_number": n - 5} for n in (6, 5)]
    run = Run.model_validate({"run_id": 4, "tasks": attempts, "status": {"state": "TERMINATED"}})
    server.spoil(Fault("outputs", Reply(200, {"notebook_output": {"result": "at last"}})))
    task = task_of(SubmitRun(tasks=[notebook()]))
    result = await plugin.outputs(StatusView(task, RunHandle(run_id="4"), run))
    assert result.outputs["main"].run_id == "6"


def test_a_run_that_waits_says_for_what(plugin: DatabricksPlugin) -> None:
    details = {"code": "MAX_CONCURRENT_RUNS_REACHED", "message": "One at a time."}
    status = {"state": "QUEUED", "queue_details": details}
    run = Run.model_validate({"run_id": 7, "status": status})
    info = judged(plugin, task_of(SubmitRun(tasks=[notebook()])), run)
    assert info.phase is Phase.WAITING_FOR_RESOURCES
    assert info.reason == "MAX_CONCURRENT_RUNS_REACHED: One at a time."


def test_a_time_out_is_called_by_its_name(plugin: DatabricksPlugin) -> None:
    """SPEC 2.4: a failure with code `Timeout` is TimedOut to Prefect."""
    run = told(result="TIMEDOUT", code="CANCELED", message="after 60 s")
    error = judged(plugin, task_of(SubmitRun(tasks=[notebook()])), run).err
    assert error is not None
    assert error.code == "Timeout"


async def test_a_partial_success_is_a_failure_where_the_connection_says_so(
    server: DatabricksServer,
) -> None:
    strict = DatabricksPlugin(workspace(server, partial_success_fails=True))
    task = task_of(SubmitRun(tasks=[notebook()]))
    assert judged(strict, task, told(result="SUCCESS_WITH_FAILURES")).phase.is_failure
    assert judged(strict, task, told(result="SUCCESS")).phase is Phase.SUCCESS
    await strict.aclose()


# --- whose run it is -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (
            SubmitRun(tasks=[notebook(seconds="600")]),
            SubmitRun(tasks=[notebook(seconds="600")], run_name="another"),
        ),
        (
            RunJob(job_id=JOB_ID, job_parameters={"seconds": "600"}),
            RunJob(job_id=JOB_ID, job_parameters={"seconds": "601"}),
        ),
        (RunJob(job_id=JOB_ID, job_parameters={"seconds": "600"}), RunJob(job_id=8)),
        (
            RunJob(job_id=JOB_ID, job_parameters={"seconds": "600"}),
            SubmitRun(tasks=[notebook()]),
        ),
    ],
    ids=["tasks", "parameters", "job", "kind"],
)
async def test_a_run_under_our_key_that_was_made_from_another_spec_is_left_alone(
    server: DatabricksServer, tmp_path: Path, first: DatabricksRun, second: DatabricksRun
) -> None:
    """REQ-34: ledgers that don't know of each other, one `idempotency_key`; Databricks does not compare."""
    server.jobs[8] = server.jobs[JOB_ID]
    asked = partial(request, task_type="databricks", idempotency_key="the key")
    fast = PluginConfig.load({"readRateLimiter": {"qps": 1000, "burst": 1000}})
    block = workspace(server, engine=fast, settings=EngineSettings.load(QUICK))
    with engine(tmp_path / "1", [entry], {"default": block}) as one:
        told_one = Told()
        ours = one.admit(asked(first, reporter=told_one))
        await eventually(lambda: "RUNNING" in told_one.names, within=WITHIN)
        with engine(tmp_path / "2", [entry], {"default": block}) as two:
            async with asyncio.timeout(WITHIN):
                theirs = await two.admit(asked(second)).outcome()
        assert theirs.info.err is not None
        assert theirs.info.err.code == "IdempotencyConflict"
        assert (server.made(), server.live()) == (1, 1)
        ours.cancel("the test is over")
        assert (await ours.outcome()).info.phase is Phase.ABORTED


def test_what_databricks_resolved_in_a_parameter_is_no_conflict(plugin: DatabricksPlugin) -> None:
    """`{{job.start_time.iso_date}}` comes back as a date; a parameter that was not given, as its default."""
    spec = RunJob(job_id=7, job_parameters={"day": "{{job.start_time.iso_date}}", "n": "1"})
    shown = [{"name": "day", "value": "2031-04-01"}, {"name": "n", "default": "1"}]
    shown.append({"name": "other", "default": "x", "value": "y"})
    run = Run.model_validate(
        {"run_id": 1, "job_id": 7, "job_parameters": shown, "status": {"state": "RUNNING"}}
    )
    assert judged(plugin, task_of(spec), run).phase is Phase.RUNNING


# --- reading many, ending one ----------------------------------------------------------------


async def test_a_batch_is_one_request_and_leaves_out_what_has_ended(
    server: DatabricksServer, plugin: DatabricksPlugin
) -> None:
    """REQ-37: a run that ended is read alone, as only then its tasks and their errors come along."""
    makes = {"a": "600", "b": "0", "c": "600"}
    a, b, c = [
        await plugin.create(
            task_of(SubmitRun(tasks=[notebook(seconds=seconds)]), generated_name=name)
        )
        for name, seconds in makes.items()
    ]
    await ended(plugin, b)
    found = await plugin.get_many([GetView(handle) for handle in (c, b, a)])
    assert [run and str(run.run_id) for run in found] == [c.run_id, None, a.run_id]
    (asked,) = server.calls("get_many")
    assert asked.query == "active_only=true&limit=24"
    just_ended = {"run_id": int(a.run_id), "status": {"state": "TERMINATED"}}
    server.spoil(Fault("get_many", Reply(200, {"runs": [just_ended]})))
    assert await plugin.get_many([GetView(a), GetView(c)]) == [None, None]
    server.reset()
    assert await plugin.get_many([GetView(a), GetView(c)]) == [None, None]


async def test_a_cancel_that_is_refused_is_done_only_if_the_run_is_over(
    server: DatabricksServer, plugin: DatabricksPlugin
) -> None:
    """REQ-43: whatever words a workspace has for it."""
    refusal = Reply(400, {"error_code": "INVALID_STATE", "message": "Run is terminated."})
    handle = await plugin.create(task_of(SubmitRun(tasks=[notebook(seconds="600")])))
    server.spoil(Fault("delete", refusal))
    with pytest.raises(RemoteUserError, match="terminated"):
        await plugin.delete(DeleteView(handle, "x"))
    await plugin.delete(DeleteView(handle, "x"))
    await ended(plugin, handle)
    server.spoil(Fault("delete", refusal))
    await plugin.delete(DeleteView(handle, "x"))
    with pytest.raises(NotFound):
        await plugin.delete(DeleteView(RunHandle(run_id="7"), "x"))


# --- what answers mean -----------------------------------------------------------------------


def answer(status: int, code: str | int, message: str = "", **headers: str) -> Answer:
    body = json.dumps({"error_code": code, "message": message}).encode()
    return Answer(status, {k.replace("_", "-"): v for k, v in headers.items()}, body)


@pytest.mark.parametrize(
    ("given", "meant", "code"),
    [
        (answer(400, "INVALID_PARAMETER_VALUE", "Run 7 does not exist."), NotFound, None),
        (answer(400, "INVALID_PARAMETER_VALUE", "Run: 7 in job: 8 doesn't exist"), NotFound, None),
        (answer(404, "RESOURCE_DOES_NOT_EXIST", "no"), NotFound, None),
        (answer(400, "INVALID_PARAMETER_VALUE", "Job 7 does not exist."), RemoteUserError, None),
        (answer(400, "MALFORMED_REQUEST", "no"), RemoteUserError, None),
        (answer(401, 401, "no credential"), AuthError, "Unauthorized"),
        (answer(403, "PERMISSION_DENIED", "no"), AuthError, "Forbidden"),
        (answer(429, "RESOURCE_EXHAUSTED", "less"), Throttled, "HTTP429"),
        (answer(400, "REQUEST_LIMIT_EXCEEDED", "less"), Throttled, "HTTP429"),
        (answer(503, "TEMPORARILY_UNAVAILABLE", "x", retry_after="2"), Throttled, "HTTP503"),
        (answer(503, "TEMPORARILY_UNAVAILABLE", "x"), RemoteSystemError, None),
        (answer(409, "ABORTED", "sequencer check failed"), RemoteSystemError, None),
        (answer(500, "UNKNOWN", "x"), RemoteSystemError, None),
        (answer(501, "NOT_IMPLEMENTED", "x"), RemoteSystemError, None),
        (Answer(502, {}, b"<html>"), RemoteSystemError, "HTTP502"),
    ],
)
def test_the_error_code_says_what_the_status_does_not(
    given: Answer, meant: type[RemoteError], code: str | None
) -> None:
    """SPEC 6.1. Of the errors that are shown, Databricks' own code is."""
    error = judge(given, "POST")
    assert type(error) is meant
    assert error is not None
    assert error.code == (code or json.loads(given.body)["error_code"])


@pytest.mark.parametrize("status", [429, 503])
def test_the_hint_to_wait_is_in_seconds(status: int) -> None:
    """REQ-15."""
    error = judge(answer(status, "REQUEST_LIMIT_EXCEEDED", retry_after="3"), "GET")
    assert isinstance(error, Throttled)
    assert error.retry_after == timedelta(seconds=3)


async def test_two_creates_that_have_met_are_no_conflict(
    server: DatabricksServer, tmp_path: Path
) -> None:
    """409 ABORTED: the one that is repeated is answered with the run."""
    aborted = Reply(409, {"error_code": "ABORTED", "message": "sequencer check failed"})
    server.spoil(Fault("create", aborted, carried_out=True))
    block = workspace(server, settings=EngineSettings.load(QUICK))
    with engine(tmp_path, [entry], {"default": block}) as host:
        spec = SubmitRun(tasks=[notebook()])
        async with asyncio.timeout(WITHIN):
            outcome = await host.admit(request(spec, task_type="databricks")).outcome()
    assert outcome.info.phase is Phase.SUCCESS
    assert server.made() == 1


async def test_a_job_that_is_not_there_ends_the_task_in_the_workspaces_words(
    server: DatabricksServer, tmp_path: Path
) -> None:
    block = workspace(server, settings=EngineSettings.load(QUICK))
    with engine(tmp_path, [entry], {"default": block}) as host:
        outcome = await host.admit(request(RunJob(job_id=8), task_type="databricks")).outcome()
    assert outcome.info.phase is Phase.PERMANENT_FAILURE
    assert "Job 8 does not exist." in outcome.info.reason


# --- bad input -------------------------------------------------------------------------------


WRONG: list[tuple[type[DatabricksRun], dict[str, Any], str]] = [
    (RunJob, {"job_id": 0}, "greater than 0"),
    (RunJob, {"job_id": 2**63}, "less than"),
    (RunJob, {"job_id": 7, "job_parameters": {"n": 1}}, "valid string"),
    (RunJob, {"job_id": 7, "tasks": []}, "Extra inputs"),
    (RunJob, {"job_id": 7, "more": {"idempotency_token": "x"}}, "leave out idempotency_token"),
    (SubmitRun, {"tasks": []}, "at least 1 item"),
    (SubmitRun, {"tasks": [{}]}, "task_key of its own"),
    (SubmitRun, {"tasks": [notebook(), notebook()]}, r"task_key of its own \(wrong: \['main'"),
    (SubmitRun, {"tasks": [notebook()], "more": {"run_name": "x"}}, "leave out run_name"),
]


@pytest.mark.parametrize(("kind", "fields", "told"), WRONG)
def test_a_spec_that_can_not_work_is_refused_before_any_request(
    kind: type[DatabricksRun], fields: dict[str, Any], told: str
) -> None:
    """CASE-251."""
    with pytest.raises(ValidationError, match=told):
        kind.model_validate(fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"client_id": "a"},
        {"client_secret": SecretStr("b")},
        {"token": SecretStr("t"), "client_id": "a", "client_secret": SecretStr("b")},
        {"token": SecretStr("t"), "client_id": "a"},
    ],
)
def test_a_connection_needs_one_way_in(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="either token, or client_id and client_secret"):
        Databricks(host=HttpUrl("https://dbc.example.com"), **fields)


def test_an_address_of_a_page_is_no_workspace() -> None:
    with pytest.raises(ValidationError, match="leave out what follows"):
        Databricks(host=HttpUrl("https://dbc.example.com/jobs?o=1"), token=SecretStr("t"))


@pytest.mark.parametrize("spec", [RunJob(job_id=7), SubmitRun(tasks=[notebook()])])
def test_a_spec_that_was_kept_is_read_as_what_it_was(spec: DatabricksRun) -> None:
    """The sweeper makes it anew from the ledger; without it, the plugin still judges runs."""
    again = entry.spec.model_validate_json(spec.model_dump_json())
    assert again == spec
    assert DatabricksRun.model_validate({}).quota == "default"


# --- the server that all of this rests on ----------------------------------------------------


SUBMIT, RUN_NOW = "/api/2.2/jobs/runs/submit", "/api/2.2/jobs/run-now"
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (SUBMIT, {"tasks": [notebook()], "runname": "x"}, "MALFORMED_REQUEST"),
    (SUBMIT, {"tasks": [notebook()], "timeout_seconds": "60"}, "MALFORMED_REQUEST"),
    (SUBMIT, {"tasks": [{"task_key": "main"}]}, "INVALID_PARAMETER_VALUE"),
    (SUBMIT, {"tasks": [notebook(), notebook()]}, "INVALID_PARAMETER_VALUE"),
    (SUBMIT, {"tasks": [notebook()], "idempotency_token": "x" * 65}, "INVALID_PARAMETER_VALUE"),
    (RUN_NOW, {"job_id": str(JOB_ID)}, "MALFORMED_REQUEST"),
    (RUN_NOW, {"job_id": JOB_ID, "job_parameters": {"n": 1}}, "MALFORMED_REQUEST"),
    ("/api/2.2/jobs/runs/cancel", {"run_id": "7"}, "MALFORMED_REQUEST"),
    ("/api/2.2/jobs/runs/cancel", {"run_id": 7}, "INVALID_PARAMETER_VALUE"),
    ("/api/2.1/jobs/run-now", {"job_id": JOB_ID}, "ENDPOINT_NOT_FOUND"),
]


@pytest.mark.parametrize(("path", "body", "code"), REFUSED)
async def test_the_server_refuses_what_databricks_refuses(
    server: DatabricksServer, path: str, body: dict[str, Any], code: str
) -> None:
    async with aclosing(RemoteClient(server.url, token=SecretStr(TOKEN))) as api:
        refused = await api.request("POST", path, json=body)
    assert refused.status in (400, 404)
    assert refused.json()["error_code"] == code
    assert server.made() == 0


@pytest.mark.parametrize(("token", "status"), [(None, 401), (SecretStr("dapi-stolen"), 403)])
async def test_the_server_knows_who_asks(
    server: DatabricksServer, token: SecretStr | None, status: int
) -> None:
    async with aclosing(RemoteClient(server.url, token=token)) as api:
        refused = await api.request("POST", SUBMIT, json={"tasks": [notebook()]})
    assert (refused.status, server.made()) == (status, 0)


async def test_the_server_keeps_tokens_and_knows_what_it_has_no_answer_for(
    server: DatabricksServer,
) -> None:
    body = {"tasks": [notebook(seconds="600")], "idempotency_token": KEY}
    async with aclosing(RemoteClient(server.url, token=SecretStr(TOKEN))) as api:
        form = await api.request("POST", SUBMIT, form={"tasks": "[]"})
        assert form.json()["error_code"] == "MALFORMED_REQUEST"
        made = [await api.post(SUBMIT, json=body) for _ in range(2)]
        assert made[0] == made[1]
        runs = "/api/2.2/jobs/runs"
        for path in (f"{runs}/get-output?run_id={made[0]['run_id']}", f"{runs}/list?limit=25"):
            assert (await api.request("GET", path)).status == 400
        server.forget()
        deleted = await api.request("POST", SUBMIT, json=body)
        assert "deleted" in deleted.json()["message"]
    assert server.made() == 1
