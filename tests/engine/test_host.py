"""The engine's thread: it comes with the first job, serves every loop and thread, and leaves nothing."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from prefect_webapi import Phase
from prefect_webapi.clock import Clock
from prefect_webapi.contract.errors import EngineClosed, LedgerUnavailable, WebApiError
from prefect_webapi.engine import host as engine_host
from prefect_webapi.engine.host import Host
from prefect_webapi.engine.liveness import this_process
from prefect_webapi.engine.request import Outcome
from prefect_webapi.engine.runtime import Runtime
from prefect_webapi.ledger.records import JobState
from prefect_webapi.ledger.sql import SqlStore
from prefect_webapi.metrics import Metrics
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import ReportJob
from tests.support.engine import at, request, run
from tests.support.waiting import eventually, eventually_blocking
from tests.support.witness import places_taken, records

QUICK_JOB = ReportJob(seconds=0.05)


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefect-webapi"]


def test_importing_it_starts_nothing() -> None:
    """No thread, no event loop, no Prefect, no file."""
    script = """
import sys, threading
import prefect_webapi.engine.host
assert threading.active_count() == 1, threading.enumerate()
assert "prefect" not in sys.modules
assert not {"httpx_aiohttp", "aiosqlite", "asyncpg"} & set(sys.modules)
import psutil
assert psutil.Process().open_files() == [], psutil.Process().open_files()
"""
    subprocess.run([sys.executable, "-c", script], check=True)


async def test_the_thread_comes_with_the_first_job_and_goes_with_the_host(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """Nothing of it is left: no thread, no connection, no open file, no row of a living process."""
    before = set(threading.enumerate())
    address = int(job_server.url.rsplit(":", 1)[1])
    with at(tmp_path, job_server) as host:
        assert not engine_threads()
        assert not (tmp_path / "webapi.db").exists()
        outcomes = await asyncio.gather(
            *(
                run(host, ReportJob(day=n, seconds=0.05), t)
                for n, t in enumerate(["keys", "do", "blocking-do"])
            )
        )
        assert all(outcome.info.phase is Phase.SUCCESS for outcome in outcomes)
        assert len(engine_threads()) == 1
    me = psutil.Process()
    assert not [thread for thread in set(threading.enumerate()) - before if thread.is_alive()]
    assert not [file.path for file in me.open_files() if file.path.startswith(str(tmp_path))]
    assert not [
        c
        for c in me.net_connections()
        if c.raddr and c.raddr.port == address and c.status == "ESTABLISHED"
    ]
    with at(tmp_path / "other", job_server) as host:  # a second host of the same process
        assert (await run(host, QUICK_JOB)).info.phase is Phase.SUCCESS
    assert not engine_threads()


async def test_closing_leaves_no_task_and_says_nothing(
    job_server: EmbeddedJobServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also with jobs that wait, are being made, run and end."""
    job_server.fault("create", delay=0.2, times=2)
    caplog.set_level(logging.WARNING)
    with at(tmp_path, job_server, {"resourceQuotas": {"default": 3}}) as host:
        tickets = [
            host.admit(request(ReportJob(day=n, outcome="never"), task_type="keys"))
            for n in range(6)
        ]
        await eventually(lambda: len(job_server.log("create")) == 3, within=20)
        tickets[0].cancel("enough")
    for ticket in tickets[1:]:
        with pytest.raises(EngineClosed, match="the next run takes it up"):
            await ticket.outcome()
    assert not [r for r in caplog.records if r.levelno > logging.WARNING or r.name == "asyncio"]
    made = job_server.stats()
    assert made.created == 3
    states = sorted(record.state for record in await records(tmp_path))
    assert JobState.CREATING not in states
    assert states.count(JobState.SLOT_REQUESTED) == 3
    assert await places_taken(tmp_path) >= made.live == 2


async def test_a_create_on_the_way_is_awaited_by_a_process_that_ends(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """REQ-33: an orderly end makes no suspect; nothing new is sent meanwhile."""
    job_server.behave("neither")
    job_server.fault("create", delay=0.5)
    config = {"resourceQuotas": {"default": 1}}
    with at(tmp_path, job_server, config) as host:
        first = host.admit(request(ReportJob(seconds=1, result="later"), task_type="neither"))
        await eventually(lambda: job_server.log("create"), within=20)
        second = host.admit(request(ReportJob(day=1, seconds=0), task_type="neither"))
    for ticket in (first, second):
        with pytest.raises(EngineClosed):
            await ticket.outcome()
    assert len(job_server.log("create")) == 1
    with at(tmp_path, job_server, config) as host:
        outcomes = await asyncio.gather(
            run(host, ReportJob(seconds=1, result="later"), "neither", execution="2"),
            run(host, ReportJob(day=1, seconds=0), "neither", execution="2"),
        )
    assert [outcome.info.phase for outcome in outcomes] == [Phase.SUCCESS] * 2
    assert outcomes[0].value.data == "later"
    assert job_server.stats().created == 2


async def test_a_synchronous_call_on_the_way_is_awaited_by_a_process_that_ends(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """Its result is there for the next run."""
    job_server.fault("create", delay=0.5)
    with at(tmp_path, job_server) as host:
        host.admit(request(ReportJob(result="kept"), task_type="do"))
        await eventually(lambda: job_server.log("create"), within=20)
    with at(tmp_path, job_server) as host:
        outcome = await run(host, ReportJob(result="kept"), "do", execution="2")
    assert outcome.value.data == "kept"
    assert len(job_server.log("create")) == 1


def test_many_loops_and_threads_use_one_engine(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-265: coroutines on loops of their own, and threads that block."""

    def on_a_loop(host: Host, n: int) -> list[Outcome]:
        async def some() -> list[Outcome]:
            specs = (ReportJob(day=10 * n + m, seconds=0.05, result=10 * n + m) for m in range(5))
            return await asyncio.gather(*(run(host, spec) for spec in specs))

        return asyncio.run(some())

    def blocking(host: Host, n: int) -> list[Outcome]:
        spec = ReportJob(day=10 * n, seconds=0.05, result=10 * n)
        return [host.admit(request(spec, task_type="keys")).outcome_blocking()]

    with at(tmp_path, job_server) as host, ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(on_a_loop, host, n) for n in range(4)]
        asked += [threads.submit(blocking, host, n) for n in range(4, 8)]
        outcomes = [outcome for future in asked for outcome in future.result(60)]
        assert len(engine_threads()) == 1
    expected = [10 * n + m for n in range(4) for m in range(5)] + [10 * n for n in range(4, 8)]
    assert [outcome.value.data for outcome in outcomes] == expected
    assert job_server.stats().created == 24


def test_a_loop_that_ends_early_leaves_its_job_alone(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """Who stops waiting changes nothing remotely; the next caller meets the same job."""
    spec = ReportJob(outcome="never", result="later")

    async def impatient(host: Host) -> None:
        ticket = host.admit(request(spec, task_type="keys"))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ticket.outcome(), 0.5)

    with at(tmp_path, job_server) as host:
        asyncio.run(impatient(host))
        eventually_blocking(lambda: job_server.stats().live, within=20)
        again = host.admit(request(spec, task_type="keys", execution="2"))
        [job] = job_server.jobs()
        job_server.end(job.name, "succeeded")
        assert again.outcome_blocking().value.data == "later"
    assert not job_server.log("delete")
    assert job_server.stats().created == 1


def test_a_closed_host_takes_nothing(job_server: EmbeddedJobServer, tmp_path: Path) -> None:
    """Closing one that never started is nothing either."""
    with at(tmp_path, job_server) as host:
        pass
    with pytest.raises(EngineClosed, match="nothing new is started"):
        host.admit(request(QUICK_JOB, task_type="keys"))
    host.cancel_flow_run("run-1", "nobody is there to hear it")
    host.close()
    assert not engine_threads()


def test_a_call_that_comes_just_before_the_end_is_told(
    job_server: EmbeddedJobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine was there as the call came, and closed before it was handed over."""
    start = Host.start

    def held_up(self: Host) -> None:
        start(self)
        self.close()

    with at(tmp_path, job_server, sweeps=False) as host:
        host.start()
        monkeypatch.setattr(Host, "start", held_up)
        ticket = host.admit(request(QUICK_JOB, task_type="keys"))
        monkeypatch.undo()
        with pytest.raises(EngineClosed):
            ticket.outcome_blocking()


class Lasting(SqlStore):
    """A ledger that takes its time to close."""

    async def aclose(self) -> None:
        await asyncio.sleep(1)
        await super().aclose()


async def nothing(_: Runtime) -> None: ...


def test_who_comes_to_an_engine_that_broke_down_is_told(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """Nobody closed it, so calls still come while it cleans up."""

    def break_down(_: Runtime) -> None:
        raise RuntimeError("an unforeseen error in the engine")

    with at(tmp_path, job_server, store=Lasting, sweeps=False) as host:
        host.start()
        host.post(break_down)
        time.sleep(0.3)
        ticket, done = host.admit(request(QUICK_JOB, task_type="keys")), host.perform(nothing)
        with pytest.raises(EngineClosed):
            done.result(5)
        with pytest.raises(EngineClosed):
            ticket.outcome_blocking()


class SlowToOpen(SqlStore):
    async def open(self) -> None:
        await asyncio.sleep(1)
        await super().open()


def test_a_start_that_takes_too_long_is_not_made_twice(
    job_server: EmbeddedJobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who comes next waits for the engine that is about to be there."""
    with at(tmp_path, job_server, store=SlowToOpen, sweeps=False) as host:
        monkeypatch.setattr(engine_host, "START_SECONDS", 0.2)
        with pytest.raises(WebApiError, match="did not start within"):
            host.admit(request(QUICK_JOB, task_type="keys"))
        monkeypatch.undo()
        ticket = host.admit(request(QUICK_JOB, task_type="keys"))
        assert len(engine_threads()) == 1
        assert ticket.outcome_blocking().info.phase is Phase.SUCCESS
    assert not engine_threads()


def test_a_ledger_that_can_not_be_had_is_named_and_nothing_is_started(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """The error names the place; when it is mended, the same host works."""
    folder = tmp_path / "ledger"
    folder.write_text("a file where a directory should be")
    with at(folder, job_server) as host:
        for _ in range(2):
            with pytest.raises(LedgerUnavailable, match=str(folder)):
                host.admit(request(QUICK_JOB, task_type="keys"))
            assert not engine_threads()
        assert not job_server.log()
        folder.unlink()
        outcome = host.admit(request(QUICK_JOB, task_type="keys")).outcome_blocking()
        assert outcome.info.phase is Phase.SUCCESS


def test_a_fork_while_a_call_is_answered_keeps_no_lock() -> None:
    """Who held it goes on in the parent only."""
    script = """
import os, signal
from prefect_webapi.engine import call
call._answering.acquire()
child = os.fork()
if child == 0:
    signal.alarm(10)
    call.Call(None, print).when_over(lambda: None)
    os._exit(0)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0


def test_a_forked_process_gets_an_engine_of_its_own(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """The parent's goes on; the child follows the parent's job instead of making it again."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.support.forking", str(tmp_path), job_server.url],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert sorted(ended.stdout.split()) == [
        "child:mine",
        "child:shared",
        "parent:mine",
        "parent:shared",
    ]
    assert job_server.stats().created == 3
    assert job_server.stats().duplicates == {}


async def test_letters_of_all_threads_are_read_and_those_that_come_together_wake_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each wake is a write to a socket; a flow may post thousands of letters in one go."""
    loop, done, calls = asyncio.get_running_loop(), list[int](), list[object]()
    real, interrupts = loop.call_soon_threadsafe, list[BaseException]()

    def call_soon_threadsafe(callback: Any, *args: Any) -> Any:
        calls.append(callback)
        if interrupts:
            raise interrupts.pop()
        return real(callback, *args)

    monkeypatch.setattr(loop, "call_soon_threadsafe", call_soon_threadsafe)
    services: Any = SimpleNamespace(clock=Clock(), metrics=Metrics())
    runtime = Runtime(services, this_process(datetime.now(UTC)))

    def hand_in(*letters: int) -> None:
        for letter in letters:
            runtime.hand_in(partial(done.append, letter))

    hand_in(0)  # before anybody reads
    reader = asyncio.ensure_future(runtime._read_mail())  # pyright: ignore[reportPrivateUsage]
    await eventually(lambda: done == [0], within=5)
    hand_in(*range(1, 100))
    assert len(calls) == 1
    await eventually(lambda: done == [*range(100)], within=5)
    # A signal that raises in a caller's thread at any place loses no later letter.
    interrupts.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        hand_in(100)
    hand_in(101)
    await eventually(lambda: done[100:] == [100, 101], within=5)
    runtime.post(partial(done.append, 102))
    await eventually(lambda: done[102:] == [102], within=5)
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    # Nobody reads any more, and what comes now is done by whoever looks last.
    hand_in(103)
    assert done[103:] == []
    runtime.refuse_mail()
    assert done[103:] == [103]
    hand_in(104)
    assert done[104:] == [104]
