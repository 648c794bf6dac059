"""Live jobs of one process, 10^2 to 10^5: memory, CPU, the loop's longest block, late reads, and the restart.

The whole engine without Prefect, over a real ledger file; the service is in memory (no socket), so that nothing but the
engine is measured. Each size runs in fresh processes. The first makes the jobs, watches them at one read per
`GAP`, and goes; the second restores them all from the ledger, watches again, and sees them end together.

- bytes per job: growth of resident memory from before the first call until all are live and one gap more, so that each
  was read, after a collection; the specs were there before. The author's handle is measured as well, in a process of
  its own.
- bytes per waiting job: the same of jobs that are written down and wait for the limiter to let their create go, before
  which there is no handle; a process of its own.
- CPU per job and hour: of a window in which each job is read about once per gap, the process's whole CPU without what
  the same process used for as long before the jobs came (idle: its heartbeat, and its look for cancels asked). A
  thousand jobs take no more than that, so that few are watched for three gaps.
- longest block: how late a timer on the engine's loop rang, at worst, while jobs were made, watched, restored, ended.
- late: reads' time after they were due, from the engine's own histogram (upper bound of its bucket).

CASE-270: judging 100,000 snapshots of a live job takes at most 2 s, without the author's own `status`.

Run: `uv run python -m benchmarks.scale [--quick] [--json] [--sizes 1000 10000] [--repetitions N]`
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import gc
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
from prometheus_client import CollectorRegistry
from pydantic import TypeAdapter

from benchmarks.inmemory import (
    ENTRY,
    WIDE,
    Connection,
    Handle,
    Limiter,
    LoopProbe,
    Memory,
    Number,
    Silent,
    tracked,
    unlimited,
)
from benchmarks.measure import (
    Chosen,
    Figures,
    Report,
    Series,
    Table,
    Target,
    by_turns,
    in_child,
    main,
    peak_bytes,
)
from benchmarks.plot import Curves
from prefect_webapi import EngineSettings
from prefect_webapi._prefect.collector import collected_seldom
from prefect_webapi.engine.contexts import StatusView
from prefect_webapi.engine.host import Host, Ticket
from prefect_webapi.engine.runtime import Runtime
from prefect_webapi.metrics import Metrics
from prefect_webapi.settings import WebApiSettings
from tests.support.engine import engine, request
from tests.support.waiting import eventually_blocking

SIZES, QUICK_SIZES = (100, 1_000, 10_000, 100_000), (1_000,)
GAP_SECONDS, QUICK_GAP_SECONDS = 30, 5
FEW, GAPS_OF_FEW = 1_000, 3
PROBED_SECONDS = 2.0
GIVE_UP_SECONDS = 1_800.0
GC_THRESHOLD: int = WebApiSettings.model_fields["gc_threshold"].default
SLOW_WRITES: Limiter = {"qps": 5, "burst": 5}
LOOKS_SECONDS = 0.1
"""So often what is waited for is looked at: that takes the engine's time, too."""
_until = partial(eventually_blocking, within=GIVE_UP_SECONDS, every=LOOKS_SECONDS)
SNAPSHOTS = 100_000
FLAT_FROM, FLAT_TO = 1_000, 100_000


def living(jobs: int, gap: int, folder: str) -> Figures:
    """Both lives of a size, each in a process of its own; the second one's figures go on top."""
    aside = f"{folder}-waiting"
    for each in (folder, aside):
        shutil.rmtree(each, ignore_errors=True)
        Path(each).mkdir()
    made, handles = in_child(first_life, jobs, gap, folder), in_child(author_alone, jobs)
    restored = in_child(second_life, jobs, gap, folder)
    waiting = in_child(waiting_life, jobs, gap, aside)
    longest = {
        name: max(made[name], restored[name])
        for name in ("longest block ms", "its CPU ms", "collector ms")
    }
    beyond = made["bytes per job"] - handles["author's bytes per job"]
    return made | handles | restored | waiting | longest | {"bytes beyond the author's": beyond}


def author_alone(jobs: int) -> Figures:
    """What the handles take if nobody but their author keeps them."""
    adapter = TypeAdapter(Handle)
    gc.collect()
    before = psutil.Process().memory_info().rss
    kept = [adapter.validate_json(f'{{"name": "p-{n:032d}"}}') for n in range(jobs)]
    grown = psutil.Process().memory_info().rss - before
    return {"author's bytes per job": grown / len(kept)}


def first_life(jobs: int, gap: int, folder: str) -> Figures:
    specs = [Number(number=n) for n in range(jobs)]
    window = gap * GAPS_OF_FEW if jobs <= FEW and gap == GAP_SECONDS else gap
    figures: Figures = {}
    with _life(gap, folder) as (host, metrics):
        _admit(host, [Number(number=-1)])  # what all jobs share is there before they come
        _until(lambda: Memory.reads >= 1)
        idle = _idle(window)
        gc.collect()
        before = psutil.Process().memory_info().rss
        with LoopProbe(host) as probe:
            began = time.perf_counter()
            tickets = _admit(host, specs)
            _until(lambda: tracked(host) > jobs)
            figures["made per s"] = jobs / (time.perf_counter() - began)
        time.sleep(gap)
        gc.collect()
        figures["bytes per job"] = (psutil.Process().memory_info().rss - before) / jobs
        figures["peak bytes per job"] = (peak_bytes() - before) / jobs
        figures |= _watched(jobs, window, metrics, idle)
        with probe:
            time.sleep(PROBED_SECONDS)
        figures |= _blocks(probe)
        assert len(tickets) == jobs
    return figures


def second_life(jobs: int, gap: int, folder: str) -> Figures:
    specs = [Number(number=n) for n in range(jobs)]
    figures: Figures = {}
    with _life(gap, folder) as (host, _):
        with LoopProbe(host) as probe:
            began = time.perf_counter()
            tickets = _admit(host, specs)
            _until(lambda: tracked(host) >= jobs)
            figures["restored s"] = time.perf_counter() - began
            time.sleep(PROBED_SECONDS)
            Memory.over = True
            _all_well(tickets)
        figures |= _blocks(probe)
    return figures


def waiting_life(jobs: int, gap: int, folder: str) -> Figures:
    specs = [Number(number=n) for n in range(jobs)]
    with _life(gap, folder, SLOW_WRITES) as (host, _):
        _admit(host, [Number(number=-1)])
        _until(lambda: Memory.reads >= 1)
        gc.collect()
        before = psutil.Process().memory_info().rss
        tickets = _admit(host, specs)
        _until(lambda: _driven(host) > jobs)
        gc.collect()
        grown = psutil.Process().memory_info().rss - before
        assert tracked(host) < jobs / 2, "most of them wait no more"
    return {"bytes per waiting job": grown / len(tickets)}


def judging(gap: int, folder: str) -> Figures:
    """Snapshots that bring no news, judged one after the other; the author's own time apart."""

    async def judge(runtime: Runtime) -> Figures:
        job = next(iter(runtime._jobs.values()))
        began = time.thread_time()
        for _ in range(SNAPSHOTS):
            assert not await runtime._observer.judge(job, False)
        whole = time.thread_time() - began
        plugin, view = job.loaded.plugin, StatusView(job.view, job.handle, False)
        assert isinstance(plugin, Memory)
        began = time.thread_time()
        for _ in range(SNAPSHOTS):
            plugin.status(view)
        author = time.thread_time() - began
        return {"engine s": whole - author, "author s": author}

    with _life(gap, folder) as (host, _):
        _admit(host, [Number(number=-1)])
        _until(lambda: Memory.reads >= 1)
        return host.perform(judge).result(GIVE_UP_SECONDS)


@contextmanager
def _life(
    gap: int, folder: str, writes: Limiter = WIDE
) -> Generator[tuple[Host, CollectorRegistry]]:
    interval = f"{gap}s"
    connection = Connection(
        engine=unlimited(writes, resyncInterval=interval),
        settings=EngineSettings.load({"initialInterval": interval}),
    )
    registry = CollectorRegistry()
    blocks = {"default": connection}
    with (
        collected_seldom(GC_THRESHOLD),  # as in a process of Prefect tasks
        engine(Path(folder), [ENTRY], blocks, metrics=Metrics(registry)) as host,
    ):
        host.start()
        yield host, registry


def _driven(host: Host) -> int:
    """How many jobs it looks after, made or not."""

    async def count(runtime: Runtime) -> int:
        return len(runtime._jobs)

    return host.perform(count).result(60)


def _admit(host: Host, specs: Sequence[Number]) -> list[Ticket]:
    """As `run_many` does: what the jobs share is there once."""
    one = request(specs[0], task_type="memory", task_run="many", reporter=Silent())
    return [
        host.admit(replace(one, spec=spec, nth=spec.number, inputs=vars(spec))) for spec in specs
    ]


def _all_well(tickets: Sequence[Ticket]) -> None:
    """As `run_many` waits: each says that it is over, and costs no task."""
    over: deque[Ticket] = deque()
    for ticket in tickets:
        ticket.when_over(partial(over.append, ticket))
    _until(lambda: len(over) == len(tickets))
    assert all(ticket.outcome_blocking().value == 1 for ticket in over)


def _idle(window: int) -> float:
    """CPU seconds per second of an engine that has one job, for as long as the jobs are watched later: few of them take
    less than its heartbeat does.
    """
    cpu, began = time.process_time(), time.perf_counter()
    time.sleep(window)
    return (time.process_time() - cpu) / (time.perf_counter() - began)


def _watched(jobs: int, window: int, metrics: CollectorRegistry, idle: float) -> Figures:
    """So many seconds of nothing but reading."""
    late = _lateness(metrics)
    cpu, reads, began = time.process_time(), Memory.reads, time.perf_counter()
    time.sleep(window)
    cpu, reads = time.process_time() - cpu, Memory.reads - reads
    seconds = time.perf_counter() - began
    cpu, hours = cpu - idle * seconds, seconds / 3600
    late = {bound: n - late.get(bound, 0.0) for bound, n in _lateness(metrics).items()}
    return {
        "idle CPU ms per s": 1000 * idle,
        "CPU s per job and hour": cpu / jobs / hours,
        "reads per s": reads / hours / 3600,
        "CPU per read us": 1e6 * cpu / max(1, reads),
        "late p50 s": _quantile(late, 0.5),
        "late p99 s": _quantile(late, 0.99),
    }


def _lateness(metrics: CollectorRegistry) -> dict[float, float]:
    """``dict[upper bound in seconds, reads at most so late]``."""
    return {
        float(sample.labels["le"]): sample.value
        for family in metrics.collect()
        for sample in family.samples
        if sample.name == "prefect_webapi_poll_lag_seconds_bucket"
    }


def _quantile(buckets: dict[float, float], share: float) -> float:
    whole = max(buckets.values(), default=0.0)
    return next((bound for bound, n in sorted(buckets.items()) if n >= share * whole), 0.0)


def _blocks(probe: LoopProbe) -> Figures:
    return {
        "longest block ms": 1000 * probe.longest,
        "its CPU ms": 1000 * probe.longest_cpu,
        "collector ms": 1000 * probe.collector,
    }


SHOWN = (
    (
        "bytes per job",
        "author's bytes per job",
        "bytes beyond the author's",
        "peak bytes per job",
        "bytes per waiting job",
    ),
    (
        "idle CPU ms per s",
        "CPU s per job and hour",
        "CPU per read us",
        "reads per s",
        "late p50 s",
        "late p99 s",
    ),
    ("longest block ms", "its CPU ms", "collector ms"),
    ("made per s", "restored s"),
)
TITLES = (
    "memory",
    "watching, one read per job and {gap} s",
    "the engine's loop",
    "ways in",
)


def run(chosen: Chosen) -> Report:
    sizes = chosen.sizes or (QUICK_SIZES if chosen.quick else SIZES)
    gap = QUICK_GAP_SECONDS if chosen.quick else GAP_SECONDS
    with tempfile.TemporaryDirectory() as folder:
        measured = by_turns(
            chosen.repetitions,
            {str(n): partial(living, n, gap, f"{folder}/{n}") for n in sizes},
        )
        judged = by_turns(chosen.repetitions, {"judging": partial(in_child, judging, gap, folder)})[
            "judging"
        ]
    tables = [
        Table(
            title.format(gap=gap),
            [{"jobs": n} | {name: measured[str(n)][name] for name in names} for n in sizes],
        )
        for title, names in zip(TITLES, SHOWN, strict=True)
    ]
    tables.append(Table(f"judging {SNAPSHOTS:,} snapshots without news", [judged]))

    def at(n: int, name: str) -> Series | None:
        return measured.get(str(n), {}).get(name)

    most, few = at(FLAT_TO, "CPU s per job and hour"), at(FLAT_FROM, "CPU s per job and hour")
    flat = None
    if most is not None and few is not None:
        flat = max(most.median / few.median, few.median / most.median)

    def median(name: str) -> float | None:
        found = at(100_000, name)
        return found and found.median

    return Report(
        question="What does a live job cost one process, and does it stay so as they grow?",
        tables=tables,
        notes=[
            "the service is in memory: no socket; the ledger is a file of SQLite, synchronous=FULL",
            f"both gaps of the policy are set to {gap} s, so that the rate of reads is known",
        ],
        targets=[
            Target(
                "100,000 jobs: bytes each beyond the author's own",
                median("bytes beyond the author's"),
                2048,
            ),
            Target(
                "100,000 jobs: longest block of the loop without the collector, ms",
                median("longest block ms"),
                100,
            ),
            Target("100,000 jobs: restored from the ledger, s", median("restored s"), 10),
            Target("judging 100,000 snapshots, s (CASE-270)", judged["engine s"].median, 2),
            Target("CPU per job from 1,000 to 100,000: largest ratio", flat, 1.2),
        ],
        plots=[
            Curves(
                name,
                "live jobs",
                name,
                {name: [(n, measured[str(n)][name].median) for n in sizes]},
            )
            for name in ("bytes per job", "CPU s per job and hour", "longest block ms")
        ],
    )


if __name__ == "__main__":
    main(run, __doc__)
