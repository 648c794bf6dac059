"""Tasks in the background: scheduled by one process, run by a task worker in another."""

from __future__ import annotations

import importlib
import signal
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType, TaskRun
from prefect.exceptions import CancelledRun
from prefect.states import Cancelling, Scheduled
from pydantic import HttpUrl, SecretStr

from prefect_webapi import ConfigurationError, EngineSettings, JobFailed, run_key
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import JobServer
from tests.support.jobserver import TOKEN
from tests.support.prefect import Child, PrefectServer, Scripts, save_block
from tests.support.waiting import eventually_blocking

TASKS = """
    from prefect import flow
    from prefect_webapi_jobserver import run_job, run_job_sync

    sync = run_job_sync.with_options(connection="delayed", retries=1)
    later = run_job.with_options(connection="delayed")
    delayed = []

    @flow
    def nightly():
        for _ in range(2):
            delayed.append(sync.delay(seconds=0.1, result="equal"))
            delayed[-1].wait(60)

    @flow
    def endless():
        delayed.extend(each.delay(outcome="never") for each in (later, sync))
        for future in delayed:
            future.wait(60)
"""

WORKER = """
    from prefect.task_worker import serve
    from {module} import later, sync

    serve(sync, later)
"""


@pytest.fixture
def client(prefect_api: PrefectServer) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def tasks(
    job_server: EmbeddedJobServer,
    prefect_api: PrefectServer,
    scripts: Scripts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """A module of tasks that this process and a task worker both import."""
    settings = EngineSettings(
        initial_interval=timedelta(milliseconds=100), retry_base=timedelta(milliseconds=20)
    )
    block = JobServer(base_url=HttpUrl(job_server.url), token=SecretStr(TOKEN), settings=settings)
    save_block(block, "delayed")
    name = f"delayed_{tmp_path.name.replace('-', '_')}"
    scripts.write(TASKS, f"{name}.py")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    return importlib.import_module(name)


def serve(scripts: Scripts, tasks: Any, ledger: Path) -> Child:
    url = f"sqlite+aiosqlite:///{ledger}"
    script = scripts.write(WORKER.format(module=tasks.__name__), "worker.py")
    return scripts.start(script, PREFECT_INTEGRATIONS_WEBAPI_LEDGER_URL=url)


def ended(client: SyncPrefectClient, run: UUID) -> TaskRun:
    """The task run, once it is over."""

    def final() -> TaskRun | None:
        found = client.read_task_run(run)
        return found if found.state is not None and found.state.is_final() else None

    found = eventually_blocking(final, within=60, every=0.2)
    assert found is not None
    return found


@pytest.mark.timeout(240)
def test_a_delayed_task_runs_its_job_in_a_task_worker(
    tasks: Any,
    client: SyncPrefectClient,
    job_server: EmbeddedJobServer,
    scripts: Scripts,
    tmp_path: Path,
) -> None:
    """How the job ends is how the scheduled task run ends: result, failure, another attempt, cancel.

    Two equal calls in one flow run are two jobs, although a task worker takes results for those of equal calls.
    """

    serve(scripts, tasks, tmp_path / "webapi.db")
    good = tasks.later.delay(seconds=0.1, result=7)
    bad = tasks.later.delay(seconds=0.1, outcome="fail", message="no figures")
    flaky = tasks.sync.delay(seconds=0.1, outcome="fail-first", result=8)

    run = ended(client, good.task_run_id)
    assert (run.state_name, run.run_count, good.result().data) == ("Completed", 1, 7)
    run = ended(client, bad.task_run_id)
    assert (run.state_name, run.run_count) == ("RetryableFailure", 1)
    with pytest.raises(JobFailed, match="no figures"):
        bad.result()
    run = ended(client, flaky.task_run_id)
    assert (run.state_name, run.run_count, flaky.result().data) == ("Completed", 2, 8)
    assert job_server.stats().created == 4
    tasks.nightly()
    assert [ended(client, each.task_run_id).state_name for each in tasks.delayed] == [
        "Completed"
    ] * 2
    assert [each.result().data for each in tasks.delayed] == ["equal"] * 2
    assert job_server.stats().created == 6

    tasks.delayed.clear()
    flow_run = threading.Thread(target=tasks.endless)
    flow_run.start()
    eventually_blocking(lambda: job_server.stats().live == 2, within=30)
    run = client.read_task_run(tasks.delayed[0].task_run_id)
    assert run.flow_run_id is not None
    client.set_flow_run_state(run.flow_run_id, Cancelling())
    flow_run.join()
    for future in tasks.delayed:
        run = ended(client, future.task_run_id)
        assert (run.state_type, run.state_name) == (StateType.CANCELLED, "Cancelled")
        with pytest.raises(CancelledRun, match="the flow run was cancelled"):
            future.result()
    assert job_server.stats().live == 0


def test_delay_inside_run_key_is_refused_as_it_would_be_lost(tasks: Any) -> None:
    """A second start would not meet the job, and say nothing."""
    with run_key("monday"), pytest.raises(ConfigurationError, match="idempotency_key"):
        tasks.sync.delay(seconds=0.1)


@pytest.mark.chaos
@pytest.mark.timeout(240)
def test_a_delayed_task_whose_worker_was_killed_meets_its_job_when_it_is_scheduled_again(
    tasks: Any,
    client: SyncPrefectClient,
    job_server: EmbeddedJobServer,
    scripts: Scripts,
    tmp_path: Path,
) -> None:
    """Prefect leaves the task run Running for ever; whoever schedules it again gets the job that it has."""
    first = serve(scripts, tasks, tmp_path / "webapi.db")
    future = tasks.sync.delay(seconds=15, result="once")
    scheduled = client.read_task_run(future.task_run_id).state
    assert scheduled is not None
    eventually_blocking(lambda: job_server.stats().live == 1, within=60)
    first.send(signal.SIGKILL)
    first.end()
    serve(scripts, tasks, tmp_path / "webapi.db")
    left = client.read_task_run(future.task_run_id)
    assert left.state is not None
    assert not left.state.is_final()
    again = Scheduled(state_details=scheduled.state_details)
    client.set_task_run_state(future.task_run_id, again, force=True)
    assert ended(client, future.task_run_id).state_name == "Completed"
    assert future.result().data == "once"
    assert job_server.stats().created == 1
