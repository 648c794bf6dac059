"""The third parties of the benchmarks, each a process of its own: Prefect's server, the test suite's Databricks."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.support.prefect import PrefectServer, free_port

__all__ = ["databricks_server", "prefect_server", "settle", "shared_server"]

IDLE_SHARE, SETTLE_SECONDS = 0.1, 300.0
SHARED = "BENCHMARKS_PREFECT_SERVER"


@contextmanager
def prefect_server() -> Generator[PrefectServer]:
    """A server that the processes started inside the block use, with a home of their own; the shared one, if any."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        shared = os.environ.get(SHARED)
        port, group = map(int, shared.split(":")) if shared else (free_port(), None)
        server = PrefectServer(home=Path(folder), port=port, group=group)
        if shared:
            settle(server)
        else:
            server.start()
        os.environ |= server.environment(PREFECT_LOGGING_LEVEL="ERROR")
        try:
            yield server
        finally:
            if not shared:
                server.stop()


@contextmanager
def shared_server() -> Generator[None]:
    """One server for all benchmarks that are started inside the block: each start takes half a minute."""
    with prefect_server() as server:
        os.environ[SHARED] = f"{server.port}:{server.group}"
        try:
            yield
        finally:
            del os.environ[SHARED]


def settle(server: PrefectServer) -> None:
    """Wait until it has stored the events it was sent: else it takes CPU from what is measured next."""
    end = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < end:
        before = _cpu_seconds(server)
        time.sleep(1)
        if _cpu_seconds(server) - before < IDLE_SHARE:
            return


def _cpu_seconds(server: PrefectServer) -> float:
    used = 0.0
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == server.group:
                used += sum(process.cpu_times()[:2])
    return used


@contextmanager
def databricks_server() -> Generator[str]:
    """Its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.servers.databricks"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split()[1]
    finally:
        process.terminate()
        process.communicate()
