"""A job has so long to live, wherever it stands; and what a service that can't be reached proves."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import pytest

from prefect_webapi import Phase
from prefect_webapi.engine.request import Outcome, Overrides
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import ReportJob
from tests.support.engine import Told, at, request, run
from tests.support.jobserver import TOKEN
from tests.support.waiting import eventually
from tests.support.wire import free_port, garbled

ENDLESS = ReportJob(outcome="never")


def is_timed_out(outcome: Outcome) -> bool:
    info = outcome.info
    return info.err is not None and (info.err.code, info.err.kind) == ("Timeout", "user")


async def test_a_job_that_outlives_its_deadline_is_ended(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-250, REQ-71: the true reason reaches the service."""
    with at(tmp_path, job_server, deadline="1s") as host:
        outcome = await run(host, ENDLESS, max_attempts=3)
    assert is_timed_out(outcome)
    assert not outcome.info.may_retry
    [create], [delete] = job_server.log("create"), job_server.log("delete")
    assert delete.query == "reason=deadline of 1s exceeded"
    assert 0.8 < delete.mono - create.mono < 3
    assert job_server.stats().live == 0


async def test_a_deadline_counts_from_the_first_process(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-251: ten seconds, of which the second process begins after the twentieth. Twenty times as fast."""
    began = time.time()
    settings: dict[str, Any] = {
        **{"speed": 20, "epoch": began, "deadline": "10s"},
        **{"getTimeout": "10m", "createTimeout": "10m", "deleteTimeout": "10m"},
    }
    with at(tmp_path, job_server, **settings) as host:
        host.admit(request(ENDLESS, task_type="keys"))
        await eventually(lambda: job_server.jobs(), within=5)
    await eventually(lambda: time.time() - began > 20 / 20, within=5)
    asked = len(job_server.log())
    with at(tmp_path, job_server, **settings) as host:
        outcome = await run(host, ENDLESS, execution="2")
    assert is_timed_out(outcome)
    assert "deadline of 10s exceeded" in outcome.info.reason
    # it is read as well: it may have ended by itself
    assert "delete" in [entry.op for entry in job_server.log(since=asked)[:2]]
    assert len(job_server.log("create")) == 1
    assert job_server.stats().live == 0


async def test_a_deadline_ends_the_wait_for_a_place(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-252."""
    told = Told()
    soon = Overrides(deadline=timedelta(milliseconds=400))
    with at(tmp_path, job_server, {"resourceQuotas": {"default": 1}}) as host:
        holder = host.admit(request(ENDLESS, task_type="keys", task="holder"))
        [first] = await eventually(job_server.jobs, within=5)
        outcome = await run(host, ReportJob(), options=soon, reporter=told)
        job_server.end(first.name, "succeeded")
        assert (await holder.outcome()).info.phase is Phase.SUCCESS
    assert is_timed_out(outcome)
    assert "WAITING_FOR_RESOURCES" in told.names
    assert [entry.name for entry in job_server.log("create")] == [first.name]
    assert not job_server.log("delete")


@pytest.mark.parametrize("op", ["create", "get"])
async def test_a_deadline_ends_a_throttled_task_in_time(
    job_server: EmbeddedJobServer, tmp_path: Path, op: Literal["create", "get"]
) -> None:
    """CASE-253: the service would like to hear nothing for a minute."""
    job_server.fault(op, status=429, retry_after="60", times=None)
    with at(tmp_path, job_server, deadline="500ms", cancelGrace="200ms") as host:
        outcome = await asyncio.wait_for(run(host, ENDLESS), 10)
    assert is_timed_out(outcome)
    assert len(job_server.log("create")) == 1
    assert len(job_server.log("delete")) == int(op == "get")
    assert job_server.stats().inside_retry_after == 0


async def test_a_service_that_refuses_connections_is_asked_until_it_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """CASE-260, CASE-279: nothing was sent, so even a service with neither keys nor search is asked again."""
    port = free_port()
    told = Told()
    settings: dict[str, Any] = {"maxCreateAttempts": 1000, "retryCap": "200ms"}
    with at(tmp_path, f"http://127.0.0.1:{port}", **settings) as host:
        ticket = host.admit(request(ReportJob(seconds=0.1), task_type="neither", reporter=told))
        with EmbeddedJobServer(token=TOKEN, port=port) as server:
            outcome = await ticket.outcome()
            made = server.stats()
    assert outcome.info.phase is Phase.SUCCESS
    assert made.created == 1


async def test_a_service_that_never_is_there_fails_the_task_for_a_retry(tmp_path: Path) -> None:
    """CASE-260: by nobody's fault, and without any doubt about a job."""
    settings: dict[str, Any] = {"maxCreateAttempts": 3}
    with at(tmp_path, f"http://127.0.0.1:{free_port()}", **settings) as host:
        outcome = await run(host, ReportJob(), "neither")
    assert outcome.info.phase is Phase.RETRYABLE_FAILURE
    assert outcome.info.err is not None
    assert (outcome.info.err.code, outcome.info.kind) == ("ConnectError", "system")


async def test_a_failed_handshake_is_no_unknown_outcome(tmp_path: Path) -> None:
    """CASE-259: it is repeated, since nothing of the request was sent."""
    port = free_port()
    settings: dict[str, Any] = {"maxCreateAttempts": 3}
    async with garbled(port) as heard:
        with at(tmp_path, f"https://127.0.0.1:{port}", **settings) as host:
            outcome = await run(host, ReportJob(), "neither")
    assert outcome.info.phase is Phase.RETRYABLE_FAILURE
    assert outcome.info.err is not None
    assert (outcome.info.err.code, outcome.info.kind) == ("ConnectError", "system")
    assert len(heard) == 3
    assert all(b"jobs" not in hello for hello in heard)
