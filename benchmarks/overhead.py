"""Remote jobs of 5 s against bare Prefect tasks that sleep for 5 s: wall, CPU, memory, threads; and the first byte.

Each case is a flow in a process of its own, on one Prefect server and one service, both processes of their own. A flow
of one job comes before it and takes what a process pays once (imports, the engine's start); its CPU is shown apart.
Before each case Prefect's server is given the time to store what it was told.

- awaited: N async tasks in one `gather`. - mapped: N sync tasks by `.map`, which Prefect gives a thread each. "results
  s" is until the last result is there; the flow itself ends whole seconds after its begin, since Prefect then waits for
  a thread that sleeps (that of its heartbeats).
- run_many: N jobs in one task run, against the awaited tasks' CPU per job.
- by hand: tasks that create their job and read it once, when it is over: they know how long it takes, write nothing
  down and limit nothing. So much it takes to ask the service at all.
- requests: the same numbers of creates and reads as the remote jobs made, in a bare loop over httpx: what their
  requests cost at least.
- first byte: tasks one after the other, from the call to the create's arrival at the service, against a bare task's
  from the call to its body; ledger writes before the create. CASE-067: 50 ms above the bare task, one write.

Run: `uv run python -m benchmarks.overhead [--quick] [--json] [--repetitions N]`
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.measure import (
    CPU,
    PEAK,
    THREADS,
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
from benchmarks.remote import BLOCK, connection, create_of, remote_flow
from benchmarks.servers import prefect_server, settle
from benchmarks.service import Service

SECONDS = 5.0
AWAITED, MAPPED, MANY = (100, 1_000, 5_000), (100, 500), 10_000
QUICK_AWAITED, QUICK_MAPPED, QUICK_MANY = (100,), (50,), 300
FIRST_BYTES, QUICK_FIRST_BYTES = 100, 20
AT_ONCE = 10
RESULTS, CREATES, READS, CPU_PER_JOB = "results s", "creates", "reads", "CPU ms per job"
FIRST = "CPU s of the first"
SHOWN = (WALL, RESULTS, CPU, CPU_PER_JOB, PEAK, THREADS, CREATES, READS, FIRST)


# --- flows, in child processes ---------------------------------------------------------------


def awaited_bare(jobs: int) -> Figures:
    from prefect import flow, task

    @task
    async def nap(seconds: float) -> None:
        await asyncio.sleep(seconds)

    @flow
    async def naps(jobs: int, seconds: float) -> None:
        await asyncio.gather(*(nap(seconds) for _ in range(jobs)))

    return _used(jobs, lambda n, seconds: asyncio.run(naps(n, seconds)))


def awaited_remote(jobs: int, url: str) -> Figures:
    return _used(jobs, lambda n, seconds: asyncio.run(remote_flow([seconds] * n)), url)


def mapped_bare(jobs: int) -> Figures:
    from prefect import flow, task, unmapped

    @task
    def nap(_: int, seconds: float) -> None:
        time.sleep(seconds)

    @flow
    def naps(jobs: int, seconds: float) -> float:
        nap.map(range(jobs), unmapped(seconds)).result()
        return time.perf_counter()

    return _used(jobs, naps)


def mapped_remote(jobs: int, url: str) -> Figures:
    from prefect import flow, unmapped

    from prefect_webapi_jobserver import run_job_sync

    job = run_job_sync.with_options(connection=BLOCK)

    @flow
    def remote(jobs: int, seconds: float) -> float:
        job.map(day=list(range(jobs)), seconds=unmapped(seconds)).result()
        return time.perf_counter()

    return _used(jobs, remote, url)


def awaited_by_hand(jobs: int, url: str) -> Figures:
    import httpx
    from prefect import flow, task

    sent = [create_of(n, SECONDS) for n in range(jobs)]

    @flow
    async def naps(jobs: int, seconds: float) -> None:
        gate = asyncio.Semaphore(AT_ONCE)  # httpx's pool is slow where many wait for a connection
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:

            @task
            async def nap(number: int, seconds: float) -> None:
                path, body = sent[number]
                async with gate:
                    (await client.put(path, json=body)).json()
                await asyncio.sleep(seconds)
                async with gate:
                    (await client.get(path)).json()

            await asyncio.gather(*(nap(n, seconds) for n in range(jobs)))

    return _used(jobs, lambda n, seconds: asyncio.run(naps(n, seconds)), url)


def mapped_by_hand(jobs: int, url: str) -> Figures:
    import httpx
    from prefect import flow, task, unmapped

    sent = [create_of(n, SECONDS) for n in range(jobs)]
    # Idle ones are let go after 5 s otherwise, just when the reads come: one thread then closes what another has taken.
    kept = httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=60)
    client = httpx.Client(base_url=url, trust_env=False, limits=kept)

    @task
    def nap(number: int, seconds: float) -> None:
        path, body = sent[number]
        client.put(path, json=body).json()
        time.sleep(seconds)
        client.get(path).json()

    @flow
    def naps(jobs: int, seconds: float) -> float:
        nap.map(range(jobs), unmapped(seconds)).result()
        return time.perf_counter()

    with client:
        return _used(jobs, naps, url)


def many(jobs: int, url: str) -> Figures:
    from prefect import flow

    from prefect_webapi import run_many
    from prefect_webapi_jobserver import ReportJob, run_job

    job = run_job.with_options(connection=BLOCK)

    @flow
    async def remote(jobs: int, seconds: float) -> None:
        await run_many(job, [ReportJob(day=day, seconds=seconds) for day in range(jobs)])

    return _used(jobs, lambda n, seconds: asyncio.run(remote(n, seconds)), url)


def _used(jobs: int, work: Callable[[int, float], Any], url: str = "") -> Figures:
    """`work(jobs, seconds)` after one that starts whatever is started once per process.

    It may return when its results were there, in seconds of `perf_counter`.
    """
    first, figures = Figures(), Figures()
    with using(first):
        work(1, 0.0)
    if url:
        Service(url).reset()
    with using(figures):
        began = time.perf_counter()
        ended = work(jobs, SECONDS)
    if isinstance(ended, float):
        figures[RESULTS] = ended - began
    figures |= {CPU_PER_JOB: 1000 * figures[CPU] / jobs, FIRST: first[CPU]}
    if url:
        stats = Service(url).stats()
        figures |= {CREATES: stats["create"], READS: stats["get"] + stats["batch"]}
    return figures


def requests(creates: int, reads: int, url: str) -> Figures:
    """As many requests, in a loop that does nothing else."""
    import httpx

    async def all_of_them() -> None:
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:

            async def loop() -> None:
                for n in numbers:
                    path, body = sent[n % creates]
                    if n < creates:
                        (await client.put(path, json=body)).json()
                    else:
                        (await client.get(path)).json()

            await asyncio.gather(*(loop() for _ in range(AT_ONCE)))

    sent = [create_of(n, SECONDS) for n in range(creates)]
    numbers, figures = iter(range(creates + reads)), Figures()
    with using(figures):
        asyncio.run(all_of_them())
    return figures


# --- the first byte --------------------------------------------------------------------------


def first_byte(tasks: int, url: str) -> Figures:
    from prefect import flow, task

    from prefect_webapi.ledger.sql import SqlStore
    from prefect_webapi_jobserver import run_job_sync

    writes, reached = list[float](), list[float]()
    job = run_job_sync.with_options(connection=BLOCK)

    def counted(name: str) -> None:
        real = getattr(SqlStore, name)

        async def call(self: SqlStore, argument: Any) -> Any:
            writes.append(time.time())
            return await real(self, argument)

        setattr(SqlStore, name, call)

    @task
    def bare() -> None:
        reached.append(time.time())

    @flow
    def one_after_the_other(call: Callable[[int], Any]) -> list[float]:
        called: list[float] = []
        for n in range(tasks):
            called.append(time.time())
            call(n)
        return called

    def remote(day: int) -> None:
        job(day=day, seconds=0)

    counted("intent")
    counted("move")
    job(day=-1, seconds=0)  # the engine is up before
    service = Service(url)
    service.reset()
    called = one_after_the_other(lambda _: bare())
    base = [1000 * (b - a) for a, b in zip(called, reached, strict=True)]
    called = one_after_the_other(remote)
    made = sorted(service.made())
    ours = [1000 * (b - a) for a, b in zip(called, made, strict=True)]
    before = [sum(a <= at <= b for at in writes) for a, b in zip(called, made, strict=True)]
    return {
        "bare: call to body ms": statistics.median(base),
        "remote: call to create ms": statistics.median(ours),
        "above ms": statistics.median(ours) - statistics.median(base),
        "writes before create": max(before),
    }


# --- the report ------------------------------------------------------------------------------


def run(chosen: Chosen) -> Report:
    awaited = chosen.sizes or (QUICK_AWAITED if chosen.quick else AWAITED)
    mapped, runs = (QUICK_MAPPED, QUICK_MANY) if chosen.quick else (MAPPED, MANY)
    by_kind = [("awaited", n) for n in awaited] + [("mapped", n) for n in mapped]
    with prefect_server() as server, Service() as service:
        in_child(connection, service.url)

        def on(work: Callable[..., Figures], *arguments: Any) -> Callable[[], Figures]:
            def once() -> Figures:
                settle(server)
                service.reset()
                return in_child(work, *arguments)

            return once

        cases: dict[str, Callable[[], Figures]] = {}
        for n in awaited:
            cases[f"awaited bare {n}"] = on(awaited_bare, n)
            if not chosen.quick:
                cases[f"awaited by hand {n}"] = on(awaited_by_hand, n, service.url)
            cases[f"awaited remote {n}"] = on(awaited_remote, n, service.url)
        for n in mapped:
            cases[f"mapped bare {n}"] = on(mapped_bare, n)
            if not chosen.quick:
                cases[f"mapped by hand {n}"] = on(mapped_by_hand, n, service.url)
            cases[f"mapped remote {n}"] = on(mapped_remote, n, service.url)
        cases[f"run_many {runs}"] = on(many, runs, service.url)
        measured = by_turns(chosen.repetitions, cases)
        ours = {f"{kind} {n}": f"{kind} remote {n}" for kind, n in by_kind}
        ours[f"run_many {runs}"] = f"run_many {runs}"
        bare_loop = by_turns(
            chosen.repetitions,
            {
                name: on(
                    requests,
                    int(measured[case][CREATES].median),
                    int(measured[case][READS].median),
                    service.url,
                )
                for name, case in ours.items()
            },
        )
        bytes_ = by_turns(
            chosen.repetitions,
            {
                "one after the other": on(
                    first_byte,
                    QUICK_FIRST_BYTES if chosen.quick else FIRST_BYTES,
                    service.url,
                )
            },
        )["one after the other"]

    def median(case: str, figure: str) -> float:
        return measured[case][figure].median

    def targets(kind: str, n: int) -> Sequence[Target]:
        ours, bare = f"{kind} remote {n}", f"{kind} bare {n}"
        allowed = median(bare, CPU) + 1.3 * bare_loop[f"{kind} {n}"][CPU].median + 0.002 * n
        return [
            Target(
                f"{kind}, {n:,}: wall, times the bare tasks'",
                median(ours, WALL) / median(bare, WALL),
                1.15,
            ),
            Target(
                f"{kind}, {n:,}: CPU s; allowed: bare + 1.3 x requests + 2 ms a job",
                median(ours, CPU),
                allowed,
            ),
        ]

    def floor(kind: str, n: int) -> str:
        """What is reached by who does nothing but ask the service."""
        wall = median(f"{kind} by hand {n}", WALL) / median(f"{kind} bare {n}", WALL)
        return f"{kind}, {n:,}, by hand: wall {wall:.2f} times the bare tasks'"

    def without_steps(n: int) -> str:
        until = {kind: median(f"mapped {kind} {n}", RESULTS) for kind in ("bare", "remote")}
        return (
            f"mapped, {n:,}: the results were there after {until['remote'] / until['bare']:.2f} times the bare tasks'; "
            "a sync flow ends whole seconds after its begin, since Prefect waits for the thread of its heartbeats"
        )

    at_awaited = 1_000 if 1_000 in awaited else max(awaited)
    share = median(f"run_many {runs}", CPU_PER_JOB) / median(
        f"awaited remote {at_awaited}", CPU_PER_JOB
    )
    bare_share = bare_loop[f"run_many {runs}"][CPU].median / (
        runs / 1000 * median(f"awaited remote {at_awaited}", CPU_PER_JOB)
    )
    return Report(
        question="What does a remote job cost beyond a task that sleeps as long?",
        tables=[
            Table(
                f"jobs of {SECONDS:g} s",
                [
                    {"case": name} | {figure: each.get(figure, "") for figure in SHOWN}
                    for name, each in measured.items()
                ],
            ),
            Table(
                "their requests in a bare loop",
                [{"case": name, CPU: each[CPU]} for name, each in bare_loop.items()],
            ),
            Table("to the first byte", [dict(bytes_)]),
        ],
        notes=[
            *([] if chosen.quick else [floor("awaited", at_awaited), floor("mapped", max(mapped))]),
            without_steps(max(mapped)),
            f"run_many, {runs:,}: its requests in a bare loop take {bare_share:.3f} of an awaited task's CPU per job",
        ],
        targets=[
            *targets("awaited", at_awaited),
            *targets("mapped", max(mapped)),
            Target(f"run_many, {runs:,}: CPU per job, of an awaited task's", share, 0.1),
            Target(
                "the first byte, above the bare task, ms (CASE-067)", bytes_["above ms"].median, 50
            ),
            Target("ledger writes before it", bytes_["writes before create"].median, 1),
        ],
        plots=[
            Curves(
                figure,
                "awaited tasks",
                figure,
                {
                    kind: [(n, median(f"awaited {kind} {n}", figure)) for n in awaited]
                    for kind in ("bare", "by hand", "remote")
                    if f"awaited {kind} {awaited[0]}" in measured
                },
            )
            for figure in (WALL, CPU, PEAK)
        ],
    )


if __name__ == "__main__":
    main(run, __doc__)
