"""Load a day of sales by three statements in one session, then ask for several figures at once, with bound values."""

import asyncio
from datetime import date

from prefect import flow

from prefect_webapi import webapi_task
from prefect_webapi_snowflake import SnowflakeJob, run_statement

FIGURE = "SELECT ? AS region, 100 * ? AS sales"


@webapi_task("snowflake")
async def load(
    day: date,
) -> SnowflakeJob:  # only describes the job; the task returns a SnowflakeResult
    return SnowflakeJob(
        statement=(
            "CREATE TABLE sales (day, amount);"
            f"INSERT INTO sales VALUES ('{day}', 20), ('{day}', 22);"
            "SELECT SUM(amount) AS amount FROM sales"
        ),
        statement_count=3,
    )


@flow(log_prints=True)
async def daily_figures(day: date = date(2026, 11, 23)) -> None:
    loaded = await load(day)
    print(f"{loaded.results[1].changed} rows loaded, {loaded.rows[0]} in all")
    figure = run_statement.with_options(retries=2)
    regions = enumerate(("north", "south", "west"), start=1)
    results = await asyncio.gather(
        *(figure(statement=FIGURE, bindings=[name, nth]) for nth, name in regions)
    )
    print(f"figures: {[row for result in results for row in result.rows]}")


if __name__ == "__main__":
    import local
    from pydantic import HttpUrl, SecretStr

    from prefect_webapi_snowflake import Snowflake

    def connection(url: str) -> Snowflake:
        token = SecretStr("local-programmatic-access-token")
        return Snowflake(account="localorg-local_account", token=token, endpoint=HttpUrl(url))

    local.run(daily_figures, "snowflake", connection)
