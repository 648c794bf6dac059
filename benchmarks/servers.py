"""The third parties of the benchmarks, each a process of its own: Prefect's server, the test suite's Databricks."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from tests.support.prefect import PrefectServer, free_port

__all__ = ["databricks_server", "prefect_server"]


@contextmanager
def prefect_server() -> Generator[Path]:
    """A server that the processes started inside the block use; its folder, which is their home as well."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        server = PrefectServer(home=Path(folder), port=free_port())
        server.start()
        os.environ |= server.environment(PREFECT_LOGGING_LEVEL="ERROR")
        try:
            yield Path(folder)
        finally:
            server.stop()


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
