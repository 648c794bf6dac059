"""The machine's clock is set while jobs run: spans don't notice."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from prefect_webapi import Phase
from prefect_webapi.clock import Clock
from prefect_webapi.engine.reaper import sweep
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import ReportJob
from tests.support.engine import GivenRuns, at, run
from tests.support.ledger import another_store, ledger_of
from tests.support.sweeping import CRASHED
from tests.support.waiting import eventually
from tests.support.witness import places_taken


@pytest.mark.parametrize("hours", [1, -1])
async def test_a_clock_that_jumps_ends_no_job_and_loses_no_place(
    job_server: EmbeddedJobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    """CASE-206: with a deadline and a quota; each job is made once, none is deleted, reads go on as often."""
    jump = timedelta(0)

    def now(_: Clock) -> datetime:
        return datetime.now(UTC) + jump

    monkeypatch.setattr(Clock, "now", now)
    config = {"resourceQuotas": {"default": 2}}
    with at(tmp_path, job_server, config, deadline="60s") as host:
        jobs = [
            asyncio.ensure_future(run(host, ReportJob(seconds=1.5, day=day), task_run=f"job {day}"))
            for day in range(4)
        ]
        await eventually(lambda: job_server.stats().live == 2, within=10)
        jump = timedelta(hours=hours)
        reads = len(job_server.log())
        await eventually(lambda: len(job_server.log()) > reads + 4, within=10)
        outcomes = await asyncio.gather(*jobs)
    assert [outcome.info.phase for outcome in outcomes] == [Phase.SUCCESS] * 4
    assert job_server.stats().created == 4
    assert job_server.stats().peak_live == 2
    assert job_server.log("delete") == []
    assert await places_taken(tmp_path) == 0


@pytest.mark.parametrize("hours", [1, -1])
async def test_a_sweeper_takes_no_job_of_a_living_process_when_the_clock_jumps(
    job_server: EmbeddedJobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    """CASE-206: although its flow run has ended; the process is heard of within two seconds."""
    jump = timedelta(0)

    def now(_: Clock) -> datetime:
        return datetime.now(UTC) + jump

    async def last_beat() -> datetime:
        async with another_store(ledger_of(tmp_path)) as store:
            [row] = await store.runtimes()
        return row.last_beat

    async def has_beaten_since(at: datetime) -> bool:
        return (
            abs(now(Clock()) - await last_beat()) < timedelta(seconds=5) and at != await last_beat()
        )

    monkeypatch.setattr(Clock, "now", now)
    runs = GivenRuns({"run-1": CRASHED})
    with at(tmp_path, job_server, runs=runs) as host:
        job = asyncio.ensure_future(run(host, ReportJob(outcome="never")))
        await eventually(lambda: job_server.stats().live == 1, within=10)
        first = await last_beat()
        await eventually(lambda: has_beaten_since(first), within=4, every=0.1)
        jump = timedelta(hours=hours)  # ten seconds before the next one in turn
        await eventually(lambda: has_beaten_since(first), within=4, every=0.1)
        with at(tmp_path, job_server, runs=runs, sweeps=False) as sweeper:
            report = await asyncio.wrap_future(sweeper.perform(sweep))
        assert (report.looked_at, report.driven, report.jobs) == (1, 1, ())
        job_server.end(job_server.jobs()[0].name, "succeeded")
        assert (await job).info.phase is Phase.SUCCESS
    assert job_server.stats().created == 1
    assert job_server.log("delete") == []
