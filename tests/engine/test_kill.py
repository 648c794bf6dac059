"""A process is killed between any two acts: the next one finds every job, and makes none twice."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from prefect_webapi import Phase, PluginConfig, TaskExecutionContextReader
from prefect_webapi.clock import Clock
from prefect_webapi.contract.errors import LedgerUnavailable, WebApiError
from prefect_webapi.contract.keys import JobKey
from prefect_webapi.engine.faults import arm
from prefect_webapi.ledger.records import JobState
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import JobServerPlugin, ReportJob
from tests.ledger.raw import raw
from tests.support.deaths import killed, killed_in_create, killed_with_a_wish
from tests.support.engine import at, request, run
from tests.support.engine_child import End, Work, carry_out, child, hosted
from tests.support.plugins import entry
from tests.support.waiting import eventually
from tests.support.witness import places_taken, records

pytestmark = pytest.mark.usefixtures("each_ledger")

QUOTA = {"resourceQuotas": {"default": 2}}
ROOM_FOR_ALL = {"resourceQuotas": {"default": 3}}
"""For jobs of which two may be unknown for good, and keep their places: a third one would wait for ever."""
SPECS = tuple(ReportJob(day=day, seconds=0.15, result=f"report {day}") for day in range(3))


async def run_again(work: Work) -> list[End]:
    """The same calls of the same run, as a new execution in this process."""
    again = replace(work, execution="execution-2", die_at=None)
    with hosted(again) as host:
        calls = (carry_out(again, host, nth) for nth in range(len(again.specs)))
        return await asyncio.gather(*calls)


def work_at(
    server: EmbeddedJobServer, folder: Path, mood: Literal["keys", "search", "neither"], **more: Any
) -> Work:
    server.behave(mood)
    given: dict[str, Any] = {"task_type": mood, "specs": SPECS, **more}
    return Work(folder=folder, server=server.url, **given)


CREATING = ("KP-01", "KP-06", "KP-08", "KP-09", "KP-10")
WAITING = ("KP-02", "KP-03", "KP-04", "KP-05")
ENDING = ("KP-13", "KP-17", "KP-19")
LIVING = ("KP-11", "KP-11:2", "KP-12", "KP-14", "KP-16", "KP-18", "KP-20")
Mood = Literal["keys", "search", "neither"]


TELLING = {
    ("keys", True): {*WAITING, *CREATING, *LIVING, *ENDING},
    ("search", True): {"KP-06", "KP-08"},
    ("neither", True): {"KP-05", "KP-06", "KP-08"},
    ("neither", False): {"KP-01"},
}
"""The part of the matrix that every run of the suite does; the whole of it is under `-m chaos`."""


def matrix(mood: Mood, quota: bool, places: tuple[str, ...]) -> list[Any]:
    """Rows of the matrix of moods and places."""
    told = TELLING.get((mood, quota), set[str]())
    return [
        pytest.param(mood, place, quota, marks=() if place in told else pytest.mark.chaos)
        for place in places
    ]


async def ends_after_a_kill(work: Work) -> tuple[list[End], set[JobKey]]:
    """Run `work` until it dies, then again: what the second run's calls came to, and the suspects' keys."""
    told = killed(work)
    unknown = {
        record.key
        for record in await records(work.folder)
        if record.state is JobState.CREATING and work.task_type == "neither"
    }
    ends = await run_again(work)
    before = {end.job_key: end.data for end in told if end.phase == "SUCCESS"}
    assert before.items() <= {end.job_key: end.data for end in ends}.items()
    return ends, unknown


@pytest.mark.parametrize(
    ("mood", "place", "quota"),
    [
        *(matrix("keys", True, (*WAITING, *CREATING, *LIVING, *ENDING))),
        *(matrix("search", True, (*WAITING, *CREATING, *ENDING))),
        *(matrix("neither", True, (*WAITING, *CREATING, *ENDING))),
        *(matrix("keys", False, (*CREATING, "KP-17"))),
        *(matrix("search", False, CREATING)),
        *(matrix("neither", False, CREATING)),
    ],
)
async def test_every_job_is_made_once_wherever_the_process_dies(
    job_server: EmbeddedJobServer, tmp_path: Path, mood: Mood, place: str, quota: bool
) -> None:
    """KP-01 to KP-06, KP-08 to KP-14, KP-16 to KP-20, KP-31: the process dies there and the run starts again.

    The re-run half of CASE-161 to CASE-166, CASE-168 to CASE-174, CASE-176 to CASE-180 and CASE-191.
    """
    places = ROOM_FOR_ALL if mood == "neither" else QUOTA
    work = work_at(job_server, tmp_path, mood, config=places if quota else {}, die_at=place)
    ends, unknown = await ends_after_a_kill(work)
    if mood == "neither" and place in ("KP-06", "KP-08"):
        assert unknown
    assert {end.job_key for end in ends if end.code == "CreateOutcomeUnknown"} == unknown
    good = [end for end in ends if end.job_key not in unknown]
    assert [(e.phase, e.data) for e in good] == [("SUCCESS", f"report {e.nth}") for e in good]
    made = job_server.stats()
    assert not made.duplicates
    if unknown:
        sent = Counter(entry.body["key"] for entry in job_server.log("create"))
        assert all(sent[key] <= 1 for key in unknown)
    else:
        assert made.created == len(SPECS)
        assert made.live == 0
    assert await places_taken(work.folder) == (len(unknown) if quota else 0)
    others = {record.state for record in await records(work.folder) if record.key not in unknown}
    assert others <= {JobState.CLOSED}


async def test_a_result_that_was_half_written_is_written_again(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """KP-15, CASE-242 and the re-run half of CASE-175."""
    text = "x" * 100_000
    specs = (ReportJob(seconds=0.1, result=text),)
    work = work_at(job_server, tmp_path, "keys", specs=specs, die_at="KP-15")
    [end], _ = await ends_after_a_kill(work)
    assert end.data == text
    assert job_server.stats().created == 1
    [copy] = (tmp_path / "outputs").rglob("*.json")
    assert text in copy.read_text()


@pytest.mark.parametrize("mood", ["keys", "search", "neither"])
async def test_a_process_dies_while_its_create_is_on_the_way(
    job_server: EmbeddedJobServer, tmp_path: Path, mood: Mood
) -> None:
    """KP-07, the re-run half of CASE-167: the service takes the job after the death."""
    work = work_at(job_server, tmp_path, mood, config=QUOTA, specs=SPECS[:1])
    await killed_in_create(work, job_server)
    [end] = await run_again(work)
    assert job_server.stats().created == 1
    if mood == "neither":
        assert end.code == "CreateOutcomeUnknown"
        assert len(job_server.log("create")) == 1
    else:
        assert (end.phase, end.data) == ("SUCCESS", "report 0")
    assert await places_taken(work.folder) == (mood == "neither")


@pytest.mark.parametrize("mood", ["keys", "search"])
@pytest.mark.parametrize("place", ["KP-08:2", "KP-17", "KP-19", "KP-20"])
async def test_a_process_dies_between_two_attempts(
    job_server: EmbeddedJobServer, tmp_path: Path, mood: Mood, place: str
) -> None:
    """KP-29, KP-30, the re-run half of CASE-189 and CASE-190: two attempts, two jobs, two keys."""
    specs = (ReportJob(seconds=0.1, outcome="fail-first", result="second"),)
    work = work_at(
        job_server, tmp_path, mood, config=QUOTA, specs=specs, max_attempts=2, die_at=place
    )
    [end], _ = await ends_after_a_kill(work)
    assert (end.phase, end.data) == ("SUCCESS", "second")
    made = job_server.stats()
    assert made.created == 2
    assert not made.duplicates
    assert await places_taken(work.folder) == 0


ENDLESS = (ReportJob(outcome="never"), ReportJob(day=1, outcome="never"))


@pytest.mark.parametrize("place", ["KP-21", "KP-22", "KP-22:5", "KP-24", "KP-11:6"])
async def test_a_process_dies_while_it_cancels(
    job_server: EmbeddedJobServer, tmp_path: Path, place: str
) -> None:
    """KP-21, KP-22, KP-24, CASE-115, the re-run half of CASE-181, CASE-182, CASE-184: the delete is made."""
    work = work_at(
        job_server, tmp_path, "keys", config=QUOTA, specs=ENDLESS, cancel="CREATED", die_at=place
    )
    if place == "KP-22:5":  # in the middle of an outage
        job_server.fault("delete", status=503, times=6)
    if place == "KP-11:6":  # after both deletes were taken: the jobs take their time to die
        slow = tuple(spec.model_copy(update={"dies_in": 1.0}) for spec in ENDLESS)
        work = replace(work, specs=slow)
    ends, _ = await ends_after_a_kill(work)
    assert [(end.phase, end.stopped_by_us) for end in ends] == [("ABORTED", True)] * 2
    made = job_server.stats()
    assert not made.duplicates
    assert 1 <= made.created <= 2  # the other call may not have got as far as its create
    assert made.live == 0
    assert {job.message for job in job_server.jobs()} == {"enough"}
    assert await places_taken(work.folder) == 0


async def test_a_process_dies_while_its_delete_is_on_the_way(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """KP-23, the re-run half of CASE-183: it is sent again, and the second answer does no harm."""
    work = work_at(job_server, tmp_path, "keys", config=QUOTA, specs=ENDLESS[:1], cancel="CREATED")
    job_server.fault("delete", delay=0.2)
    with child(work) as first:
        await eventually(lambda: job_server.log("delete"), within=30)
        first.signal(signal.SIGKILL)
        assert first.ends() == []
    [record] = await records(work.folder)
    assert record.state is JobState.CANCELLING
    assert await places_taken(work.folder) == 1
    await eventually(lambda: job_server.stats().live == 0, within=5)
    [end] = await run_again(replace(work, cancel=None))
    assert end.phase == "ABORTED"
    assert end.reason.startswith("enough")
    assert len(job_server.log("delete")) == 2
    assert await places_taken(work.folder) == 0


async def test_a_process_dies_after_giving_up_its_wait_for_a_place(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """KP-25, the re-run half of CASE-185: nothing was sent for it, and it stands in nobody's way."""
    work = work_at(
        job_server,
        tmp_path,
        "keys",
        config={"resourceQuotas": {"default": 1}},
        specs=ENDLESS,
        cancel="WAITING",
        die_at="KP-17",
    )
    with child(work) as first:
        first.ends()
        assert first.code == -signal.SIGKILL
    over = [record for record in await records(work.folder) if record.state.is_over]
    assert [record.details.stopped_by_us for record in over] == [True]
    # The other call was told that it waits, too, or had its place: then it was cancelled, or made its job.
    sent = {entry.name for entry in job_server.log("create")}
    assert not sent & {record.key for record in over}
    assert not job_server.log("delete")
    assert await places_taken(work.folder) <= 1


@pytest.mark.parametrize("mood", ["keys", "search", "neither"])
async def test_a_process_dies_after_a_cancel_while_create_is_on_the_way(
    job_server: EmbeddedJobServer, tmp_path: Path, mood: Mood
) -> None:
    """KP-26, the re-run half of CASE-186: the wish was written down, so the job is found and deleted."""
    work = work_at(job_server, tmp_path, mood, specs=ENDLESS[:1], execution="execution-1")
    await killed_with_a_wish(work, job_server)
    [end] = await run_again(work)
    assert job_server.stats().created == 1
    if mood == "neither":
        assert end.code == "CreateOutcomeUnknown"
        return
    assert (end.phase, end.stopped_by_us) == ("ABORTED", True)
    assert job_server.stats().live == 0
    assert [job.message for job in job_server.jobs()] == ["enough"]


@pytest.mark.parametrize("max_attempts", [1, 2])
async def test_a_process_dies_when_contact_is_lost(
    job_server: EmbeddedJobServer, tmp_path: Path, max_attempts: int
) -> None:
    """KP-28, the re-run half of CASE-188: contact is there again, and the job is the same."""
    work = work_at(
        job_server,
        tmp_path,
        "keys",
        config={**QUOTA, "caching": {"maxSystemFailures": 1, "resyncInterval": "5s"}},
        settings={"visibilityDelay": "5s"},
        specs=(ReportJob(seconds=1.5, result="found"),),
        max_attempts=max_attempts,
        speed=10,
        epoch=time.time(),
        die_at="KP-28",
    )
    job_server.fault("batch", status=500, times=None)
    job_server.fault("get", status=500, times=None)
    with child(work) as first:
        assert first.ends() == []
        assert first.code == -signal.SIGKILL
    job_server.clear_faults()
    [end] = await run_again(work)
    assert (end.phase, end.data) == ("SUCCESS", "found")
    assert job_server.stats().created == 1
    assert not job_server.log("delete")
    assert await places_taken(work.folder) == 0


async def test_a_process_dies_before_it_deletes_what_failed_but_still_runs(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """KP-27, the re-run half of CASE-187: the delete is made before the next attempt's create."""
    work = work_at(
        job_server,
        tmp_path,
        "keys",
        config=QUOTA,
        specs=(ReportJob(outcome="never", message="it hangs"),),
        task_type="cleanup",
        max_attempts=2,
        die_at="KP-27",
    )
    [end], _ = await ends_after_a_kill(work)
    assert end.code == "Hangs"
    assert [e.op for e in job_server.log() if e.op in ("create", "delete")] == [
        *("create", "delete"),
        *("create", "delete"),
    ]
    assert job_server.stats().live == 0
    assert await places_taken(work.folder) == 0


async def test_a_deadline_runs_on_while_nobody_is_there(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-251: it is counted from the first run's intent, and the job is deleted at once."""
    work = work_at(
        job_server,
        tmp_path,
        "keys",
        config=QUOTA,
        settings={"deadline": "10s"},
        specs=ENDLESS[:1],
        speed=10,
        epoch=time.time(),
        die_at="KP-11:2",
    )
    with child(work) as first:
        assert first.ends() == []
    [record] = await records(work.folder)
    assert record.state is JobState.CREATED
    assert record.deadline == record.created_at + timedelta(seconds=10)
    late, clock = record.created_at + timedelta(seconds=20), Clock(10, epoch=work.epoch)
    await eventually(lambda: clock.now() > late, within=10)
    [end] = await run_again(work)
    assert end.code == "Timeout"
    assert "deadline of 10s exceeded" in end.reason
    assert len(job_server.log("create")) == 1
    [job] = job_server.jobs()
    assert (job.state, job.message) == ("cancelled", "deadline of 10s exceeded")
    [after] = await records(work.folder)
    assert after.deadline == record.deadline
    assert await places_taken(work.folder) == 0


@pytest.mark.parametrize("task_type", ["do", "idempotent-do"])
@pytest.mark.parametrize("in_flight", [False, True])
async def test_a_process_dies_in_a_synchronous_call(
    job_server: EmbeddedJobServer, tmp_path: Path, task_type: str, in_flight: bool
) -> None:
    """KP-38, the re-run half of CASE-198: only what is declared idempotent is sent again, with the same key."""
    work = work_at(
        job_server,
        tmp_path,
        "search",
        config=QUOTA,
        specs=SPECS[:1],
        task_type=task_type,
        die_at=None if in_flight else "KP-38",
    )
    job_server.fault("create", delay=0.3)
    with child(work) as first:
        if in_flight:
            await eventually(lambda: job_server.log("create"), within=60)
            first.signal(signal.SIGKILL)
        assert first.ends() == []
        assert first.code == -signal.SIGKILL
    [end] = await run_again(work)
    sent = [entry.body["key"] for entry in job_server.log("create")]
    if task_type == "do":
        assert end.code == "OutcomeUnknown"
        assert len(sent) == in_flight
    else:
        assert (end.phase, end.data) == ("SUCCESS", "report 0")
        assert sent == [end.job_key] * (1 + in_flight)
    assert await places_taken(work.folder) == 0


# --- several processes that live ----------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["succeed", "fail"])
async def test_two_processes_of_one_run_share_their_jobs(
    job_server: EmbeddedJobServer, tmp_path: Path, outcome: Literal["succeed", "fail"]
) -> None:
    """CASE-201, CASE-282: one drives, the other follows, both end with the same."""
    specs = tuple(
        ReportJob(day=day, seconds=1, outcome=outcome, result=f"report {day}") for day in range(3)
    )
    work = work_at(job_server, tmp_path, "keys", config=QUOTA, specs=specs)
    with child(work) as first, child(replace(work, execution="execution-2")) as second:
        one, two = first.ends(), second.ends()
    assert [end.phase for end in one] == [
        "SUCCESS" if outcome == "succeed" else "RETRYABLE_FAILURE"
    ] * 3
    assert one == two
    assert job_server.stats().created == 3
    assert len(job_server.log("create")) == 3
    assert await places_taken(work.folder) == 0


async def test_a_follower_takes_over_when_the_driver_is_killed(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-201: and no job is made twice."""
    specs = tuple(ReportJob(day=day, outcome="never", result=f"report {day}") for day in range(2))
    work = work_at(job_server, tmp_path, "keys", config=QUOTA, specs=specs)
    with child(work) as first:
        await eventually(lambda: len(job_server.log()) > 5, within=60)
        owners = {record.runtime for record in await records(tmp_path)}
        with child(replace(work, execution="execution-2")) as second:
            await eventually(lambda: second.said("following it") >= 2, within=30)
            assert {record.runtime for record in await records(tmp_path)} == owners
            first.signal(signal.SIGKILL)
            assert first.ends() == []

            async def is_taken_over() -> bool:
                return not owners & {record.runtime for record in await records(tmp_path)}

            await eventually(is_taken_over, within=10)
            for job in job_server.jobs():
                job_server.end(job.name, "succeeded")
            ends = second.ends()
    assert [(end.phase, end.data) for end in ends] == [
        ("SUCCESS", f"report {day}") for day in range(2)
    ]
    assert job_server.stats().created == 2
    assert not job_server.log("delete")
    assert await places_taken(tmp_path) == 0


async def test_an_owner_that_slept_loses_to_its_successor_and_stops_quietly(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """KP-33, the re-run half of CASE-193: awake again it takes what its successor got."""
    specs = (ReportJob(outcome="never", result="report 0"),)
    work = work_at(
        job_server, tmp_path, "keys", config=QUOTA, specs=specs, speed=20, epoch=time.time()
    )
    with child(work) as sleeper:
        await eventually(lambda: job_server.log("get"), within=60)
        [before] = await records(tmp_path)
        sleeper.signal(signal.SIGSTOP)
        with child(replace(work, execution="execution-2")) as successor:

            async def is_replaced() -> bool:
                [record] = await records(tmp_path)
                return record.fence > before.fence

            await eventually(is_replaced, within=30)
            job_server.end(before.key, "succeeded")
            [end] = successor.ends()
        sleeper.signal(signal.SIGCONT)
        [same] = sleeper.ends()
        assert sleeper.code == 0
        assert sleeper.said("ERROR") == 0
    assert (end.phase, end.data) == ("SUCCESS", "report 0")
    assert same == end
    assert job_server.stats().created == 1
    assert not job_server.log("delete")
    assert await places_taken(tmp_path) == 0


# --- what else may go while a job lives -----------------------------------------------------------


@pytest.mark.parametrize("is_mended", [True, False])
async def test_a_handle_that_can_not_be_written_down_is_kept_or_its_job_ended(
    job_server: EmbeddedJobServer, tmp_path: Path, each_ledger: str, is_mended: bool
) -> None:
    """KP-35, CASE-195: the ledger's table is away when create answers; for two minutes it is asked again."""
    spec = ReportJob(seconds=0.1, result="kept") if is_mended else ENDLESS[0]
    gone = threading.Event()

    async def rename(old: str, new: str) -> None:
        await raw(each_ledger, f"ALTER TABLE {old} RENAME TO {new}")

    def passing(place: str) -> None:
        if place == "KP-08":  # on the engine's loop
            with ThreadPoolExecutor() as elsewhere:
                elsewhere.submit(asyncio.run, rename("webapi_job", "hidden")).result()
            gone.set()

    arm(passing)
    try:
        with at(tmp_path, job_server, QUOTA, speed=20) as host:
            ticket = host.admit(request(spec, task_type="keys"))
            await asyncio.to_thread(gone.wait, 20)
            if is_mended:
                await rename("hidden", "webapi_job")
                assert (await ticket.outcome()).value.data == "kept"
            else:
                with pytest.raises(LedgerUnavailable, match=r"no such table|does not exist"):
                    await ticket.outcome()
                assert job_server.stats().live == 0
                await rename("hidden", "webapi_job")
    finally:
        arm(None)
    assert job_server.stats().created == 1
    assert len(job_server.log("delete")) == (not is_mended)


@pytest.mark.parametrize("op", ["create", "get"])
async def test_a_process_dies_between_new_credentials_and_the_call_that_was_to_use_them(
    job_server: EmbeddedJobServer, tmp_path: Path, op: Literal["create", "get"]
) -> None:
    """KP-36, CASE-196: the next process finds the old ones refused and gets new ones again; one job."""
    work = work_at(job_server, tmp_path, "keys", specs=SPECS[:1], config=QUOTA, die_at="KP-36")
    job_server.fault(op, status=401, times=2)
    [end], _ = await ends_after_a_kill(work)
    assert (end.phase, end.data) == ("SUCCESS", "report 0")
    assert [call.status for call in job_server.log(op)][:2] == [401, 401]
    assert job_server.stats().created == 1
    assert await places_taken(work.folder) == 0


class _NewHandle(BaseModel):
    """What a newer version of the plugin keeps of a job."""

    name: str
    region: str


class _NewPlugin(JobServerPlugin):
    async def create(  # pyright: ignore[reportIncompatibleMethodOverride] - a newer version, with a handle of its own
        self, ctx: TaskExecutionContextReader
    ) -> _NewHandle:
        await super().create(ctx)
        return _NewHandle(name=ctx.task_execution_metadata.generated_name, region="here")

    def get_config(self) -> PluginConfig:
        return super().get_config().model_copy(update={"resource_meta": _NewHandle})


async def test_a_handle_that_newer_code_can_not_read_is_shown_and_its_job_left_alone(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """KP-37, the re-run half of CASE-197."""
    with at(tmp_path, job_server) as host:
        host.admit(request(ENDLESS[0], task_type="keys"))
        await eventually(lambda: job_server.log("get"), within=20)
    [job] = job_server.jobs()
    with at(tmp_path, job_server, entries=[entry(_NewPlugin, "keys")]) as host:
        with pytest.raises(WebApiError, match="can't be read by this version") as told:
            await run(host, ENDLESS[0], execution="2")
        assert job.name in str(told.value)
        assert not job_server.log("delete")
    with at(tmp_path, job_server) as host:
        again = host.admit(request(ENDLESS[0], task_type="keys", execution="3"))
        job_server.end(job.name, "succeeded")
        assert (await again.outcome()).info.phase is Phase.SUCCESS
    assert job_server.stats().created == 1
