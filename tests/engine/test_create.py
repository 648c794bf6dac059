"""A job is made exactly once, whatever happens to the answer."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, ClassVar

import pytest

from prefect_webapi import (
    BadTaskSpecification,
    CreateResult,
    Phase,
    TaskExecutionContextReader,
    path,
)
from prefect_webapi.engine.host import Host, Ticket
from prefect_webapi.engine.request import Overrides
from prefect_webapi.ledger.records import Draft, Drawn, Move, MoveResult
from prefect_webapi.ledger.sql import SqlStore
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import ReportJob
from prefect_webapi_jobserver.models import JobHandle, JobView
from tests.support.engine import Told, at, request, run
from tests.support.plugins import SinglePlugin, entry
from tests.support.waiting import eventually


class SnapshotPlugin(SinglePlugin):
    """Create's answer is the first snapshot; `kind` says what the author does with the handle."""

    async def create(  # pyright: ignore[reportIncompatibleMethodOverride] - the contract allows more than the skeleton uses
        self, ctx: TaskExecutionContextReader
    ) -> CreateResult[JobHandle | None, JobView] | None:
        job = ctx.task_execution_metadata
        spec = ctx.spec(ReportJob)
        if spec.day < 0:
            raise BadTaskSpecification(f"day is {spec.day}; no report has a day below 0")
        body = {"spec": spec.model_dump(mode="json"), "fingerprint": job.fingerprint}
        made = JobView.model_validate(
            await self._api.put(path("jobs", job.generated_name), json=body)
        )
        match spec.kind:
            case "nothing":
                return None
            case "no handle":
                return CreateResult(None, made)
            case _:
                return CreateResult(JobHandle(name=made.name), made)


SNAPSHOT = entry(SnapshotPlugin, "snapshot")


async def test_a_healthy_service_gets_one_create_with_the_generated_name(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-041, REQ-25."""
    with at(tmp_path, job_server) as host:
        outcome = await run(host, ReportJob(seconds=0.1, result=42))
    assert outcome.info.phase is Phase.SUCCESS
    assert outcome.value.data == 42
    [create] = job_server.log("create")
    assert create.name == outcome.job_key
    assert job_server.stats().created == 1


@pytest.mark.parametrize("task_type", ["keys", "single"])
async def test_a_lost_answer_is_repeated_with_the_same_key(
    job_server: EmbeddedJobServer, tmp_path: Path, task_type: str
) -> None:
    """CASE-042, REQ-24."""
    job_server.fault("create", drop=True, after_acceptance=True)
    with at(tmp_path, job_server) as host:
        outcome = await run(host, ReportJob(seconds=0.1), task_type)
    assert outcome.info.phase is Phase.SUCCESS
    assert [entry.name for entry in job_server.log("create")] == [outcome.job_key] * 2
    assert job_server.stats().created == 1


async def test_a_searchable_service_is_searched_before_a_second_create(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-043."""
    job_server.behave("search")
    job_server.fault("create", drop=True, after_acceptance=True)
    with at(tmp_path, job_server) as host:
        outcome = await run(host, ReportJob(seconds=0.1), "search")
    assert outcome.info.phase is Phase.SUCCESS
    assert [entry.op for entry in job_server.log()][:2] == ["create", "find"]
    assert job_server.stats().created == 1


async def test_a_searchable_service_that_made_nothing_gets_a_second_create(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """REQ-31: the search must find nothing for as long as a job may stay invisible."""
    job_server.behave("search")
    job_server.fault("create", drop=True)
    with at(tmp_path, job_server) as host:
        outcome = await run(host, ReportJob(seconds=0.1), "search")
    assert outcome.info.phase is Phase.SUCCESS
    assert len(job_server.log("create")) == 2
    assert len(job_server.log("find")) >= 2
    assert job_server.stats().created == 1


async def test_a_service_with_neither_is_never_asked_twice(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-044, REQ-33: the place in the quota stays taken."""
    job_server.behave("neither")
    job_server.fault("create", drop=True, after_acceptance=True)
    with at(tmp_path, job_server, {"resourceQuotas": {"default": 1}}) as host:
        outcome = await run(host, ReportJob(seconds=0.1), "neither")
        assert outcome.info.err is not None
        assert outcome.info.err.code == "CreateOutcomeUnknown"
        assert outcome.job_key in outcome.info.err.message
        told = Told()
        second = host.admit(request(ReportJob(seconds=0.3), task_type="neither", reporter=told))
        await eventually(lambda: told.phases, within=5)
        second.cancel("enough")
    assert len(job_server.log("create")) == 1


async def test_a_duplicate_may_be_accepted_on_purpose(
    job_server: EmbeddedJobServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """CASE-045."""
    job_server.behave("neither")
    job_server.fault("create", drop=True, after_acceptance=True)
    with at(tmp_path, job_server) as host:
        options = Overrides(on_unknown_create="retry")
        outcome = await run(host, ReportJob(seconds=0.1), "neither", options=options)
    assert outcome.info.phase is Phase.SUCCESS
    assert len(job_server.log("create")) == 2
    assert "a duplicate is accepted" in caplog.text


async def test_a_busy_service_is_asked_again_with_growing_gaps(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-046."""
    job_server.fault("create", status=503, times=3)
    with at(tmp_path, job_server) as host:
        outcome = await run(host, ReportJob(seconds=0.1))
    assert outcome.info.phase is Phase.SUCCESS
    creates = job_server.log("create")
    assert [entry.name for entry in creates] == [outcome.job_key] * 4
    assert job_server.stats().created == 1


async def test_tries_are_bounded(job_server: EmbeddedJobServer, tmp_path: Path) -> None:
    """CASE-047."""
    job_server.fault("create", status=503, times=None)
    with at(tmp_path, job_server) as host:
        outcome = await run(host, ReportJob(seconds=0.1))
    assert outcome.info.phase is Phase.RETRYABLE_FAILURE
    assert outcome.info.kind == "system"
    assert len(job_server.log("create")) == 10


async def test_a_wrong_request_fails_at_once_with_the_services_words(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-048, REQ-32."""
    job_server.fault("create", status=400, body={"message": "no such kind of report"})
    with at(tmp_path, job_server) as host:
        outcome = await run(host, ReportJob(seconds=0.1))
    assert outcome.info.phase is Phase.PERMANENT_FAILURE
    assert outcome.info.kind == "user"
    assert "no such kind of report" in outcome.info.reason
    assert len(job_server.log("create")) == 1


async def test_a_refused_token_is_loaded_anew_once(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-049: the second request is made by a plugin that was loaded again."""
    job_server.fault("create", status=401)
    with at(tmp_path, job_server) as host:
        outcome = await run(host, ReportJob(seconds=0.1))
    assert outcome.info.phase is Phase.SUCCESS
    assert len(job_server.log("create")) == 2


async def test_a_forbidden_task_fails_after_two_requests(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-050."""
    job_server.fault("create", status=403, times=None)
    with at(tmp_path, job_server) as host:
        outcome = await run(host, ReportJob(seconds=0.1), max_attempts=3)
    assert outcome.info.err is not None
    assert outcome.info.err.code == "Forbidden"
    assert not outcome.info.may_retry
    assert len(job_server.log("create")) <= 2


async def test_a_job_under_our_key_is_adopted(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-055: 409 with our fingerprint."""
    job_server.behave(repeat="conflict")
    job_server.fault("create", drop=True, after_acceptance=True)
    with at(tmp_path, job_server) as host:
        outcome = await run(host, ReportJob(seconds=0.1))
    assert outcome.info.phase is Phase.SUCCESS
    assert job_server.stats().created == 1


async def test_a_foreign_job_under_our_key_is_left_alone(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-056, REQ-34: 409 with another fingerprint."""
    with at(tmp_path / "theirs", job_server) as host:
        theirs = await run(host, ReportJob(seconds=0.1, day=1), idempotency_key="same")
    with at(tmp_path / "ours", job_server) as host:
        ours = await run(host, ReportJob(seconds=0.1, day=2), idempotency_key="same")
    assert theirs.job_key == ours.job_key
    assert ours.info.err is not None
    assert ours.info.err.code == "IdempotencyConflict"
    assert not job_server.log("delete")
    assert job_server.stats().created == 1


async def test_equal_calls_of_one_run_are_two_jobs(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-057: and a second execution of the run meets the same two (CASE-058)."""
    spec = ReportJob(seconds=0.1)
    with at(tmp_path, job_server) as host:
        first = await asyncio.gather(run(host, spec, task_run="t1"), run(host, spec, task_run="t2"))
    assert len({o.job_key for o in first}) == 2
    with at(tmp_path, job_server) as host:
        again = await asyncio.gather(
            run(host, spec, task_run="t3", execution="2"),
            run(host, spec, task_run="t4", execution="2"),
        )
    assert {o.job_key for o in again} == {o.job_key for o in first}
    assert job_server.stats().created == 2


async def test_a_users_key_is_one_job_in_every_run(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-061."""
    spec = ReportJob(seconds=0.1, result="once")
    with at(tmp_path, job_server) as host:
        outcomes = [
            await run(host, spec, run=name, execution=name, idempotency_key="k")
            for name in ("run-a", "run-b")
        ]
    assert [o.value.data for o in outcomes] == ["once", "once"]
    assert job_server.stats().created == 1


async def test_a_retry_after_a_failed_job_is_a_new_job(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-063, CASE-105: the key differs in the attempt."""
    spec = ReportJob(seconds=0.1, outcome="fail-first")
    with at(tmp_path, job_server) as host:
        first = await run(host, spec, task_run="t", max_attempts=2)
        second = await run(host, spec, task_run="t", attempt=2, max_attempts=2)
    assert first.info.phase is Phase.RETRYABLE_FAILURE
    assert second.info.phase is Phase.SUCCESS
    assert first.job_key != second.job_key
    assert job_server.stats().created == 2


async def test_a_hanging_create_is_given_up_as_unknown(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-064: the same key again, one job."""
    job_server.fault("create", delay=3, after_acceptance=True, status=200)
    with at(tmp_path, job_server, createTimeout="1s") as host:
        outcome = await run(host, ReportJob(seconds=0.1), "single")
    assert outcome.info.phase is Phase.SUCCESS
    creates = job_server.log("create")
    assert len(creates) == 2
    assert 0.5 < creates[1].mono - creates[0].mono < 2.5
    assert job_server.stats().created == 1


async def test_a_job_that_can_not_be_read_yet_is_waited_for(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-065, REQ-58."""
    with at(tmp_path, job_server, visibilityDelay="5s") as host:
        outcome = await run(host, ReportJob(seconds=0.1, hidden_for=1), "single")
    assert outcome.info.phase is Phase.SUCCESS
    assert job_server.stats().created == 1


async def test_a_spec_arrives_as_it_was_written(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-066: quotes, newlines, emoji, 200 KiB."""
    text = "\"'\\\n\r\t \u2028 ä 漢 🦆 \x00" + "x" * 200 * 1024
    with at(tmp_path, job_server) as host:
        outcome = await run(host, ReportJob(seconds=0.1, result=text))
    assert outcome.value.data == text
    assert job_server.log("create")[0].body["spec"]["result"] == text


@pytest.mark.parametrize(
    ("fault", "made"),
    [
        ({"status": 429}, True),
        ({"status": 503, "retry_after": "0.1"}, True),
        ({"status": 500}, False),
        ({"status": 504}, False),
        ({"drop": True, "after_acceptance": True}, False),
        ({"status": 200, "body": {"state": "queued"}}, False),
    ],
)
async def test_only_what_surely_made_nothing_is_repeated(
    job_server: EmbeddedJobServer, tmp_path: Path, fault: dict[str, Any], made: bool
) -> None:
    """CASE-279, REQ-83: on a service with neither keys nor search."""
    job_server.behave("neither")
    job_server.fault("create", **fault)
    with at(tmp_path, job_server, {"resourceQuotas": {"default": 1}}) as host:
        outcome = await run(host, ReportJob(seconds=0.1), "neither")
    if made:
        assert outcome.info.phase is Phase.SUCCESS
        assert job_server.stats().created == 1
        return
    assert outcome.info.err is not None
    assert outcome.info.err.code == "CreateOutcomeUnknown"
    assert len(job_server.log("create")) == 1


async def test_a_job_that_is_over_when_create_answers_is_never_read(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-051, REQ-30."""
    with at(tmp_path, job_server, entries=[SNAPSHOT]) as host:
        outcome = await run(host, ReportJob(seconds=0, result=[1, 2]), "snapshot")
    assert outcome.info.phase is Phase.SUCCESS
    assert outcome.value.data == [1, 2]
    assert [entry.op for entry in job_server.log()] == ["create"]


async def test_a_job_that_has_failed_when_create_answers_is_neither_read_nor_deleted(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-052."""
    spec = ReportJob(seconds=0, outcome="fail", message="no figures")
    with at(tmp_path, job_server, entries=[SNAPSHOT]) as host:
        outcome = await run(host, spec, "snapshot")
    assert outcome.info.phase.is_failure
    assert outcome.info.kind == "user"
    assert outcome.info.reason == "no figures"
    assert [entry.op for entry in job_server.log()] == ["create"]


async def test_what_create_tells_is_shown_before_the_first_read(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-053."""
    told = Told()
    with at(tmp_path, job_server, entries=[SNAPSHOT]) as host:
        outcome = await run(host, ReportJob(seconds=0.1), "snapshot", reporter=told)
    assert outcome.info.phase is Phase.SUCCESS
    shown = told.times[told.names.index("RUNNING")]
    assert shown < job_server.log("get")[0].mono


@pytest.mark.parametrize("kind", ["nothing", "no handle"])
async def test_an_author_who_returns_no_handle_is_told_what_is_wanted(
    job_server: EmbeddedJobServer, tmp_path: Path, kind: str
) -> None:
    """CASE-054, REQ-29."""
    with at(tmp_path, job_server, entries=[SNAPSHOT]) as host:
        outcome = await run(host, ReportJob(seconds=30, kind=kind), "snapshot")
    assert outcome.info.phase is Phase.PERMANENT_FAILURE
    assert outcome.info.kind == "system"
    assert "return what `get` and `delete` need" in outcome.info.reason
    assert len(job_server.log("create")) == 1


async def test_a_job_that_is_over_needs_no_handle(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """REQ-29: nothing would ever be read or deleted with it."""
    spec = ReportJob(seconds=0, kind="no handle", result="done")
    with at(tmp_path, job_server, entries=[SNAPSHOT]) as host:
        outcome = await run(host, spec, "snapshot")
        again = await run(host, spec, "snapshot", execution="2")
    assert outcome.info.phase is Phase.SUCCESS
    assert [outcome.value.data, again.value.data] == ["done", "done"]
    assert [entry.op for entry in job_server.log()] == ["create"]


async def test_a_spec_that_the_author_refuses_costs_no_request(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-068."""
    with at(tmp_path, job_server, entries=[SNAPSHOT]) as host:
        outcome = await run(host, ReportJob(day=-1), "snapshot", max_attempts=3)
    assert outcome.info.phase is Phase.PERMANENT_FAILURE
    assert outcome.info.err is not None
    assert (outcome.info.err.kind, outcome.info.err.code) == ("user", "BadTaskSpecification")
    assert "no report has a day below 0" in outcome.info.err.message
    assert not job_server.log()


async def test_two_hundred_calls_stay_two_hundred_jobs_when_the_run_starts_again(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-060: equal and unequal calls; the first process leaves in the middle."""
    specs = [ReportJob(seconds=0.5, day=n if n < 150 else -1, result=n) for n in range(150)]
    specs += [ReportJob(seconds=0.5, day=-1)] * 50

    def calls(host: Host, execution: str) -> list[Ticket]:
        return [
            host.admit(
                request(spec, task_type="keys", execution=execution, task_run=f"{execution}/{n}")
            )
            for n, spec in enumerate(specs)
        ]

    with at(tmp_path, job_server) as host:
        calls(host, "1")
        await eventually(lambda: job_server.stats().created >= 100, within=20)
    with at(tmp_path, job_server) as host:
        outcomes = await asyncio.gather(*(ticket.outcome() for ticket in calls(host, "2")))
    assert all(outcome.info.phase is Phase.SUCCESS for outcome in outcomes)
    assert [outcome.value.data for outcome in outcomes[:150]] == list(range(150))
    assert job_server.stats().created == 200
    assert not job_server.stats().duplicates


class CountingStore(SqlStore):
    """Counts the writes about jobs."""

    writes = 0

    async def intent(self, draft: Draft) -> Drawn:
        CountingStore.writes += 1
        return await super().intent(draft)

    async def move(self, move: Move) -> MoveResult:
        CountingStore.writes += 1
        return await super().move(move)


class WritesPlugin(SinglePlugin):
    """Notes how many writes there were before create."""

    seen: ClassVar[list[int]] = []

    async def create(
        self, ctx: TaskExecutionContextReader
    ) -> JobHandle | CreateResult[JobHandle, JobView]:
        self.seen.append(CountingStore.writes)
        return await super().create(ctx)


@pytest.mark.parametrize(("quotas", "before", "most"), [({}, 1, 4), ({"default": 1}, 2, 5)])
async def test_a_create_waits_for_one_write_or_two(
    job_server: EmbeddedJobServer,
    tmp_path: Path,
    quotas: dict[str, int],
    before: int,
    most: int,
) -> None:
    """CASE-067, REQ-28: in all a job costs four writes, five with a quota. The time is measured in `benchmarks/`."""
    CountingStore.writes = 0
    WritesPlugin.seen.clear()
    config = {"resourceQuotas": quotas}
    entries = [entry(WritesPlugin, "writes")]
    with at(tmp_path, job_server, config, entries=entries, store=CountingStore) as host:
        outcome = await run(host, ReportJob(seconds=0.1), "writes")
    assert outcome.info.phase is Phase.SUCCESS
    assert WritesPlugin.seen == [before]
    assert CountingStore.writes <= most
