"""What a pass of the sweeper must not do: hang, stop at one job, end what somebody wants, forget what lives."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest

from prefect_webapi import Phase, PluginEntry
from prefect_webapi.contract.keys import JobKey
from prefect_webapi.engine.call import Call
from prefect_webapi.engine.faults import arm
from prefect_webapi.engine.job import Ending
from prefect_webapi.engine.reaper import Action, SweepReport, sweep
from prefect_webapi.engine.request import Fate, Overrides, RunState
from prefect_webapi.engine.runtime import Runtime
from prefect_webapi.ledger.records import JobState, Record
from prefect_webapi.ledger.sql import SqlStore
from prefect_webapi.quotas import Busy, SlotLease
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import JobServer, JobServerPlugin, ReportJob
from tests.ledger.raw import raw
from tests.support.deaths import killed
from tests.support.engine import GivenRuns, LocalSlots, Told, at, request, run
from tests.support.engine_child import Work
from tests.support.jobserver import TOKEN
from tests.support.ledger import ledger_of
from tests.support.plugins import ALL
from tests.support.sweeping import LONG_AGO, swept
from tests.support.waiting import eventually
from tests.support.witness import places_taken, records

QUOTA = {"resourceQuotas": {"default": 2}}
ENDLESS = ReportJob(outcome="never")
CANCELLED = {"run-1": Fate(RunState.CANCELLED, "Cancelled")}


async def left(
    folder: Path, server: EmbeddedJobServer, *specs: ReportJob, task_type: str = "keys", **call: Any
) -> list[Record]:
    """Jobs that a process made, read once, and left alive when it ended."""
    before = server.stats().created
    with at(folder, server, {"resourceQuotas": {"default": 40}}) as host:
        for spec in specs:
            host.admit(request(spec, task_type=task_type, task_run=f"first/{spec.day}", **call))

        async def are_known() -> bool:
            found = await records(folder)
            return len(found) > before and all(r.state is JobState.CREATED for r in found)

        await eventually(lambda: server.stats().created == before + len(specs), within=20)
        await eventually(are_known, within=20)
        await eventually(lambda: server.log("get") or server.log("batch"), within=20)
    return await records(folder)


def killed_at(
    place: str, folder: Path, server: EmbeddedJobServer, task_type: str = "keys", **work: Any
) -> None:
    given: dict[str, Any] = {"specs": (ENDLESS,), "config": QUOTA, **work}
    killed(Work(folder=folder, server=server.url, task_type=task_type, die_at=place, **given))


# --- one job hurts no other, and no pass hangs --------------------------------------------------


async def test_a_service_that_takes_no_deletes_holds_no_pass_up(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    killed_at("KP-22", tmp_path, job_server, "keys", cancel="CREATED")
    job_server.fault("delete", status=503, times=None)
    report = await asyncio.wait_for(swept(tmp_path, job_server, config=QUOTA), 20)
    assert [job.came_to.split(";")[0] for job in report.jobs] == ["asked to end"]
    [record] = await records(tmp_path)
    assert (record.state, record.runtime) == (JobState.CANCELLING, "")
    job_server.clear_faults()
    await swept(tmp_path, job_server, config=QUOTA)
    assert job_server.stats().live == 0


async def test_more_jobs_to_look_at_than_a_process_tracks_hold_no_pass_up(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    specs = [ENDLESS.model_copy(update={"day": day}) for day in range(12)]
    await left(tmp_path, job_server, *specs, options=Overrides(on_exit="leave"))
    config = {"resourceQuotas": {"default": 40}, "caching": {"size": 10}}
    report = await asyncio.wait_for(swept(tmp_path, job_server, CANCELLED, config=config), 20)
    assert [job.action for job in report.jobs] == [Action.LOOK] * 12
    assert job_server.stats().live == 12
    assert await places_taken(tmp_path) == 12


class WrittenByHand(ReportJob):
    must: str = ""

    def model_post_init(self, context: Any) -> None:
        assert self.must.strip()


async def test_a_spec_that_can_not_be_read_any_more_hurts_nobody(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    odd = PluginEntry(
        id="odd",
        supported_task_types=["odd"],
        connection=JobServer,
        spec=WrittenByHand,
        plugin_loader=lambda setup: JobServerPlugin(setup.connection),
    )
    with at(tmp_path, job_server, QUOTA, entries=(*ALL, odd)) as host:
        host.admit(request(WrittenByHand(must="x", outcome="never"), task_type="odd"))
        host.admit(request(ENDLESS, task_type="keys"))

        async def are_known() -> bool:
            found = await records(tmp_path)
            return len(found) == 2 and all(r.state is JobState.CREATED for r in found)

        await eventually(are_known, within=20)
    await raw(
        ledger_of(tmp_path), "UPDATE webapi_job SET details = replace(details, '\"must\"', '\"x\"')"
    )
    report = await _pass(tmp_path, job_server, entries=(*ALL, odd))
    assert job_server.stats().live == 0
    assert not report.troubles


async def test_an_unreadable_handle_is_told(job_server: EmbeddedJobServer, tmp_path: Path) -> None:
    """The job is left alone, its record belongs to nobody, and the pass says so."""
    await left(tmp_path, job_server, ENDLESS, ENDLESS.model_copy(update={"day": 1}))
    [bad, _] = await records(tmp_path)
    await raw(
        ledger_of(tmp_path),
        f"UPDATE webapi_job SET handle = '{{\"was\": 1}}' WHERE key = '{bad.key}'",
    )
    report = await swept(tmp_path, job_server, CANCELLED, config=QUOTA)
    assert [bad.key in trouble for trouble in report.troubles] == [True]
    assert job_server.stats().live == 1
    assert {r.runtime for r in await records(tmp_path) if r.key == bad.key} == {""}


async def test_a_connection_that_is_gone_hurts_no_other(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    await left(tmp_path, job_server, ENDLESS, options=Overrides(on_exit="leave"))
    await left(tmp_path, job_server, ENDLESS.model_copy(update={"day": 1}), task_type="single")
    report = await _pass(tmp_path, job_server, entries=[e for e in ALL if e.id != "keys"])
    assert len(report.troubles) == 1
    assert {job.action for job in report.jobs} == {Action.REPORT, Action.END}
    assert job_server.stats().live == 1


async def test_who_stops_waiting_for_a_pass_stops_no_engine(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    with at(tmp_path, job_server, QUOTA, sweeps=False) as host:
        ticket = host.admit(request(ENDLESS, task_type="keys"))
        await eventually(lambda: job_server.stats().live, within=20)

        async def work(_: Runtime) -> None:
            await asyncio.sleep(0.4)

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(host.perform(work)), 0.1)
        await asyncio.sleep(0.5)
        ticket.cancel("seen")
        assert (await asyncio.wait_for(ticket.outcome(), 20)).info.phase is Phase.ABORTED


async def _pass(
    folder: Path, server: EmbeddedJobServer, *, entries: Sequence[PluginEntry[Any]]
) -> SweepReport:
    runs = GivenRuns(CANCELLED)
    with at(folder, server, QUOTA, entries=entries, speed=20, runs=runs, sweeps=False) as host:
        return await asyncio.wrap_future(host.perform(sweep))


# --- what somebody wants stays ------------------------------------------------------------------


async def test_a_run_that_has_just_come_back_is_not_abandoned(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """It was suspended for longer than `abandon_after`; its task has not asked again yet."""
    await left(tmp_path, job_server, ENDLESS)
    resumed = Fate(RunState.RUNNING, "Running", datetime.now(UTC) + timedelta(minutes=1))
    report = await swept(
        tmp_path, job_server, {"run-1": resumed}, config=QUOTA, settings={"abandonAfter": "1s"}
    )
    assert report.jobs == ()
    assert job_server.stats().live == 1


async def test_the_place_of_a_dead_processs_job_is_free_once_the_job_is_over(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-145: its run goes on, but other calls come first, which would wait for ever.

    Its own call comes later, and gets the result without a second job. The waiting process was there before the other
    one died.
    """
    one = {"resourceQuotas": {"default": 1}}
    first, second = ReportJob(day=1, outcome="never", result="first"), ReportJob(day=2, seconds=0.1)
    with at(tmp_path, job_server, one, speed=20) as host:
        with at(tmp_path, job_server, one) as dying:
            dying.admit(request(first, task_type="keys", task_run="first"))

            async def is_known() -> bool:
                return [r.state for r in await records(tmp_path)] == [JobState.CREATED]

            await eventually(is_known, within=20)
            told = Told()
            waiting = request(second, task_type="keys", task_run="second", reporter=told)
            ticket = host.admit(waiting)
            await eventually(lambda: "WAITING_FOR_RESOURCES" in told.names, within=20)
        job_server.end(job_server.jobs()[0].name, "succeeded")
        outcome = await asyncio.wait_for(ticket.outcome(), 30)
        assert outcome.info.phase is Phase.SUCCESS
        again = request(first, task_type="keys", task_run="first again", execution="2")
        outcome = await asyncio.wait_for(host.admit(again).outcome(), 30)
        assert outcome.value.data == "first"
    assert job_server.stats().created == 2
    assert job_server.stats().peak_live == 1


async def test_a_job_that_waits_for_the_retry_of_a_living_process_is_nobodys(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    config = {**QUOTA, "caching": {"maxSystemFailures": 0, "resyncInterval": "5s"}}
    running = {"run-1": Fate(RunState.RUNNING, "Running", LONG_AGO)}
    with at(tmp_path, job_server, config) as host:
        job_server.fault("get", status=500, times=None)
        job_server.fault("batch", status=500, times=None)
        call = request(ENDLESS, task_type="keys", attempt=1, max_attempts=2)
        outcome = await asyncio.wait_for(host.admit(call).outcome(), 30)
        assert outcome.info.may_retry
        job_server.clear_faults()
        await swept(tmp_path, job_server, running, config=QUOTA, settings={"abandonAfter": "1s"})
        assert job_server.stats().live == 1


async def test_a_shared_job_belongs_to_the_run_that_took_it_over_last(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    await left(tmp_path, job_server, ENDLESS, idempotency_key="one for all")
    with at(tmp_path, job_server, QUOTA) as host:
        host.admit(
            request(
                ENDLESS,
                task_type="keys",
                run="run-2",
                execution="execution-2",
                task_run="second",
                idempotency_key="one for all",
            )
        )

        async def is_taken_over() -> bool:  # a look at it alone is none
            return [each.root_run for each in await records(tmp_path)] == ["run-2"]

        await eventually(is_taken_over, within=20)
    fates = {**CANCELLED, "run-2": Fate(RunState.RESTING, "AwaitingRetry")}
    report = await swept(tmp_path, job_server, fates, config=QUOTA)
    assert report.jobs == ()
    assert (job_server.stats().created, job_server.stats().live) == (1, 1)


class SlowlyRead(SqlStore):
    """The first record that is looked up arrives late."""

    is_slow: ClassVar[bool] = True

    async def get(self, key: JobKey) -> Record | None:
        if SlowlyRead.is_slow:
            SlowlyRead.is_slow = False
            await asyncio.sleep(0.6)
        return await super().get(key)


async def test_a_call_that_is_quicker_than_the_sweeper_keeps_its_job(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    [record] = await left(tmp_path, job_server, ENDLESS)
    SlowlyRead.is_slow = True
    with at(tmp_path, job_server, QUOTA, sweeps=False, store=SlowlyRead) as host:

        async def adopt(runtime: Runtime) -> bool:
            loaded = await runtime.services.plugins.get("keys", None, "default")
            return await runtime.adopt(record, loaded, Ending("orphan")) is not None

        sweeping = asyncio.wrap_future(host.perform(adopt))
        await asyncio.sleep(0.2)
        reads = len(job_server.log())
        host.admit(request(ENDLESS, task_type="keys", execution="execution-2", task_run="second"))
        await eventually(lambda: len(job_server.log()) > reads + 2, within=20)
        await sweeping
    assert not job_server.log("delete")
    assert len(await records(tmp_path)) == 1


async def test_a_call_that_comes_to_a_swept_job_hears_of_it(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    spec = ReportJob(seconds=2.0, queued_seconds=1.0)
    [record] = await left(tmp_path, job_server, spec)
    told = Told()
    with at(tmp_path, job_server, QUOTA, sweeps=False) as host:

        async def adopt(runtime: Runtime) -> bool:
            loaded = await runtime.services.plugins.get("keys", None, "default")
            return await runtime.adopt(record, loaded) is not None

        assert await asyncio.wrap_future(host.perform(adopt))
        call = request(
            spec, task_type="keys", execution="execution-2", task_run="second", reporter=told
        )
        outcome = await asyncio.wait_for(host.admit(call).outcome(), 20)
    assert outcome.info.phase is Phase.SUCCESS
    assert "RUNNING" in told.names


@pytest.mark.parametrize("is_over", [False, True])
async def test_a_run_that_comes_back_to_an_orphan_gets_a_job_of_its_own(
    job_server: EmbeddedJobServer, tmp_path: Path, is_over: bool
) -> None:
    """Whether the orphan is still dying or was over when its sweeper died: the run is not told of its end."""
    spec = ENDLESS.model_copy(update={"dies_in": 0.0 if is_over else 3.0})
    await left(tmp_path, job_server, spec)
    if is_over:

        def die(place: str) -> None:
            if place == "KP-17":
                raise RuntimeError("the sweeper dies here")

        arm(die)
    try:
        await swept(tmp_path, job_server, config=QUOTA)
    finally:
        arm(None)
    [record] = await records(tmp_path)
    assert record.state is (JobState.OVER if is_over else JobState.CANCELLING)
    with at(tmp_path, job_server, QUOTA, sweeps=False) as host:
        ticket = host.admit(
            request(spec, task_type="keys", execution="execution-2", task_run="second")
        )
        await eventually(lambda: job_server.stats().created == 2, within=20)
        await eventually(lambda: job_server.stats().live == 1, within=20)
        ticket.detach()
    assert job_server.stats().live == 1


# --- what lives is not forgotten ----------------------------------------------------------------


async def test_a_call_that_comes_while_the_end_of_a_swept_job_is_kept_gets_its_result(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """`status` has put the result, the call brings a view of its own: nothing is lost in between."""
    spec = ReportJob(seconds=0.1, result="kept")
    killed_at("KP-10", tmp_path, job_server, specs=(spec,), config={})
    [record] = await records(tmp_path)
    with at(tmp_path, job_server, sweeps=False) as host:

        def come(place: str) -> None:
            if place == "KP-14":
                arm(None)
                asked = request(spec, task_type="keys", execution="execution-2")
                call = Call(asked, host.post)
                engine = runtimes[0]
                job = engine._jobs[record.key]  # pyright: ignore[reportPrivateUsage] - at this very moment
                engine._attach(call, job)  # pyright: ignore[reportPrivateUsage]
                calls.append(call)

        async def adopt(runtime: Runtime) -> None:
            runtimes.append(runtime)
            loaded = await runtime.services.plugins.get("keys", None, "default")
            await runtime.adopt(record, loaded)

        runtimes: list[Runtime] = []
        calls: list[Call] = []
        arm(come)
        try:
            await asyncio.wrap_future(host.perform(adopt))
            await eventually(lambda: calls and not calls[0].is_waiting, within=10)
        finally:
            arm(None)
    assert calls[0].result().value.data == "kept"


async def test_a_refusal_of_a_create_that_is_sent_again_proves_nothing(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    killed_at("KP-08", tmp_path, job_server, "single")
    assert job_server.stats().live == 1
    job_server.fault("create", status=401, times=None)
    await swept(tmp_path, job_server, CANCELLED, config=QUOTA)
    [record] = await records(tmp_path)
    assert record.state is JobState.SUSPECT
    assert await places_taken(tmp_path) == 1
    job_server.clear_faults()
    await swept(tmp_path, job_server, CANCELLED, config=QUOTA)
    assert job_server.stats().live == 0
    assert job_server.stats().created == 1
    assert await places_taken(tmp_path) == 0


async def test_a_block_that_a_person_named_may_be_the_wrong_one(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-285: that its service knows no such job is no proof that the job is gone."""
    await left(tmp_path, job_server, ENDLESS)
    await raw(ledger_of(tmp_path), "UPDATE webapi_job SET connection = 'inline'")
    with EmbeddedJobServer(token=TOKEN) as other:
        await swept(tmp_path, other, CANCELLED, config=QUOTA, connection="default")
    [record] = await records(tmp_path)
    assert not record.state.is_over
    assert await places_taken(tmp_path) == 1
    await swept(tmp_path, job_server, CANCELLED, config=QUOTA, connection="default")
    assert job_server.stats().live == 0


async def test_a_job_that_can_not_be_read_for_a_while_is_not_deleted_unread(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    config = {**QUOTA, "caching": {"maxSystemFailures": 1, "resyncInterval": "5s"}}
    await left(tmp_path, job_server, ReportJob(seconds=0.5, result="precious"))
    await eventually(lambda: job_server.stats().live == 0, within=5)
    job_server.fault("get", status=500, times=4)
    job_server.fault("batch", status=500, times=4)
    await swept(tmp_path, job_server, config=config)
    assert not job_server.log("delete")
    [record] = await records(tmp_path)
    assert record.details.outputs is not None


async def test_a_synchronous_call_is_not_made_for_a_run_that_is_over(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    killed_at("KP-38", tmp_path, job_server, "idempotent-do", specs=(ReportJob(seconds=0.1),))
    await swept(tmp_path, job_server, CANCELLED, config=QUOTA)
    assert job_server.stats().created == 0
    assert await places_taken(tmp_path) == 0


async def test_a_create_that_nobody_can_find_out_about_is_given_up_at_the_horizon(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    job_server.behave("neither")
    killed_at("KP-08", tmp_path, job_server, "neither")
    report = await swept(tmp_path, job_server, config=QUOTA, settings={"reaperHorizon": "1s"})
    assert [job.action for job in report.jobs] == [Action.GIVE_UP]
    assert await places_taken(tmp_path) == 0


async def test_a_run_that_another_prefect_does_not_know_is_not_missing(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """A wrong profile, or none, must not end what it knows nothing of."""
    await left(tmp_path, job_server, ENDLESS)
    await raw(
        ledger_of(tmp_path),
        "UPDATE webapi_job SET details = replace(details, 'a Prefect', 'another Prefect')",
    )
    report = await swept(tmp_path, job_server, {"run-1": Fate(RunState.MISSING)}, config=QUOTA)
    assert report.jobs == ()
    assert job_server.stats().live == 1


class CountedSlots(LocalSlots):
    lent: ClassVar[list[str]] = []
    freed: ClassVar[list[str]] = []

    async def acquire(
        self, names: Sequence[str], slots: int, holder: str, seconds: float
    ) -> SlotLease | Busy:
        lease = await super().acquire(names, slots, holder, seconds)
        if isinstance(lease, SlotLease):
            CountedSlots.lent.append(lease.id)
        return lease

    async def release(self, lease_id: str) -> None:
        CountedSlots.freed.append(lease_id)
        await super().release(lease_id)


async def test_a_job_that_is_only_looked_at_keeps_no_new_slots(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    await left(tmp_path, job_server, ENDLESS, options=Overrides(on_exit="leave"))
    CountedSlots.lent.clear()
    CountedSlots.freed.clear()
    for _ in range(2):
        runs = GivenRuns(CANCELLED)
        with at(
            tmp_path, job_server, QUOTA, speed=20, slots=CountedSlots, runs=runs, sweeps=False
        ) as host:
            await asyncio.wrap_future(host.perform(sweep))
            await asyncio.sleep(0.2)
    assert set(CountedSlots.lent) <= set(CountedSlots.freed)


async def test_a_deadline_that_passed_before_anything_was_sent_is_told_to_who_comes_back(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    killed_at("KP-02", tmp_path, job_server, "keys", settings={"deadline": "1s"})
    await asyncio.sleep(1)
    await swept(tmp_path, job_server, {}, config=QUOTA)
    with at(tmp_path, job_server, QUOTA) as host:
        outcome = await run(host, ENDLESS, "keys", execution="execution-2", task_run="second")
    assert "deadline" in outcome.info.reason
    assert job_server.stats().created == 0
