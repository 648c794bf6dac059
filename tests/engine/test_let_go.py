"""A job that a living process drives no longer, although it is its own in the ledger: its own sweeper sees to it."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from prefect_webapi.contract.errors import LedgerUnavailable
from prefect_webapi.contract.keys import JobKey
from prefect_webapi.engine import host as engine_host
from prefect_webapi.engine import job as engine_job
from prefect_webapi.engine.host import Host
from prefect_webapi.engine.reaper import sweep
from prefect_webapi.engine.request import Fate, RunState
from prefect_webapi.ledger.records import Move, MoveResult, Record
from prefect_webapi.ledger.sql import SqlStore
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import ReportJob
from tests.support.engine import GivenRuns, Told, at, request
from tests.support.sweeping import LONG_AGO
from tests.support.waiting import eventually

ENDLESS = ReportJob(outcome="never")
CANCELLED = {"run-1": Fate(RunState.CANCELLED, "Cancelled", LONG_AGO)}
RUNNING = {"run-1": Fate(RunState.RUNNING, "Running", LONG_AGO)}
FORGIVING = {"caching": {"maxSystemFailures": 1, "resyncInterval": "5s"}}


async def running(host: Host, **call: Any) -> Any:
    """A call whose job runs."""
    told = Told()
    ticket = host.admit(request(ENDLESS, task_type="keys", reporter=told, **call))
    await eventually(lambda: "RUNNING" in told.names, within=20)
    return ticket


async def lost(host: Host, server: EmbeddedJobServer) -> None:
    """A job without contact, whose task has a retry left."""
    ticket = await running(host, max_attempts=2)
    server.fault("get", status=500, times=None)
    server.fault("batch", status=500, times=None)
    outcome = await asyncio.wait_for(ticket.outcome(), 20)
    assert outcome.info.may_retry
    server.clear_faults()


class Away(SqlStore):
    """A ledger that takes no moves for a while."""

    is_away = False

    async def move(self, move: Move) -> MoveResult:
        if Away.is_away:
            raise LedgerUnavailable("away")
        return await super().move(move)


async def test_a_cancel_while_the_ledger_was_away_ends_the_job_after_it(
    job_server: EmbeddedJobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was away for longer than its writes are repeated; whatever has become of the flow run."""
    monkeypatch.setattr(engine_job, "LEDGER_PATIENCE", timedelta(seconds=1))
    monkeypatch.setattr(engine_host, "SWEEP_SECONDS", 0.5)
    runs = GivenRuns(RUNNING)
    with at(tmp_path, job_server, store=Away, runs=runs) as host:
        ticket = await running(host)
        Away.is_away = True
        ticket.cancel("the task's time is up")
        with pytest.raises(LedgerUnavailable):
            await ticket.outcome()
        Away.is_away = False
        await eventually(lambda: job_server.stats().live == 0, within=20)


async def test_a_job_without_contact_that_gets_no_retry_is_ended_with_its_run(
    job_server: EmbeddedJobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flow run was cancelled before the retry, or a `retry_condition_fn` wanted none."""
    monkeypatch.setattr(engine_host, "SWEEP_SECONDS", 0.5)
    runs = GivenRuns(RUNNING)
    with at(tmp_path, job_server, FORGIVING, runs=runs) as host:
        await lost(host, job_server)
        runs.given.update(CANCELLED)
        await eventually(lambda: job_server.stats().live == 0, within=20)


async def test_a_job_that_waits_for_a_retry_is_left_alone_by_its_own_process(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """However long its run has been running: the retry takes it up."""
    runs = GivenRuns(RUNNING)
    with at(
        tmp_path,
        job_server,
        FORGIVING,
        runs=runs,
        sweeps=False,
        abandonAfter="1s",
        orphanAfter="1s",
    ) as host:
        await lost(host, job_server)
        await asyncio.sleep(1.5)
        report = await asyncio.wrap_future(host.perform(sweep))
        assert report.jobs == ()
        told = Told()
        host.admit(request(ENDLESS, task_type="keys", reporter=told, attempt=2, max_attempts=2))
        await eventually(lambda: "RUNNING" in told.names, within=20)
        assert (job_server.stats().created, job_server.stats().live) == (1, 1)


class Forgetful(SqlStore):
    """Some reads fail."""

    fails = 0

    async def get(self, key: JobKey) -> Record | None:
        if Forgetful.fails:
            Forgetful.fails -= 1
            raise LedgerUnavailable("the connection broke")
        return await super().get(key)


async def test_a_pass_whose_read_failed_after_a_take_over_can_be_repeated(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    with at(tmp_path, job_server) as host:
        await running(host)
    runs = GivenRuns(CANCELLED)
    with at(tmp_path, job_server, store=Forgetful, runs=runs, sweeps=False) as host:
        Forgetful.fails = 1
        first = await asyncio.wrap_future(host.perform(sweep))
        assert len(first.troubles) == 1
        Forgetful.fails = 0
        await asyncio.wrap_future(host.perform(sweep))
        assert job_server.stats().live == 0


async def test_the_sweeper_of_a_process_goes_on_after_an_unforeseen_error(
    job_server: EmbeddedJobServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Runs(GivenRuns):
        asked = 0

        async def fates(self, *runs: Any) -> Any:
            self.asked += 1
            if self.asked == 1:
                raise KeyError("an unforeseen error")
            return await super().fates(*runs)

    with at(tmp_path, job_server) as host:
        await running(host)
    monkeypatch.setattr(engine_host, "SWEEP_SECONDS", 0.2)
    runs = Runs(CANCELLED)
    with at(tmp_path, job_server, {"resourceQuotas": {"default": 1}}, runs=runs) as host:
        for day in range(2):  # one of them waits, so it sweeps
            host.admit(request(ReportJob(outcome="never", day=day), task_type="keys", run="run-2"))
        await eventually(lambda: runs.asked > 1, within=20)
    assert "unforeseen" in caplog.text
