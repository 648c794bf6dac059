"""How late the end of a job is seen, and how many reads that takes, for jobs of 2 s to 5 h.

In virtual time, with the engine's own `Poller` (its policy, its jitter, its heap): jobs of about the same length (a
fifth more or less) begin together, and an answer says "over" from a job's end on. Compared with fixed gaps of 1 s and
30 s and with an exponential back-off (1 s, times 1.5, at most 20 s), whose reads are counted by their ages.

"ours" is a task's first run, of jobs whose create told how they stand; where create tells no more than the id there is
one more read, at once. "ours, second run" has learned from the ends that the first run saw. "ours, alike in turn": jobs
of the very same length begin one after the other, over two lengths; the first ends tell when the others will be over.

The fewest reads of a policy that knows nothing but a job's age, for the lag that ours has: half of the ends are seen
within ``min(15 s, max(0.5 s, 5% of the age))``. An end falls anywhere between two reads at ages r and r + g, so half of
them wait for more than g / 2, and the one that waits for g / 2 ended at age r + g / 2. So that promise bounds each gap,
which means g ≤ min(30, max(1, 0.1 r / 0.95)). Taking the largest gap each time (`fewest_reads`) is the fewest: gaps
never shrink with age, so whoever reads earlier once can't be ahead later.

In real time, the same for jobs of a few seconds through Prefect: from the end at the service to the result in the flow.

Run: `uv run python -m benchmarks.lag [--quick] [--json] [--repetitions N]`
"""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import anyio

from benchmarks.measure import Chosen, Figures, Report, Table, Target, by_turns, in_child, main
from benchmarks.plot import Curves
from benchmarks.remote import connection, remote_flow
from benchmarks.servers import prefect_server
from benchmarks.service import Service
from prefect_webapi.engine.durations import Durations
from prefect_webapi.poller import Observation, Poller, ReadingPolicy
from tests.support import virtualtime

LENGTHS = {"2 s": 2.0, "30 s": 30.0, "10 min": 600.0, "5 h": 18_000.0}
SPREAD, JOBS = 0.2, 100
REAL_SECONDS, QUICK_REAL_SECONDS, REAL_JOBS = (2.0, 30.0), (2.0,), 50
OURS, AT_ONCE, LEARNED = "ours", "ours, create tells the id only", "ours, second run"
ALIKE = "ours, alike in turn"
LEAST, EXPONENTIAL = "fewest reads by age", "exponential"
POLICY = ReadingPolicy(initial=1.0, longest=30.0, workers=10)
TASK = "plugin", "task"
LAG_P50, LAG_P95, READS = "lag p50 s", "lag p95 s", "reads per job"


# --- in virtual time -------------------------------------------------------------------------


def ours(length: float, seed: float, *, is_known: bool = True) -> Figures:
    """The engine's poller with the defaults of a block."""
    return virtualtime.run(_ours(_lengths(length, seed), Durations({}), is_known=is_known))


def learned(length: float, seed: float) -> Figures:
    """The same for the second run of a task."""
    durations = Durations({})
    virtualtime.run(_ours(_lengths(length, seed + 1), durations))
    return virtualtime.run(_ours(_lengths(length, seed), Durations(durations.news())))


def alike(length: float, seed: float) -> Figures:
    """Jobs of one length that begin one after the other."""
    pause = 2 * length / JOBS * random.Random(seed).uniform(0.9, 1.1)
    return virtualtime.run(_ours([length] * JOBS, Durations({}), pause=pause))


async def _ours(
    lengths: Sequence[float], durations: Durations, *, is_known: bool = True, pause: float = 0.0
) -> Figures:
    clock, lags, reads = virtualtime.LoopClock(), list[float](), 0
    expected = durations.expected(*TASK)

    class Service:
        async def one(self, context: float) -> bool:
            nonlocal reads
            reads += 1
            return clock.monotonic() >= context

        async def many(self, contexts: Sequence[float]) -> Sequence[bool]:
            return [await self.one(each) for each in contexts]

    async def take(observation: Observation) -> None:
        if not observation.resource:
            poller.again(observation.watched, ends=durations.ends(*TASK))
            return
        lags.append(clock.monotonic() - observation.watched.context)
        age = poller.age(observation.watched)
        durations.note(*TASK, age - observation.since, age)
        poller.forget(observation.watched)
        if len(lags) == len(lengths):
            tasks.cancel_scope.cancel()

    poller = Poller(POLICY, Service(), take, clock)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(poller.run)
        for length in lengths:
            ends_at, ends = clock.monotonic() + length, durations.ends(*TASK)
            poller.watch(None, ends_at, expected=expected, ends=ends, is_known=is_known)
            if pause:
                await asyncio.sleep(pause)
    return _figures(lags, reads)


def planned(ages: Callable[[], Iterator[float]], length: float, seed: float) -> Figures:
    """Reads at ages that depend on nothing else."""
    lags, reads = list[float](), 0
    for end in _lengths(length, seed):
        for age in ages():
            reads += 1
            if age >= end:
                lags.append(age - end)
                break
    return _figures(lags, reads)


def fixed(gap: float) -> Iterator[float]:
    age = 0.0
    while True:
        age += gap
        yield age


def exponential(first: float = 1.0, factor: float = 1.5, longest: float = 20.0) -> Iterator[float]:
    age, gap = 0.0, first
    while True:
        age += gap
        yield age
        gap = min(longest, gap * factor)


def fewest_reads() -> Iterator[float]:
    age = 0.0
    while True:
        age += min(POLICY.longest, max(POLICY.initial, 0.1 * age / 0.95))
        yield age


def _lengths(length: float, seed: float) -> list[float]:
    chance = random.Random(seed)
    return [length * chance.uniform(1 - SPREAD, 1 + SPREAD) for _ in range(JOBS)]


def _figures(lags: Sequence[float], reads: int) -> Figures:
    return {
        LAG_P50: statistics.median(lags),
        LAG_P95: statistics.quantiles(lags, n=20)[-1],
        READS: reads / len(lags),
    }


POLICIES: dict[str, Callable[[float, float], Figures]] = {
    OURS: ours,
    AT_ONCE: partial(ours, is_known=False),
    LEARNED: learned,
    ALIKE: alike,
    LEAST: partial(planned, fewest_reads),
    "fixed 1 s": partial(planned, partial(fixed, 1.0)),
    "fixed 30 s": partial(planned, partial(fixed, 30.0)),
    EXPONENTIAL: partial(planned, exponential),
}


# --- in real time ----------------------------------------------------------------------------


def through_prefect(url: str, seconds: float) -> Figures:
    """Jobs awaited in a flow: when the call returned, against the service's own time of the end."""
    results = asyncio.run(remote_flow([seconds] * REAL_JOBS))
    service = Service(url=url)
    ends, stats = service.ends(), service.stats()
    lags = [at - ends[name] for name, at in results.items()]
    return _figures(lags, int(stats["read"]))


# --- the report ------------------------------------------------------------------------------


def run(chosen: Chosen) -> Report:
    chance = random.Random(0)

    def measured(policy: str, length: float) -> Callable[[], Figures]:
        return lambda: POLICIES[policy](length, chance.random())

    virtual = by_turns(
        chosen.repetitions,
        {
            f"{name}, {policy}": measured(policy, length)
            for name, length in LENGTHS.items()
            for policy in POLICIES
        },
    )
    lengths = QUICK_REAL_SECONDS if chosen.quick else REAL_SECONDS
    with prefect_server(), Service() as service:
        in_child(connection, service.url)

        def fresh(seconds: float) -> Figures:
            service.reset()
            return in_child(through_prefect, service.url, seconds)

        real = by_turns(
            chosen.repetitions, {f"{seconds:g} s": partial(fresh, seconds) for seconds in lengths}
        )

    def of(name: str, policy: str, figure: str) -> float:
        return virtual[f"{name}, {policy}"][figure].median

    rows: list[dict[str, Any]] = [
        {"job": name, "policy": policy, **virtual[f"{name}, {policy}"]}
        for name in LENGTHS
        for policy in POLICIES
    ]

    def late(policy: str) -> float:
        return max(of(n, policy, LAG_P50) / max(1.0, 0.05 * s) for n, s in LENGTHS.items())

    def reads(policy: str, beside: str) -> float:
        return max(of(n, policy, READS) / of(n, beside, READS) for n in LENGTHS)

    return Report(
        question="How late is the end of a job seen, and what does it cost in reads?",
        tables=[
            Table(f"{JOBS} jobs, in virtual time", rows),
            Table(
                f"{REAL_JOBS} jobs through Prefect, from the end to the result in the flow",
                [{"job": name, **figures} for name, figures in real.items()],
            ),
        ],
        targets=[
            Target("lag p50, of max(1 s, 5% of the age); the worst length", late(OURS), 1.0),
            Target("reads, times the fewest by age; the worst length", reads(OURS, LEAST), 1.2),
            Target("second run: lag p50, the same", late(LEARNED), 1.0),
            Target("second run: reads, of exponential's", reads(LEARNED, EXPONENTIAL), 1.0),
        ],
        plots=[
            Curves(
                figure,
                "length of the job, s",
                figure,
                {p: [(s, of(n, p, figure)) for n, s in LENGTHS.items()] for p in POLICIES},
            )
            for figure in (LAG_P50, READS)
        ],
    )


if __name__ == "__main__":
    main(run, __doc__)
