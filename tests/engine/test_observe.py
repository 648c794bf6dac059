"""What the answers of reads lead to: progress, patience, contact lost, absence believed late."""

from __future__ import annotations

import asyncio
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from prometheus_client import CollectorRegistry
from pydantic import ConfigDict

from prefect_webapi import GetContext, Phase, PhaseInfo, StatusContext
from prefect_webapi.engine.request import Outcome
from prefect_webapi.metrics import Metrics
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import ReportJob
from prefect_webapi_jobserver.models import JobHandle, JobView
from tests.support.engine import Told, at, request, run
from tests.support.jobserver import TOKEN
from tests.support.plugins import SinglePlugin, entry
from tests.support.waiting import eventually

SOON = {"caching": {"resyncInterval": "5s"}}
"""The shortest gap allowed; a fifth failure in a row comes after some twenty seconds of a clock that runs faster."""
PATIENT: dict[str, Any] = {"getTimeout": "10m", "createTimeout": "10m", "deleteTimeout": "10m"}
"""Time-outs for a clock that runs faster than the server does."""
ENDLESS = ReportJob(outcome="never")


def failing(server: EmbeddedJobServer, times: int | None, **fault: Any) -> None:
    server.fault("get", status=500, body={"message": "out of order"}, times=times, **fault)


def is_contact_lost(outcome: Outcome, *, after: int) -> bool:
    info = outcome.info
    return (
        info.phase is Phase.RETRYABLE_FAILURE
        and info.kind == "system"
        and f"lost contact after {after} failures" in info.reason
    )


async def test_five_failed_reads_in_a_row_are_borne_again_and_again(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-073: one good answer sets the count back."""
    failing(job_server, 5)
    job_server.fault("get")  # one good answer between
    failing(job_server, 5)
    with at(tmp_path, job_server, SOON, speed=40, **PATIENT) as host:
        ticket = host.admit(request(ENDLESS, task_type="single"))
        await eventually(lambda: len(job_server.log("get")) >= 11, within=20)
        job_server.end(job_server.jobs()[0].name, "succeeded")
        outcome = await ticket.outcome()
    assert outcome.info.phase is Phase.SUCCESS
    statuses = [entry.status for entry in job_server.log("get")]
    assert statuses[:11] == [500] * 5 + [200] + [500] * 5
    assert not job_server.log("delete")


async def test_contact_is_lost_with_the_sixth_failure_and_the_job_is_ended(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-074, REQ-57: no retry is left, so the job is deleted; its place stays taken until it is gone."""
    failing(job_server, 6)
    told = Told()
    config = {**SOON, "resourceQuotas": {"default": 1}}
    with at(tmp_path, job_server, config, speed=20, **PATIENT) as host:
        first = host.admit(
            request(ReportJob(outcome="never", dies_in=0.3), task_type="single", reporter=told)
        )
        await eventually(lambda: job_server.log("create"), within=5)
        second = host.admit(request(ReportJob(seconds=0), task_type="single", task="other"))
        outcomes = [await first.outcome(), await second.outcome()]
    assert is_contact_lost(outcomes[0], after=6)
    assert "out of order" in outcomes[0].info.reason
    assert outcomes[1].info.phase is Phase.SUCCESS
    [delete] = job_server.log("delete")
    assert "lost contact after 6 failures" in delete.query
    assert told.cancelled == ["lost contact after 6 failures"]
    creates = job_server.log("create")
    assert creates[1].mono >= delete.mono + 0.3
    assert job_server.stats().peak_live == 1


async def test_a_retry_takes_up_the_job_that_contact_was_lost_with(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-074: with a retry left nothing is deleted, and the retry makes no second job."""
    failing(job_server, 6)
    spec = ReportJob(outcome="never", result="kept")
    with at(tmp_path, job_server, SOON, speed=20, **PATIENT) as host:
        first = await run(host, spec, "single", task_run="t", max_attempts=2)
        retry = host.admit(
            request(spec, task_type="single", task_run="t", attempt=2, max_attempts=2)
        )
        await eventually(lambda: len(job_server.log("get")) >= 7, within=5)
        job_server.end(first.job_key, "succeeded")
        second = await retry.outcome()
    assert is_contact_lost(first, after=6)
    assert second.info.phase is Phase.SUCCESS
    assert second.job_key == first.job_key
    assert second.value.data == "kept"
    assert len(job_server.log("create")) == 1
    assert not job_server.log("delete")


async def test_no_failed_read_is_borne_if_the_block_says_so(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-075."""
    failing(job_server, 1)
    config = {"caching": {"maxSystemFailures": 0}}
    with at(tmp_path, job_server, config) as host:
        outcome = await run(host, ENDLESS, "single")
    assert is_contact_lost(outcome, after=1)
    assert len(job_server.log("delete")) == 1
    assert job_server.stats().live == 0


async def test_throttled_reads_are_no_failures(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-076, REQ-22, REQ-39: ten of them with a bound of none, each counted, and people are told."""
    job_server.fault("get", status=429, times=10)
    metrics = Metrics(CollectorRegistry())
    told = Told()
    config = {"caching": {"maxSystemFailures": 0}}
    with at(tmp_path, job_server, config, metrics=metrics) as host:
        outcome = await run(host, ReportJob(seconds=0.1), "single", reporter=told)
    assert outcome.info.phase is Phase.SUCCESS
    assert metrics.value("throttled_total", plugin="single", op="read") == 10
    assert any("the service throttles" in reason for _, reason in told.phases)
    assert job_server.stats().created == 1


async def test_a_task_ends_when_a_service_that_answered_once_falls_silent(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-077: nothing is Running for ever."""
    job_server.fault("get")  # one good answer first
    failing(job_server, None)
    with at(tmp_path, job_server, SOON, speed=20, **PATIENT) as host:
        outcome = await run(host, ENDLESS, "single")
    assert is_contact_lost(outcome, after=6)
    assert len(job_server.log("delete")) == 1


class WeirdPlugin(SinglePlugin):
    """Reads of some jobs raise what no author should raise."""

    async def get(self, ctx: GetContext[JobHandle]) -> JobView:
        job = await super().get(ctx)
        match job.message:
            case "KeyError":
                raise KeyError("no such column")
            case "SystemExit":
                raise SystemExit("enough")
            case _:
                return job


@pytest.mark.parametrize(("weird", "jobs"), [("KeyError", 100), ("SystemExit", 10)])
async def test_an_exception_of_one_read_is_the_business_of_one_job(
    job_server: EmbeddedJobServer, tmp_path: Path, weird: str, jobs: int
) -> None:
    """CASE-078, REQ-23."""
    config = {"caching": {"maxSystemFailures": 1, "resyncInterval": "5s"}}
    specs = [ReportJob(seconds=0.2, day=n) for n in range(jobs - 1)]
    bad = ReportJob(outcome="never", message=weird)
    with at(
        tmp_path, job_server, config, entries=[entry(WeirdPlugin, "weird")], speed=5, **PATIENT
    ) as host:
        failed, *fine = await asyncio.gather(
            *(run(host, spec, "weird", task_run=f"t{n}") for n, spec in enumerate([bad, *specs]))
        )
    assert all(outcome.info.phase is Phase.SUCCESS for outcome in fine)
    assert is_contact_lost(failed, after=2)
    assert failed.info.err is not None
    assert failed.info.err.code == weird
    assert [entry.name for entry in job_server.log("delete")] == [failed.job_key]


async def test_a_hanging_read_is_cut_off_and_counted(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-079: the other 19 jobs of ten workers go on meanwhile."""
    config = {"caching": {"maxSystemFailures": 0}}
    spec = ReportJob(outcome="never", day=-1)
    with at(tmp_path, job_server, config, getTimeout="1s") as host:
        stuck = host.admit(request(spec, task_type="single", task_run="stuck"))
        [job] = await eventually(job_server.jobs, within=5)
        job_server.fault("get", name=job.name, delay=2.0)
        others = await asyncio.gather(
            *(
                run(host, ReportJob(seconds=0.1, day=n), "single", task_run=f"t{n}")
                for n in range(19)
            )
        )
        outcome = await stuck.outcome()
    assert all(other.info.phase is Phase.SUCCESS for other in others)
    assert is_contact_lost(outcome, after=1)
    assert outcome.info.err is not None
    assert outcome.info.err.code == "Timeout"
    assert "no answer to get of plugin 'single' within 1 s" in outcome.info.reason


class BlockingPlugin(SinglePlugin):
    """An author who knows no coroutines."""

    def get(self, ctx: GetContext[JobHandle]) -> JobView:  # pyright: ignore[reportIncompatibleMethodOverride] - plain functions are allowed
        url = f"{self._connection.base_url}jobs/{ctx.resource_meta.name}"
        asked = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
        time.sleep(0.5)
        with urllib.request.urlopen(asked, timeout=20) as answer:
            return JobView.model_validate_json(answer.read())


async def test_blocking_reads_hold_up_neither_the_loop_nor_each_other(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-080, REQ-36: 20 jobs on ten threads, where one after the other would take ten seconds."""
    lags: list[float] = []
    with at(tmp_path, job_server, entries=[entry(BlockingPlugin, "blocking")]) as host:
        began = time.monotonic()
        tickets = [
            host.admit(request(ReportJob(seconds=0, day=n), task_type="blocking", task_run=f"t{n}"))
            for n in range(20)
        ]
        waiting = asyncio.gather(*(ticket.outcome() for ticket in tickets))
        while not waiting.done():
            arrived = threading.Event()
            sent = time.monotonic()
            host.post(lambda runtime, arrived=arrived: arrived.set())
            await asyncio.to_thread(arrived.wait, 5)
            lags.append(time.monotonic() - sent)
            await asyncio.sleep(0.02)
        took = time.monotonic() - began
    assert all(outcome.info.phase is Phase.SUCCESS for outcome in await waiting)
    assert max(lags) < 0.4
    assert took < 5


async def test_a_job_that_a_batch_answer_lacks_is_read_alone(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-082, REQ-37: only its failure counts, and only for it."""
    config = {"caching": {"maxSystemFailures": 0}}
    with at(tmp_path, job_server, config, cancelGrace="100ms") as host:
        tickets = [
            host.admit(
                request(ReportJob(outcome="never", day=n), task_run=f"t{n}", task_type="keys")
            )
            for n in range(20)
        ]
        await eventually(lambda: job_server.stats().created == 20, within=10)
        await eventually(lambda: job_server.log("batch"), within=10)
        lost, *others = job_server.jobs()
        failing(job_server, None, name=lost.name)
        job_server.end(lost.name, "forgotten")
        await eventually(lambda: job_server.log("delete"), within=10)
        for job in others:
            job_server.end(job.name, "succeeded")
        job_server.clear_faults()
        outcomes = await asyncio.gather(*(ticket.outcome() for ticket in tickets))
    failed = [outcome for outcome in outcomes if outcome.info.phase is not Phase.SUCCESS]
    assert [outcome.job_key for outcome in failed] == [lost.name]
    assert is_contact_lost(failed[0], after=1)
    assert [entry.name for entry in job_server.log("delete")] == [lost.name]


async def test_more_tasks_than_a_process_may_track_wait_before_create(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-084, REQ-21: and say why they wait."""
    config = {"caching": {"size": 10}}
    told = [Told() for _ in range(30)]
    with at(tmp_path, job_server, config) as host:
        outcomes = await asyncio.gather(
            *(
                run(host, ReportJob(seconds=0.2, day=n), task_run=f"t{n}", reporter=reporter)
                for n, reporter in enumerate(told)
            )
        )
    assert all(outcome.info.phase is Phase.SUCCESS for outcome in outcomes)
    assert job_server.stats().peak_live <= 10
    assert job_server.stats().created == 30
    waited = [reporter for reporter in told if "NOT_READY" in reporter.names]
    assert len(waited) >= 19
    assert "caching.size" in waited[0].phases[0][1]


class Locked(JobView):
    """A snapshot that nobody could store."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    lock: Any
    file: Any


class LockedPlugin(SinglePlugin):
    opened: ClassVar[list[Any]] = []

    async def get(self, ctx: GetContext[JobHandle]) -> JobView:
        job = await super().get(ctx)
        self.opened.append(_open_itself())
        return Locked(**job.model_dump(), lock=threading.Lock(), file=self.opened[-1])

    def status(self, ctx: StatusContext[JobHandle, JobView]) -> PhaseInfo:
        assert isinstance(ctx.resource, Locked)
        with ctx.resource.lock:
            assert ctx.resource.file.readline()
        return super().status(ctx)


def _open_itself() -> Any:
    return Path(__file__).open()


async def test_a_snapshot_may_hold_a_lock_and_an_open_file(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-085, REQ-38: it is handed to `status` as it is and never stored."""
    with at(tmp_path, job_server, entries=[entry(LockedPlugin, "locked")]) as host:
        outcome = await run(host, ReportJob(seconds=0.1, result="read"), "locked")
    for file in LockedPlugin.opened:
        file.close()
    assert outcome.value.data == "read"


async def test_one_answer_that_there_is_no_such_job_is_not_believed(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-086, REQ-58."""
    with at(tmp_path, job_server, SOON, speed=20, visibilityDelay="1s", **PATIENT) as host:
        ticket = host.admit(request(ENDLESS, task_type="single"))
        await eventually(lambda: len(job_server.log("get")) > 3, within=10)
        job_server.fault("get", status=404)
        await eventually(
            lambda: 404 in [entry.status for entry in job_server.log("get")[:-1]], within=10
        )
        job_server.end(job_server.jobs()[0].name, "succeeded")
        outcome = await ticket.outcome()
    assert outcome.info.phase is Phase.SUCCESS
    assert len(job_server.log("create")) == 1


async def test_a_job_that_is_gone_fails_its_attempt_and_the_next_makes_a_new_one(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-087, REQ-58: two answers, some time apart."""
    spec = ReportJob(seconds=2, result="second")
    with at(tmp_path, job_server, SOON, speed=20, visibilityDelay="1s", **PATIENT) as host:
        ticket = host.admit(request(spec, task_type="single", task_run="t", max_attempts=2))
        [job] = await eventually(job_server.jobs, within=5)
        job_server.end(job.name, "forgotten")
        first = await ticket.outcome()
        second = await run(host, spec, "single", task_run="t", attempt=2, max_attempts=2)
    assert first.info.phase is Phase.RETRYABLE_FAILURE
    assert first.info.err is not None
    assert (first.info.err.code, first.info.err.kind) == ("RemoteJobVanished", "system")
    absent = [e for e in job_server.log("get") if e.name == first.job_key and e.status == 404]
    assert absent[-1].mono - absent[0].mono >= 5 / 20
    assert second.info.phase is Phase.SUCCESS
    assert second.job_key != first.job_key
    assert job_server.stats().created == 2


async def test_an_answer_that_is_older_than_the_last_takes_nothing_back(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-090: a stale replica."""
    told = Told()
    with at(tmp_path, job_server) as host:
        ticket = host.admit(request(ENDLESS, task_type="single", reporter=told))
        await eventually(lambda: "RUNNING" in told.names, within=5)
        name = job_server.jobs()[0].name
        for stale in ("queued", "initializing"):
            job_server.fault("get", status=200, body={"name": name, "state": stale})
        before = len(job_server.log("get"))
        await eventually(lambda: len(job_server.log("get")) > before + 3, within=5)
        job_server.end(name, "succeeded")
        outcome = await ticket.outcome()
    assert outcome.info.phase is Phase.SUCCESS
    assert told.names == ["QUEUED", "RUNNING"]


@pytest.mark.parametrize("garbage", ["html", "empty", "truncated", "charset", "huge"])
async def test_an_answer_that_can_not_be_read_is_a_failed_read(
    job_server: EmbeddedJobServer,
    tmp_path: Path,
    garbage: Literal["html", "empty", "truncated", "charset", "huge"],
) -> None:
    """CASE-254: its beginning is in the failure's text."""
    job_server.fault("get", garbage=garbage)
    config = {"caching": {"maxSystemFailures": 0}}
    with at(tmp_path, job_server, config) as host:
        outcome = await run(host, ENDLESS, "single")
    assert is_contact_lost(outcome, after=1)
    assert outcome.info.err is not None
    assert outcome.info.err.code == ("AnswerTooLarge" if garbage == "huge" else "UnreadableAnswer")
    assert len(outcome.info.reason) < 500


async def test_a_create_whose_answer_can_not_be_read_is_repeated_under_its_key(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-254: the job may have been made."""
    job_server.fault("create", garbage="truncated", after_acceptance=True)
    with at(tmp_path, job_server) as host:
        outcome = await run(host, ReportJob(seconds=0.1), "single")
    assert outcome.info.phase is Phase.SUCCESS
    assert [entry.name for entry in job_server.log("create")] == [outcome.job_key] * 2
    assert job_server.stats().created == 1
