"""What `status` says, and what it can never do: phases as they reach people, mistakes of authors, ends."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest

from prefect_webapi import (
    CreateResult,
    ExternalResource,
    Phase,
    PhaseInfo,
    StatusContext,
    TaskExecutionContextReader,
    TaskInfo,
    TaskLog,
    path,
)
from prefect_webapi._prefect.states import ending
from prefect_webapi.engine.request import Overrides
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import ReportJob
from prefect_webapi_jobserver.models import JobHandle, JobView
from tests.support.engine import Told, at, request, run
from tests.support.jobserver import TOKEN
from tests.support.plugins import SinglePlugin, entry
from tests.support.waiting import eventually

SOON = {"caching": {"resyncInterval": "5s"}}
PATIENT: dict[str, Any] = {"getTimeout": "1h", "createTimeout": "1h", "deleteTimeout": "1h"}
ENDED = datetime(2026, 11, 24, 6, 30, tzinfo=UTC)
NAIVE = datetime(2026, 11, 24, 6, 30)  # noqa: DTZ001 - an author who forgot the zone


HALF = "half of \ud83d"
"""JSON may escape half of a surrogate pair, so a service's words may hold one."""
_HALVES = TaskInfo(
    custom_info={"note": HALF, HALF: [HALF]},
    logs=(TaskLog(name=HALF, uri=f"https://example.com/{HALF}"),),
    external_resources=(ExternalResource(external_id=HALF, cache_status=HALF),),
)


class OddPlugin(SinglePlugin):
    """`kind` of the spec names an author's way with `status`."""

    calls: ClassVar[int] = 0

    def status(self, ctx: StatusContext[JobHandle, JobView]) -> PhaseInfo:
        OddPlugin.calls += 1
        usual = super().status(ctx)
        odd = _ODD.get(ctx.spec(ReportJob).kind)
        return usual if odd is None else odd(usual)


def _raises(usual: PhaseInfo) -> PhaseInfo:
    raise KeyError("no such column")


def _no_phase_info(usual: PhaseInfo) -> Any:
    return "RUNNING"


def _parts(usual: PhaseInfo) -> PhaseInfo:
    """Three parts, told in another order each time."""
    parts = [
        ExternalResource(external_id=f"part-{n}", index=n, phase=usual.phase) for n in range(3)
    ]
    turn = OddPlugin.calls % 3
    info = TaskInfo(external_resources=tuple(parts[turn:] + parts[:turn]))
    return usual.model_copy(update={"info": info})


def _more_links(usual: PhaseInfo) -> PhaseInfo:
    """A second link from the fifth answer on; nothing else ever changes."""
    links = [TaskLog(name="Job", uri="https://example.com/job")]
    if OddPlugin.calls >= 5:
        links.append(TaskLog(name="Driver log", uri="https://example.com/log"))
    return usual.model_copy(update={"info": TaskInfo(logs=tuple(links)), "version": 0})


def _over(at: datetime) -> Callable[[PhaseInfo], PhaseInfo]:
    def status(usual: PhaseInfo) -> PhaseInfo:
        if not usual.phase.is_terminal:
            return usual
        return PhaseInfo.success("done", info=TaskInfo(occurred_at=at))

    return status


def _failed(info: PhaseInfo) -> Callable[[PhaseInfo], PhaseInfo]:
    return lambda usual: info if usual.phase.is_terminal else usual


_ODD: dict[str, Callable[[PhaseInfo], PhaseInfo]] = {
    "not ready": lambda usual: (
        PhaseInfo.not_ready("warming up") if usual.phase is Phase.QUEUED else usual
    ),
    "undefined": lambda usual: PhaseInfo.undefined("can't tell"),
    "raises": _raises,
    "no phase info": _no_phase_info,
    "unknown number": lambda usual: PhaseInfo.model_construct(phase=99),
    "half a pair": lambda usual: usual.model_copy(update={"info": _HALVES}),
    "half a pair, unseen": lambda usual: usual.model_copy(update={"reason": HALF}),
    "parts": _parts,
    "more links": _more_links,
    "ended at": _over(ENDED),
    "naive": _over(NAIVE),
    "no error": _failed(PhaseInfo(phase=Phase.PERMANENT_FAILURE, reason="it went wrong")),
    "long": _failed(PhaseInfo.failure("TooLong", "x" * 1_000_000)),
    "user": _failed(PhaseInfo.failure("BadColumn", "no such column")),
    "retryable": _failed(PhaseInfo.retryable_failure("Preempted", "try again")),
}
ODD = entry(OddPlugin, "odd")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    OddPlugin.calls = 0


async def test_not_ready_after_create_only_waits(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-093, REQ-56: people see it, and nothing is created again."""
    told = Told()
    spec = ReportJob(kind="not ready", queued_seconds=0.3, seconds=0.3)
    with at(tmp_path, job_server, entries=[ODD]) as host:
        outcome = await run(host, spec, "odd", reporter=told)
    assert outcome.info.phase is Phase.SUCCESS
    assert told.changes == ["QUEUED", "NOT_READY", "RUNNING"]
    assert ("NOT_READY", "warming up") in told.phases
    assert job_server.stats().created == 1
    assert len(job_server.log("create")) == 1


async def test_a_phase_that_can_not_be_told_is_no_news_and_the_deadline_ends_it(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-094, REQ-56."""
    told = Told()
    spec = ReportJob(kind="undefined", outcome="never")
    with at(tmp_path, job_server, entries=[ODD], deadline="700ms", cancelGrace="100ms") as host:
        outcome = await run(host, spec, "odd", reporter=told)
    assert outcome.info.err is not None
    assert outcome.info.err.code == "Timeout"
    assert told.names == ["QUEUED"]
    assert OddPlugin.calls > 3
    assert len(job_server.log("create")) == 1
    assert len(job_server.log("delete")) == 1


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("raises", "KeyError"),
        ("no phase info", "TypeError"),
        ("unknown number", None),
        ("half a pair, unseen", None),
    ],
)
async def test_a_status_that_can_not_be_used_counts_as_a_failed_read(
    job_server: EmbeddedJobServer, tmp_path: Path, kind: str, code: str | None
) -> None:
    """CASE-095 and CASE-096, REQ-55: the job is neither lost nor made again, and other jobs go on."""
    spec = ReportJob(kind=kind, outcome="never")
    with at(tmp_path, job_server, SOON, entries=[ODD], speed=20, **PATIENT) as host:
        outcome = await run(host, spec, "odd")
        other = await run(host, ReportJob(seconds=0), "odd")
    assert outcome.info.phase is Phase.RETRYABLE_FAILURE
    assert outcome.info.kind == "system"
    assert "lost contact after 6 failures" in outcome.info.reason
    assert outcome.info.err is not None
    assert code in (None, outcome.info.err.code)
    assert [entry.name for entry in job_server.log("delete")] == [outcome.job_key]
    assert len(job_server.log("create")) == 2
    assert other.info.phase is Phase.SUCCESS


class FirstRaisesPlugin(OddPlugin):
    """The author did not expect what create tells."""

    async def create(self, ctx: TaskExecutionContextReader) -> CreateResult[JobHandle, JobView]:
        job = ctx.task_execution_metadata
        body = {"spec": ctx.spec(ReportJob).model_dump(mode="json")}
        made = await self._api.put(path("jobs", job.generated_name), json=body)
        return CreateResult(JobHandle(name=made["name"]), JobView.model_validate(made))

    def status(self, ctx: StatusContext[JobHandle, JobView]) -> PhaseInfo:
        usual = super().status(ctx)
        if OddPlugin.calls == 1:
            raise KeyError("no such column")
        return usual


async def test_a_status_that_fails_on_what_create_told_leaves_the_job_to_the_reads(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """REQ-55: also for the first snapshot."""
    entries = [entry(FirstRaisesPlugin, "first")]
    with at(tmp_path, job_server, entries=entries) as host:
        outcome = await run(host, ReportJob(seconds=0.1), "first")
    assert outcome.info.phase is Phase.SUCCESS
    assert job_server.stats().created == 1


async def test_a_new_link_in_the_same_phase_is_told_once(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-097, REQ-78: with a version raised for the author who forgot."""
    told = Told()
    with at(tmp_path, job_server, entries=[ODD]) as host:
        ticket = host.admit(
            request(ReportJob(kind="more links", outcome="never"), task_type="odd", reporter=told)
        )
        await eventually(lambda: OddPlugin.calls >= 10, within=5)
        job_server.end(job_server.jobs()[0].name, "succeeded")
        await ticket.outcome()
    running = [info for info in told.infos if info.phase is Phase.RUNNING]
    assert [len(info.info.logs) for info in running] == [1, 2]
    assert [info.version for info in running] == [0, 1]


async def test_an_answer_that_tells_nothing_new_is_told_to_nobody(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-098: a hundred of them, one event."""
    told = Told()
    with at(tmp_path, job_server, SOON, entries=[ODD], speed=200, **PATIENT) as host:
        ticket = host.admit(
            request(ReportJob(outcome="never", message="as before"), task_type="odd", reporter=told)
        )
        await eventually(lambda: OddPlugin.calls >= 100, within=30)
        job_server.end(job_server.jobs()[0].name, "succeeded")
        await ticket.outcome()
    assert told.phases == [("QUEUED", ""), ("RUNNING", "as before")]


async def test_a_secret_that_a_service_echoes_at_each_read_is_told_at_none(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """An answer that says what was told before isn't searched again; one that holds a secret never does."""
    told = Told()
    spec = ReportJob(outcome="never", message=f"started with {TOKEN}")
    with at(tmp_path, job_server, SOON, entries=[ODD], speed=200, **PATIENT) as host:
        ticket = host.admit(request(spec, task_type="odd", reporter=told))
        await eventually(lambda: OddPlugin.calls >= 10, within=30)
        job_server.end(job_server.jobs()[0].name, "succeeded")
        await ticket.outcome()
    assert told.phases == [("QUEUED", ""), ("RUNNING", "started with ***")]


async def test_phases_are_told_in_their_order(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-099: the engine's part of it."""
    told = Told()
    spec = ReportJob(queued_seconds=0.3, initializing_seconds=0.3, seconds=0.3)
    with at(tmp_path, job_server) as host:
        outcome = await run(host, spec, reporter=told)
    assert told.changes == ["QUEUED", "INITIALIZING", "RUNNING"]
    assert outcome.info.phase is Phase.SUCCESS


async def test_a_failure_without_an_error_gets_one(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-100."""
    with at(tmp_path, job_server, entries=[ODD]) as host:
        outcome = await run(host, ReportJob(kind="no error", seconds=0), "odd")
    assert outcome.info.err is not None
    assert (outcome.info.err.code, outcome.info.kind) == ("Unknown", "system")
    assert outcome.info.err.message == "it went wrong"


async def test_a_megabyte_of_reason_is_cut(job_server: EmbeddedJobServer, tmp_path: Path) -> None:
    """CASE-101: in what is delivered and in what is kept."""
    spec = ReportJob(kind="long", seconds=0)
    with at(tmp_path, job_server, entries=[ODD]) as host:
        outcome = await run(host, spec, "odd")
    assert len(outcome.info.reason.encode()) <= 4 * 1024
    assert outcome.info.reason.endswith("…")
    assert outcome.info.err is not None
    assert len(outcome.info.err.message.encode()) <= 64 * 1024
    message = ending(outcome).message
    assert message is not None
    assert len(message.encode()) < 100 * 1024


async def test_half_a_surrogate_pair_in_the_services_words_loses_no_job(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    told = Told()
    with at(tmp_path, job_server, entries=[ODD]) as host:
        outcome = await run(host, ReportJob(kind="half a pair", seconds=0.2), "odd", reporter=told)
    assert outcome.info.phase is Phase.SUCCESS
    assert outcome.info.info.custom_info == {"note": "half of ?", "half of ?": ["half of ?"]}
    assert job_server.stats().created == 1
    failure = PhaseInfo.failure(HALF, HALF)
    assert failure.err is not None
    assert failure.err.code == "half of ?"


async def test_parts_of_a_job_keep_their_index(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-103: across reads and retries, in whichever order the author tells them."""
    told = [Told(), Told()]
    spec = ReportJob(kind="parts", seconds=0.3, outcome="fail-first")
    with at(tmp_path, job_server, entries=[ODD]) as host:
        for attempt, reporter in enumerate(told, 1):
            await run(
                host, spec, "odd", task_run="t", attempt=attempt, max_attempts=2, reporter=reporter
            )
    for reporter in told:
        shown = [info.info.external_resources for info in reporter.infos if info.phase > 3]
        assert shown
        for parts in shown:
            assert {part.external_id: part.index for part in parts} == {
                f"part-{n}": n for n in range(3)
            }


async def test_the_order_of_parts_is_no_news(job_server: EmbeddedJobServer, tmp_path: Path) -> None:
    """CASE-103: a service that lists the same parts in another order has told nothing."""
    told = Told()
    with at(tmp_path, job_server, entries=[ODD]) as host:
        ticket = host.admit(
            request(ReportJob(kind="parts", outcome="never"), task_type="odd", reporter=told)
        )
        await eventually(lambda: OddPlugin.calls >= 10, within=5)
        job_server.end(job_server.jobs()[0].name, "succeeded")
        await ticket.outcome()
    assert told.names == ["QUEUED", "RUNNING"]


@pytest.mark.parametrize(("kind", "again"), [("user", False), ("retryable", True)])
async def test_only_a_failure_that_may_be_retried_says_so(
    job_server: EmbeddedJobServer, tmp_path: Path, kind: str, again: bool
) -> None:
    """REQ-59: what Prefect's retries go by."""
    with at(tmp_path, job_server, entries=[ODD]) as host:
        outcome = await run(host, ReportJob(kind=kind, seconds=0), "odd", max_attempts=3)
    assert outcome.info.kind == "user"
    assert outcome.info.may_retry is again


async def test_a_job_that_somebody_else_stopped_is_a_failure(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-107: RemoteAborted, not Cancelled."""
    with at(tmp_path, job_server) as host:
        ticket = host.admit(request(ReportJob(outcome="never"), task_type="keys"))
        [job] = await eventually(job_server.jobs, within=5)
        job_server.end(job.name, "cancelled", "stopped in the console")
        outcome = await ticket.outcome()
    assert outcome.info.phase is Phase.ABORTED
    assert not outcome.stopped_by_us
    assert not outcome.info.may_retry
    assert not job_server.log("delete")
    state = ending(outcome)
    assert state.is_failed()
    assert state.name == "RemoteAborted"
    assert state.message is not None
    assert "stopped in the console" in state.message


async def test_the_time_of_the_remote_end_is_shown(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-108: as the service gave it, with its zone."""
    with at(tmp_path, job_server, entries=[ODD]) as host:
        outcome = await run(host, ReportJob(kind="ended at", seconds=0), "odd")
    assert outcome.info.info.occurred_at == ENDED
    message = ending(outcome).message
    assert message is not None
    assert ENDED.isoformat() in message


async def test_a_time_without_a_zone_is_read_as_utc_with_one_warning(
    job_server: EmbeddedJobServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CASE-109."""
    monkeypatch.setattr(
        "prefect_webapi.contract.phase._warned_naive", set[str]()
    )  # as in a new process
    with at(tmp_path, job_server, entries=[ODD]) as host, caplog.at_level(logging.WARNING):
        for day in range(2):
            outcome = await run(host, ReportJob(kind="naive", seconds=0, day=day), "odd")
            assert outcome.info.phase is Phase.SUCCESS
            assert outcome.info.info.occurred_at == NAIVE.replace(tzinfo=UTC)
    assert caplog.text.count("without a time zone") == 1


async def test_a_deadline_of_the_call_wins_over_the_blocks(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """The nearest setting wins."""
    options = Overrides(deadline=timedelta(milliseconds=300))
    with at(tmp_path, job_server, deadline="1h") as host:
        outcome = await run(host, ReportJob(outcome="never"), options=options)
    assert outcome.info.err is not None
    assert outcome.info.err.code == "Timeout"
