"""A synchronous service: one call that answers with the end, made in the task's own process."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from prefect_webapi import Phase
from prefect_webapi.engine.request import Overrides
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import ReportJob
from tests.support.engine import at, request, run
from tests.support.waiting import eventually
from tests.support.witness import places_taken, records

TYPES = ("do", "idempotent-do", "blocking-do")


@pytest.mark.parametrize("task_type", TYPES)
async def test_what_the_call_put_is_the_result(
    job_server: EmbeddedJobServer, tmp_path: Path, task_type: str
) -> None:
    """CASE-212, REQ-72: and a second execution of the run gets it without a call."""
    with at(tmp_path, job_server) as host:
        outcome = await run(host, ReportJob(result=42), task_type)
        again = await run(host, ReportJob(result=42), task_type, execution="2")
    assert outcome.info.phase is Phase.SUCCESS
    assert outcome.value.data == again.value.data == 42
    [call] = job_server.log()
    assert call.op == "create"
    assert call.body["key"] == outcome.job_key


async def test_an_end_that_is_none_is_the_plugins_fault(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-213."""
    with at(tmp_path, job_server) as host:
        outcome = await run(host, ReportJob(outcome="never"), "do", max_attempts=3)
    assert outcome.info.err is not None
    assert (outcome.info.err.code, outcome.info.kind) == ("NonTerminalSyncPhase", "system")
    assert "RUNNING" in outcome.info.reason
    assert not outcome.info.may_retry
    assert len(job_server.log()) == 1


@pytest.mark.parametrize("fault", [{"status": 503}, {"drop": True, "after_acceptance": True}])
async def test_an_idempotent_call_is_made_again_with_the_same_key(
    job_server: EmbeddedJobServer, tmp_path: Path, fault: dict[str, Any]
) -> None:
    """CASE-214."""
    job_server.fault("create", **fault)
    with at(tmp_path, job_server) as host:
        outcome = await run(host, ReportJob(result="again"), "idempotent-do")
    assert outcome.info.phase is Phase.SUCCESS
    assert outcome.value.data == "again"
    assert [entry.body["key"] for entry in job_server.log()] == [outcome.job_key] * 2


@pytest.mark.parametrize(
    ("fault", "code", "phase"),
    [
        ({"status": 503}, "HTTP503", Phase.RETRYABLE_FAILURE),
        (
            {"drop": True, "after_acceptance": True},
            "OutcomeUnknown",
            Phase.PERMANENT_FAILURE,
        ),
    ],
)
async def test_a_call_that_may_have_worked_is_made_once(
    job_server: EmbeddedJobServer,
    tmp_path: Path,
    fault: dict[str, Any],
    code: str,
    phase: Phase,
) -> None:
    """CASE-215: an answer that says no may be tried again by Prefect, no answer may not."""
    job_server.fault("create", **fault)
    with at(tmp_path, job_server) as host:
        outcome = await run(host, ReportJob(), "do")
    assert outcome.info.err is not None
    assert (outcome.info.err.code, outcome.info.kind) == (code, "system")
    assert outcome.info.phase is phase
    assert len(job_server.log()) == 1


async def test_a_wrong_request_is_not_made_again(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-216: in the service's words."""
    job_server.fault("create", status=400, body={"message": "no such report"})
    with at(tmp_path, job_server) as host:
        outcome = await run(host, ReportJob(), "idempotent-do", max_attempts=3)
    assert outcome.info.phase is Phase.PERMANENT_FAILURE
    assert outcome.info.kind == "user"
    assert "no such report" in outcome.info.reason
    assert not outcome.info.may_retry
    assert len(job_server.log()) == 1


@pytest.mark.parametrize("task_type", TYPES)
async def test_a_call_that_hangs_ends_with_its_deadline(
    job_server: EmbeddedJobServer, tmp_path: Path, task_type: str
) -> None:
    """CASE-217: five times faster."""
    job_server.fault("create", delay=4)
    loop = asyncio.get_running_loop()
    with at(tmp_path, job_server, speed=5) as host:
        await run(host, ReportJob(day=1), "keys", task="warm up")  # takes the fault
        job_server.fault("create", delay=4)
        began = loop.time()
        options = Overrides(deadline=timedelta(seconds=5))
        outcome = await run(host, ReportJob(), task_type, options=options)
        assert 0.8 < loop.time() - began < 2.5
    assert outcome.info.err is not None
    assert (outcome.info.err.code, outcome.info.kind) == ("Timeout", "user")
    assert "deadline of 5s exceeded" in outcome.info.reason


@pytest.mark.parametrize("task_type", ["do", "blocking-do"])
async def test_calls_take_places_of_a_quota(
    job_server: EmbeddedJobServer, tmp_path: Path, task_type: str
) -> None:
    """CASE-218."""
    job_server.fault("create", delay=0.2, times=None)  # so long each call is under way at least
    with at(tmp_path, job_server, {"resourceQuotas": {"default": 2}}) as host:
        outcomes = await asyncio.gather(
            *(run(host, ReportJob(day=n), task_type) for n in range(10))
        )
    assert all(outcome.info.phase is Phase.SUCCESS for outcome in outcomes)
    assert len(job_server.log()) == 10
    calls = [entry.mono for entry in job_server.log()]
    assert max(sum(0 <= later - call < 0.19 for call in calls) for later in calls) == 2
    assert await places_taken(tmp_path) == 0


async def test_calls_pass_the_write_limiter(job_server: EmbeddedJobServer, tmp_path: Path) -> None:
    """CASE-219, REQ-14."""
    qps, burst = 20, 5
    with at(tmp_path, job_server, {"writeRateLimiter": {"qps": qps, "burst": burst}}) as host:
        await asyncio.gather(*(run(host, ReportJob(day=n), "do") for n in range(25)))
    calls = [entry.mono for entry in job_server.log()]
    assert len(calls) == 25
    for first in range(25):
        for last in range(first + burst, 25):
            allowed = burst + qps * (calls[last] - calls[first])
            assert last - first + 1 <= allowed + 5  # they are timed where they arrive


async def test_blocking_calls_run_side_by_side_and_stall_nobody(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-220: another job is made, read and delivered while ten threads are stuck."""
    with at(tmp_path, job_server) as host:
        await run(host, ReportJob(day=-1, seconds=0), "keys")  # everything is loaded
        job_server.fault("create", delay=2.5, times=10)
        calls = [host.admit(request(ReportJob(day=n), task_type="blocking-do")) for n in range(10)]
        await eventually(lambda: len(job_server.log("create")) == 11, within=5)
        other = await run(host, ReportJob(day=11, seconds=0), "keys")
        assert other.info.phase is Phase.SUCCESS
        open_calls = [entry for entry in job_server.log("create") if entry.status is None]
        assert len(open_calls) == 10
        outcomes = await asyncio.gather(*(call.outcome() for call in calls))
    assert all(outcome.info.phase is Phase.SUCCESS for outcome in outcomes)


async def test_a_result_above_the_limit_is_refused(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-221: nothing of it is kept."""
    spec = ReportJob(result="x" * 1_000)
    with at(tmp_path, job_server, maxDatasetSizeBytes=500) as host:
        outcome = await run(host, spec, "do", max_attempts=3)
    assert outcome.info.err is not None
    assert (outcome.info.err.code, outcome.info.kind) == ("OutputSizeExceeded", "user")
    assert not outcome.info.may_retry
    assert outcome.value is None
    [record] = await records(tmp_path)
    assert record.details.outputs is None


@pytest.mark.parametrize("task_type", ["do", "blocking-do"])
async def test_a_cancelled_call_frees_its_place_when_it_has_ended(
    job_server: EmbeddedJobServer, tmp_path: Path, task_type: str
) -> None:
    """CASE-222: a coroutine is stopped, a thread has to be waited for."""
    job_server.fault("create", delay=2)
    with at(tmp_path, job_server, {"resourceQuotas": {"default": 1}}) as host:
        ticket = host.admit(request(ReportJob(), task_type=task_type))
        await eventually(lambda: job_server.log("create"), within=20)
        ticket.cancel("cancelled by user")
        outcome = await ticket.outcome()
        assert outcome.info.phase is Phase.ABORTED
        assert outcome.stopped_by_us
        assert "cancelled by user" in outcome.info.reason
        if task_type == "blocking-do":
            assert await places_taken(tmp_path) == 1
        other = await run(host, ReportJob(day=1), task_type)
        assert other.info.phase is Phase.SUCCESS
    first, second = job_server.log("create")
    waited = second.mono - first.mono
    assert (waited >= 1.9) == (task_type == "blocking-do")
    assert await places_taken(tmp_path) == 0
