"""The machine's clock is set while jobs run: spans don't notice."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from prefect_webapi import Phase
from prefect_webapi.clock import Clock
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import ReportJob
from tests.support.engine import at, run
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
