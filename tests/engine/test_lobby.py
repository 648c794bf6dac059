"""Calls that come by the hundred wait outside, one line for each connection."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from prefect_webapi import Phase, PluginEntry
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import JobServer, JobServerPlugin, ReportJob
from tests.support.engine import GivenConnections, block, engine, request, run
from tests.support.plugins import ALL

CALLS = 500


class Slow(JobServerPlugin):
    async def resource_requirements(self, ctx: Any) -> Any:
        await asyncio.sleep(60)


SLOW = PluginEntry(
    id="slow",
    supported_task_types=["slow"],
    connection=JobServer,
    spec=ReportJob,
    plugin_loader=lambda setup: Slow(setup.connection),
)


@pytest.mark.parametrize("slow", ["connection", "requirements"])
async def test_a_connection_that_is_slow_to_come_holds_no_other_up(
    job_server: EmbeddedJobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    """Who keeps the block, or what a plugin asks of its service, takes its time."""
    resolve = GivenConnections.resolve

    async def slowly(self: GivenConnections, ref: Any, *args: Any, **kwargs: Any) -> Any:
        if ref == "sick" and slow == "connection":
            await asyncio.sleep(60)
        return await resolve(self, ref, *args, **kwargs)

    monkeypatch.setattr(GivenConnections, "resolve", slowly)
    sick = block(job_server, {"resourceQuotas": {"default": 1000}})
    blocks = {"default": block(job_server), "sick": sick}
    with engine(tmp_path, (*ALL, SLOW), blocks) as host:
        for day in range(CALLS):
            host.admit(request(ReportJob(day=day), task_type="slow", connection="sick"))
        outcome = await asyncio.wait_for(run(host, ReportJob(seconds=0.1)), 15)
    assert outcome.info.phase is Phase.SUCCESS
