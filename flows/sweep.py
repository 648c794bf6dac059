"""The sweeper as a flow, to be scheduled: it ends the remote jobs that dead processes and ended flows have left."""

import asyncio

from prefect import flow

from prefect_webapi.sweeper import sweep


@flow(name="webapi-sweep", log_prints=True)
async def webapi_sweep(dry_run: bool = False) -> None:
    report = await sweep(dry_run=dry_run)
    for job in report.jobs:
        print(f"job {job.job_key} ({job.task}): {job.action}, {job.reason}. {job.came_to}")
    for trouble in report.troubles:
        print(f"not done: {trouble}")
    print(f"{report.looked_at} jobs not over, {len(report.jobs)} for the sweeper")


if __name__ == "__main__":
    asyncio.run(webapi_sweep())
