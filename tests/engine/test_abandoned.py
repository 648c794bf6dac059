"""A process is killed between any two acts and nobody comes back: the sweeper ends what it left."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from prefect_webapi import Phase
from prefect_webapi.contract.keys import JobKey
from prefect_webapi.engine.reaper import Action
from prefect_webapi.engine.request import Fate, Overrides, RunState
from prefect_webapi.ledger.records import JobState, Record
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import ReportJob
from tests.support.deaths import killed, killed_in_create, killed_with_a_wish
from tests.support.engine import at, request, run
from tests.support.engine_child import Work
from tests.support.sweeping import LONG_AGO, swept
from tests.support.waiting import eventually
from tests.support.witness import places_taken, records

Mood = Literal["keys", "single", "search", "neither"]

QUOTA = {"resourceQuotas": {"default": 2}}
ENDLESS = tuple(ReportJob(day=day, outcome="never") for day in range(3))
SHORT = tuple(ReportJob(day=day, seconds=0.15, result=f"report {day}") for day in range(3))

BEFORE = ("KP-01", "KP-02", "KP-03", "KP-04", "KP-05")
CREATING = ("KP-06", "KP-08", "KP-09", "KP-10", "KP-11", "KP-11:2", "KP-12")
ENDING = ("KP-13", "KP-14", "KP-16", "KP-17", "KP-18", "KP-19", "KP-20")

CHEAP = {
    ("keys", "KP-02"),
    ("keys", "KP-06"),
    ("keys", "KP-08"),
    ("keys", "KP-11"),
    ("keys", "KP-14"),
    ("keys", "KP-17"),
    ("single", "KP-08"),
    ("search", "KP-08"),
    ("neither", "KP-08"),
}
"""The part that every run of the suite does; the whole of it is under `-m chaos`."""


def matrix(places: Sequence[str]) -> list[Any]:
    moods: tuple[Mood, ...] = ("keys", "single", "search", "neither")
    return [
        pytest.param(mood, place, marks=() if (mood, place) in CHEAP else pytest.mark.chaos)
        for mood in moods
        for place in places
    ]


def work_at(server: EmbeddedJobServer, folder: Path, mood: Mood, **more: Any) -> Work:
    server.behave("keys" if mood == "single" else mood)
    given: dict[str, Any] = {"task_type": mood, "config": QUOTA, **more}
    return Work(folder=folder, server=server.url, **given)


async def unknown_at(work: Work) -> set[JobKey]:
    """Keys of the jobs that nobody can find out about."""
    return {
        record.key
        for record in await records(work.folder)
        if record.state is JobState.CREATING and work.task_type == "neither"
    }


@pytest.mark.parametrize(("mood", "place"), matrix((*BEFORE, *CREATING)))
async def test_no_job_lives_on_when_nobody_comes_back(
    job_server: EmbeddedJobServer, tmp_path: Path, mood: Mood, place: str
) -> None:
    """KP-01 to KP-06, KP-08 to KP-12, the abandoned half of CASE-161 to CASE-166, CASE-168 to CASE-172."""
    work = work_at(job_server, tmp_path, mood, specs=ENDLESS, die_at=place)
    killed(work)
    unknown = await unknown_at(work)
    report = await swept(tmp_path, job_server, config=QUOTA)
    assert not report.troubles
    left = [job for job in job_server.jobs() if job.state not in ("cancelled", "succeeded")]
    there = {job.labels["job_key"] for job in job_server.jobs()}
    assert {job.labels["job_key"] for job in left} == unknown & there
    if place == "KP-06":
        assert not left
    if place == "KP-08":  # one was answered; another may have been about to leave
        assert bool(left) == bool(unknown)
    made = job_server.stats()
    assert not made.duplicates
    assert made.created <= 2
    reported = {job.job_key for job in report.jobs if job.action is Action.REPORT}
    assert reported == unknown
    assert await places_taken(tmp_path) == len(unknown)
    others = [record for record in await records(tmp_path) if record.key not in unknown]
    assert {record.state for record in others} <= {JobState.CLOSED}
    assert all("Crashed" in job.message for job in job_server.jobs() if job.state == "cancelled")


@pytest.mark.parametrize(("mood", "place"), matrix(ENDING))
async def test_a_job_that_ended_well_is_never_deleted(
    job_server: EmbeddedJobServer, tmp_path: Path, mood: Mood, place: str
) -> None:
    """KP-13, KP-14, KP-16 to KP-20, the abandoned half of CASE-173, CASE-174, CASE-176 to CASE-180.

    CASE-202: its result is stored after all, and whoever asks after that gets it without a call of the service.
    """
    work = work_at(job_server, tmp_path, mood, specs=SHORT[:1], die_at=place)
    killed(work)
    await eventually(lambda: job_server.stats().live == 0, within=5)
    report = await swept(tmp_path, job_server, config=QUOTA)
    assert not report.troubles
    assert not job_server.log("delete")
    assert await places_taken(tmp_path) == 0
    [record] = await records(tmp_path)
    assert record.state is JobState.CLOSED
    assert record.details.phase is not None
    assert record.details.phase.phase is Phase.SUCCESS
    before = len(job_server.log())
    with at(tmp_path, job_server, QUOTA) as host:
        outcome = await run(host, SHORT[0], mood, execution="execution-2", task_run="execution-2/0")
    assert outcome.value is not None
    assert outcome.value.data == "report 0"
    assert len(job_server.log()) == before
    assert job_server.stats().created == 1


@pytest.mark.parametrize("mood", ["keys", "single", "search", "neither"])
async def test_a_job_whose_create_was_on_the_way_is_found_and_ended(
    job_server: EmbeddedJobServer, tmp_path: Path, mood: Mood
) -> None:
    """KP-07, the abandoned half of CASE-167; without key and search it is reported, and its place stays taken."""
    work = work_at(job_server, tmp_path, mood, specs=ENDLESS[:1])
    await killed_in_create(work, job_server)
    report = await swept(tmp_path, job_server, config=QUOTA)
    stuck = mood == "neither"
    assert job_server.stats().created == 1
    assert job_server.stats().live == stuck
    assert await places_taken(tmp_path) == stuck
    if stuck:
        assert [job.action for job in report.jobs] == [Action.REPORT]
        assert "jobs resolve" in report.jobs[0].reason


@pytest.mark.parametrize("place", ["KP-21", "KP-22", "KP-24", "KP-11:6"])
async def test_a_delete_that_was_a_duty_is_made(
    job_server: EmbeddedJobServer, tmp_path: Path, place: str
) -> None:
    """KP-21, KP-22, KP-24, CASE-115, the abandoned half of CASE-181, CASE-182, CASE-184."""
    slow = tuple(spec.model_copy(update={"dies_in": 0.5}) for spec in ENDLESS)
    work = work_at(job_server, tmp_path, "keys", specs=slow[:2], cancel="CREATED", die_at=place)
    killed(work)
    cancelled = {"run-1": Fate(RunState.CANCELLED, "Cancelled", LONG_AGO)}
    report = await swept(tmp_path, job_server, cancelled, config=QUOTA)
    assert not report.troubles
    assert job_server.stats().live == 0
    assert await places_taken(tmp_path) == 0
    told = {job.message for job in job_server.jobs()}
    assert told <= {"enough", "the flow run was cancelled"}
    assert {record.state for record in await records(tmp_path)} == {JobState.CLOSED}


async def test_a_duty_of_a_run_that_may_come_back_keeps_its_end_for_it(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """The job is deleted now; the call that is made again hears how it ended, and makes no other."""
    work = work_at(
        job_server, tmp_path, "keys", specs=ENDLESS[:1], cancel="CREATED", die_at="KP-22"
    )
    killed(work)
    await swept(tmp_path, job_server, {}, config=QUOTA)
    assert job_server.stats().live == 0
    assert await places_taken(tmp_path) == 0
    [record] = await records(tmp_path)
    assert record.state is JobState.OVER
    with at(tmp_path, job_server, QUOTA) as host:
        outcome = await run(
            host, ENDLESS[0], "keys", execution="execution-2", task_run="execution-2/0"
        )
    assert outcome.info.phase is Phase.ABORTED
    assert outcome.info.reason.startswith("enough")
    assert job_server.stats().created == 1


@pytest.mark.parametrize("mood", ["keys", "single", "search", "neither"])
async def test_a_wish_that_came_while_create_was_on_the_way_is_granted(
    job_server: EmbeddedJobServer, tmp_path: Path, mood: Mood
) -> None:
    """KP-26, the abandoned half of CASE-186: never a live job of a cancelled run, if it can be found at all."""
    work = work_at(job_server, tmp_path, mood, specs=ENDLESS[:1])
    await killed_with_a_wish(work, job_server)
    await swept(tmp_path, job_server, {}, config=QUOTA)
    assert job_server.stats().created == 1
    assert job_server.stats().live == (mood == "neither")


async def test_a_job_that_failed_but_still_runs_is_ended(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """KP-27, the abandoned half of CASE-187."""
    hangs = ReportJob(outcome="never", message="it hangs")
    work = work_at(
        job_server, tmp_path, "keys", specs=(hangs,), task_type="cleanup", die_at="KP-27"
    )
    killed(work)
    await swept(tmp_path, job_server, config=QUOTA)
    assert job_server.stats().live == 0
    assert await places_taken(tmp_path) == 0


async def test_a_job_without_contact_is_ended_when_there_is_contact_again(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """KP-28, CASE-145, the abandoned half of CASE-188: its place stays taken until it is gone."""
    work = work_at(
        job_server,
        tmp_path,
        "keys",
        config={**QUOTA, "caching": {"maxSystemFailures": 1, "resyncInterval": "5s"}},
        specs=ENDLESS[:1],
        die_at="KP-28",
    )
    job_server.fault("batch", status=500, times=None)
    job_server.fault("get", status=500, times=None)
    killed(work)
    job_server.clear_faults()
    assert await places_taken(tmp_path) == 1
    await swept(tmp_path, job_server, config=QUOTA)
    assert job_server.stats().live == 0
    assert await places_taken(tmp_path) == 0


# --- who is an orphan ----------------------------------------------------------------------------


async def left_behind(folder: Path, server: EmbeddedJobServer, **call: Any) -> Record:
    """A job that a process made, read once, and left alive when it ended."""
    with at(folder, server, QUOTA) as host:
        host.admit(request(ENDLESS[0], task_type="keys", **call))
        await eventually(lambda: server.log("get") or server.log("batch"), within=20)
    [record] = await records(folder)
    assert record.state is JobState.CREATED
    return record


ENDED = [
    (Fate(RunState.FINAL, "Failed", LONG_AGO), "ended as Failed"),
    (Fate(RunState.MISSING), "no longer known"),
    (Fate(RunState.CANCELLED, "Cancelled"), "was cancelled"),
]
GOES_ON = [
    Fate(RunState.RUNNING, "Running", LONG_AGO),
    Fate(RunState.RESTING, "AwaitingRetry", LONG_AGO),
]


@pytest.mark.parametrize(("fate", "why"), ENDED)
async def test_a_job_of_a_run_that_is_over_is_an_orphan(
    job_server: EmbeddedJobServer, tmp_path: Path, fate: Fate, why: str
) -> None:
    """CASE-127: a flow run that was deleted, or has ended without a process to tell."""
    record = await left_behind(tmp_path, job_server)
    planned = await swept(tmp_path, job_server, {"run-1": fate}, config=QUOTA, dry_run=True)
    assert [(job.job_key, job.action) for job in planned.jobs] == [(record.key, Action.END)]
    assert not job_server.log("delete")
    report = await swept(tmp_path, job_server, {"run-1": fate}, config=QUOTA)
    [job] = report.jobs
    assert why in job.reason
    assert job.came_to == "over as ABORTED"
    assert len(job_server.log("delete")) == 1
    assert [each.message for each in job_server.jobs()] == [job.reason]
    again = await swept(tmp_path, job_server, {"run-1": fate}, config=QUOTA)
    assert (again.looked_at, again.jobs) == (0, ())


@pytest.mark.parametrize("fate", GOES_ON)
async def test_a_job_of_a_run_that_may_come_back_stays(
    job_server: EmbeddedJobServer, tmp_path: Path, fate: Fate
) -> None:
    await left_behind(tmp_path, job_server)
    report = await swept(tmp_path, job_server, {"run-1": fate}, config=QUOTA)
    assert (report.looked_at, report.jobs) == (1, ())
    assert job_server.stats().live == 1


async def test_a_run_that_counts_as_running_for_ever_is_given_up_at_last(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """A killed `python flow.py` stays Running in Prefect; `abandon_after` bounds that."""
    await left_behind(tmp_path, job_server)
    running = {"run-1": Fate(RunState.RUNNING, "Running", LONG_AGO)}
    report = await swept(
        tmp_path, job_server, running, config=QUOTA, settings={"abandonAfter": "1s"}
    )
    assert ["abandoned" in job.reason for job in report.jobs] == [True]
    assert job_server.stats().live == 0


async def test_a_job_that_a_later_run_did_not_ask_for_is_superseded(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-059: re-run with changed inputs makes a new job, never adopts the old one, and the old one is ended."""
    old = await left_behind(tmp_path, job_server)
    with at(tmp_path, job_server, QUOTA) as host:
        new = ReportJob(day=7, seconds=0.1)
        outcome = await run(host, new, "keys", execution="execution-2", task_run="second")
    assert outcome.job_key != old.key
    report = await swept(tmp_path, job_server, config=QUOTA)
    [job] = report.jobs
    assert job.job_key == old.key
    assert job.reason.startswith("superseded")
    assert [each.message for each in job_server.jobs() if each.state == "cancelled"] == [job.reason]


async def test_a_job_that_shall_go_on_is_looked_at_and_left(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """`on_exit="leave"`: its place is given back when it has ended by itself."""
    with at(tmp_path, job_server, QUOTA) as host:
        host.admit(
            request(
                ReportJob(seconds=2.0),
                task_type="keys",
                options=Overrides(on_exit="leave"),
            )
        )
        await eventually(lambda: job_server.stats().live, within=20)
    report = await swept(tmp_path, job_server, config=QUOTA)
    assert [job.action for job in report.jobs] == [Action.LOOK]
    assert job_server.stats().live == 1
    assert await places_taken(tmp_path) == 1
    await eventually(lambda: job_server.stats().live == 0, within=5)
    await swept(tmp_path, job_server, config=QUOTA)
    assert not job_server.log("delete")
    assert await places_taken(tmp_path) == 0


async def test_a_suspect_is_given_up_at_the_horizon(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """T-16: until then it is reported and its place stays taken."""
    work = work_at(job_server, tmp_path, "neither", specs=ENDLESS[:1], die_at="KP-08")
    killed(work)
    first = await swept(tmp_path, job_server, config=QUOTA)
    assert [job.action for job in first.jobs] == [Action.REPORT]
    [record] = await records(tmp_path)
    with at(tmp_path, job_server, QUOTA) as host:  # the run again: now the ledger says suspect
        await run(host, ENDLESS[0], "neither", execution="execution-2", task_run="execution-2/0")
    last = await swept(tmp_path, job_server, config=QUOTA, settings={"reaperHorizon": "1s"})
    assert [job.action for job in last.jobs] == [Action.GIVE_UP]
    assert await places_taken(tmp_path) == 0
    [record] = await records(tmp_path)
    assert record.state is JobState.CLOSED
    assert len(job_server.log("create")) == 1


# --- beside others -------------------------------------------------------------------------------


async def test_a_job_of_a_living_process_is_nobodys_orphan(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    with at(tmp_path, job_server, QUOTA) as host:
        ticket = host.admit(request(ENDLESS[0], task_type="keys"))
        await eventually(lambda: job_server.stats().live, within=20)
        report = await swept(tmp_path, job_server, config=QUOTA)
        assert (report.looked_at, report.driven, report.jobs) == (1, 1, ())
        assert job_server.stats().live == 1
        ticket.cancel("done")
        await ticket.outcome()


async def test_two_sweepers_and_a_run_that_comes_back_disturb_nobody(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """Each orphan is ended once; the run that comes back makes jobs of its own for those that were ended."""
    specs = tuple(ReportJob(day=day, outcome="never") for day in range(20))
    wide = {"resourceQuotas": {"default": 40}}
    with at(tmp_path, job_server, wide) as host:
        for spec in specs:
            host.admit(request(spec, task_type="keys", task_run=f"first/{spec.day}"))
        await eventually(lambda: job_server.stats().live == len(specs), within=20)
    reports = await asyncio.gather(
        *(swept(tmp_path, job_server, config=wide, speed=4) for _ in range(2)),
    )
    assert job_server.stats().live == 0
    assert len(job_server.log("delete")) == len(specs)
    assert not any(report.troubles for report in reports)
    assert {record.state for record in await records(tmp_path)} == {JobState.CLOSED}
    assert await places_taken(tmp_path) == 0
    with at(tmp_path, job_server, wide) as host:
        ticket = host.admit(
            request(specs[0], task_type="keys", execution="execution-2", task_run="second/0")
        )
        await eventually(lambda: job_server.stats().live == 1, within=20)
        ticket.cancel("seen")
        await ticket.outcome()
    assert job_server.stats().created == len(specs) + 1


async def test_a_call_that_comes_while_its_job_is_swept_takes_it_over(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """A job that was taken up for its deadline's sake is the caller's again as soon as one asks for it."""
    record = await left_behind(tmp_path, job_server)
    with at(tmp_path, job_server, QUOTA, sweeps=False) as host:

        async def adopted(runtime: Any) -> bool:
            loaded = await runtime.services.plugins.get("keys", None, "default")
            return await runtime.adopt(record, loaded, None) is not None

        assert await asyncio.wrap_future(host.perform(adopted))
        ticket = host.admit(
            request(ENDLESS[0], task_type="keys", execution="execution-2", task_run="second")
        )
        await asyncio.sleep(0.3)
        ticket.cancel("enough")
        outcome = await ticket.outcome()
    assert outcome.info.phase is Phase.ABORTED
    assert job_server.stats().created == 1
    assert job_server.stats().live == 0
