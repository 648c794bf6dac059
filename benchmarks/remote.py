"""Our side of the benchmarks that go through Prefect: a saved connection, and flows of remote jobs.

Used in child processes only, whose environment names a Prefect server.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from benchmarks.measure import Figures

__all__ = ["BLOCK", "connection", "remote_flow"]

BLOCK = "bench"


def connection(url: str) -> Figures:
    """Save the connection to the service."""
    from pydantic import HttpUrl, SecretStr

    from benchmarks.inmemory import unlimited
    from prefect_webapi_jobserver import JobServer

    block = JobServer(base_url=HttpUrl(url), token=SecretStr(BLOCK), engine=unlimited())
    block.save(BLOCK, overwrite=True)
    return {}


async def remote_flow(seconds: Sequence[float]) -> dict[str, float]:
    """A job for each length, awaited together: when each call returned, in seconds since 1970, by the job's name."""
    from prefect import flow

    from prefect_webapi_jobserver import run_job

    job = run_job.with_options(connection=BLOCK)

    async def one(day: int, length: float) -> tuple[str, float]:
        report = await job(day=day, seconds=length)
        return report.uri.rpartition("/")[2].removesuffix("#report"), time.time()

    @flow
    async def remote() -> dict[str, float]:
        return dict(await asyncio.gather(*map(one, range(len(seconds)), seconds)))

    return await remote()
