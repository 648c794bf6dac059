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

__all__ = ["databricks_server", "prefect_server", "settle"]

IDLE_SHARE, SETTLE_SECONDS = 0.1, 300.0


@contextmanager
def prefect_server() -> Generator[PrefectServer]:
    """A server that the processes started inside the block use."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        server = PrefectServer(home=Path(folder), port=free_port())
        server.start()
        os.environ |= server.environment(PREFECT_LOGGING_LEVEL="ERROR")
        try:
            yield server
        finally:
            server.stop()


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
