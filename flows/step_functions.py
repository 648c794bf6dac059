"""A load for each of three days and then a report over them, each an execution of a state machine on AWS.

With `--local` the state machine runs in moto's server on this machine.
"""

import asyncio
from typing import Any

from prefect import flow

from prefect_webapi import webapi_task
from prefect_webapi_aws import StateMachineRun, run_state_machine

MACHINE = "arn:aws:states:us-east-1:123456789012:stateMachine:report"


@webapi_task("step-functions")
async def report(totals: list[float]) -> StateMachineRun:  # only describes the execution
    return StateMachineRun(state_machine_arn=MACHINE, input={"result": {"sum": sum(totals)}})


@flow(log_prints=True)
async def loads(days: int = 3) -> Any:
    load = run_state_machine.with_options(retries=2)
    loaded = await asyncio.gather(
        *(
            load(state_machine_arn=MACHINE, input={"day": day, "result": {"total": day * 1.5}})
            for day in range(1, days + 1)
        )
    )
    told = await report([each["total"] for each in loaded])
    print(f"{len(loaded)} days are loaded, together {told['sum']}")
    return told


if __name__ == "__main__":
    import local
    from pydantic import HttpUrl, SecretStr

    from prefect_webapi_aws import StepFunctions

    local.run(
        loads,
        "step_functions",
        lambda url: StepFunctions(
            region="us-east-1",
            access_key_id="local",
            secret_access_key=SecretStr("local-secret"),
            endpoint_url=HttpUrl(url),
        ),
    )
