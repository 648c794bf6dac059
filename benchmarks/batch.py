"""Requests per cycle, and how late ends are seen, with 1,000 and 10,000 jobs read fifty at a time, against one by one.

A cycle is a read of every job. The service is a process of its own, behind a socket; limits are off; each job is due
once per `GAP`. The jobs end in the course of one further gap, and their results' lag is taken against the service's own
times. That lag is half a gap at best: the job is due once in it.

Run: `uv run python -m benchmarks.batch [--quick] [--json] [--sizes 1000] [--repetitions N]`
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import HttpUrl, SecretStr

from benchmarks.inmemory import Silent, tracked, unlimited
from benchmarks.measure import (
    CPU,
    WALL,
    Chosen,
    Figures,
    Report,
    Table,
    Target,
    by_turns,
    in_child,
    main,
    using,
)
from benchmarks.plot import Curves
from benchmarks.service import Service
from prefect_webapi import EngineSettings, PluginEntry
from prefect_webapi.engine.host import Ticket
from prefect_webapi_jobserver import JobServer, ReportJob
from prefect_webapi_jobserver.plugin import JobServerPlugin
from tests.support.engine import engine, request
from tests.support.waiting import eventually_blocking

SIZES, QUICK_SIZES = (1_000, 10_000), (1_000,)
GAP_SECONDS = 5
LIFE_SECONDS = {1_000: 12.0, 10_000: 45.0}
READY_SECONDS = 300.0
CYCLE = "requests per cycle"


def watched(url: str, jobs: int, at_once: int) -> Figures:
    class Batches(JobServerPlugin):
        max_batch = at_once

    entry = PluginEntry(
        id="batches",
        supported_task_types=["batches"],
        connection=JobServer,
        spec=ReportJob,
        plugin_loader=lambda setup: Batches(setup.connection),
    )
    gap = f"{GAP_SECONDS}s"
    block = JobServer(
        base_url=HttpUrl(url),
        token=SecretStr("bench"),
        engine=unlimited(resyncInterval=gap),
        settings=EngineSettings.load({"initialInterval": gap, "createTimeout": "5m"}),
    )
    service, silent, figures = Service(url), Silent(), Figures()
    life = LIFE_SECONDS[jobs]
    with (
        tempfile.TemporaryDirectory() as folder,
        engine(Path(folder), [entry], {"default": block}) as host,
    ):
        tickets = [
            host.admit(
                request(
                    ReportJob(day=n, seconds=life + GAP_SECONDS * n / jobs),
                    task_type="batches",
                    task_run=str(n),
                    reporter=silent,
                )
            )
            for n in range(jobs)
        ]
        eventually_blocking(lambda: tracked(host) >= jobs, within=READY_SECONDS, every=0.1)
        before = service.stats()
        with using(figures):
            time.sleep(GAP_SECONDS)
            after = service.stats()
        results = asyncio.run(_results(tickets))
    requests, reads = (
        sum(after[name] - before[name] for name in names) for names in (("get", "batch"), ("read",))
    )
    ends = service.ends()
    lags = [at - ends[name] for name, at in results.items()]
    return figures | {
        CYCLE: requests / reads * jobs,
        "jobs per request": reads / requests,
        "reads per s": reads / figures[WALL],
        "CPU us per read": 1e6 * figures[CPU] / reads,
        "lag p50 s": statistics.median(lags),
        "lag p95 s": statistics.quantiles(lags, n=20)[-1],
    }


async def _results(tickets: list[Ticket]) -> dict[str, float]:
    """When each result was there, in seconds since 1970, by the job's name."""

    async def one(ticket: Ticket) -> tuple[str, float]:
        report = (await ticket.outcome()).value
        return report.uri.rpartition("/")[2].removesuffix("#report"), time.time()

    return dict(await asyncio.gather(*map(one, tickets)))


def run(chosen: Chosen) -> Report:
    sizes = chosen.sizes or (QUICK_SIZES if chosen.quick else SIZES)
    with Service() as service:

        def on(jobs: int, at_once: int) -> Callable[[], Figures]:
            def once() -> Figures:
                service.reset()
                return in_child(watched, service.url, jobs, at_once)

            return once

        at_a_time = (50,) if chosen.quick else (1, 50)
        cases = {(n, k): on(n, k) for n, k in itertools.product(sizes, at_a_time)}
        measured = by_turns(
            chosen.repetitions, {f"{n} jobs, {k} at a time": w for (n, k), w in cases.items()}
        )
    shown = (CYCLE, "jobs per request", "reads per s", "CPU us per read", "lag p50 s", "lag p95 s")
    of = {case: measured[f"{case[0]} jobs, {case[1]} at a time"] for case in cases}
    return Report(
        question="How many requests does a look at every job take, and how late is its end seen?",
        tables=[
            Table(
                f"each job due every {GAP_SECONDS} s",
                [
                    {"jobs": n, "at a time": k} | {name: of[n, k][name] for name in shown}
                    for n, k in cases
                ],
            )
        ],
        targets=[
            Target("1,000 jobs: requests per cycle", of[1_000, 50][CYCLE].median, 20)
            if 1_000 in sizes
            else Target("1,000 jobs: requests per cycle", None, 20)
        ],
        plots=[
            Curves(
                CYCLE,
                "live jobs",
                CYCLE,
                {f"{k} at a time": [(n, of[n, k][CYCLE].median) for n in sizes] for k in at_a_time},
            )
        ],
    )


if __name__ == "__main__":
    main(run, __doc__)
