"""Let a Flyte connector run three jobs at once, and ask it for a sum: a job has a life, a call answers at once.

`python flows/flyte_connector.py --local` uses flytekit's server on this machine; without `--local` it uses your block
`default`, whose connector must serve the task types `sleeper` and `adder`.
"""

import asyncio

from prefect import flow
from pydantic import BaseModel, SecretStr

from prefect_webapi import webapi_task
from prefect_webapi_flyte import ConnectorJob, FlyteConnector, run_connector_call


class Nap(BaseModel):
    result: str
    slept: float


@webapi_task("flyte-connector", task_run_name="nap of {who}", retries=1)
async def nap(who: str, seconds: float) -> ConnectorJob[Nap]:
    return ConnectorJob[Nap](
        task_type="sleeper",
        custom={"seconds": seconds, "result": f"{who} is rested"},
        outputs={"result": "string", "slept": "float"},
    )


@flow(log_prints=True)
async def night() -> None:
    naps = await asyncio.gather(nap("Ada", 0.5), nap("Grace", 1.0), nap("Alan", 1.5))
    for each in naps:
        print(f"{each.result} after {each.slept} s")
    custom = {"a": naps[0].slept + naps[1].slept, "b": naps[2].slept}
    print(await run_connector_call(task_type="adder", custom=custom))


if __name__ == "__main__":
    import local
    from cryptography.fernet import Fernet

    local.run(
        night,
        "flyte_connector",
        lambda address: FlyteConnector(
            address=address, tls=False, handle_key=SecretStr(Fernet.generate_key().decode())
        ),
    )
