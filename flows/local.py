"""Runs an example without an account: `python flows/NAME.py --local`.

The service is a server on this machine (`tests/servers/`), Prefect and the ledger live in a folder that is thrown
away. Without `--local` the example uses your Prefect, and its block named `default`.
"""

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import Flow
from prefect.blocks.core import Block
from prefect.testing.utilities import prefect_test_harness

REPOSITORY = Path(__file__).parents[1]
START_SECONDS = 120


def run(
    example: Flow[..., Any], server: str, connection: Callable[[str], Block], **arguments: Any
) -> None:
    """Run the flow `example`; with `--local` against `tests.servers.<server>`.

    Args:
        connection: makes the block from the server's address.
        arguments: of the flow.
    """
    if "--local" not in sys.argv[1:]:
        _call(example, arguments)
        return
    with tempfile.TemporaryDirectory() as folder, _served(server) as url:
        ledger = Path(folder) / "webapi.db"
        os.environ["PREFECT_INTEGRATIONS_WEBAPI_LEDGER_URL"] = f"sqlite+aiosqlite:///{ledger}"
        with prefect_test_harness(server_startup_timeout=START_SECONDS):
            connection(url).save("default")
            _call(example, arguments)


def _call(example: Flow[..., Any], arguments: dict[str, Any]) -> None:
    if example.isasync:
        asyncio.run(example(**arguments))
    else:
        example(**arguments)


@contextmanager
def _served(name: str) -> Generator[str]:
    """The server as a process; it ends with the pipe to its input."""
    command = [sys.executable, "-m", f"tests.servers.{name}"]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("READY "):
            raise SystemExit(f"{' '.join(command)} did not start")
        yield line.split()[1]
        assert process.stdin is not None
        process.stdin.close()
