"""The soak's flow and the process that runs it, begun anew or again: `python soak_flow.py RUN_ID RESULTS`."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow_async
from prefect.task_runners import ThreadPoolTaskRunner

from prefect_webapi import register, task_for
from prefect_webapi_jobserver import ReportJob
from tests.support.plugins import KEYS, SEARCH

MOODS = {"keys": KEYS, "search": SEARCH}
CONNECTION = "soak"
SUBMITTED, IN_SUBFLOW = 0.05, 0.1
SIDE_BY_SIDE = 25
"""Task runs at once in each flow. Prefect takes some 100 ms for each, and each start begins all anew."""

for entry in MOODS.values():
    register(entry)

# A retry is for what is nobody's fault: contact lost, an answer that never came.
TASKS: dict[str, Any] = {
    mood: task_for(mood, ReportJob, name=f"{mood} job", retries=10, connection=CONNECTION)
    for mood in MOODS
}


def specs(jobs: int, seconds: float, seed: int) -> list[dict[str, Any]]:
    """What the jobs shall do; every start of the run asks for the same."""
    dice = random.Random(seed)
    return [
        {
            "day": n,
            "seconds": round(dice.uniform(seconds / 20, seconds), 2),
            "result": f"report {n}",
        }
        for n in range(jobs)
    ]


async def in_any_order(mood: str, wanted: list[dict[str, Any]]) -> list[str]:
    """Their results, in the order of `wanted`; each start takes another, so that new jobs stand beside old ones."""
    some = asyncio.Semaphore(SIDE_BY_SIDE)
    data: dict[int, str] = {}

    async def one(nth: int) -> None:
        async with some:
            report: Any = await TASKS[mood](**wanted[nth])
        data[nth] = report.data

    order = random.sample(range(len(wanted)), len(wanted))
    await asyncio.gather(*(one(nth) for nth in order))
    return [data[nth] for nth in range(len(wanted))]


@flow(name="soak-part")
async def part(mood: str, wanted: list[dict[str, Any]]) -> list[str]:
    return await in_any_order(mood, wanted)


POOL = cast(Any, ThreadPoolTaskRunner(max_workers=10))


@flow(name="soak", task_runner=POOL)
async def soak(mood: str, jobs: int, seconds: float, seed: int) -> list[str]:
    """Awaited side by side, some submitted, some in a subflow; the results in the order of the specs."""
    wanted = specs(jobs, seconds, seed)
    submitted, below = int(jobs * SUBMITTED), int(jobs * IN_SUBFLOW)
    task = TASKS[mood]
    futures: list[Any] = [task.submit(**w) for w in wanted[:submitted]]
    inner, outer = await asyncio.gather(
        part(mood, wanted[submitted : submitted + below]),
        in_any_order(mood, wanted[submitted + below :]),
    )
    ends: list[Any] = await asyncio.to_thread(lambda: [future.result() for future in futures])
    return [*(report.data for report in ends), *inner, *outer]


async def main(run: UUID, results: Path) -> int:
    async with get_client() as client:
        flow_run = await client.read_flow_run(run)
    state: Any = await run_flow_async(
        soak, flow_run=flow_run, parameters=flow_run.parameters, return_type="state"
    )
    if not state.is_completed():
        print(state, file=sys.stderr)
        return 1
    results.write_text(json.dumps(await state.result()))
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main(UUID(sys.argv[1]), Path(sys.argv[2]))))
