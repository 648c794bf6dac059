"""What each region sold on a day, by Amazon Athena: values travel as parameters, and large results stay in S3.

With `--local` an imitation of Athena on this machine answers each query with the same small table.
"""

import asyncio

from prefect import flow

from prefect_webapi import webapi_task
from prefect_webapi_aws import AthenaQuery, run_query

SALES = "SELECT day, sum(amount) AS amount FROM sales WHERE region = ? AND day >= ? GROUP BY day"


@webapi_task("athena")
async def export(region: str) -> AthenaQuery:  # only describes the query
    query = "SELECT * FROM sales WHERE region = ?"
    return AthenaQuery(query=query, parameters=(region,), database="shop", result="location")


@flow(log_prints=True)
async def sales(regions: tuple[str, ...] = ("north", "côte d'or"), since: int = 1) -> None:
    ask = run_query.with_options(retries=1)
    results = await asyncio.gather(
        *(ask(query=SALES, parameters=(region, since), database="shop") for region in regions)
    )
    for region, result in zip(regions, results, strict=True):
        total = sum(row["amount"] or 0 for row in result.records())
        print(f"{region}: {total} on {len(result.rows)} days")
    whole = await export(regions[0])
    print(f"all of {regions[0]} is at {whole.location}")


if __name__ == "__main__":
    import local
    from pydantic import HttpUrl, SecretStr

    from prefect_webapi_aws import Athena

    local.run(
        sales,
        "athena",
        lambda url: Athena(
            region="us-east-1",
            access_key_id="local",
            secret_access_key=SecretStr("local-secret"),
            endpoint_url=HttpUrl(url),
            output_location="s3://shop-results/",
        ),
    )
