"""Code of an author's that holds up the engine's loop is named, in the log and in a metric."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from prefect_webapi import CreateResult, Phase, PhaseInfo, TaskExecutionContextReader
from prefect_webapi.engine.watchdog import watching
from prefect_webapi.metrics import Metrics
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import ReportJob
from prefect_webapi_jobserver.models import JobHandle, JobView
from tests.support.engine import at, run
from tests.support.plugins import SINGLE, SinglePlugin, entry

LOGGER = "prefect_webapi.engine.watchdog"


class BlocksInCreate(SinglePlugin):
    """A blocking call in a coroutine: what the watchdog is for."""

    async def create(
        self, ctx: TaskExecutionContextReader
    ) -> JobHandle | CreateResult[JobHandle, JobView]:
        self._wait()
        return await super().create(ctx)

    def _wait(self) -> None:
        time.sleep(1.6)


class BlocksInStatus(SinglePlugin):
    def status(self, ctx: Any) -> PhaseInfo:
        time.sleep(1.6)
        return super().status(ctx)


async def test_a_plugin_that_blocks_the_loop_is_named_once(
    job_server: EmbeddedJobServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """REQ-77: each block is counted, under the method that the engine called; the log says it once a minute."""
    entries = [SINGLE, entry(BlocksInCreate, "in-create"), entry(BlocksInStatus, "in-status")]
    metrics = Metrics(CollectorRegistry())
    with (
        caplog.at_level(logging.WARNING, LOGGER),
        at(tmp_path, job_server, entries=entries, metrics=metrics) as host,
    ):
        for plugin in ("single", "in-create", "in-status"):
            outcome = await run(host, ReportJob(seconds=0), plugin, task_run=plugin)
            assert outcome.info.phase is Phase.SUCCESS
    assert metrics.value("blocked_total", plugin="in-create", op="create") == 1
    assert metrics.value("blocked_total", plugin="in-status", op="status") >= 1
    assert metrics.value("blocked_total", plugin="single") == 0
    lines = [r.getMessage() for r in caplog.records if r.name == LOGGER]
    [line] = [line for line in lines if "plugin" in line]
    assert "create of plugin 'in-create' blocks it in line" in line
    assert "test_watchdog.py" in line


async def test_a_loop_that_turns_is_left_alone_and_others_are_told_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """REQ-77: what blocks needn't be a plugin."""
    metrics = Metrics(CollectorRegistry())
    with caplog.at_level(logging.WARNING, LOGGER):
        with watching(metrics, limit=0.4):
            await asyncio.sleep(1)
        assert metrics.value("blocked_total") == 0
        with watching(metrics, limit=0.2):
            for _ in range(2):
                time.sleep(0.6)  # noqa: ASYNC251 - that is the point
                await asyncio.sleep(0.3)
    assert metrics.value("blocked_total", plugin="", op="") == 2
    [line] = [r.getMessage() for r in caplog.records if r.name == LOGGER]
    assert "something blocks it in line" in line


async def test_a_long_turn_of_many_short_steps_is_blamed_on_none_of_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As in a process full of task runs, where each system call waits for Python's lock."""

    async def short() -> None:
        time.sleep(0.01)  # noqa: ASYNC251 - that is the point

    metrics = Metrics(CollectorRegistry())
    with caplog.at_level(logging.WARNING, LOGGER), watching(metrics, limit=0.4):
        await asyncio.sleep(0.2)
        await asyncio.gather(*(short() for _ in range(100)))
        await asyncio.sleep(0.2)
    assert metrics.value("blocked_total", plugin="", op="") == 1
    [line] = [r.getMessage() for r in caplog.records if r.name == LOGGER]
    assert "each of its steps is short" in line


async def test_the_time_of_the_collector_is_nobodys_fault() -> None:
    metrics = Metrics(CollectorRegistry())
    with watching(metrics, limit=0.2):
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            gc.collect()
        await asyncio.sleep(0.3)
    assert metrics.value("blocked_total", plugin="", op="") == 0
