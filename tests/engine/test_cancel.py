"""A job that nobody wants any more is ended, and counts until it is gone."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import pytest

from prefect_webapi import Phase
from prefect_webapi.contract.errors import EngineClosed
from prefect_webapi.engine.faults import arm
from prefect_webapi.engine.host import Host, Ticket
from prefect_webapi.engine.request import Outcome, Overrides
from prefect_webapi.ledger.records import JobState
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import ReportJob
from tests.support.deaths import killed
from tests.support.engine import GivenConnections, Told, at, request, run
from tests.support.engine_child import Work
from tests.support.waiting import eventually
from tests.support.witness import places_taken, records

Mood = Literal["keys", "search", "neither"]
pytestmark = pytest.mark.usefixtures("each_ledger")

ONE = {"resourceQuotas": {"default": 1}}
ENDLESS = ReportJob(outcome="never")


async def started(
    host: Host, spec: ReportJob = ENDLESS, task_type: str = "keys", **call: Any
) -> Ticket:
    """A call whose job is running."""
    told = Told()
    ticket = host.admit(request(spec, task_type=task_type, reporter=told, **call))
    await eventually(lambda: "RUNNING" in told.names, within=20)
    return ticket


def aborted(outcome: Outcome) -> bool:
    return outcome.info.phase is Phase.ABORTED and outcome.stopped_by_us


async def test_a_cancelled_job_is_deleted_and_its_place_is_free_when_it_is_gone(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-110, CASE-111, CASE-116, REQ-47: the service takes its time; so does the place."""
    spec = ReportJob(outcome="never", dies_in=1.0)
    with at(tmp_path, job_server, ONE) as host:
        ticket = await started(host, spec)
        ticket.cancel("cancelled by user")
        await eventually(lambda: job_server.log("delete"), within=5)
        next_one = host.admit(request(ReportJob(day=1, seconds=0), task_type="keys"))
        assert await places_taken(tmp_path) == 1
        outcome = await ticket.outcome()
        assert job_server.stats().live == 0
        assert (await next_one.outcome()).info.phase is Phase.SUCCESS
    assert aborted(outcome)
    first, second = job_server.log("create")
    [delete] = job_server.log("delete")
    assert second.mono - delete.mono >= 0.9
    assert job_server.stats().peak_live == 1
    assert first.name == delete.name
    assert await places_taken(tmp_path) == 0


@pytest.mark.parametrize("status", [404, 410, 409])
async def test_a_job_that_is_over_already_takes_one_delete(
    job_server: EmbeddedJobServer, tmp_path: Path, status: int
) -> None:
    """CASE-113, REQ-43: gone, gone for good, or ended by itself."""
    with at(tmp_path, job_server, ONE, initialInterval="2s", speed=10) as host:
        ticket = await started(host)
        [job] = job_server.jobs()
        job_server.end(job.name, "succeeded" if status == 409 else "forgotten")
        if status == 410:
            job_server.fault("delete", status=410)
        ticket.cancel("cancelled by user")
        outcome = await ticket.outcome()
        assert aborted(outcome)
        assert [entry.status for entry in job_server.log("delete")] == [status]
    assert await places_taken(tmp_path) == 0


async def test_a_job_that_hides_at_first_is_deleted_all_the_same(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """REQ-42: "not found" for a job that can't be seen yet says nothing."""
    spec = ReportJob(outcome="never", hidden_for=0.5)
    with at(tmp_path, job_server, visibilityDelay="2s") as host:
        ticket = host.admit(request(spec, task_type="keys"))
        await eventually(lambda: job_server.log("batch") or job_server.log("get"), within=20)
        ticket.cancel("cancelled by user")
        await eventually(lambda: 404 in [e.status for e in job_server.log("delete")], within=5)
        assert aborted(await ticket.outcome())
    assert job_server.stats().live == 0


async def test_a_delete_that_fails_is_repeated_with_growing_gaps(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-114, REQ-46: the place stays taken meanwhile."""
    job_server.fault("delete", status=503, times=5)
    with at(tmp_path, job_server, ONE, retryBase="100ms", retryCap="10s") as host:
        ticket = await started(host)
        ticket.cancel("cancelled by user")
        await eventually(lambda: len(job_server.log("delete")) >= 4, within=20)
        assert await places_taken(tmp_path) == 1
        assert aborted(await ticket.outcome())
    deletes = job_server.log("delete")
    assert [entry.status for entry in deletes] == [503] * 5 + [202]
    assert (
        deletes[5].mono - deletes[4].mono >= 0.16
    )  # a tenth of the ceiling at least: 100 ms, doubled four times
    assert await places_taken(tmp_path) == 0


async def test_a_throttled_delete_comes_back_when_the_service_said(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-155."""
    job_server.fault("delete", status=429, retry_after="1", times=2)
    with at(tmp_path, job_server) as host:
        ticket = await started(host)
        ticket.cancel("cancelled by user")
        assert aborted(await ticket.outcome())
    assert job_server.stats().live == 0
    assert job_server.stats().inside_retry_after == 0
    assert [entry.status for entry in job_server.log("delete")] == [429, 429, 202]


async def test_a_job_that_finishes_while_delete_is_on_the_way_counts_as_cancelled(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-117: with the remote outcome in the message, and the result kept."""
    job_server.fault("delete", delay=1.5)
    with at(tmp_path, job_server) as host:
        ticket = await started(host, ReportJob(seconds=1, result="done"))
        ticket.cancel("cancelled by user")
        outcome = await ticket.outcome()
    assert aborted(outcome)
    assert "cancelled by user" in outcome.info.reason
    assert "SUCCESS" in outcome.info.reason
    [job] = job_server.jobs()
    assert job.state == "succeeded"
    [record] = await records(tmp_path)
    assert record.details.outputs is not None
    assert record.details.outputs.value["data"] == "done"


async def test_a_job_that_was_seen_over_is_no_longer_cancelled(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """Cancel wins over success only if the job was not yet seen terminal."""
    seen, go_on = asyncio.Event(), asyncio.Event()

    class SlowOutputs:
        async def write(self, name: str, data: bytes, /) -> str:
            loop.call_soon_threadsafe(seen.set)
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(go_on.wait(), loop))
            return "kept"

        async def read(self, uri: str, /) -> bytes | None:
            return None

        async def uri(self, name: str, /) -> str:
            return name

    loop = asyncio.get_running_loop()
    spec = ReportJob(seconds=0.1, result="x" * 100_000)
    with at(tmp_path, job_server, ONE, outputs=SlowOutputs()) as host:
        ticket = host.admit(request(spec, task_type="keys"))
        await asyncio.wait_for(seen.wait(), 20)
        ticket.cancel("cancelled by user")
        other = host.admit(request(ENDLESS, task_type="keys", idempotency_key="passes after it"))
        other.cancel("the runtime has read its mail")
        await other.outcome()
        go_on.set()
        outcome = await ticket.outcome()
    assert outcome.info.phase is Phase.SUCCESS
    assert not job_server.log("delete")
    assert len(job_server.log("create")) == 1
    assert await places_taken(tmp_path) == 0


async def test_a_call_cancelled_while_it_waits_for_a_place_leaves_the_queue(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-118: nothing is sent for it, and the next in the queue gets on."""
    with at(tmp_path, job_server, ONE) as host:
        first = await started(host)
        waiting = [Told(), Told()]
        second, third = (
            host.admit(request(ReportJob(day=n, seconds=0), task_type="keys", reporter=told))
            for n, told in enumerate(waiting, start=1)
        )
        await eventually(
            lambda: all("WAITING_FOR_RESOURCES" in told.names for told in waiting), within=5
        )
        second.cancel("cancelled by user")
        outcome = await second.outcome()
        assert aborted(outcome)
        assert len(job_server.log("create")) == 1
        assert not job_server.log("delete")
        first.cancel("cancelled by user")
        await first.outcome()
        assert (await third.outcome()).info.phase is Phase.SUCCESS
    freed = max(entry.mono for entry in job_server.log("delete"))
    assert job_server.log("create")[-1].mono - freed < 2
    assert outcome.job_key not in {entry.name for entry in job_server.log()}
    assert await places_taken(tmp_path) == 0


@pytest.mark.parametrize("mood", ["keys", "search", "neither"])
async def test_a_create_on_the_way_is_awaited_and_its_job_deleted(
    job_server: EmbeddedJobServer, tmp_path: Path, mood: Mood
) -> None:
    """CASE-119."""
    job_server.behave(mood)
    job_server.fault("create", delay=0.4)
    with at(tmp_path, job_server, ONE) as host:
        ticket = host.admit(request(ENDLESS, task_type=mood))
        await eventually(lambda: job_server.log("create"), within=20)
        ticket.cancel("cancelled by user")
        assert aborted(await ticket.outcome())
    assert job_server.stats().created == 1
    assert job_server.stats().live == 0
    assert [job.message for job in job_server.jobs()] == ["cancelled by user"]
    assert await places_taken(tmp_path) == 0


@pytest.mark.parametrize("task_type", ["keys", "single", "search", "neither"])
async def test_a_cancelled_create_without_an_answer_is_looked_for(
    job_server: EmbeddedJobServer, tmp_path: Path, task_type: str
) -> None:
    """CASE-119, REQ-45: found by search or by its key; where neither can be, it stays a suspect."""
    job_server.behave("keys" if task_type == "single" else task_type)  # pyright: ignore[reportArgumentType]
    job_server.fault("create", delay=0.4, drop=True, after_acceptance=True)
    with at(tmp_path, job_server, ONE) as host:
        ticket = host.admit(request(ENDLESS, task_type=task_type))
        await eventually(lambda: job_server.log("create"), within=20)
        ticket.cancel("cancelled by user")
        outcome = await ticket.outcome()
    assert job_server.stats().created == 1
    if task_type == "neither":
        assert outcome.info.err is not None
        assert outcome.info.err.code == "CreateOutcomeUnknown"
        assert await places_taken(tmp_path) == 1
        return
    assert aborted(outcome)
    assert job_server.stats().live == 0
    assert await places_taken(tmp_path) == 0


async def test_a_cancelled_create_that_made_nothing_is_not_sent_again(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-119: the service said that it was too busy."""
    job_server.fault("create", delay=0.3, status=503, retry_after="0")
    with at(tmp_path, job_server, ONE) as host:
        ticket = host.admit(request(ENDLESS, task_type="keys"))
        await eventually(lambda: job_server.log("create"), within=20)
        ticket.cancel("cancelled by user")
        assert aborted(await ticket.outcome())
    assert len(job_server.log("create")) == 1
    assert not job_server.log("delete")
    assert await places_taken(tmp_path) == 0


@pytest.mark.parametrize("config", [{}, ONE])
async def test_a_call_cancelled_before_anything_sends_nothing(
    job_server: EmbeddedJobServer, tmp_path: Path, config: dict[str, Any]
) -> None:
    """CASE-120."""
    with at(tmp_path, job_server, config) as host:
        ticket = host.admit(request(ENDLESS, task_type="keys"))
        ticket.cancel("cancelled by user")
        outcome = await ticket.outcome()
        assert aborted(outcome)
        assert outcome.info.reason == "cancelled by user"
    assert not job_server.log()
    assert await places_taken(tmp_path) == 0


@pytest.mark.timeout(240)
@pytest.mark.parametrize("jobs", [200, pytest.param(1_000, marks=pytest.mark.chaos)])
async def test_many_cancelled_jobs_obey_the_write_limiter(
    job_server: EmbeddedJobServer, tmp_path: Path, jobs: int
) -> None:
    """CASE-121, REQ-14: and every one of them is gone."""
    qps, burst = 250, 20
    config = {"writeRateLimiter": {"qps": qps, "burst": burst}}
    with at(tmp_path, job_server, config, cancelGrace="1h") as host:
        tickets = [
            host.admit(request(ReportJob(day=n, outcome="never"), task_type="keys"))
            for n in range(jobs)
        ]
        await eventually(lambda: job_server.stats().live == jobs, within=90, every=0.2)
        host.cancel_flow_run("run-1", "flow run cancelled")
        outcomes = await asyncio.gather(*(ticket.outcome() for ticket in tickets))
    assert all(map(aborted, outcomes))
    made = job_server.stats()
    assert (made.created, made.live, made.duplicates) == (jobs, 0, {})
    deletes = [entry.mono for entry in job_server.log("delete")]
    assert len(deletes) == jobs
    for first in range(0, jobs, 10):
        for last in range(first + burst, jobs, 10):
            allowed = burst + qps * (deletes[last] - deletes[first])
            assert last - first + 1 <= allowed * 1.2 + 2  # they are timed where they arrive


@pytest.mark.parametrize("cause", ["user", "flow", "deadline", "contact"])
async def test_the_true_reason_arrives_at_the_service(
    job_server: EmbeddedJobServer, tmp_path: Path, cause: str
) -> None:
    """CASE-122, REQ-44: in the service's own field, in the ledger and in the outcome."""
    config = {"caching": {"maxSystemFailures": 2, "resyncInterval": "5s"}}
    deadline = timedelta(seconds=10) if cause == "deadline" else None
    with at(tmp_path, job_server, config, speed=10, visibilityDelay="5s") as host:
        ticket = await started(host, options=Overrides(deadline=deadline))
        match cause:
            case "user":
                ticket.cancel("cancelled by user")
                reason = "cancelled by user"
            case "flow":
                host.cancel_flow_run("run-1", "flow run cancelled")
                reason = "flow run cancelled"
            case "contact":
                job_server.fault("batch", status=500, times=3)
                job_server.fault("get", status=500, times=3)
                reason = "lost contact after 3 failures"
            case _:
                reason = "deadline of 10s exceeded"
        outcome = await ticket.outcome()
    [job] = job_server.jobs()
    assert (job.state, job.message) == ("cancelled", reason)
    [record] = await records(tmp_path)
    assert record.cancel_reason == reason
    assert reason in outcome.info.reason
    codes = {"deadline": "Timeout", "contact": "HTTP500"}
    assert (outcome.info.err.code if outcome.info.err else None) == codes.get(cause)


async def test_a_job_that_failed_but_still_runs_is_gone_before_the_next_attempt(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-123."""
    spec = ReportJob(outcome="never", message="it hangs")
    job_server.fault("delete", delay=0.4)  # it is read, and seen failed, meanwhile
    with at(tmp_path, job_server, ONE) as host:
        first = await run(host, spec, "cleanup", task_run="t", max_attempts=2)
        assert job_server.stats().live == 0
        second = host.admit(
            request(spec, task_type="cleanup", task_run="t", attempt=2, max_attempts=2)
        )
        assert (await second.outcome()).job_key != first.job_key
    assert first.info.phase is Phase.RETRYABLE_FAILURE
    assert first.info.err is not None
    assert first.info.err.code == "Hangs"
    ops = [entry.op for entry in job_server.log() if entry.op in ("create", "delete")]
    assert ops == ["create", "delete", "create", "delete"]
    assert job_server.stats().peak_live == 1


@pytest.mark.parametrize("outcome", ["succeed", "fail"])
async def test_a_job_that_ended_by_itself_is_never_deleted(
    job_server: EmbeddedJobServer, tmp_path: Path, outcome: Literal["succeed", "fail"]
) -> None:
    """CASE-124, CASE-125: also when the flow is cancelled afterwards."""
    with at(tmp_path, job_server) as host:
        ticket = host.admit(request(ReportJob(seconds=0.1, outcome=outcome), task_type="keys"))
        await ticket.outcome()
        host.cancel_flow_run("run-1", "flow run cancelled")
        ticket.cancel("cancelled by user")
        after = await started(host, run="run-2", execution="2")
        after.detach()
    assert not job_server.log("delete")


async def test_the_other_jobs_of_a_flow_run_end_with_it(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-126: those of its subflows too, and nobody else's."""
    with at(tmp_path, job_server) as host:
        mine = await started(host, ReportJob(day=1, outcome="never"))
        below = await started(
            host,
            ReportJob(day=2, outcome="never"),
            run="subflow",
            execution="2",
            levels={"run-1": "execution-1"},
        )
        theirs = await started(host, ReportJob(day=3, outcome="never"), run="run-2", execution="3")
        failed = await run(host, ReportJob(day=4, seconds=0, outcome="fail"))
        assert failed.info.phase is Phase.RETRYABLE_FAILURE
        host.cancel_flow_run("run-1", "flow run failed")
        assert aborted(await mine.outcome())
        assert aborted(await below.outcome())
        theirs.detach()
    assert len(job_server.log("delete")) == 2
    assert job_server.stats().live == 1


async def test_one_of_two_calls_that_share_a_job_may_go(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """The job ends with the last call that wants it."""
    with at(tmp_path, job_server) as host:
        first = await started(host, idempotency_key="shared")
        second = host.admit(
            request(ENDLESS, task_type="keys", execution="2", idempotency_key="shared")
        )
        third = host.admit(
            request(ENDLESS, task_type="keys", execution="3", idempotency_key="shared")
        )
        third.cancel("not needed")
        assert aborted(await third.outcome())
        first.cancel("not needed")
        assert aborted(await first.outcome())
        assert not job_server.log("delete")
        second.cancel("nobody needs it")
        assert aborted(await second.outcome())
    assert [job.message for job in job_server.jobs()] == ["nobody needs it"]
    assert job_server.stats().created == 1


async def test_who_follows_a_job_of_another_process_may_go(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """Its owner's run wants it; the owner's cancel ends it, for who follows too."""
    shared: dict[str, Any] = {"task_type": "keys", "run_key": "2024-05-01"}
    with at(tmp_path, job_server) as owner, at(tmp_path, job_server, sweeps=False) as other:
        told = Told()
        first = owner.admit(request(ENDLESS, run="run-1", task_run="a", reporter=told, **shared))
        await eventually(lambda: "RUNNING" in told.names, within=20)
        second, third = (
            other.admit(request(ENDLESS, run=f"run-{n}", task_run="b", execution=f"{n}", **shared))
            for n in (2, 3)
        )
        await asyncio.sleep(1)
        second.cancel("run-2 was cancelled")
        assert aborted(await asyncio.wait_for(second.outcome(), 10))
        await asyncio.sleep(1.5)
        assert not job_server.log("delete")
        first.cancel("run-1 was cancelled")
        assert aborted(await first.outcome())
        assert aborted(await asyncio.wait_for(third.outcome(), 10))
    assert (job_server.stats().created, job_server.stats().live) == (1, 0)


async def test_people_wait_no_longer_than_the_grace(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-269: the place and the duty stay until the job is gone."""
    spec = ReportJob(outcome="never", dies_in=1.5)
    with at(tmp_path, job_server, ONE, cancelGrace="300ms") as host:
        ticket = await started(host, spec)
        ticket.cancel("cancelled by user")
        outcome = await ticket.outcome()
        assert aborted(outcome)
        assert "not confirmed" in outcome.info.reason
        assert job_server.stats().live == 1
        assert await places_taken(tmp_path) == 1

        async def is_closed() -> bool:
            [record] = await records(tmp_path)
            return record.state is JobState.CLOSED

        await eventually(is_closed, within=10)
        assert job_server.stats().live == 0
    assert await places_taken(tmp_path) == 0


async def test_an_attempt_that_waits_for_the_end_of_the_one_before_hears_its_cancel(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """That one takes its time to die, and nothing was done for this one yet."""
    job_server.fault("delete", status=503, times=None)
    same: dict[str, Any] = {"task_run": "t", "max_attempts": 2}
    with at(tmp_path, job_server, cancelGrace="200ms") as host:
        first = await started(host, **same)
        first.cancel("the task's time is up")
        assert aborted(await asyncio.wait_for(first.outcome(), 5))
        second = host.admit(request(ENDLESS, task_type="keys", attempt=2, **same))
        await asyncio.sleep(0.5)
        second.cancel("cancelled by user")
        assert aborted(await asyncio.wait_for(second.outcome(), 5))
        job_server.clear_faults()
    assert job_server.stats().created == 1


async def test_a_call_that_met_a_job_as_it_was_deleted_hears_its_cancel(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """Its process died over the delete; the next one repeats it, in vain."""
    work = Work(folder=tmp_path, server=job_server.url, specs=(ENDLESS,), task_type="keys")
    killed(replace(work, die_at="KP-22", cancel="CREATED"))
    [record] = await records(tmp_path)
    assert record.state is JobState.CANCELLING
    job_server.fault("delete", status=503, times=None)
    again: dict[str, Any] = {"task_run": record.task_run, "execution": "execution-2"}
    with at(tmp_path, job_server, cancelGrace="200ms", sweeps=False) as host:
        ticket = host.admit(request(ENDLESS, task_type="keys", **again))
        await eventually(lambda: job_server.log("delete"), within=10)
        ticket.cancel("cancelled by user")
        assert aborted(await asyncio.wait_for(ticket.outcome(), 5))
        job_server.clear_faults()
        await eventually(lambda: job_server.stats().live == 0, within=20)


async def test_a_call_whose_connection_is_slow_to_come_hears_its_cancel(
    job_server: EmbeddedJobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ends the job of an earlier run all the same, once the connection is there."""
    with at(tmp_path, job_server) as host:
        await started(host)
    resolve, here = GivenConnections.resolve, asyncio.Event()

    async def slow(self: GivenConnections, *args: Any, **kwargs: Any) -> Any:
        await here.wait()
        return await resolve(self, *args, **kwargs)

    monkeypatch.setattr(GivenConnections, "resolve", slow)
    with at(tmp_path, job_server, sweeps=False, speed=20) as host:
        ticket = host.admit(request(ENDLESS, task_type="keys", execution="execution-2"))
        await asyncio.sleep(0.2)
        ticket.cancel("cancelled by user")
        outcome = await asyncio.wait_for(ticket.outcome(), 5)
        assert aborted(outcome)
        assert not outcome.job_key
        host.post(lambda _: here.set())
        await eventually(lambda: job_server.stats().live == 0, within=20)


async def test_a_call_that_asks_again_gets_a_job_of_its_own_when_the_old_one_is_gone(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """REQ-27: a cancelled job is no result; and the two never live at once."""
    spec = ReportJob(outcome="never", dies_in=0.5)
    with at(tmp_path, job_server) as host:
        ticket = await started(host, spec)
        ticket.cancel("cancelled by user")
        again = host.admit(request(spec, task_type="keys", execution="2"))
        first = await ticket.outcome()
        again.cancel("enough")
        second = await again.outcome()
    assert aborted(first)
    assert aborted(second)
    assert job_server.stats().peak_live == 1


@pytest.mark.parametrize("when", ["running", "waiting", "entering"])
async def test_a_detached_job_is_left_to_the_next_process(
    job_server: EmbeddedJobServer, tmp_path: Path, when: str
) -> None:
    """REQ-80: whatever it is doing; nothing new is started for it."""
    config = ONE if when == "waiting" else {}
    spec = ReportJob(seconds=1.0, result="later")
    with at(tmp_path, job_server, config) as host:
        ticket = await detached(host, spec, when)
        creates = len(job_server.log("create"))
        with pytest.raises(EngineClosed, match="the job goes on"):
            await ticket.outcome()
        if when == "waiting":
            await eventually(lambda: job_server.stats().live == 0, within=10)
        later = await run(host, ReportJob(day=2, seconds=0), task="other")
        assert later.info.phase is Phase.SUCCESS
        assert len(job_server.log("create")) == creates + 1
    assert not job_server.log("delete")
    with at(tmp_path, job_server, config) as host:
        outcome = await run(host, spec, execution="execution-2")
    assert outcome.value.data == "later"
    assert job_server.stats().duplicates == {}
    assert await places_taken(tmp_path) == 0


async def detached(host: Host, spec: ReportJob, when: str) -> Ticket:
    """A call that was detached while its job ran, waited for a place, or was about to be written down."""
    told, is_there, go_on = Told(), threading.Event(), threading.Event()

    def stop(place: str) -> None:
        if place == "KP-01" and when == "entering":
            arm(None)
            is_there.set()
            go_on.wait(20)

    if when == "waiting":
        await started(host, ReportJob(day=1, seconds=0.5))
    arm(stop)
    ticket = host.admit(request(spec, task_type="keys", reporter=told))
    match when:
        case "running":
            await eventually(lambda: "RUNNING" in told.names, within=20)
        case "waiting":
            await eventually(lambda: "WAITING_FOR_RESOURCES" in told.names, within=20)
        case _:
            await asyncio.to_thread(is_there.wait, 20)
    ticket.detach()
    arm(None)
    go_on.set()
    return ticket
