"""A service in this process's memory: no socket, no waiting. What is left is the engine's own cost."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import gc
import time
from typing import Any, TypeAlias

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
from prefect_webapi.ledger.records import Record

__all__ = [
    "ENTRY",
    "WIDE",
    "Connection",
    "Handle",
    "Limiter",
    "LoopProbe",
    "Memory",
    "Number",
    "Silent",
    "tracked",
    "unlimited",
]


Limiter: TypeAlias = dict[str, int]
"""As a block has it: `qps` and `burst`."""
WIDE: Limiter = {"qps": 100_000, "burst": 10_000}


def unlimited(writes: Limiter = WIDE, **caching: Any) -> PluginConfig:
    """Limits that nothing here reaches, unless `writes` are to wait."""
    given = {"size": 500_000, **caching}
    return PluginConfig.load(
        {"readRateLimiter": WIDE, "writeRateLimiter": writes, "caching": given}
    )


class Connection(BaseModel):
    engine: PluginConfig = unlimited()
    settings: EngineSettings = EngineSettings()


class Number(JobSpec[int]):
    number: int


class Handle(BaseModel):
    name: str


class Memory(AsyncPlugin[Handle, bool]):
    """Answers from memory; all jobs end when `over` is set. `reads`: jobs read, one by one."""

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
        Memory.reads += 1
        return self.over

    async def delete(self, ctx: DeleteContext[Handle]) -> None:
        return

    def status(self, ctx: StatusContext[Handle, bool]) -> PhaseInfo:
        if ctx.resource:
            ctx.output_writer.put(1)
            return PhaseInfo.success()
        return PhaseInfo.running()


ENTRY = PluginEntry(
    id="memory",
    supported_task_types=["memory"],
    connection=Connection,
    spec=Number,
    plugin_loader=lambda setup: Memory(setup.connection),
)


class Silent:
    """A reporter that costs nothing; one for all jobs."""

    def phase(self, record: Record, info: PhaseInfo, *, waiting_for_quota: bool) -> None:
        return

    def cancelling(self, record: Record, reason: str) -> None:
        return


def tracked(host: Host) -> int:
    """How many jobs its pollers watch."""

    async def count(runtime: Runtime) -> int:
        return sum(len(channel.poller) for channel in runtime._channels)

    return host.perform(count).result(60)


class LoopProbe:
    """A timer on the engine's loop that should ring every 2 ms: how late it rings is how long others would have waited.

    Attributes:
        longest: seconds, without the garbage collector's pauses; longest_cpu: of CPU time that the loop's thread used
            in the longest one, so that less means that the machine gave it to others.
        collector: seconds of the longest pause for the garbage collector.
    """

    EVERY = 0.002

    def __init__(self, host: Host) -> None:
        self._host = host
        self.longest = self.longest_cpu = self.collector = self._paused = 0.0
        self._began: float | None = None

    def __enter__(self) -> LoopProbe:
        self._stop = False
        gc.callbacks.append(self._collecting)
        self._done = self._host.perform(self._ring)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop = True
        self._done.result(60)
        gc.callbacks.remove(self._collecting)

    async def _ring(self, runtime: Runtime) -> None:
        while not self._stop:
            began, cpu, paused = time.perf_counter(), time.thread_time(), self._collected()
            await asyncio.sleep(self.EVERY)
            late = time.perf_counter() - began - self.EVERY - (self._collected() - paused)
            if late > self.longest:
                self.longest, self.longest_cpu = late, time.thread_time() - cpu

    def _collected(self) -> float:
        """Seconds of all pauses. After one this thread may run before the collector's own has told that it is over."""
        began = self._began
        return self._paused + (0.0 if began is None else time.perf_counter() - began)

    def _collecting(self, phase: str, _info: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.perf_counter()
        elif self._began is not None:
            pause = time.perf_counter() - self._began
            self._paused += pause
            self._began = None
            self.collector = max(self.collector, pause)
