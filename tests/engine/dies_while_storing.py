"""A process that is killed when half of its result is stored: `python -m tests.engine.dies_while_storing FOLDER URL`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from prefect_webapi.contract.keys import JobKey
from tests.support.engine import FolderOutputs, at, run
from tests.engine.test_outputs import BIG


class DyingOutputs(FolderOutputs):
    async def write(self, key: JobKey, data: bytes) -> str:
        await super().write(key, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")


async def main(folder: Path, url: str) -> None:
    with at(folder, url, outputs=DyingOutputs(folder / "outputs")) as host:
        await run(host, BIG, task_run="first")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
