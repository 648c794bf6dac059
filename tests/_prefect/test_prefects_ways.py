"""What Prefect offers any task works on tasks whose work is a remote job, and the job follows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import psutil
import pytest
from prefect import flow, task, unmapped
from prefect.cache_policies import INPUTS
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    TaskRunFilter,
    TaskRunFilterTags,
)
from prefect.client.schemas.objects import StateType, TaskRun
from prefect.runtime import flow_run
from prefect.states import Cancelling
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.transactions import atransaction, transaction

from prefect_webapi import JobFailed, RemoteTask, run_many, sync_task_for, task_for
from prefect_webapi._prefect import body
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import Report, ReportJob
from tests.support.engine import block
from tests.support.prefect import Child, PrefectServer, Scripts, prefect_leaks, save_block
from tests.support.waiting import eventually, eventually_blocking

pytestmark = pytest.mark.usefixtures("engine_here")


class Broken(Exception):
    """What a flow of these tests fails with."""


@pytest.fixture
def run(job_server: EmbeddedJobServer) -> RemoteTask[..., Any]:
    return sync_task_for("job-server", ReportJob, name="run", connection=block(job_server))


def creates(server: EmbeddedJobServer) -> int:
    return server.stats().created


def with_client(ask: Callable[[SyncPrefectClient], Any]) -> Any:
    with get_client(sync_client=True) as client:
        return ask(client)


def ended_runs(of: str, count: int) -> list[TaskRun]:
    """The task runs of a flow run, once so many are over."""
    mine = FlowRunFilter(id=FlowRunFilterId(any_=[UUID(of)]))

    def all_over() -> list[TaskRun]:
        runs: list[TaskRun] = with_client(lambda c: c.read_task_runs(flow_run_filter=mine))
        over = [each for each in runs if each.state is not None and each.state.is_final()]
        return over if len(over) == count else []

    return eventually_blocking(all_over, within=20, every=0.1)


def names_of(run: UUID) -> list[str]:
    """Names of a task run's states in order."""
    states = with_client(lambda client: client.read_task_run_states(run))
    return [state.name for state in sorted(states, key=lambda state: state.timestamp)]


# --- retries, hooks, tags, results ---------------------------------------------------------------


def test_a_retry_waits_its_delay_and_hooks_run(
    run: RemoteTask[..., Any], job_server: EmbeddedJobServer
) -> None:
    """`retry_delay_seconds` between the attempts, each a job of its own; hooks once per end; tags for filters."""
    told: list[str] = []
    runs: list[str] = []
    flaky = run.with_options(
        retries=1,
        retry_delay_seconds=0.3,
        tags=["ways"],
        on_running=[lambda task, run, state: told.append("running")],
        on_completion=[lambda task, run, state: told.append(f"completed {state.name}")],
        on_failure=[lambda task, run, state: told.append(f"failed {state.name}")],
    )

    @flow
    def nightly() -> None:
        runs.append(str(flow_run.id))
        flaky(seconds=0.1, outcome="fail-first")
        with pytest.raises(JobFailed):
            flaky.with_options(retries=0)(seconds=0.1, outcome="fail")

    nightly()
    assert creates(job_server) == 3
    first, second, _ = (mono for _, mono in specs_made(job_server))
    assert second - first >= 0.1 + 0.3  # its job, the delay
    assert told == [
        "running",
        "running",
        "completed Completed",
        "running",
        "failed RetryableFailure",
    ]
    ended_runs(runs[0], 2)
    tagged = TaskRunFilter(tags=TaskRunFilterTags(all_=["ways"]))
    mine = FlowRunFilter(id=FlowRunFilterId(any_=[UUID(runs[0])]))
    found = with_client(lambda c: c.read_task_runs(task_run_filter=tagged, flow_run_filter=mine))
    by_count = {each.run_count: each for each in found}
    assert by_count.keys() == {1, 2}
    names = names_of(by_count[2].id)
    waits, retries = names.index("AwaitingRetry"), names.index("Retrying")
    assert waits < retries < names.index("Completed")


def test_a_cached_result_makes_no_job(
    run: RemoteTask[..., Any], job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """A cache policy of the user's is followed, also over flow runs; `refresh_cache` makes the job again."""
    cached = run.with_options(cache_policy=INPUTS, persist_result=True)
    asked = {"seconds": 0.1, "result": 7, "message": str(tmp_path)}

    @flow
    def nightly(again: bool = False) -> Any:
        return cast(Any, cached.with_options(refresh_cache=again))(**asked, return_state=True)

    first, second, third = nightly(), nightly(), nightly(again=True)
    assert [state.name for state in (first, second, third)] == ["Completed", "Cached", "Completed"]
    assert [state.result().data for state in (first, second, third)] == [7, 7, 7]
    assert creates(job_server) == 2


def test_a_persisted_result_and_failure_are_read_from_prefects_api(
    run: RemoteTask[..., Any],
) -> None:
    runs: list[str] = []

    @flow(persist_result=True)
    def nightly() -> None:
        runs.append(str(flow_run.id))
        run(seconds=0.1, result=7)
        cast(Any, run)(seconds=0.1, outcome="fail", message="no figures", return_state=True)

    nightly()
    states = {each.state_name: each.state for each in ended_runs(runs[0], 2)}
    read: Any = states["Completed"]
    assert read.result() == Report(uri=read.result().uri, data=7)
    failed: Any = states["RetryableFailure"]
    with pytest.raises(JobFailed, match="no figures"):
        failed.result()


# --- futures ----------------------------------------------------------------------------------------


@prefect_leaks
def test_wait_for_orders_and_a_failed_upstream_makes_no_job(
    run: RemoteTask[..., Any], job_server: EmbeddedJobServer
) -> None:
    """As for any task: what waits for a failure is NotReady, and nothing is asked of the service."""
    later = task_for("job-server", ReportJob, name="later", connection=block(job_server))
    names: list[str | None] = []

    @flow
    def nightly() -> None:
        first = run.submit(kind="first", seconds=0.5)
        second = later.submit(kind="second", seconds=0.1, wait_for=[first])
        broken = run.submit(kind="broken", seconds=0.1, outcome="fail")
        waits = cast(Any, run).submit(kind="never", wait_for=[second, broken], return_state=True)
        names.extend(each.name for each in (first.state, second.state, broken.state, waits))

    nightly()
    assert names == ["Completed", "Completed", "RetryableFailure", "NotReady"]
    at = {spec["kind"]: mono for spec, mono in specs_made(job_server)}
    assert at.keys() == {"first", "second", "broken"}
    assert at["second"] - at["first"] >= 0.5


@prefect_leaks
def test_map_takes_unmapped_and_futures_and_keeps_the_order(
    run: RemoteTask[..., Any], job_server: EmbeddedJobServer
) -> None:
    @task
    def days() -> list[int]:
        return [3, 1, 2]

    def nightly() -> list[Any]:
        futures = cast(Any, run).map(
            day=cast(Any, days).submit(), result=["c", "a", "b"], seconds=unmapped(0.1)
        )
        return futures.result()

    pooled: Any = cast(Any, flow)(nightly, task_runner=ThreadPoolTaskRunner(max_workers=2))
    assert [report.data for report in pooled()] == ["c", "a", "b"]
    days_made = {spec["day"]: spec["result"] for spec, _ in specs_made(job_server)}
    assert days_made == {3: "c", 1: "a", 2: "b"}
    assert job_server.stats().peak_live <= 2


PROCESSES = """
    from prefect import flow, unmapped
    from prefect.runtime import flow_run
    from prefect.task_runners import ProcessPoolTaskRunner
    from prefect_webapi_jobserver import run_job_sync

    @flow(task_runner=ProcessPoolTaskRunner(max_workers=1))
    def nightly(outcome: str):
        print("RUN", flow_run.id, flush=True)
        job = run_job_sync.with_options(connection="pool")
        results, seconds = ["c", "a", "b"], unmapped(0.2)
        futures = job.map(day=[3, 1, 2], result=results, seconds=seconds, outcome=unmapped(outcome))
        return [future.result().data for future in futures]

    if __name__ == "__main__":
        print("GOT", nightly("succeed"), flush=True)
        nightly("never")
"""


@pytest.mark.timeout(280)
def test_a_pool_of_processes_makes_a_job_per_call_and_hears_of_a_cancel(
    prefect_api: PrefectServer, scripts: Scripts, job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """`ProcessPoolTaskRunner`: the pool's process has an engine of its own, on the same ledger."""
    save_block(block(job_server), "pool")
    ledger = f"sqlite:///{tmp_path / 'pool.db'}"
    child = scripts.start(PROCESSES, PREFECT_INTEGRATIONS_WEBAPI_LEDGER_URL=ledger)
    with children_ended(child):
        assert child.process.stdout is not None
        told = list(iter_until(child.process.stdout, "RUN", times=2))
        assert "GOT ['c', 'a', 'b']\n" in told
        assert (creates(job_server), job_server.stats().duplicates) == (3, {})
        eventually_blocking(lambda: job_server.stats().live == 1, within=60)
        run = UUID(told[-1].split()[1])
        with_client(lambda client: client.set_flow_run_state(run, Cancelling()))
        code, said = child.end(within=60)
    assert code != 0, said
    assert "CancelledRun: the flow run was cancelled" in said
    assert (job_server.stats().live, job_server.stats().duplicates) == (0, {})


def iter_until(lines: Iterable[str], start: str, *, times: int) -> Iterator[str]:
    """Lines up to the one that is the last of so many that begin so."""
    for line in lines:
        yield line
        times -= line.startswith(start)
        if times == 0:
            return
    raise AssertionError(f"the output ended before {start}")


@contextmanager
def children_ended(child: Child) -> Generator[None]:
    """A pool's process outlives a flow that is killed, and holds its output open: nobody would see its end."""
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            for each in psutil.Process(child.process.pid).children(recursive=True):
                each.kill()


def test_an_interrupt_just_after_a_job_was_handed_over_ends_it(
    run: RemoteTask[..., Any], job_server: EmbeddedJobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CASE-110: Prefect raises a time-out or a signal wherever the thread happens to be."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(body, "undone_with_transaction", interrupted)

    @flow
    def nightly() -> None:
        run(outcome="never")

    with pytest.raises(KeyboardInterrupt):
        nightly()
    assert job_server.stats().live == 0


# --- transactions --------------------------------------------------------------------------------------


def test_a_transaction_that_is_rolled_back_takes_its_jobs_with_it(
    run: RemoteTask[..., Any], job_server: EmbeddedJobServer
) -> None:
    """The live job is deleted; of the finished one the flow's next attempt gets a new one, not the old result."""
    undone: list[str] = []
    drops = sync_task_for(
        "job-server",
        ReportJob,
        name="drops",
        connection=block(job_server),
        on_rollback=[lambda own: undone.append(own.get("table"))],
    )
    states: list[Any] = []

    @flow(retries=1)
    def nightly() -> Any:
        with transaction() as around:
            around.set("table", "sales")
            report = drops(seconds=0.1, result=7)
            if not states:
                states.append(run.submit(outcome="never"))
                eventually_blocking(lambda: job_server.stats().live == 1, within=20)
                raise Broken
        states[0].wait(20)
        return report.data

    assert nightly() == 7
    assert undone == ["sales"]
    assert states[0].state.type is StateType.CANCELLED
    assert "its transaction was rolled back" in str(job_server.log("delete"))
    assert (creates(job_server), job_server.stats().live) == (3, 0)


def test_a_transaction_that_is_committed_keeps_its_jobs(
    run: RemoteTask[..., Any], job_server: EmbeddedJobServer
) -> None:
    """A later failure of the flow, or of a task around the call, takes nothing back: the next attempt meets the job."""
    tries: list[int] = []

    @task(retries=1)
    def around() -> Any:
        report = run(seconds=0.1, result="nested")
        tries.append(1)
        if len(tries) == 1:
            raise Broken
        return report.data

    @flow(retries=1)
    def nightly() -> Any:
        with transaction():
            report = run(seconds=0.1, result=7)
        told = around()
        if len(tries) == 2:
            tries.append(2)
            raise Broken
        return told, report.data

    assert nightly() == ("nested", 7)
    assert creates(job_server) == 2


@prefect_leaks
async def test_the_jobs_of_run_many_are_rolled_back_with_their_transaction(
    job_server: EmbeddedJobServer,
) -> None:
    many = task_for("job-server", ReportJob, name="run", connection=block(job_server))
    tries: list[int] = []

    @flow(retries=1)
    async def nightly() -> int:
        async with atransaction():
            reports = await run_many(many, [ReportJob(day=day, seconds=0.1) for day in range(3)])
            tries.append(1)
            if len(tries) == 1:
                raise Broken
        return len(reports)

    assert await nightly() == 3
    assert creates(job_server) == 6


@prefect_leaks
async def test_what_was_over_of_a_run_many_that_is_cut_short_is_rolled_back(
    job_server: EmbeddedJobServer,
) -> None:
    """All that had ended by then, and not one of them only."""
    many = task_for("job-server", ReportJob, name="run", connection=block(job_server))
    specs = [ReportJob(day=day, seconds=0.1) for day in range(3)]
    tries: list[int] = []

    @flow(retries=1)
    async def nightly() -> int:
        tries.append(1)
        async with atransaction():
            if len(tries) == 1:
                endless = ReportJob(day=9, outcome="never")
                running = asyncio.ensure_future(run_many(many, [*specs, endless]))
                await eventually(lambda: creates(job_server) == 4, within=20)
                await eventually(lambda: job_server.stats().live == 1, within=20)
                await asyncio.sleep(1)
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
                raise Broken
            reports = await run_many(many, specs)
        return len(reports)

    assert await nightly() == 3
    assert creates(job_server) == 4 + 3


def test_a_rollback_takes_back_no_result_of_another_run(job_server: EmbeddedJobServer) -> None:
    """That run has committed it; this one was only handed it out."""
    load = sync_task_for(
        "job-server", ReportJob, name="load", connection=block(job_server), idempotency_key="May"
    )

    @flow
    def nightly(fails: bool) -> None:
        with transaction():
            load(seconds=0.1, result=7)
            if fails:
                raise Broken

    nightly(fails=False)
    with pytest.raises(Broken):
        nightly(fails=True)
    nightly(fails=False)
    assert creates(job_server) == 1


def specs_made(server: EmbeddedJobServer) -> list[tuple[dict[str, Any], float]]:
    """What the service was asked to make, and when, in seconds of its clock."""
    return [(cast(dict[str, Any], each.body)["spec"], each.mono) for each in server.log("create")]
