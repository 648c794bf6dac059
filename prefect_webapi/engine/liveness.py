"""Which processes are alive: the one rule by which a record's owner counts as dead."""

from __future__ import annotations

import os
import socket
import uuid
from datetime import datetime, timedelta

import psutil

from prefect_webapi.ledger.records import RuntimeRow

__all__ = ["BEAT_EVERY", "Pulse", "born_at", "is_alive", "is_gone", "this_process"]

BEAT_EVERY = timedelta(seconds=10)
SILENT_AFTER = timedelta(seconds=30)
_SAME_START_SECONDS = 2.0


def this_process(now: datetime) -> RuntimeRow:
    """A row for a runtime that starts now in this process."""
    pid = os.getpid()
    return RuntimeRow(
        id=uuid.uuid4().hex,
        host=socket.gethostname(),
        pid=pid,
        born=born_at(psutil.Process(pid)),
        started=now,
        last_beat=now,
    )


def born_at(process: psutil.Process) -> float:
    """Seconds from the machine's start to the process's. Unlike a time of day they stay when the clock is set."""
    return process.create_time() - psutil.boot_time()


class Pulse:
    """When this process last told the ledger that it lives; by the wall clock, as others see it."""

    __slots__ = ("last",)

    def __init__(self) -> None:
        self.last: datetime | None = None

    def is_fresh(self, now: datetime) -> bool:
        """Whether nobody can have taken this process for dead: it was neither asleep nor cut off for long.

        A clock that was set leaves the last beat stale too, whichever way it was set.
        """
        return self.last is not None and abs(now - self.last) < SILENT_AFTER - BEAT_EVERY


def is_alive(row: RuntimeRow | None, *, me: RuntimeRow, now: datetime) -> bool:
    """Dead: never registered, ended in order, silent for 30 s, or on this host and its process is gone.

    A pid is believed only together with the process's start time: containers begin their pids anew.
    """
    if row is None or not row.pid or now - row.last_beat > SILENT_AFTER:
        return False
    if row.host != me.host:
        return True
    try:
        process = psutil.Process(row.pid)
        is_same = abs(born_at(process) - row.born) < _SAME_START_SECONDS
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # somebody else's: its beats tell
        return True


def is_gone(row: RuntimeRow, *, me: RuntimeRow) -> bool:
    """Whether it has ended for good: no later look can say otherwise.

    One that is silent may come back, and a pid that is in use may be its own: when it was born can be misjudged while
    the clock is set.
    """
    return not row.pid or (row.host == me.host and not psutil.pid_exists(row.pid))
