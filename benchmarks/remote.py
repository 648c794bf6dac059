"""Our side of the benchmarks: a saved connection, flows of remote jobs, and what a create of theirs sends.

Used in child processes only, whose environment names a Prefect server.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.measure import Figures

__all__ = ["BLOCK", "connection", "create_of", "remote_flow"]

BLOCK = "bench"


def connection(url: str) -> Figures:
    """Save the connection to the service."""
    from pydantic import HttpUrl, SecretStr

    from benchmarks.inmemory import unlimited
    from prefect_webapi_jobserver import JobServer

    block = JobServer(base_url=HttpUrl(url), token=SecretStr(BLOCK), engine=unlimited())
    block.save(BLOCK, overwrite=True)
    return {}


def create_of(number: int, seconds: float) -> tuple[str, dict[str, Any]]:
    """Path and body of a create as our plugin sends it: who is compared with us sends and gets no less."""
    from uuid import uuid4

    from prefect_webapi.contract.keys import base_of, fingerprint_of, job_key
    from prefect_webapi_jobserver import ReportJob

    spec = ReportJob(day=number, seconds=seconds)
    fingerprint = fingerprint_of("report", BLOCK, spec)
    key = job_key(base_of("bare", "bench.bare", fingerprint), 0, 1)
    labels = {"job_key": key, "flow_run_id": str(uuid4()), "task_run_id": str(uuid4())}
    spec_as_sent = spec.model_dump(mode="json")
    return f"/jobs/{key}", {"spec": spec_as_sent, "fingerprint": fingerprint, "labels": labels}


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
