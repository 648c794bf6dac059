"""Reports for a few days, then an index of them: a plugin's ready task, and a task that describes its own job.

Start it twice: the second start meets the jobs of the first, as both run under the same key.
"""

import asyncio
from datetime import UTC, datetime

from prefect import flow

from prefect_webapi import run_key, webapi_task
from prefect_webapi_jobserver import ReportJob, run_job


@webapi_task("job-server", connection="quickstart")
async def build_index(days: int) -> ReportJob:  # only describes the job; the task returns a Report
    return ReportJob(kind="index", day=days, result={"days": days})


@flow(log_prints=True)
async def nightly(days: int = 3) -> None:
    job = run_job.with_options(connection="quickstart", retries=2)
    reports = await asyncio.gather(*(job(kind="report", day=day) for day in range(1, days + 1)))
    index = await build_index(days)
    print(f"{len(reports)} reports ready, see {index.uri}")


if __name__ == "__main__":
    with run_key(f"nightly {datetime.now(UTC):%Y-%m-%d}"):
        asyncio.run(nightly())
