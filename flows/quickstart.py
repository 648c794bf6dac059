"""Twenty remote jobs, at most five at a time: most succeed, one fails for good, one needs a second attempt, one is
cancelled.

`prefect-webapi quickstart` starts a job server and a Prefect server, saves the connection as a block named
"quickstart" (its quota of five is in there), and runs this flow. Kill it and run the same flow run again: each call
meets the job that it had made.
"""

import asyncio

from prefect import flow

from prefect_webapi_jobserver import Report, run_job


@flow(log_prints=True)
async def quickstart(connection: str = "quickstart") -> None:
    job = run_job.with_options(
        connection=connection, retries=1, task_run_name="{kind} {day}", tags=["quickstart"]
    )

    # A job that nobody waits for any more is cancelled, at the job server too: see the last lines.
    endless = asyncio.create_task(job(kind="endless", day=20, outcome="never"))

    outcomes = await asyncio.gather(
        *(
            job(kind="report", day=day, seconds=1 + day % 5, result={"sold": 100 * day})
            for day in range(1, 18)
        ),
        # Fails once: `retries` makes a second attempt, a job of its own.
        job(kind="fragile", day=18, outcome="fail-first", result={"sold": 1800}),
        # Fails in every attempt.
        job(kind="hopeless", day=19, outcome="fail", message="there are no figures for this day"),
        return_exceptions=True,
    )
    for outcome in outcomes:
        print(outcome.data if isinstance(outcome, Report) else f"no report: {outcome}")

    endless.cancel()
    await asyncio.wait([endless])
