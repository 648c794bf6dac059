"""Two processes on one ledger never both drive a job: sleepers, other machines, pids that are used again."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
from pydantic import SecretStr

from prefect_webapi.ledger.records import JobState, Record
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import ReportJob
from tests.ledger.raw import raw
from tests.support.engine import block, engine, run
from tests.support.engine_child import Work, child
from tests.support.jobserver import TOKEN
from tests.support.plugins import ALL
from tests.support.waiting import eventually
from tests.support.witness import places_taken, records

pytestmark = pytest.mark.usefixtures("each_ledger")

TABLES = ("job", "claim", "group", "quota", "runtime")
ENDLESS = (ReportJob(outcome="never", result="report 0"),)


def work_at(server: EmbeddedJobServer, folder: Path, **more: Any) -> Work:
    """One job, in time that goes 20 times as fast: a process counts as dead after 1.5 s of silence."""
    return Work(
        folder=folder,
        server=server.url,
        specs=ENDLESS,
        config={"resourceQuotas": {"default": 2}},
        speed=20,
        epoch=time.time(),
        **more,
    )


async def the_record(folder: Path) -> Record:
    [record] = await records(folder)
    return record


@pytest.mark.parametrize("mood", ["keys", pytest.param("search", marks=pytest.mark.chaos)])
async def test_an_owner_that_slept_before_its_create_makes_no_second_job(
    job_server: EmbeddedJobServer, tmp_path: Path, mood: Literal["keys", "search"]
) -> None:
    """KP-33, CASE-193, CASE-207: its successor has made the job meanwhile; awake again it sends nothing and follows."""
    job_server.behave(mood)
    work = work_at(job_server, tmp_path, task_type=mood)
    with child(replace(work, stop_at="KP-06")) as sleeper:
        await eventually(lambda: sleeper.is_stopped, within=60)
        before = await the_record(tmp_path)
        assert before.state is JobState.CREATING
        assert not job_server.log("create")
        with child(replace(work, execution="execution-2")) as successor:

            async def is_taken_over() -> bool:
                return (await the_record(tmp_path)).state is JobState.CREATED

            await eventually(is_taken_over, within=30)
            owned = await the_record(tmp_path)
            assert owned.fence > before.fence
            sleeper.signal(signal.SIGCONT)
            await eventually(lambda: sleeper.said("following it"), within=30)
            after = await the_record(tmp_path)
            assert (after.runtime, after.fence) == (owned.runtime, owned.fence)
            [job] = job_server.jobs()
            job_server.end(job.name, "succeeded")
            [end], [same] = successor.ends(), sleeper.ends()
        assert sleeper.code == 0
        assert sleeper.said("ERROR") == 0
    assert (end.phase, end.data) == ("SUCCESS", "report 0")
    assert same == end
    assert len(job_server.log("create")) == 1
    assert not job_server.log("delete")
    assert await places_taken(tmp_path) == 0


async def test_an_owner_that_slept_and_is_cancelled_asks_its_successor(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """KP-33, CASE-193: it sends no delete of its own, the wish is passed on, and the one job ends once."""
    work = work_at(job_server, tmp_path, cancel="CREATED")
    with child(replace(work, stop_at="KP-21")) as sleeper:
        await eventually(lambda: sleeper.is_stopped, within=60)
        before = await the_record(tmp_path)
        with child(replace(work, execution="execution-2", cancel=None)) as successor:

            async def is_taken_over() -> bool:
                return (await the_record(tmp_path)).fence > before.fence

            await eventually(is_taken_over, within=30)
            sleeper.signal(signal.SIGCONT)
            [end], [same] = successor.ends(), sleeper.ends()
    assert (end.phase, same.phase) == ("ABORTED", "ABORTED")
    assert job_server.stats().created == 1
    assert len(job_server.log("delete")) == 1
    assert [job.message for job in job_server.jobs()] == ["enough"]
    assert await places_taken(tmp_path) == 0


async def test_a_job_is_taken_up_on_another_machine_with_the_secret_that_is_there(
    job_server: EmbeddedJobServer, tmp_path: Path, each_ledger: str
) -> None:
    """CASE-230: nobody there can see that the process is gone, so it must have been silent first."""
    work = work_at(job_server, tmp_path, machine="machine-1")
    with child(work) as first:
        await eventually(lambda: job_server.log("get") or job_server.log("batch"), within=60)
        before = await the_record(tmp_path)
        [row] = await raw(each_ledger, "SELECT host, pid FROM webapi_runtime")
        assert row == ("machine-1", first.pid)
        first.signal(signal.SIGKILL)
        assert first.ends() == []
    job_server.behave("keys", token="rotated")
    job_server.end(before.key, "succeeded")
    settings = dict(work.config)
    there = block(job_server, settings).model_copy(update={"token": SecretStr("rotated")})
    with engine(tmp_path, ALL, {"default": there}, speed=20, epoch=work.epoch) as host:
        outcome = await run(host, ENDLESS[0], execution="2")
    assert outcome.value.data == "report 0"
    assert (outcome.job_key, job_server.stats().created) == (before.key, 1)
    after = await the_record(tmp_path)
    assert after.fence > before.fence
    everything = [await raw(each_ledger, f"SELECT * FROM webapi_{table}") for table in TABLES]
    assert TOKEN not in str(everything)
    assert "rotated" not in str(everything)


async def test_a_pid_that_is_used_again_does_not_pass_for_the_dead_process(
    job_server: EmbeddedJobServer, tmp_path: Path, each_ledger: str
) -> None:
    """SPEC 3.1: a pid counts with its process's time of birth, so the job is taken over at once."""
    work = replace(work_at(job_server, tmp_path, die_at="KP-11:2"), speed=1.0)
    with child(work) as first:
        assert first.ends() == []
        assert first.code == -signal.SIGKILL
    before = await the_record(tmp_path)
    me = psutil.Process(os.getpid())
    await raw(each_ledger, "UPDATE webapi_runtime SET pid = :pid", pid=me.pid)
    job_server.end(before.key, "succeeded")
    began = time.monotonic()
    with child(replace(work, execution="execution-2", die_at=None)) as second:
        [end] = second.ends()
    assert time.monotonic() - began < 20, "it waited for silence"
    assert end.data == "report 0"
    assert job_server.stats().created == 1
