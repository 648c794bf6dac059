"""Never more live jobs than a quota, counted at the service: many tasks, deaths, edited quotas, early ends."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from prefect_webapi import (
    CreateResult,
    Phase,
    ResourceConstraintsSpec,
    ResourceRequirements,
    TaskExecutionContextReader,
    leases,
    path,
)
from prefect_webapi.clock import Clock
from prefect_webapi.contract.errors import ConfigurationError, QuotaNotConfigured
from prefect_webapi.engine.channels import LedgerCount
from prefect_webapi.engine.host import Host, Ticket
from prefect_webapi.engine.request import JobRequest
from prefect_webapi.ledger.records import JobState, Move, MoveResult, QuotaRow, Record
from prefect_webapi.ledger.sql import SqlStore
from prefect_webapi.quotas import Busy, SlotLease, SlotsUnavailable
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import JobServerPlugin, ReportJob
from prefect_webapi_jobserver.models import JobHandle, JobView
from tests.support.engine import LocalSlots, Told, at, block, engine, request, run
from tests.support.engine_child import Work, child
from tests.support.leaks import given_back
from tests.support.ledger import another_store, ledger_of
from tests.support.plugins import ALL, entry
from tests.support.waiting import eventually

pytestmark = pytest.mark.usefixtures("each_ledger")

NAME = "webapi:keys:default:default"


def quota(jobs: int, **more: Any) -> dict[str, Any]:
    return {"resourceQuotas": {"default": jobs}, **more}


async def places_taken(folder: Path) -> int:
    """What the ledger counts, asked by nobody who works on it."""
    return sum(row.live for row in await limits(folder))


async def limits(folder: Path) -> Sequence[QuotaRow]:
    async with another_store(ledger_of(folder)) as store:
        return await store.quotas()


@dataclass
class Witnessed:
    """Makes slots for an engine and remembers them and what they were asked."""

    kind: type[LocalSlots] = LocalSlots
    made: list[LocalSlots] = field(default_factory=list[LocalSlots])

    def __call__(self, clock: Clock) -> LocalSlots:
        self.made.append(self.kind(clock))
        return self.made[-1]

    async def active(self) -> int:
        return sum([await slots.active(NAME) for slots in self.made])

    async def active_is_zero(self) -> bool:
        return await self.active() == 0


class Counting(LocalSlots):
    """Counts what it is asked, and its refusals."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.asked = 0
        self.refused = 0

    async def ensure(self, name: str, limit: int) -> None:
        self.asked += 1
        await super().ensure(name, limit)

    async def acquire(
        self, names: Sequence[str], slots: int, holder: str, seconds: float
    ) -> SlotLease | Busy:
        self.asked += 1
        answer = await super().acquire(names, slots, holder, seconds)
        self.refused += isinstance(answer, Busy)
        return answer


def admitted(host: Host, jobs: int, task: str = "task", **spec: Any) -> list[Ticket]:
    return [
        host.admit(
            request(
                ReportJob(day=day, **spec), task_type="keys", task=task, task_run=f"{task}-{day}"
            )
        )
        for day in range(jobs)
    ]


async def test_twenty_tasks_of_a_quota_of_three_are_never_more_than_three_jobs(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-129, REQ-75."""
    slots = Witnessed()
    with at(tmp_path, job_server, quota(3), slots=slots) as host:
        tickets = admitted(host, 20, seconds=0.1)
        outcomes = await asyncio.gather(*(ticket.outcome() for ticket in tickets))
        await eventually(slots.active_is_zero, within=5)
    assert all(outcome.info.phase is Phase.SUCCESS for outcome in outcomes)
    stats = job_server.stats()
    assert (stats.created, stats.peak_live, stats.live) == (20, 3, 0)
    assert await places_taken(tmp_path) == 0


class FullStore(SqlStore):
    """Counts how often the ledger had no room."""

    refused: ClassVar[int] = 0

    async def move(self, move: Move) -> MoveResult:
        result = await super().move(move)
        FullStore.refused += result is MoveResult.FULL
        return result


async def test_jobs_of_a_killed_process_keep_their_places_until_they_are_gone(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-131, REQ-75: each process has slots of its own here, so the ledger's count is all that holds."""
    FullStore.refused = 0
    specs = tuple(ReportJob(day=day, outcome="never") for day in range(3))
    work = Work(folder=tmp_path, server=job_server.url, specs=specs, config=quota(3))
    slots = Witnessed()
    with (
        child(work) as dead,
        at(tmp_path, job_server, quota(3), store=FullStore, slots=slots) as host,
    ):
        await eventually(lambda: job_server.stats().live == 3, within=20)
        waiting = [
            host.admit(
                request(ReportJob(seconds=0), task_type="keys", run="other", task_run=f"o{n}")
            )
            for n in range(4)
        ]
        await eventually(lambda: FullStore.refused >= 1, within=10)
        dead.signal(signal.SIGKILL)
        assert dead.ends() == []
        before = FullStore.refused
        await eventually(lambda: FullStore.refused >= before + 2, within=10)
        assert job_server.stats().created == 3
        again = [
            host.admit(
                request(
                    spec, task_type="keys", execution="execution-2", task_run=f"again-{spec.day}"
                )
            )
            for spec in specs
        ]
        # The reads of the re-attached jobs come from this process.
        seen = len(job_server.log())
        await eventually(lambda: job_server.log("batch", since=seen), within=10)
        assert job_server.stats().created == 3
        for job in job_server.jobs():
            job_server.end(job.name, "succeeded")
        outcomes = await asyncio.gather(*(ticket.outcome() for ticket in [*again, *waiting]))
        await eventually(slots.active_is_zero, within=5)
    assert all(outcome.info.phase is Phase.SUCCESS for outcome in outcomes)
    stats = job_server.stats()
    assert (stats.created, stats.peak_live) == (7, 3)
    assert not stats.duplicates
    assert await places_taken(tmp_path) == 0


async def test_without_quotas_nobody_is_asked_for_a_slot(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-132."""
    slots = Witnessed(Counting)
    with at(tmp_path, job_server, slots=slots) as host:
        outcomes = await asyncio.gather(*(t.outcome() for t in admitted(host, 5, seconds=0.1)))
    assert all(outcome.info.phase is Phase.SUCCESS for outcome in outcomes)
    [counting] = slots.made
    assert isinstance(counting, Counting)
    assert counting.asked == 0


class GpuPlugin(JobServerPlugin):
    """Its jobs count against a namespace of their own."""

    async def resource_requirements(self, ctx: TaskExecutionContextReader) -> ResourceRequirements:
        return ResourceRequirements(namespace=ctx.spec(ReportJob).kind)


async def test_a_namespace_that_nobody_configured_fails_the_task_before_create(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-133, REQ-73: whole names count, so the quota of `gpu` is none of `gpu:a100`."""
    entries = [entry(GpuPlugin, "gpu")]
    with at(tmp_path, job_server, {"resourceQuotas": {"gpu": 1}}, entries=entries) as host:
        with pytest.raises(QuotaNotConfigured) as refused:
            await run(host, ReportJob(kind="gpu:a100"), "gpu")
        fine = await run(host, ReportJob(kind="gpu", seconds=0), "gpu")
    assert "'gpu:a100'" in str(refused.value)
    assert "it has: gpu" in str(refused.value)
    assert fine.info.phase is Phase.SUCCESS
    assert [create.body["spec"]["kind"] for create in job_server.log("create")] == ["gpu"]


async def test_namespaces_are_counted_apart(job_server: EmbeddedJobServer, tmp_path: Path) -> None:
    """REQ-73, REQ-75: one queue does not hold up another."""
    entries = [entry(GpuPlugin, "gpu")]
    config = {"resourceQuotas": {"cpu": 2, "gpu": 1}}
    with at(tmp_path, job_server, config, entries=entries) as host:
        for n in range(4):
            for kind in ("cpu", "gpu"):
                spec = ReportJob(kind=kind, outcome="never", day=n)
                host.admit(request(spec, task_type="gpu", task_run=f"{kind}-{n}"))
        await eventually(lambda: job_server.stats().live == 3, within=10)
        job_server.end(job_server.jobs()[0].name, "succeeded")
        await eventually(lambda: job_server.stats().created == 4, within=10)
    kinds = [create.body["spec"]["kind"] for create in job_server.log("create")]
    assert sorted(kinds[:3]) == ["cpu", "cpu", "gpu"]
    assert kinds[3] == kinds[0]
    assert job_server.stats().peak_live == 3


class ProjectPlugin(JobServerPlugin):
    """No project has more than three places, and no more than two in one work pool."""

    constraints = ResourceConstraintsSpec(project_scope=3, namespace_scope=2)

    async def resource_requirements(self, ctx: TaskExecutionContextReader) -> ResourceRequirements:
        return ResourceRequirements(constraints=self.constraints)


class TwoEachPlugin(ProjectPlugin):
    constraints = ResourceConstraintsSpec(project_scope=2)


def of_project(project: str, day: int, pool: str = "", **spec: Any) -> JobRequest:
    """A call of a task with a tag `project:…`; the job server counts under the pool, or the project."""
    called = request(
        ReportJob(day=day, quota=pool or project, **spec),
        task_type="shared",
        task_run=f"{project}-{pool}-{day}",
        labels={"project": project},
    )
    return replace(called, caller=replace(called.caller, namespace=pool))


async def test_projects_share_a_quota_and_each_keeps_to_its_constraint(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-134, REQ-74: quota 10, two places each for `ab` and `abc`, counted apart; `ab` came first with ten jobs."""
    slots = Witnessed()
    entries = [entry(TwoEachPlugin, "shared")]
    with at(tmp_path, job_server, quota(10), entries=entries, slots=slots) as host:
        tickets = [
            host.admit(of_project(project, day, seconds=0.3))
            for project in ("ab", "abc")
            for day in range(6)
        ]
        outcomes = await asyncio.gather(*(ticket.outcome() for ticket in tickets))
        await eventually(slots.active_is_zero, within=5)
    assert all(outcome.info.phase is Phase.SUCCESS for outcome in outcomes)
    stats = job_server.stats()
    assert stats.peak_by_quota == {"ab": 2, "abc": 2}
    assert stats.peak_live == 4
    assert {row.name: row.live for row in await limits(tmp_path)} == {
        "webapi:shared:default:default": 0,
        "webapi:shared:default:default:project=ab": 0,
        "webapi:shared:default:default:project=abc": 0,
    }


async def test_a_project_constraint_and_a_namespace_constraint_are_both_kept(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-135: three places per project, two per work pool; both pools are at it, and nobody holds a half."""
    slots = Witnessed()
    entries = [entry(ProjectPlugin, "shared")]
    with at(tmp_path, job_server, quota(10), entries=entries, slots=slots) as host:
        tickets = [
            host.admit(of_project("ab", day, pool, seconds=0.3))
            for day in range(5)
            for pool in ("one", "two")
        ]
        outcomes = await asyncio.gather(*(ticket.outcome() for ticket in tickets))
        await eventually(slots.active_is_zero, within=5)
    assert all(outcome.info.phase is Phase.SUCCESS for outcome in outcomes)
    stats = job_server.stats()
    assert (stats.peak_live, stats.peak_by_quota) == (3, {"one": 2, "two": 2})
    assert await places_taken(tmp_path) == 0


async def test_a_waiting_job_names_its_constraint_and_the_block_names_its_project(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-136: what the block says wins over the tag; what a name may not hold is written otherwise."""
    told = Told()
    entries = [entry(TwoEachPlugin, "shared")]
    with at(tmp_path, job_server, quota(10), entries=entries, project="a:b/c") as host:
        for day in range(2):
            host.admit(of_project("ab", day, outcome="never"))
        waiter = replace(of_project("abc", 2), reporter=told)
        await eventually(lambda: job_server.stats().live == 2, within=10)
        host.admit(waiter)
        await eventually(lambda: told.phases, within=10)
        assert job_server.stats().created == 2
    name = "webapi:shared:default:default"
    [(phase, reason), *_] = told.phases
    assert phase == "WAITING_FOR_RESOURCES"
    assert reason.startswith(
        f"quota {name}: limit 10, {name}:project=a~3Ab~2Fc: limit 2, position 1, waits for 0 s"
    )


class HeavyPlugin(JobServerPlugin):
    """Jobs whose kind is `heavy` take three places."""

    async def resource_requirements(self, ctx: TaskExecutionContextReader) -> ResourceRequirements:
        return ResourceRequirements(places=3 if ctx.spec(ReportJob).kind == "heavy" else 1)


async def test_a_job_of_three_places_counts_three_and_light_ones_do_not_pass_it(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """REQ-75, REQ-76: of ten places three heavy jobs take nine; the fourth waits, and a light one behind it too."""
    slots, told = Witnessed(), Told()
    entries = [entry(HeavyPlugin, "keys")]
    with at(tmp_path, job_server, quota(10), entries=entries, slots=slots) as host:
        heavy = admitted(host, 3, "heavy", kind="heavy", outcome="never")
        await eventually(lambda: job_server.stats().live == 3, within=10)
        heavy += admitted(host, 1, "fourth", kind="heavy", outcome="never")
        await eventually(lambda: places_wanted(tmp_path, 1), within=10)
        spec = ReportJob(kind="light", outcome="never")
        host.admit(request(spec, task_type="keys", task="light", reporter=told))
        await eventually(lambda: any("position 2" in reason for _, reason in told.phases), within=5)
        assert (job_server.stats().created, await slots.active()) == (3, 9)
        job_server.end(job_server.jobs()[0].name, "succeeded")
        await eventually(lambda: job_server.stats().created == 5, within=10)
        assert (await slots.active(), await places_taken(tmp_path)) == (10, 10)
        first = await heavy[0].outcome()
        with pytest.raises(ConfigurationError, match=r"asks for 3 places .* which has 2"):
            await too_heavy(job_server, tmp_path)
    assert first.info.phase is Phase.SUCCESS
    kinds = [create.body["spec"]["kind"] for create in job_server.log("create")]
    assert kinds == ["heavy"] * 4 + ["light"]
    assert job_server.stats().peak_live == 4


async def places_wanted(folder: Path, jobs: int) -> bool:
    async with another_store(ledger_of(folder)) as store:
        return len(await store.select(states=[JobState.SLOT_REQUESTED])) == jobs


async def too_heavy(job_server: EmbeddedJobServer, folder: Path) -> None:
    entries = [entry(HeavyPlugin, "keys")]
    with at(folder / "other", job_server, quota(2), entries=entries) as host:
        await run(host, ReportJob(kind="heavy"))


class Stammering(LocalSlots):
    """Releases a slot and fails to say so, each time at first."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.failed: set[str] = set()
        self.released: list[str] = []

    async def release(self, lease_id: str) -> None:
        self.released.append(lease_id)
        await super().release(lease_id)
        if lease_id not in self.failed:
            self.failed.add(lease_id)
            raise SlotsUnavailable("the answer was lost")


async def test_a_slot_that_is_freed_twice_makes_room_for_one(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-138: the first answer to each release is lost, so each is sent again."""
    slots = Witnessed(Stammering)
    with at(tmp_path, job_server, quota(2), slots=slots) as host:
        outcomes = await asyncio.gather(*(t.outcome() for t in admitted(host, 8, seconds=0.1)))
        [stammering] = slots.made
        assert isinstance(stammering, Stammering)
        await eventually(lambda: len(stammering.released) == 16, within=10)
    assert all(outcome.info.phase is Phase.SUCCESS for outcome in outcomes)
    assert job_server.stats().peak_live == 2
    assert await places_taken(tmp_path) == 0


async def test_a_lowered_quota_ends_nothing_and_starts_nothing_until_there_is_room(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-139, CASE-140: from 4 to 2 with four alive, then up to 5 with waiters. Five times as fast."""
    slots = Witnessed(Counting)

    def edited(jobs: int) -> Any:
        return block(job_server, quota(jobs, caching={"resyncInterval": "5s"}), getTimeout="10m")

    blocks = {"default": edited(4)}
    with engine(tmp_path, ALL, blocks, speed=5, slots=slots) as host:
        admitted(host, 4, outcome="never")
        await eventually(lambda: job_server.stats().live == 4, within=10)
        blocks["default"] = edited(2)
        [counting] = slots.made
        assert isinstance(counting, Counting)
        await eventually(lambda: counting.limits[NAME] == 2, within=10)
        admitted(host, 6, "later", outcome="never")

        async def refused_again() -> None:
            before = counting.refused
            await eventually(lambda: counting.refused >= before + 3, within=10)

        for ended in range(3):
            await refused_again()
            assert job_server.stats().created == 4, f"{ended} of four jobs were over"
            job_server.end(job_server.jobs()[ended].name, "succeeded")
        await eventually(lambda: job_server.stats().created == 5, within=10)
        await refused_again()
        assert (job_server.stats().created, job_server.stats().live) == (5, 2)
        assert not job_server.log("delete")
        blocks["default"] = edited(5)
        await eventually(lambda: job_server.stats().live == 5, within=10)
        await refused_again()
    stats = job_server.stats()
    assert (stats.created, stats.peak_live) == (8, 5)
    assert not job_server.log("delete")


class EarlyPlugin(JobServerPlugin):
    """Create's answer tells how the job is, which may be over."""

    async def create(self, ctx: TaskExecutionContextReader) -> CreateResult[JobHandle, JobView]:
        name = ctx.task_execution_metadata.generated_name
        body = {"spec": ctx.spec(ReportJob).model_dump(mode="json")}
        made = JobView.model_validate(await self._api.put(path("jobs", name), json=body))
        return CreateResult(JobHandle(name=name), made)


@pytest.mark.parametrize("outcome", ["succeed", "fail"])
async def test_a_job_that_is_over_at_once_frees_its_slot(
    job_server: EmbeddedJobServer, tmp_path: Path, outcome: str
) -> None:
    """CASE-144: as does one whose create the service refuses."""
    slots = Witnessed()
    job_server.fault("create", status=422, skip=1)
    entries = [entry(EarlyPlugin, "keys")]
    with at(tmp_path, job_server, quota(1), entries=entries, slots=slots) as host:
        tickets = admitted(host, 4, seconds=0, outcome=outcome)
        outcomes = [await ticket.outcome() for ticket in tickets]
        await eventually(slots.active_is_zero, within=5)
    phases = sorted(each.info.phase.name for each in outcomes)
    over = "SUCCESS" if outcome == "succeed" else "RETRYABLE_FAILURE"
    assert phases == sorted(["PERMANENT_FAILURE", over, over, over])
    assert len(job_server.log("create")) == 4
    assert not job_server.log("get")
    assert await places_taken(tmp_path) == 0


async def test_a_job_with_which_contact_was_lost_keeps_its_slot_until_it_is_over(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-145: nobody reads it between two attempts, and the next task waits all the same.

    That its end is noticed without a second attempt is the sweeper's.
    """
    slots = Witnessed(Counting)
    spec, told = ReportJob(outcome="never"), Told()
    config = quota(1, caching={"maxSystemFailures": 0})
    with at(tmp_path, job_server, config, slots=slots) as host:
        job_server.fault("get", status=500)
        first = await run(host, spec, task_run="t", max_attempts=2)
        [counting] = slots.made
        assert isinstance(counting, Counting)
        waiter = host.admit(
            request(ReportJob(seconds=0), task_type="keys", task="other", reporter=told)
        )
        await eventually(lambda: counting.refused >= 2, within=10)
        assert job_server.stats().created == 1
        assert await slots.active() == 1
        retry = host.admit(request(spec, task_type="keys", task_run="t", attempt=2, max_attempts=2))
        job_server.end(first.job_key, "succeeded")
        outcomes = [await retry.outcome(), await waiter.outcome()]
        await eventually(slots.active_is_zero, within=5)
    assert "lost contact" in first.info.reason
    assert [outcome.info.phase for outcome in outcomes] == [Phase.SUCCESS] * 2
    assert "WAITING_FOR_RESOURCES" in told.names
    assert (job_server.stats().created, job_server.stats().peak_live) == (2, 1)
    assert not job_server.log("delete")


async def test_a_waiting_job_tells_its_place_and_for_how_long_it_waits(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-136, REQ-76: also for how long, as the wait goes on; and it can be cancelled at once."""
    told = Told()
    # No faster: a machine that stalls for a moment would wait for seconds before it first tells.
    with at(tmp_path, job_server, quota(1), speed=5, getTimeout="10m") as host:
        admitted(host, 1, outcome="never")
        await eventually(lambda: job_server.stats().live == 1, within=10)
        waiter = host.admit(
            request(ReportJob(seconds=0), task_type="keys", task="waiter", reporter=told)
        )
        await eventually(lambda: len(told.phases) >= 3, within=30)
        waiter.cancel("enough")
        outcome = await waiter.outcome()
    assert outcome.info.phase is Phase.ABORTED
    assert {name for name, _ in told.phases} == {"WAITING_FOR_RESOURCES"}
    reasons = [reason for _, reason in told.phases]
    assert all(reason.startswith(f"quota {NAME}: limit 1, position 1") for reason in reasons)
    waits = [int(reason.split("waits for ")[1].split()[0]) for reason in reasons]
    assert waits[0] == 0
    assert waits[-1] > 10
    assert len(job_server.log("create")) == 1


class LeakySlots(LocalSlots):
    """Counts slots that a dead process had and whose lease is lost."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self.leaked = 2

    async def active(self, name: str) -> int:
        return await super().active(name) + self.leaked

    async def give_back(self, name: str, slots: int) -> None:
        self.leaked -= slots


async def test_slots_that_leaked_come_back_although_as_many_jobs_wait_for_them(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-131, CASE-286: who waits while the ledger has room holds none; else all would wait for ever."""
    made: list[LeakySlots] = []

    def slots(clock: Clock) -> LeakySlots:
        made.append(LeakySlots(clock))
        return made[0]

    limit = "webapi:keys:default:default"
    with at(tmp_path, job_server, quota(2), slots=slots) as host:
        told = [Told(), Told()]
        calls = [
            asyncio.ensure_future(run(host, ReportJob(day=day, seconds=0.2), reporter=each))
            for day, each in enumerate(told)
        ]
        for each in told:
            await eventually(lambda t=each: "WAITING_FOR_RESOURCES" in t.names, within=10)
        assert not job_server.log("create")
        async with another_store(ledger_of(tmp_path)) as store:
            assert await given_back(made[0], limit, LedgerCount(store)) == {limit: 2}
        outcomes = await asyncio.gather(*calls)
        assert made[0].leaked == 0
    assert [outcome.info.phase.name for outcome in outcomes] == ["SUCCESS"] * 2


async def test_slots_lent_to_a_job_that_the_ledger_has_no_room_for_are_no_leak(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-286: a lease lapsed with its process, its job lives on, and another job has got the slot."""
    work = Work(
        folder=tmp_path,
        server=job_server.url,
        specs=(ReportJob(outcome="never"),),
        config=quota(1),
        execution="dead",
    )
    with child(work) as dead:
        await eventually(lambda: job_server.stats().live == 1, within=30)
        dead.signal(signal.SIGKILL)
        dead.ends()
    limit = "webapi:keys:default:default"
    made: list[LocalSlots] = []

    def slots(clock: Clock) -> LocalSlots:
        made.append(LocalSlots(clock))
        return made[0]

    with at(tmp_path, job_server, quota(1), slots=slots, sweeps=False) as host:
        told = Told()
        call = asyncio.ensure_future(
            run(host, ReportJob(day=1, seconds=0.2), run="other", reporter=told)
        )
        await eventually(
            lambda: "WAITING_FOR_RESOURCES" in told.names and made[0].leases, within=10
        )
        async with another_store(ledger_of(tmp_path)) as store:
            count = LedgerCount(store)
            assert await count.held(limit) == 2
            assert await given_back(made[0], limit, count) == {}
        call.cancel()


async def test_jobs_share_leases_and_no_record_names_one_that_was_given_back(
    job_server: EmbeddedJobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CASE-131, CASE-138, CASE-143: with some hundred jobs. The next process takes a lease of its own for each job."""
    monkeypatch.setattr(leases, "SINGLES", 4)
    slots = Witnessed(Counting)

    def called(day: int, execution: str) -> JobRequest:
        spec = ReportJob(day=day, outcome="never")
        return request(spec, task_type="keys", execution=execution, task_run=f"{execution}-{day}")

    async def records() -> Sequence[Record]:
        async with another_store(ledger_of(tmp_path)) as store:
            return await store.select(states=[JobState.CREATED])

    async def all_is_told() -> bool:
        leased = [record.details.lease for record in await records()]
        singles = {lease.id for lease in leased if lease is not None and not lease.part}
        lent = slots.made[0].leases
        blocks = sum(taken for _, taken in lent.values() if taken > 1)
        parts = sum(lease is not None and lease.part for lease in leased)
        return singles == {lease for lease, (_, n) in lent.items() if n == 1} and parts == blocks

    with at(tmp_path, job_server, quota(40), slots=slots) as host:
        tickets = [host.admit(called(day, "execution-1")) for day in range(40)]
        await eventually(lambda: job_server.stats().live == 40, within=20)
        [counting] = slots.made
        assert len(counting.leases) < 20
        await eventually(all_is_told, within=5)
        ended = [record for record in await records() if leased_in_part(record)][:3]
        days = [int(record.task_run.rpartition("-")[2]) for record in ended]
        for record in ended:
            job_server.end(record.key, "succeeded")
        await asyncio.gather(*(tickets[day].outcome() for day in days))
        await eventually(all_is_told, within=5)
        assert await slots.active() == 37
    with at(tmp_path, job_server, quota(40), slots=slots) as host:
        again = [host.admit(called(day, "execution-2")) for day in range(40) if day not in days]

        async def all_are_held() -> bool:
            return len(slots.made) == 2 and await slots.made[1].active(NAME) == 37

        await eventually(all_are_held, within=20)
        for job in job_server.jobs():
            if job.name not in {record.key for record in ended}:
                job_server.end(job.name, "succeeded")
        outcomes = await asyncio.gather(*(ticket.outcome() for ticket in again))

        async def none_is_held() -> bool:
            return not slots.made[1].leases

        await eventually(none_is_held, within=10)
    assert all(outcome.info.phase is Phase.SUCCESS for outcome in outcomes)
    stats = job_server.stats()
    assert (stats.created, stats.peak_live) == (40, 40)
    assert not stats.duplicates
    assert await places_taken(tmp_path) == 0


def leased_in_part(record: Record) -> bool:
    return record.details.lease is not None and record.details.lease.part
