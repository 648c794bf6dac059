"""Run a saved Databricks job for a few days at once, then a one-time notebook with what the runs returned.

`python flows/databricks.py --local` uses a server on this machine; without `--local` it uses your block `default`.
"""

import asyncio
import json

from prefect import flow
from pydantic import HttpUrl, SecretStr

from prefect_webapi import webapi_task
from prefect_webapi_databricks import Databricks, SubmitRun, run_job

JOB_ID = 9_007_199_254_740_993  # of the local server's job `nightly`: put in your own
DAYS = ("2031-04-01", "2031-04-02", "2031-04-03")


@webapi_task("databricks")
async def publish(rows: int) -> SubmitRun:  # only describes the run
    notebook = {"notebook_path": "/Shared/publish", "base_parameters": {"rows": str(rows)}}
    return SubmitRun(run_name="publish", tasks=[{"task_key": "main", "notebook_task": notebook}])


@flow(log_prints=True)
async def lakehouse(job_id: int = JOB_ID, days: tuple[str, ...] = DAYS) -> None:
    job = run_job.with_options(retries=2)
    runs = await asyncio.gather(*(job(job_id=job_id, job_parameters={"day": day}) for day in days))
    rows = sum(json.loads(run.outputs["report"].result)["rows"] for run in runs)
    published = await publish(rows)
    print(f"{rows} rows of {len(runs)} days published, see {published.url}")


if __name__ == "__main__":
    import local

    local.run(
        lakehouse,
        "databricks",
        lambda url: Databricks(host=HttpUrl(url), token=SecretStr("dapi-local")),
    )
