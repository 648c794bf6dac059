"""Start `tests.ledger.worker` as a process and read what it tells."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["finished", "start_worker"]

ROOT = Path(__file__).parents[2]


def start_worker(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.ledger.worker", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


async def finished(worker: subprocess.Popen[str]) -> list[Any]:
    """What a worker told, once it has ended well."""
    output, _ = await asyncio.to_thread(worker.communicate)
    assert worker.returncode == 0
    return [json.loads(line) for line in output.splitlines()]
