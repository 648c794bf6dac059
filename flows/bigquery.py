"""Ask what a query would read, run it for a few days at once, and keep the result of the last one in a table."""

import asyncio
from datetime import date, timedelta

from prefect import flow

from prefect_webapi import webapi_task
from prefect_webapi_gcp import BigQueryJob, run_query

SALES = "SELECT @day AS day, 10 * @nth AS sales"


@webapi_task("bigquery", retries=2)
async def keep(
    day: date,
) -> BigQueryJob:  # only describes the job; the task returns a BigQueryResult
    return BigQueryJob(
        query=SALES,
        parameters={"day": day, "nth": 0},
        destination="reports.latest",
        write_disposition="WRITE_TRUNCATE",
        rows=False,
    )


@flow(log_prints=True)
async def weekly_sales(last: date = date(2026, 11, 23), days: int = 3) -> None:
    wanted = [{"day": last - timedelta(days=nth), "nth": nth} for nth in range(days)]
    cost = await run_query(query=SALES, parameters=wanted[0], dry_run=True)
    print(f"each day reads {cost.bytes_processed} bytes")
    results = await asyncio.gather(*(run_query(query=SALES, parameters=each) for each in wanted))
    print(f"sales: {[row for result in results for row in result.rows or ()]}")
    kept = await keep(last)
    print(f"the last day is in {kept.table}")


if __name__ == "__main__":
    from urllib.request import urlopen

    import local
    from pydantic import HttpUrl, SecretStr

    from prefect_webapi_gcp import BigQuery

    def connection(url: str) -> BigQuery:
        with urlopen(f"{url}/key.json") as key:
            info = SecretStr(key.read().decode())
        return BigQuery(
            project="local-project",
            location="EU",
            service_account_info=info,
            endpoint=HttpUrl(url),
        )

    local.run(weekly_sales, "bigquery", connection)
