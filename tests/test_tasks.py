"""Remote tasks as their users see them: real engine, real job server, real Prefect."""

from __future__ import annotations

import asyncio
import inspect
import pickle
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import anyio
import cloudpickle  # pyright: ignore[reportMissingTypeStubs] # it has none
import pytest
from prefect import flow, task
from prefect.cache_policies import INPUTS, NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterName
from prefect.client.schemas.objects import State, StateType, TaskRun
from prefect.context import TaskRunContext
from prefect.exceptions import CancelledRun
from prefect.states import Failed
from prefect.task_engine import TaskRunTimeoutError
from pydantic import Field, HttpUrl, SecretStr

from prefect_webapi import (
    ConfigurationError,
    EngineSettings,
    JobFailed,
    JobSpec,
    PluginConfig,
    RateLimiterConfig,
    RemoteTask,
    run_key,
    sync_task_for,
    task_for,
    webapi_task,
)
from prefect_webapi._prefect import service
from prefect_webapi.tasks import OwnRun, may_help, retry_condition
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import JobServer, Report, ReportJob
from tests.support.jobserver import TOKEN
from tests.support.prefect import Scripts, prefect_leaks
from tests.support.waiting import eventually, eventually_blocking

RATE = RateLimiterConfig(qps=1000, burst=1000)

pytestmark = pytest.mark.usefixtures("engine_here")


@pytest.fixture
def connection(job_server: EmbeddedJobServer) -> JobServer:
    return JobServer(
        base_url=HttpUrl(job_server.url),
        token=SecretStr(TOKEN),
        engine=PluginConfig(read_rate_limiter=RATE, write_rate_limiter=RATE),
        settings=EngineSettings(
            initial_interval=timedelta(milliseconds=50), retry_base=timedelta(milliseconds=20)
        ),
    )


@pytest.fixture
def run(connection: JobServer) -> RemoteTask[..., Any]:
    return task_for("job-server", ReportJob, name="run", connection=connection)


@pytest.fixture
def run_sync(connection: JobServer) -> RemoteTask[..., Any]:
    return sync_task_for("job-server", ReportJob, name="run sync", connection=connection)


class Seen:
    """The state in which a task run ended, by a hook-free look: `return_state` of a call."""

    def __init__(self) -> None:
        self.task_run: TaskRun | None = None

    def note(self) -> None:
        context = TaskRunContext.get()
        assert context is not None
        self.task_run = context.task_run

    @property
    def state(self) -> State[Any]:
        assert self.task_run is not None
        assert self.task_run.state is not None
        return self.task_run.state


def describing(seen: Seen, **spec: Any) -> Callable[[], ReportJob]:
    """A description that notes the task run it is made in."""

    def describe() -> ReportJob:
        seen.note()
        return ReportJob(**spec)

    return describe


# --- results and failures -----------------------------------------------------------------------------


@prefect_leaks
async def test_a_call_gives_what_the_job_returned(
    run: RemoteTask[..., Any], job_server: EmbeddedJobServer
) -> None:
    @flow
    async def nightly() -> list[Report]:
        return list(
            await asyncio.gather(*(run(day=day, seconds=0.1, result=day) for day in range(3)))
        )

    assert [report.data for report in await nightly()] == [0, 1, 2]
    assert job_server.stats().created == 3


def test_a_sync_task_in_a_sync_flow_gives_the_same(run_sync: RemoteTask[..., Any]) -> None:
    """CASE-265."""

    @flow
    def nightly() -> Report:
        return run_sync(seconds=0.1, result="x")

    assert nightly().data == "x"


def test_a_task_outside_a_flow_works(run_sync: RemoteTask[..., Any]) -> None:
    """CASE-266."""
    assert run_sync(seconds=0.1, result=1).data == 1


@prefect_leaks
def test_submit_and_map_give_futures_of_the_result(
    run: RemoteTask[..., Any], run_sync: RemoteTask[..., Any], job_server: EmbeddedJobServer
) -> None:
    @flow
    def nightly() -> list[Any]:
        one = run.submit(seconds=0.1, result=1)
        more = cast(Any, run_sync).map(day=[1, 2], seconds=0.1, result=2)
        return [one.result().data, *(each.data for each in more.result())]

    assert nightly() == [1, 2, 2]
    assert job_server.stats().created == 3


def test_a_described_task_gets_its_arguments_resolved(connection: JobServer) -> None:
    """CASE-276."""

    @webapi_task("job-server", connection=connection)
    def build(day: int, label: str = "none") -> ReportJob:
        return ReportJob(seconds=0.1, day=day, result=f"{label} {day}")

    @task
    def pick() -> int:
        return 7

    @flow
    def nightly() -> Report:
        return cast(Any, build).submit(cast(Any, pick).submit(), label="day").result()

    assert nightly().data == "day 7"
    assert build.name == "build"


def test_a_failed_job_raises_and_fails_the_task_under_its_name(connection: JobServer) -> None:
    """CASE-105, CASE-091."""
    seen = Seen()
    fails = webapi_task("job-server", connection=connection)(
        describing(seen, seconds=0.1, outcome="fail", message="out of memory")
    )
    with pytest.raises(JobFailed, match="out of memory") as raised:
        fails()
    assert raised.value.retryable
    assert (seen.state.type, seen.state.name) == (StateType.FAILED, "RetryableFailure")
    assert "out of memory" in (seen.state.message or "")


def test_return_state_gives_the_state(run_sync: RemoteTask[..., Any]) -> None:
    state = cast(Any, run_sync)(seconds=0.1, outcome="fail", return_state=True)
    assert state.name == "RetryableFailure"
    state = cast(Any, run_sync)(seconds=0.1, result=3, return_state=True)
    assert state.is_completed()


def test_a_retryable_failure_is_tried_again_with_a_job_of_its_own(
    connection: JobServer, job_server: EmbeddedJobServer
) -> None:
    """CASE-105."""
    seen = Seen()
    flaky = webapi_task("job-server", connection=connection, retries=2)(
        describing(seen, seconds=0.1, outcome="fail-first")
    )
    assert isinstance(flaky(), Report)
    assert job_server.stats().created == 2
    assert seen.task_run is not None
    assert seen.task_run.run_count == 2


def test_a_wrong_request_is_not_tried_again(
    run_sync: RemoteTask[..., Any], job_server: EmbeddedJobServer
) -> None:
    """CASE-104."""
    job_server.fault("create", status=422, times=9)
    with pytest.raises(JobFailed):
        run_sync.with_options(retries=2)(seconds=0.1)
    assert len(job_server.log("create")) == 1


def test_a_wrong_spec_is_told_by_field_and_not_tried_again(
    run_sync: RemoteTask[..., Any], job_server: EmbeddedJobServer
) -> None:
    with pytest.raises(ConfigurationError, match=r"seconds: .*-1"):
        run_sync.with_options(retries=2)(seconds=-1)
    assert job_server.log() == []


class TaggedJob(ReportJob):
    tags: dict[str, str] = Field(default_factory=dict)


def test_a_field_whose_default_is_made_may_be_left_out(connection: JobServer) -> None:
    """Prefect passes defaults on as arguments, and pydantic's signature has a stand-in for those made anew."""
    tagged = sync_task_for("job-server", TaggedJob, connection=connection)
    assert inspect.signature(tagged).parameters["tags"].default == {}
    assert tagged(seconds=0.1, result=7).data == 7


def test_a_function_that_describes_nothing_is_told_so(connection: JobServer) -> None:
    def wrong() -> Any:
        return "a report"

    decorate: Any = webapi_task("job-server", connection=connection, retries=2)
    with pytest.raises(
        ConfigurationError, match=r"must return a JobSpec, and .*wrong returned str"
    ):
        decorate(wrong)()


def test_the_description_runs_once_per_attempt_and_can_be_tested_by_itself(
    connection: JobServer,
) -> None:
    calls: list[int] = []

    @webapi_task("job-server", connection=connection, retries=1)
    def build(day: int) -> ReportJob:
        calls.append(day)
        return ReportJob(day=day, seconds=0.1, outcome="fail")

    assert cast(Any, build.fn(3)) == ReportJob(day=3, seconds=0.1, outcome="fail")
    with pytest.raises(JobFailed):
        build(4)
    assert calls == [3, 4, 4]


ENDS: dict[str, tuple[dict[str, Any], str, str, int, type[Exception] | None]] = {
    "success": ({"seconds": 0.1, "result": 1}, "Completed", "ended at", 1, None),
    "failure": (
        {"seconds": 0.1, "outcome": "fail", "message": "no figures"},
        *("RetryableFailure", "no figures", 1, JobFailed),
    ),
    "retried": ({"seconds": 0.1, "outcome": "fail-first"}, "Completed", "ended at", 2, None),
    "cancel": ({"outcome": "never"}, "Cancelled", "the operator said so", 1, CancelledRun),
}
"""What is asked of the service; the state's name, a part of its message, the run count; what is raised."""


@prefect_leaks
@pytest.mark.parametrize("form", ["await", "call", "submit", "map", "outside", "await outside"])
def test_each_form_of_call_ends_as_its_job_does(
    connection: JobServer, job_server: EmbeddedJobServer, form: str
) -> None:
    """CASE-091, CASE-105, CASE-265, CASE-266: states as Prefect's API has them, and what the caller gets."""
    prefix = f"{form} {uuid4().hex[:6]}"
    make = task_for if form.startswith("await") else sync_task_for

    def called(end: str) -> Any:
        spec = {"kind": form, **ENDS[end][0]}
        one: Any = make(
            "job-server",
            ReportJob,
            name=f"{prefix} {end}",
            connection=connection,
            retries=1 if end == "retried" else 0,
        )
        match form:
            case "submit":
                return one.submit(**spec).result()
            case "map":
                return one.map(day=[1], **spec).result()[0]
            case _:
                return one(**spec)

    async def awaited(end: str) -> Any:
        return await called(end)

    def run(end: str) -> Any:
        function: Any = awaited if form.startswith("await") else called
        entry: Any = function if "outside" in form else cast(Any, flow)(function)
        ended: Any = entry(end)
        return asyncio.run(ended) if inspect.iscoroutine(ended) else ended

    for end, (_, _, _, _, raises) in ENDS.items():
        with ExitStack() as around:
            if end == "cancel":
                around.enter_context(stopped_by_operator(job_server))
            if raises is not None:
                around.enter_context(pytest.raises(raises))
            assert isinstance(run(end), Report)

    def told() -> dict[str, TaskRun] | None:
        with get_client(sync_client=True) as client:
            mine = TaskRunFilter(name=TaskRunFilterName(like_=prefix))
            runs = client.read_task_runs(task_run_filter=mine)
        is_told = len(runs) == len(ENDS) and all(r.state and r.state.is_final() for r in runs)
        return (
            {r.name.removeprefix(prefix).split("-")[0].strip(): r for r in runs}
            if is_told
            else None
        )

    runs = eventually_blocking(told, within=30, every=0.1)
    assert runs is not None
    for end, (_, name, message, count, _) in ENDS.items():
        state = runs[end].state
        assert state is not None
        assert (end, state.name, runs[end].run_count) == (end, name, count)
        assert message in (state.message or "")
    assert job_server.stats().created == 5


# --- identity -------------------------------------------------------------------------------------------


def test_equal_calls_are_two_jobs_and_a_second_start_under_a_run_key_meets_them(
    run_sync: RemoteTask[..., Any], job_server: EmbeddedJobServer
) -> None:
    """CASE-282."""

    @flow
    def nightly() -> list[Any]:
        return [run_sync(seconds=0.1, result=1) for _ in range(2)]

    with run_key("monday"):
        nightly()
        assert job_server.stats().created == 2
        nightly()
    assert job_server.stats().created == 2
    nightly()
    assert job_server.stats().created == 4


def test_an_idempotency_key_meets_one_job_in_every_run(
    run_sync: RemoteTask[..., Any], job_server: EmbeddedJobServer
) -> None:
    pinned = run_sync.with_options(idempotency_key="the one")
    assert pinned(seconds=0.1, result=1) == pinned(seconds=0.1, result=1)
    assert job_server.stats().created == 1


# --- cancellation -----------------------------------------------------------------------------------------


def is_running(job_server: EmbeddedJobServer) -> bool:
    return job_server.stats().live > 0


@prefect_leaks
async def test_a_cancelled_task_deletes_its_job_and_leaves_its_caller_cancelled(
    connection: JobServer, job_server: EmbeddedJobServer
) -> None:
    """CASE-111."""
    seen = Seen()

    @webapi_task("job-server", connection=connection)
    async def endless() -> ReportJob:
        seen.note()
        return ReportJob(outcome="never")

    @flow
    async def nightly() -> None:
        running = asyncio.ensure_future(endless())
        await eventually(lambda: is_running(job_server), within=20)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert running.cancelled()

    await nightly()
    assert (seen.state.type, seen.state.name) == (StateType.CANCELLED, "Cancelled")
    assert job_server.stats().live == 0
    (request,) = job_server.log("delete")
    assert "the task was cancelled" in str(request)


@prefect_leaks
async def test_a_cancel_scope_around_a_task_deletes_its_job(
    connection: JobServer, job_server: EmbeddedJobServer
) -> None:
    """CASE-111: a scope's cancellation comes again at each await."""
    seen = Seen()

    @webapi_task("job-server", connection=connection)
    async def endless() -> ReportJob:
        seen.note()
        return ReportJob(outcome="never")

    @flow
    async def nightly() -> bool:
        async with anyio.create_task_group() as group:
            group.start_soon(endless)
            await eventually(lambda: is_running(job_server), within=20)
            group.cancel_scope.cancel()
        return group.cancel_scope.cancelled_caught

    await nightly()
    assert seen.state.type is StateType.CANCELLED
    assert job_server.stats().live == 0


@pytest.mark.parametrize("colour", ["async", "sync"])
async def test_a_task_timeout_deletes_the_job_and_ends_as_timed_out(
    connection: JobServer, job_server: EmbeddedJobServer, colour: str
) -> None:
    """CASE-112."""
    seen = Seen()
    decorate = webapi_task("job-server", connection=connection, timeout_seconds=1)

    @decorate
    async def endless() -> ReportJob:
        seen.note()
        return ReportJob(outcome="never")

    endless_sync = decorate(describing(seen, outcome="never"))
    await asyncio.to_thread(service.start, _settings)

    async def call() -> None:
        if colour == "async":
            await endless()
        else:
            endless_sync()

    with pytest.raises(TaskRunTimeoutError):
        await call()
    assert (seen.state.type, seen.state.name) == (StateType.FAILED, "TimedOut")
    assert job_server.stats().live == 0
    assert "timeout_seconds=1 passed" in str(job_server.log("delete"))


def _settings() -> Any:
    from prefect_webapi.settings import WebApiSettings

    return WebApiSettings.load()


async def test_on_exit_leave_leaves_the_job(
    connection: JobServer, job_server: EmbeddedJobServer
) -> None:
    @webapi_task("job-server", connection=connection, on_exit="leave")
    async def endless() -> ReportJob:
        return ReportJob(outcome="never")

    running = asyncio.ensure_future(cast(Any, endless()))
    await eventually(lambda: is_running(job_server), within=20)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert job_server.stats().live == 1
    assert job_server.log("delete") == []


@prefect_leaks
def test_submitted_tasks_of_a_cancelled_flow_run_are_stopped(
    run: RemoteTask[..., Any], run_sync: RemoteTask[..., Any], job_server: EmbeddedJobServer
) -> None:
    """CASE-110: a pool's task hears nothing of it from Prefect."""
    from prefect.client.orchestration import get_client
    from prefect.runtime import flow_run
    from prefect.states import Cancelling

    def cancel() -> None:
        eventually_blocking(lambda: job_server.stats().live == 2, within=20)
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(flow_run.id, Cancelling())

    @flow
    def nightly() -> list[Any]:
        futures = [each.submit(outcome="never") for each in (run, run_sync)]
        cancel()
        for future in futures:
            future.wait(20)
        return [future.state for future in futures]

    states = cast(Any, nightly)(return_state=False)
    assert [state.type for state in states] == [StateType.CANCELLED] * 2
    assert job_server.stats().live == 0
    assert "flow run was cancelled" in str(job_server.log("delete"))


@prefect_leaks
def test_a_submitted_task_of_a_flow_that_fails_is_stopped(
    run_sync: RemoteTask[..., Any], job_server: EmbeddedJobServer
) -> None:
    """CASE-126."""

    @flow
    def nightly() -> None:
        run_sync.submit(outcome="never")
        eventually_blocking(lambda: is_running(job_server), within=20)
        raise ValueError("a sibling failed")

    with pytest.raises(ValueError, match="a sibling"):
        nightly()
    assert job_server.stats().live == 0


def test_a_flow_that_ends_in_order_lets_its_submitted_tasks_finish(
    run_sync: RemoteTask[..., Any], job_server: EmbeddedJobServer
) -> None:
    """CASE-124."""

    @flow
    def nightly() -> None:
        run_sync.submit(seconds=2)
        eventually_blocking(lambda: is_running(job_server), within=20)

    nightly()
    assert job_server.log("delete") == []
    assert [job.state for job in job_server.jobs()] == ["succeeded"]


def test_a_job_stopped_by_our_operator_is_a_cancelled_run_to_its_caller(
    run_sync: RemoteTask[..., Any], job_server: EmbeddedJobServer
) -> None:
    with stopped_by_operator(job_server), pytest.raises(CancelledRun, match="operator said so"):
        run_sync(outcome="never")


@contextmanager
def stopped_by_operator(job_server: EmbeddedJobServer) -> Generator[None]:
    """Ends the only call of this process as soon as its job lives."""

    def stop() -> None:
        eventually_blocking(lambda: is_running(job_server), within=20)
        engine = service.started()
        assert engine is not None
        (watched,) = engine.watch._watched.values()  # pyright: ignore[reportPrivateUsage] # the only call
        watched.ticket.cancel("the operator said so")

    stopper = threading.Thread(target=stop)
    stopper.start()
    yield
    stopper.join()


# --- the task object -----------------------------------------------------------------------------------------


def test_with_options_keeps_the_class_and_what_was_not_given(connection: JobServer) -> None:
    base = task_for(
        "job-server", ReportJob, connection=connection, deadline=timedelta(hours=1), tags=["a"]
    )
    changed = base.with_options(name="other", retries=3, on_exit="leave")
    assert type(changed) is RemoteTask
    assert (changed.name, changed.retries, changed.tags) == ("other", 3, {"a"})
    assert (changed.job.on_exit, changed.job.deadline) == ("leave", timedelta(hours=1))
    assert changed.job.connection is base.job.connection
    assert (base.retries, base.job.on_exit) == (0, "cancel")


def test_options_that_are_fixed_at_definition_are_refused_later() -> None:
    with pytest.raises(ConfigurationError, match="version: give it where the task is made"):
        task_for("job-server", ReportJob).with_options(version="2")


def test_results_are_not_cached_unless_the_user_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """CASE-283."""
    plain = task_for("job-server", ReportJob)
    for each in (plain, plain.with_options(cache_policy=NO_CACHE), plain.with_options(retries=1)):
        assert each.cache_policy == OwnRun()
        assert not each.persist_result
    assert plain.with_options(cache_policy=INPUTS).cache_policy == INPUTS
    keyed = plain.with_options(cache_key_fn=lambda context, inputs: "key")
    assert keyed.cache_policy not in (NO_CACHE, None)
    assert caplog.text == ""


def test_a_cancelled_task_is_not_cached_under_the_users_policy(
    run_sync: RemoteTask[..., Any], job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    cached = run_sync.with_options(cache_policy=INPUTS, persist_result=True)

    with stopped_by_operator(job_server), pytest.raises(CancelledRun):
        cached(seconds=5, message=str(tmp_path))
    assert isinstance(cached(seconds=5, message=str(tmp_path)), Report)
    assert job_server.stats().created == 2


def test_a_pickled_task_holds_no_secret_and_says_so_when_it_needs_one(
    connection: JobServer,
) -> None:
    """CASE-231."""
    described = task_for("job-server", ReportJob, connection=connection)
    data: bytes = cast(Any, cloudpickle).dumps(described)
    assert TOKEN.encode() not in data
    there: RemoteTask[..., Any] = pickle.loads(data)
    assert type(there) is RemoteTask
    with pytest.raises(ConfigurationError, match="never saved"):
        asyncio.run(there(seconds=0.1))


def test_the_same_function_at_another_place_is_the_same_task() -> None:
    """REQ-27: edits of the file above it must not make new jobs."""

    def one() -> RemoteTask[[], Any]:
        @webapi_task("job-server")
        def build() -> ReportJob:
            return ReportJob()

        return build

    assert one().job.key == one().job.key
    assert one().job.key.endswith("build")


# --- retries ---------------------------------------------------------------------------------------------------


def test_our_condition_reads_the_failure_and_asks_the_users_own_after_it() -> None:
    """CASE-104."""
    plain: Any = task_for("job-server", ReportJob)
    run = TaskRun(task_key="t", dynamic_key="0")

    class Knows(Exception):
        retryable = False

    assert may_help(plain, run, Failed(data=ValueError()))
    assert not may_help(plain, run, Failed(data=Knows()))
    assert not may_help(plain, run, Failed(data=ConfigurationError("wrong")))
    asked: list[State[Any]] = []

    def own(task: Any, task_run: Any, state: State[Any]) -> bool:
        asked.append(state)
        return False

    both = retry_condition(own)
    assert not both(plain, run, Failed(data=Knows()))
    assert asked == []
    assert not both(plain, run, Failed(data=ValueError()))
    assert len(asked) == 1


def test_a_spec_may_be_described_by_any_callable() -> None:
    def describe(day: int) -> JobSpec[Report]:
        return ReportJob(day=day)

    assert sync_task_for("job-server", describe).name == "describe"
    assert task_for("job-server", ReportJob).name == "ReportJob"


# --- whole processes ---------------------------------------------------------------------------------------------

PREAMBLE = """
    import sys
    from datetime import timedelta
    from uuid import UUID

    from prefect import flow, get_client
    from prefect.flow_engine import run_flow
    from prefect.task_runners import ProcessPoolTaskRunner
    from pydantic import HttpUrl, SecretStr

    from prefect_webapi import EngineSettings, sync_task_for
    from prefect_webapi_jobserver import JobServer, ReportJob

    run = sync_task_for("job-server", ReportJob, name="run", connection="processes")

    def save_connection():
        settings = EngineSettings(initial_interval=timedelta(milliseconds=100))
        JobServer(
            base_url=HttpUrl("{url}"), token=SecretStr("{token}"), settings=settings
        ).save("processes", overwrite=True)
"""

POOL = (
    PREAMBLE
    + """
    @flow(task_runner=ProcessPoolTaskRunner(max_workers=2))
    def inner():
        futures = [run.submit(seconds=0.5, result=1) for _ in range(2)]
        return [future.result().data for future in futures]

    @flow
    def root():
        return inner()

    if __name__ == "__main__":
        save_connection()
        print("GOT", root())
"""
)

KILLED = (
    PREAMBLE
    + """
    @flow
    def inner():
        return run(seconds=20, result="inner")

    @flow
    def root():
        from prefect.runtime import flow_run
        print("RUN", flow_run.id, flush=True)
        equal = [run.submit(seconds=20, result=n // 2) for n in range(4)]
        return [inner().data, *(future.result().data for future in equal)]

    if __name__ == "__main__":
        save_connection()
        if len(sys.argv) > 1:
            with get_client(sync_client=True) as client:
                again = client.read_flow_run(UUID(sys.argv[1]))
            print("GOT", run_flow(root, flow_run=again))
        else:
            root()
"""
)


@pytest.mark.chaos
@pytest.mark.timeout(240)
def test_equal_calls_in_two_pool_processes_are_two_jobs(
    scripts: Scripts, job_server: EmbeddedJobServer
) -> None:
    """CASE-284."""
    told = scripts.run(POOL.format(url=job_server.url, token=TOKEN), within=200)
    assert "GOT [1, 1]" in told
    assert job_server.stats().created == 2


@pytest.mark.timeout(300)
def test_a_killed_flow_run_meets_its_jobs_when_it_is_run_again(
    scripts: Scripts, job_server: EmbeddedJobServer
) -> None:
    """CASE-280: equal calls, and one in a subflow."""
    script = scripts.write(KILLED.format(url=job_server.url, token=TOKEN))
    first = scripts.start(script)
    eventually_blocking(lambda: job_server.stats().created == 5, within=120)
    first.send(signal.SIGKILL)
    _, told = first.end()
    run_id = told.split("RUN ")[1].split()[0]
    again = scripts.run(script, run_id, within=200)
    assert "GOT ['inner', 0, 0, 1, 1]" in again
    assert job_server.stats().created == 5
    assert job_server.log("delete") == []
