"""Run three jobs at once; needs a saved block `Acme` named `prod`."""

import asyncio

from prefect import flow

from prefect_webapi_acme import run_acme_job


@flow(log_prints=True)
async def three_jobs() -> None:
    job = run_acme_job.with_options(connection="prod", retries=2)
    jobs = (job(command=f"echo {nth}") for nth in range(3))  # CHANGE: the fields of AcmeJob
    for result in await asyncio.gather(*jobs):
        print(result)


if __name__ == "__main__":
    asyncio.run(three_jobs())
