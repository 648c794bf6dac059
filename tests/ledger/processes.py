"""Start `tests.ledger.worker` as processes and read what they tell."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["begin", "start_worker", "told_by"]

ROOT = Path(__file__).parents[2]


def start_worker(*arguments: str) -> subprocess.Popen[str]:
    """A process that opens the ledger and then waits for `begin`."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.ledger.worker", *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def begin(*workers: subprocess.Popen[str]) -> None:
    """Let all work, once each is ready: so that they really work at once."""
    for worker in workers:
        assert worker.stdout is not None
        assert json.loads(worker.stdout.readline()) == "ready"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()


async def told_by(*workers: subprocess.Popen[str]) -> list[Any]:
    """Let them work together, and return what they told once all have ended well."""
    await asyncio.to_thread(begin, *workers)
    outputs = await asyncio.gather(*(asyncio.to_thread(w.communicate) for w in workers))
    assert [w.returncode for w in workers] == [0] * len(workers)
    return [json.loads(line) for output, _ in outputs for line in output.splitlines()]
