"""What leaves for a service and when: rates, answers that ask for less, edited blocks. Counted at the service."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from prometheus_client import CollectorRegistry

from prefect_webapi import GetContext, Phase, Throttled
from prefect_webapi.contract.errors import LedgerUnavailable
from prefect_webapi.engine.host import Host, Ticket
from prefect_webapi.ledger.sql import SqlStore
from prefect_webapi.metrics import Metrics
from prefect_webapi.testing import EmbeddedJobServer, LoggedRequest
from prefect_webapi_jobserver import ReportJob
from prefect_webapi_jobserver.models import JobHandle, JobView
from tests.support.engine import Told, at, block, engine, request, run
from tests.support.engine_child import Work, child
from tests.support.plugins import ALL, SinglePlugin, entry
from tests.support.waiting import eventually

JOSTLE = 0.3
"""Seconds by which requests may bunch on their way on a busy machine."""
ENDLESS = "never"


def limits(*, read: tuple[int, int] | None = None, write: tuple[int, int] | None = None) -> Any:
    """Configuration: (qps, burst) of each."""
    named = {"readRateLimiter": read, "writeRateLimiter": write}
    return {name: {"qps": of[0], "burst": of[1]} for name, of in named.items() if of is not None}


def admitted(
    host: Host, jobs: int, task_type: str = "single", *, task: str = "task", **spec: Any
) -> list[Ticket]:
    connection = spec.pop("connection", "default")
    return [
        host.admit(
            request(
                ReportJob(day=day, **spec),
                task_type=task_type,
                task_run=f"{task}-{day}",
                task=task,
                connection=connection,
            )
        )
        for day in range(jobs)
    ]


def most_above_the_line(calls: Sequence[LoggedRequest], *, burst: int, per_second: float) -> float:
    """By how many calls the worst of all windows exceeds ``burst + rate * width``."""
    times = [call.mono for call in calls]
    return max(
        last - first + 1 - burst - per_second * (times[last] - times[first] + JOSTLE)
        for first in range(len(times))
        for last in range(first, len(times))
    )


def gaps(calls: Sequence[LoggedRequest]) -> list[float]:
    return [after.mono - before.mono for before, after in pairwise(calls)]


def reads_of(server: EmbeddedJobServer) -> int:
    return server.stats().requests.get("get", 0)


# --- rates -------------------------------------------------------------------------------------


async def test_creates_keep_to_their_rate(job_server: EmbeddedJobServer, tmp_path: Path) -> None:
    """CASE-148, REQ-14: 30 tasks, five at once and five per second, four times as fast."""
    with at(tmp_path, job_server, limits(write=(5, 5)), speed=4, createTimeout="10m") as host:
        outcomes = await asyncio.gather(*(t.outcome() for t in admitted(host, 30, seconds=0)))
    assert all(outcome.info.phase is Phase.SUCCESS for outcome in outcomes)
    creates = job_server.log("create")
    assert len(creates) == 30
    assert most_above_the_line(creates, burst=5, per_second=20) <= 0
    assert creates[-1].mono - creates[0].mono > 25 / 20 - JOSTLE


async def test_two_plugins_at_one_endpoint_share_its_rate(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-157: the same address under another name is another endpoint with a rate of its own."""
    shared = block(job_server, limits(write=(5, 5)))
    elsewhere = block(job_server.url.replace("127.0.0.1", "localhost"), limits(write=(5, 5)))
    blocks = {"default": shared, "elsewhere": elsewhere}
    with engine(tmp_path, ALL, blocks, speed=4) as host:
        tickets = [
            *admitted(host, 10, "single", seconds=0),
            *admitted(host, 10, "keys", seconds=0, task="second plugin"),
        ]
        await asyncio.gather(*(ticket.outcome() for ticket in tickets))
        together = job_server.log("create")
        alone = await asyncio.gather(
            *(
                ticket.outcome()
                for ticket in (
                    *admitted(host, 5, "single", seconds=0, task="here"),
                    *admitted(host, 5, "single", seconds=0, task="there", connection="elsewhere"),
                )
            )
        )
    assert len(together) == 20
    assert most_above_the_line(together, burst=5, per_second=20) <= 0
    assert all(outcome.info.phase is Phase.SUCCESS for outcome in alone)
    there = {outcome.job_key for outcome in alone[5:]}
    apart = [call for call in job_server.log("create") if call.name in there]
    assert apart[-1].mono - apart[0].mono < 0.2  # a burst, while those here stand in line


async def test_saturated_reads_starve_no_job(job_server: EmbeddedJobServer, tmp_path: Path) -> None:
    """CASE-149, REQ-14: two reads per second for 100 jobs: at that rate 60 seconds are 120 reads."""
    speed = 30
    config = limits(read=(2, 5))
    # All jobs want to be read as often as each other, however long it takes to make a hundred.
    times: dict[str, Any] = {"initialInterval": "30s", "getTimeout": "10m"}
    in_flight = 10  # they overtake each other on a busy machine
    with at(tmp_path, job_server, config, speed=speed, **times) as host:
        admitted(host, 100, outcome=ENDLESS)
        await eventually(lambda: reads_of(job_server) >= 250, within=40, every=0.25)
        reads = job_server.log("get")
    assert most_above_the_line(reads, burst=5, per_second=2 * speed) <= 0
    places: dict[str, list[int]] = defaultdict(list)
    for place, read in enumerate(reads):
        places[read.name].append(place)
    assert len(places) == 100
    for of_job in places.values():
        waited = [after - before for before, after in pairwise([*of_job, len(reads)])]
        assert max(waited) <= 120 + 2 * in_flight


async def test_saturated_reads_hold_no_create_up(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-150: one read per second, and 20 jobs that want more."""
    with at(tmp_path, job_server, limits(read=(1, 5))) as host:
        admitted(host, 20, outcome=ENDLESS)
        await eventually(lambda: len(job_server.log("get")) >= 5, within=5)
        admitted(host, 20, outcome=ENDLESS, task="later")
        await eventually(lambda: len(job_server.log("create")) == 40, within=5)
    creates, reads = job_server.log("create"), job_server.log("get")
    assert creates[-1].mono - creates[20].mono < 1.0
    assert len(reads) < 5 + 5


async def test_an_edited_block_slows_reads_down_while_jobs_run(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-020: from 30 per second to one, and back; no job is lost and nothing is started anew."""
    speed = 3

    def edited(qps: int) -> Any:
        config = {**limits(read=(qps, 5)), "caching": {"resyncInterval": "5s"}}
        return block(job_server, config, initialInterval="1s", getTimeout="10m")

    blocks = {"default": edited(30)}
    with engine(tmp_path, ALL, blocks, speed=speed) as host:
        tickets = admitted(host, 50, outcome=ENDLESS)
        await eventually(lambda: reads_of(job_server) >= 60, within=10, every=0.1)
        before = job_server.log("get")
        blocks["default"] = edited(1)

        def slow() -> list[LoggedRequest]:
            last = job_server.log("get", since=before[-1].index)[-6:]
            return last if last[-1].mono - last[0].mono > 5 / speed * 0.75 else []

        lately = await eventually(slow, within=20, every=0.2)
        blocks["default"] = edited(1000)
        for job in job_server.jobs():
            job_server.end(job.name, "succeeded")
        outcomes = await asyncio.gather(*(ticket.outcome() for ticket in tickets))
    assert most_above_the_line(lately, burst=0, per_second=speed) < 5
    assert len(before) / (before[-1].mono - before[0].mono) > 5 * speed
    assert all(outcome.info.phase is Phase.SUCCESS for outcome in outcomes)
    assert job_server.stats().created == 50
    assert not job_server.log("delete")


# --- answers that ask for less ----------------------------------------------------------------------


async def test_a_throttled_create_is_repeated_without_a_retry(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-154, REQ-60: five times 429 for a task without retries, and one job."""
    job_server.fault("create", status=429, times=5)
    told = Told()
    with at(tmp_path, job_server, maxCreateAttempts=1) as host:
        outcome = await run(host, ReportJob(seconds=0.1, result=7), reporter=told)
    assert outcome.info.phase is Phase.SUCCESS
    assert outcome.value.data == 7
    creates = job_server.log("create")
    assert [call.status for call in creates] == [429] * 5 + [201]
    assert {call.name for call in creates} == {outcome.job_key}
    assert job_server.stats().created == 1
    assert any("the service throttles" in reason for _, reason in told.phases)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("op", ["create", "get", "delete"])
async def test_a_retry_after_is_obeyed(
    job_server: EmbeddedJobServer,
    tmp_path: Path,
    status: int,
    op: Literal["create", "get", "delete"],
) -> None:
    """CASE-151, CASE-155, CASE-156, REQ-41: no call of that kind leaves before; then the job goes its way."""
    job_server.fault(op, status=status, retry_after="0.8", times=2)
    config = {"caching": {"maxSystemFailures": 0}}
    metrics = Metrics(CollectorRegistry())
    with at(tmp_path, job_server, config, maxCreateAttempts=1, metrics=metrics) as host:
        if op == "delete":
            ticket = host.admit(request(ReportJob(outcome="never"), task_type="single"))
            await eventually(lambda: job_server.log("get"), within=5)
            ticket.cancel("enough")
            outcome = await ticket.outcome()
        else:
            outcome = await run(host, ReportJob(seconds=0.1), "single")
    calls = job_server.log(op)
    assert [call.status for call in calls[:2]] == [status] * 2
    assert (calls[2].status or 0) < 300
    assert all(gap >= 0.78 for gap in gaps(calls[:3]))
    assert job_server.stats().inside_retry_after == 0
    kind = "read" if op == "get" else "write"
    assert metrics.value("throttled_total", plugin="single", op=kind) == 2
    expected = Phase.ABORTED if op == "delete" else Phase.SUCCESS
    assert outcome.info.phase is expected
    assert job_server.stats().created == 1
    assert job_server.stats().live == 0


async def test_a_closed_gate_stops_reads_of_its_endpoint_only(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-151: other jobs there wait too; its writes, and reads elsewhere, go on."""
    elsewhere = block(job_server.url.replace("127.0.0.1", "localhost"), initialInterval="100ms")
    blocks = {"default": block(job_server, initialInterval="100ms"), "elsewhere": elsewhere}
    with engine(tmp_path, ALL, blocks) as host:
        admitted(host, 3, outcome=ENDLESS)
        await eventually(lambda: job_server.stats().created == 3, within=5)
        admitted(host, 1, outcome=ENDLESS, task="elsewhere", connection="elsewhere")
        await eventually(lambda: len({get.name for get in job_server.log("get")}) == 4, within=5)
        own, other = job_server.jobs()[0], job_server.jobs()[-1]
        job_server.fault("get", name=own.name, status=429, retry_after="1.5")
        refused = await eventually(
            lambda: [get for get in job_server.log("get") if get.status == 429], within=5
        )
        closed = refused[0]
        admitted(host, 1, outcome=ENDLESS, task="while it is closed")
        await eventually(
            lambda: [
                get for get in job_server.log("get")[closed.index + 1 :] if get.name == own.name
            ],
            within=5,
        )
    after = [call for call in job_server.log() if call.index > closed.index]
    opens = closed.mono + closed.seconds + 1.45
    during = [call for call in after if call.mono < opens]
    # Reads that were on their way already may arrive just after the refused one.
    late = [c for c in during if c.op == "get" and c.name != other.name]
    assert all(call.mono - closed.mono < 0.1 for call in late), late
    assert len([call for call in during if call.name == other.name]) >= 3
    assert [call.status for call in during if call.op == "create"] == [201]


def _date(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        (lambda: _date(6), 1.0, 2.0),
        (lambda: _date(-60), 0.0, 0.5),
        (lambda: "soon", 0.0, 0.5),
        (lambda: "86400", 1.2, 2.0),
    ],
    ids=["date", "date in the past", "garbage", "a day"],
)
async def test_a_retry_after_of_any_shape_is_understood(
    job_server: EmbeddedJobServer, tmp_path: Path, header: Any, least: float, most: float
) -> None:
    """CASE-152: a day is capped; what can't be read, or is over, is as if it were absent. Five times as fast."""
    job_server.fault("get", status=429, headers={"Retry-After": header()})
    with at(tmp_path, job_server, speed=5, maxRetryAfter="6s") as host:
        outcome = await run(host, ReportJob(seconds=0.05), "single")
    assert outcome.info.phase is Phase.SUCCESS
    [gap] = gaps(job_server.log("get"))
    assert least - 0.2 <= gap < most + JOSTLE


async def test_a_long_retry_after_does_not_outlive_the_deadline(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-152: the job is deleted in time, since writes have a gate of their own."""
    job_server.fault("get", status=429, retry_after="86400")
    with at(tmp_path, job_server, deadline="1s", cancelGrace="200ms") as host:
        outcome = await run(host, ReportJob(outcome="never"), "single")
    assert outcome.info.err is not None
    assert outcome.info.err.code == "Timeout"
    [delete] = job_server.log("delete")
    assert "deadline" in delete.query
    assert job_server.stats().live == 0
    assert len(job_server.log("get")) == 1


class InBodyThrottle(SinglePlugin):
    """A service that says "too many" in an answer with status 200."""

    async def get(self, ctx: GetContext[JobHandle]) -> JobView:
        job = await super().get(ctx)
        if job.state == "BUSY":
            wait = timedelta(seconds=float(job.message)) if job.message else None
            raise Throttled("too many requests", retry_after=wait)
        return job


@pytest.mark.parametrize(("told", "least"), [("0.8", 0.78), ("", 0.0)])
async def test_a_throttle_in_the_body_counts_as_one_in_the_status(
    job_server: EmbeddedJobServer, tmp_path: Path, told: str, least: float
) -> None:
    """CASE-159, REQ-39."""
    job_server.fault("get", patch={"state": "BUSY", "message": told}, times=3)
    config = {"caching": {"maxSystemFailures": 0}}
    metrics = Metrics(CollectorRegistry())
    entries = [entry(InBodyThrottle, "in-body")]
    with at(tmp_path, job_server, config, entries=entries, metrics=metrics) as host:
        outcome = await run(host, ReportJob(seconds=0.05), "in-body")
    assert outcome.info.phase is Phase.SUCCESS
    assert metrics.value("throttled_total", plugin="in-body", op="read") == 3
    between = gaps(job_server.log("get"))
    assert len(between) == 3
    assert all(gap >= least for gap in between)


async def test_throttles_between_failures_neither_count_nor_forgive(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-076, REQ-22: with two failures allowed, the third in a row ends contact however many throttles part them."""
    config = {"caching": {"maxSystemFailures": 2, "resyncInterval": "5s"}}
    for status in (500, 429, 429, 500, 429):
        job_server.fault("get", status=status)
    with at(tmp_path / "borne", job_server, config, speed=20, getTimeout="10m") as host:
        borne = await run(host, ReportJob(seconds=0), "single")
    for status in (500, 429, 500, 429, 429, 500):
        job_server.fault("get", status=status)
    with at(tmp_path / "lost", job_server, config, speed=20, getTimeout="10m") as host:
        lost = await run(host, ReportJob(outcome="never", day=1), "single")
    assert borne.info.phase is Phase.SUCCESS
    assert "lost contact after 3 failures" in lost.info.reason
    assert len(job_server.log("delete")) == 1


async def test_processes_that_share_a_rate_keep_to_it_together(
    each_ledger: str, job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-268, REQ-16: three processes that might each send 30 a second send 10 in sum, reads and writes."""
    works = [
        Work(
            folder=tmp_path,
            server=job_server.url,
            specs=tuple(ReportJob(kind=f"process {n}", day=day, seconds=0.5) for day in range(5)),
            execution=f"execution-{n}",
            config=limits(read=(30, 300), write=(30, 300)),
            settings={"sharedQps": 10},
        )
        for n in range(3)
    ]
    with ExitStack() as stack:
        children = [stack.enter_context(child(work)) for work in works]
        ends = [await asyncio.to_thread(each.ends) for each in children]
    assert [end.phase for ended in ends for end in ended] == ["SUCCESS"] * 15
    calls = job_server.log()
    assert len(calls) >= 15 + 3
    assert most_above_the_line(calls, burst=1, per_second=10) <= 0
    assert job_server.stats().created == 15


class AbsentStore(SqlStore):
    """Gives no turns for a while."""

    is_away: ClassVar[bool] = False
    refused: ClassVar[int] = 0

    async def reserve(self, name: str, seconds: float) -> float:
        if AbsentStore.is_away:
            AbsentStore.refused += 1
            raise LedgerUnavailable("the data base is away")
        return await super().reserve(name, seconds)


async def test_calls_wait_while_the_ledger_of_a_shared_rate_is_away(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """REQ-16: a limit that somebody set is kept."""
    with at(tmp_path, job_server, store=AbsentStore, sharedQps=100) as host:
        AbsentStore.is_away = True
        ticket = host.admit(request(ReportJob(seconds=0.1), task_type="keys"))
        await eventually(lambda: AbsentStore.refused, within=10)
        assert not job_server.log()
        AbsentStore.is_away = False
        assert (await ticket.outcome()).info.phase is Phase.SUCCESS
    assert job_server.stats().created == 1
