"""Which processes count as alive."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from prefect_webapi.clock import Clock
from prefect_webapi.engine.handover import Others
from prefect_webapi.engine.liveness import Pulse, born_at, is_alive, is_gone, this_process
from prefect_webapi.ledger.records import RuntimeRow
from prefect_webapi.ledger.sql import SqlStore
from tests.support.ledger import draft_for
from tests.support.waiting import eventually_blocking

NOW = datetime.now(UTC)
ME = this_process(NOW)


def row_of(pid: int) -> RuntimeRow:
    return replace(ME, id="other", pid=pid, born=born_at(psutil.Process(pid)))


def test_a_process_that_beats_and_runs_is_alive() -> None:
    assert is_alive(ME, me=ME, now=NOW)
    assert is_alive(replace(ME, host="elsewhere", pid=1, born=0.0), me=ME, now=NOW)


def test_a_process_that_never_came_or_fell_silent_is_dead() -> None:
    """30 s of silence."""
    assert not is_alive(None, me=ME, now=NOW)
    assert is_alive(ME, me=ME, now=NOW + timedelta(seconds=29))
    assert not is_alive(ME, me=ME, now=NOW + timedelta(seconds=31))


def test_a_pid_is_believed_only_with_its_time_of_birth() -> None:
    """Containers begin their pids anew."""
    assert not is_alive(replace(ME, born=ME.born - 60), me=ME, now=NOW)


@pytest.mark.parametrize("hours", [1, -1])
def test_a_clock_that_is_set_makes_no_process_another_one(
    monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    """CASE-206: to the system, machine and processes have started at another time of day since."""
    row = row_of(os.getppid())
    before, created = psutil.boot_time(), psutil.Process(row.pid).create_time()
    shifted = before + 3600 * hours
    monkeypatch.setattr("psutil._psplatform.boot_time", lambda: shifted)
    assert psutil.Process(row.pid).create_time() - created == pytest.approx(3600 * hours)
    assert is_alive(row, me=ME, now=NOW)


def test_after_a_clock_was_set_the_last_beat_counts_as_stale_whichever_way() -> None:
    """CASE-206: so the next one comes at once, and others don't wait for an hour for a process that dies then."""
    pulse = Pulse()
    assert not pulse.is_fresh(NOW)
    pulse.last = NOW
    assert pulse.is_fresh(NOW + timedelta(seconds=19))
    for hours in (1, -1):
        assert not pulse.is_fresh(NOW + timedelta(hours=hours))


def test_a_killed_process_is_dead_before_anybody_has_buried_it() -> None:
    """A parent that does not wait leaves a zombie, which still has its pid; then it is gone for good."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    row = row_of(process.pid)
    assert is_alive(row, me=ME, now=NOW)
    process.kill()
    eventually_blocking(lambda: not is_alive(row, me=ME, now=NOW), within=5)
    assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
    process.wait()
    assert not is_alive(row, me=ME, now=NOW)


def test_only_what_no_later_look_can_change_counts_as_gone_for_good() -> None:
    """One that is silent may come back; when a process was born is misjudged while the clock is set."""
    assert is_gone(replace(ME, pid=0), me=ME)
    assert is_gone(replace(ME, pid=2**22 + 1), me=ME)
    assert not is_gone(ME, me=ME)
    assert not is_gone(replace(ME, born=ME.born - 60), me=ME)
    assert not is_gone(replace(ME, host="elsewhere", pid=2**22 + 1), me=ME)


def test_of_a_process_that_may_not_be_looked_at_the_beats_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def deny(pid: int) -> None:
        raise psutil.AccessDenied(pid)

    monkeypatch.setattr(psutil, "Process", deny)
    assert is_alive(ME, me=ME, now=NOW)
    assert not is_alive(ME, me=ME, now=NOW + timedelta(seconds=31))


async def test_what_was_seen_of_processes_long_gone_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, store: SqlStore
) -> None:
    """A process that lives long meets the jobs of ever more others."""
    monkeypatch.setattr("prefect_webapi.engine.handover.SEEN_SECONDS", 0.0)
    others = Others(cast(Any, SimpleNamespace(store=store, clock=Clock())), ME)
    record = (await store.intent(draft_for())).record
    for n in range(20):
        assert not await others.drive(replace(record, runtime=f"gone-{n}"))
    assert len(others._seen) == 1  # pyright: ignore[reportPrivateUsage]
