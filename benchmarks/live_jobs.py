"""How much a live job costs one process: bytes, and the longest time that the engine's loop was blocked.

Jobs of an instant service in this process, through the whole engine without Prefect: a real ledger file, wide limits.
CASE-270: the engine's share of judging 100,000 snapshots is printed too.

Run: `uv run python -m benchmarks.live_jobs [--jobs 10000] [--seconds 20] [--json]`
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import platform
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel

from prefect_webapi import (
    AsyncPlugin,
    DeleteContext,
    EngineSettings,
    GetContext,
    JobSpec,
    PhaseInfo,
    PluginConfig,
    PluginEntry,
    StatusContext,
    TaskExecutionContextReader,
)
from prefect_webapi.engine.host import Host
from prefect_webapi.engine.runtime import Runtime
from tests.support.engine import engine, request

WIDE = {"qps": 100_000, "burst": 10_000}


class Connection(BaseModel):
    engine: PluginConfig = PluginConfig.load(
        {"readRateLimiter": WIDE, "writeRateLimiter": WIDE, "caching": {"size": 500_000}}
    )
    settings: EngineSettings = EngineSettings()


class Spec(JobSpec[int]):
    number: int


class Handle(BaseModel):
    name: str


class Instant(AsyncPlugin[Handle, bool]):
    """Answers from memory; jobs end when told."""

    guarantee = "key"
    over = False
    reads = 0

    def __init__(self, connection: Connection) -> None:
        self._config = connection.engine

    def get_config(self) -> PluginConfig:
        return self._config

    async def create(self, ctx: TaskExecutionContextReader) -> Handle:
        return Handle(name=ctx.task_execution_metadata.generated_name)

    async def get(self, ctx: GetContext[Handle]) -> bool:
        type(self).reads += 1
        return self.over

    async def delete(self, ctx: DeleteContext[Handle]) -> None:
        return

    def status(self, ctx: StatusContext[Handle, bool]) -> PhaseInfo:
        if ctx.resource:
            ctx.output_writer.put(1)
            return PhaseInfo.success()
        return PhaseInfo.running()


ENTRY = PluginEntry(
    id="instant",
    supported_task_types=["instant"],
    connection=Connection,
    spec=Spec,
    plugin_loader=lambda setup: Instant(setup.connection),
)


class LoopProbe:
    """Asks the engine's loop for a sign of life every 5 ms; the longest wait is its longest block."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.longest = 0.0

    def __enter__(self) -> LoopProbe:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.005):
            seen = threading.Event()

            def mark(_: Runtime, seen: threading.Event = seen) -> None:
                seen.set()

            asked = time.perf_counter()
            self._host.post(mark)
            seen.wait(10)
            self.longest = max(self.longest, time.perf_counter() - asked)


async def measure(jobs: int, seconds: float) -> dict[str, Any]:
    process = psutil.Process()
    with (
        tempfile.TemporaryDirectory() as folder,
        engine(Path(folder), [ENTRY], {"default": Connection()}) as host,
    ):
        specs = [Spec(number=n) for n in range(jobs)]
        gc.collect()
        before = process.memory_info().rss
        began = time.perf_counter()
        tickets = [
            host.admit(request(spec, task_type="instant", task_run=str(n)))
            for n, spec in enumerate(specs)
        ]
        while Instant.reads < jobs:  # noqa: ASYNC110 - the plugin is called in another thread
            await asyncio.sleep(0.05)
        made = time.perf_counter() - began
        gc.collect()
        per_job = (process.memory_info().rss - before) / jobs
        cpu, reads = sum(process.cpu_times()[:2]), Instant.reads
        with LoopProbe(host) as probe:
            await asyncio.sleep(seconds)
        cpu, reads = sum(process.cpu_times()[:2]) - cpu, Instant.reads - reads
        Instant.over = True
        ending = time.perf_counter()
        outcomes = await asyncio.gather(*(ticket.outcome() for ticket in tickets))
        ended = time.perf_counter() - ending
        assert all(outcome.value == 1 for outcome in outcomes)
    return {
        "jobs": jobs,
        "seconds until all were live": round(made, 1),
        "bytes per live job": round(per_job),
        "longest block of the loop, ms": round(1000 * probe.longest, 1),
        "reads per second while watched": round(reads / seconds),
        "CPU per read, us": round(1e6 * cpu / max(1, reads)),
        "seconds from the end to all results": round(ended, 1),
        "machine": f"{platform.machine()}, {psutil.cpu_count()} cores, Python {platform.python_version()}",
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--jobs", type=int, default=10_000)
    arguments.add_argument("--seconds", type=float, default=20.0)
    arguments.add_argument("--json", action="store_true")
    chosen = arguments.parse_args()
    figures = asyncio.run(measure(chosen.jobs, chosen.seconds))
    if chosen.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:40} {value}")


if __name__ == "__main__":
    main()
