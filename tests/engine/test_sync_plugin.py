"""Services that answer with the result: one call, under the same limits, quotas and rules."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from prefect_webapi import PhaseInfo, TaskExecutionContext
from prefect_webapi.engine.request import Outcome, Overrides
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import ReportJob
from tests.support.engine import at, block, engine, request, run
from tests.support.plugins import DoPlugin, entry
from tests.support.waiting import eventually

JOB = ReportJob(seconds=0.1, result="done")


def code(outcome: Outcome) -> str:
    assert outcome.info.err is not None
    return outcome.info.err.code


async def test_the_result_of_the_call_is_the_result_of_the_task(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-212, REQ-72."""
    with at(tmp_path, job_server) as host:
        outcome = await run(host, JOB, "do")
    assert outcome.value.data == "done"
    assert len(job_server.log("create")) == 1


async def test_a_call_must_end_in_a_terminal_phase(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-213."""
    with at(tmp_path, job_server) as host:
        outcome = await run(host, ReportJob(outcome="never"), "do")
    assert code(outcome) == "NonTerminalSyncPhase"
    assert outcome.info.kind == "system"


async def test_an_idempotent_call_is_repeated_with_the_same_key(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-214, CASE-198 (the idempotent half)."""
    job_server.fault("create", status=503)
    with at(tmp_path, job_server) as host:
        outcome = await run(host, JOB, "idempotent-do")
    assert outcome.value.data == "done"
    assert [entry.key for entry in job_server.log("create")] == [outcome.job_key] * 2


@pytest.mark.parametrize(
    ("fault", "expected", "retryable"),
    [
        ({"status": 503}, "HTTP503", True),
        ({"drop": True, "after_acceptance": True}, "OutcomeUnknown", False),
    ],
)
async def test_a_call_that_is_not_idempotent_is_never_repeated(
    job_server: EmbeddedJobServer,
    tmp_path: Path,
    fault: dict[str, Any],
    expected: str,
    retryable: bool,
) -> None:
    """CASE-215: an answer that says no is a retryable failure; a lost one is an unknown outcome."""
    job_server.fault("create", **fault)
    with at(tmp_path, job_server) as host:
        outcome = await run(host, JOB, "do")
    assert code(outcome) == expected
    assert outcome.info.kind == "system"
    assert outcome.info.may_retry is retryable
    assert len(job_server.log("create")) == 1


async def test_a_wrong_request_is_final(job_server: EmbeddedJobServer, tmp_path: Path) -> None:
    """CASE-216."""
    job_server.fault("create", status=400, body={"message": "no such report"}, times=None)
    with at(tmp_path, job_server) as host:
        outcome = await run(host, JOB, "do", max_attempts=3)
    assert not outcome.info.may_retry
    assert outcome.info.kind == "user"
    assert "no such report" in outcome.info.reason
    assert len(job_server.log("create")) == 1


async def test_a_hanging_call_ends_at_its_deadline(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-217."""
    job_server.fault("create", delay=30)
    with at(tmp_path, job_server) as host:
        began = time.monotonic()
        options = Overrides(deadline=timedelta(seconds=1))
        outcome = await run(host, JOB, "do", options=options)
        took = time.monotonic() - began
    assert code(outcome) == "Timeout"
    assert 0.9 < took < 5


async def test_no_more_calls_run_than_the_quota_allows(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-218: each call takes 0.2 s at the server; in any such span at most two arrive."""
    job_server.fault("create", delay=0.2, times=None)
    with at(tmp_path, job_server, {"resourceQuotas": {"default": 2}}) as host:
        specs = [ReportJob(day=day) for day in range(10)]
        await asyncio.gather(*(run(host, spec, "do") for spec in specs))
    times = sorted(call.mono for call in job_server.log("create"))
    assert len(times) == 10
    assert all(third - first >= 0.2 for first, third in zip(times, times[2:], strict=False))


async def test_calls_obey_the_write_limit(job_server: EmbeddedJobServer, tmp_path: Path) -> None:
    """CASE-219: at most burst + qps x w calls in any window of w seconds."""
    with at(tmp_path, job_server, {"writeRateLimiter": {"qps": 10, "burst": 5}}) as host:
        await asyncio.gather(*(run(host, ReportJob(day=day), "do") for day in range(15)))
    times = [call.mono for call in job_server.log("create")]
    for first in range(len(times)):
        for last in range(first, len(times)):
            window = times[last] - times[first]
            assert last - first + 1 <= 5 + 10 * window + 1


class BlockingDo(DoPlugin):
    """An author who knows no `async`: the engine gives each call a thread."""

    def do(self, ctx: TaskExecutionContext) -> PhaseInfo:  # type: ignore[override]
        time.sleep(0.3)
        ctx.output_writer.put({"uri": "here", "data": None})
        return PhaseInfo.success()


async def test_blocking_calls_run_side_by_side(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-220: and the engine's loop goes on meanwhile."""
    plugin = entry(BlockingDo, "blocking-do")
    with engine(tmp_path, [plugin], {"default": block(job_server)}) as host:
        await run(host, ReportJob(day=-1), "blocking-do")
        began = time.monotonic()
        specs = [ReportJob(day=day) for day in range(10)]
        outcomes = await asyncio.gather(*(run(host, spec, "blocking-do") for spec in specs))
        took = time.monotonic() - began
    assert all(outcome.value.uri == "here" for outcome in outcomes)
    assert took < 10 * 0.3


async def test_a_result_that_is_too_large_is_refused(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-221."""
    with at(tmp_path, job_server, maxDatasetSizeBytes=1000) as host:
        outcome = await run(host, ReportJob(result="x" * 2000), "do")
    assert code(outcome) == "OutputSizeExceeded"
    assert not outcome.info.may_retry


async def test_a_cancelled_call_is_dropped_and_its_slot_given_back(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-222."""
    job_server.fault("create", delay=30, times=1)
    with at(tmp_path, job_server, {"resourceQuotas": {"default": 1}}) as host:
        ticket = host.admit(request(JOB, task_type="do"))
        await eventually(lambda: job_server.log("create"), within=5)
        ticket.cancel("no longer wanted")
        outcome = await ticket.outcome()
        assert outcome.info.phase.name == "ABORTED"
        assert "no longer wanted" in outcome.info.reason
        after = await run(host, ReportJob(day=2, result="next"), "do")
    assert after.value.data == "next"
