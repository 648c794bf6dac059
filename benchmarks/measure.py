"""The frame of all benchmarks: repetitions in turn, what a process used, medians with their spread, targets, the page.

A benchmark is a function `run(chosen) -> Report`; `main` makes a program of it. What is measured runs in a process of
its own (`in_child`), so that memory, threads and CPU are its alone; what it is compared with runs in the same run,
before and after it by turns (`by_turns`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import sqlite3
import statistics
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.plot import Curves, draw

__all__ = ["CPU", "PEAK", "THREADS", "WALL", "Chosen", "Figures", "Report", "Series", "Table"]
__all__ += ["Target", "by_turns", "in_child", "main", "short", "using"]

Figures = dict[str, float]
"""What one repetition measured, by name; the unit is in the name."""

WALL, CPU, PEAK, THREADS = "wall s", "CPU s", "peak MiB", "threads"
SAMPLE_SECONDS = 0.05
PACKAGES = (
    *("prefect", "prefect-webapi", "prefect-databricks", "httpx", "httpx-aiohttp", "aiohttp", "h2"),
    *("pydantic", "sqlalchemy", "aiosqlite", "asyncpg"),
)


# --- one repetition --------------------------------------------------------------------------


@contextmanager
def using(figures: Figures) -> Generator[None]:
    """Note what this process uses inside the block: wall and CPU seconds, most threads. The peak is since its start."""
    process, over = psutil.Process(), threading.Event()
    most = process.num_threads()

    def look() -> None:
        nonlocal most
        while not over.wait(SAMPLE_SECONDS):
            most = max(most, process.num_threads() - 1)  # without this one

    sampler = threading.Thread(target=look, name="sampler")
    sampler.start()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        over.set()
        sampler.join()
        figures |= {WALL: wall, CPU: cpu, THREADS: most, PEAK: peak_bytes() / 2**20}


def peak_bytes() -> int:
    """The most memory this process had resident. `getrusage` would tell of its parent too."""
    told = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert told is not None
    return int(told[1]) * 1024


def in_child(work: Callable[..., Figures], *arguments: Any) -> Figures:
    """Run `work(*arguments)` in a fresh process and return its figures; both must be picklable.

    It is forked off a process that has done nothing but import the benchmark, which would take seconds each time. That
    one is started by the first call, with the environment of then.
    """
    context = multiprocessing.get_context("forkserver")
    main = sys.modules["__main__"].__spec__  # the child imports this one under another name
    known = (name for name in sys.modules if name.startswith(("benchmarks.", "tests.", "prefect_")))
    context.set_forkserver_preload([name for name in known if main is None or name != main.name])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *arguments).result()


# --- many repetitions ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Series:
    """The values of one figure, in the order of the repetitions."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        told = short(self.median)
        if len(self.values) > 1:
            told += f" ({short(min(self.values))}-{short(max(self.values))})"
        return told


Measured = Mapping[str, Series]


def by_turns(
    repetitions: int, variants: Mapping[str, Callable[[], Figures]]
) -> dict[str, dict[str, Series]]:
    """Run each variant once per repetition, in turned order each time: ``dict[variant, dict[figure, Series]]``."""
    runs: dict[str, list[Figures]] = {name: [] for name in variants}
    for turn in range(repetitions):
        for name in list(variants)[:: -1 if turn % 2 else 1]:
            began = time.perf_counter()
            runs[name].append(variants[name]())
            _say(f"{turn + 1}/{repetitions} {name}: {time.perf_counter() - began:.1f} s")
    return {
        name: {figure: Series(tuple(run[figure] for run in each)) for figure in each[0]}
        for name, each in runs.items()
    }


# --- what comes out --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target:
    """One of the figures that must be reached.

    Attributes:
        reached: None: not measured in this run.
        at_most: whether `bound` is the largest value allowed, or the smallest.
    """

    text: str
    reached: float | None
    bound: float
    at_most: bool = True

    @property
    def passed(self) -> bool | None:
        if self.reached is None:
            return None
        return self.reached <= self.bound if self.at_most else self.reached >= self.bound

    @property
    def verdict(self) -> str:
        if self.reached is None:
            return "not measured"
        if self.passed:
            return "PASS"
        ratio = self.reached / self.bound if self.bound else float("inf")
        return f"{ratio:.2f} x the bound"


@dataclass(frozen=True, slots=True)
class Table:
    """`rows`: ``dict[column, value]``; the first row's columns are the table's."""

    title: str
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Report:
    question: str
    tables: Sequence[Table]
    targets: Sequence[Target] = ()
    notes: Sequence[str] = ()
    plots: Sequence[Curves] = ()


@dataclass(frozen=True, slots=True)
class Chosen:
    """How much to measure."""

    quick: bool
    repetitions: int
    sizes: tuple[int, ...] = ()


def row(first: Mapping[str, Any], measured: Measured, figures: Sequence[str]) -> dict[str, Any]:
    """A table's row: `first`, then these figures."""
    return {**first, **{name: measured[name] for name in figures if name in measured}}


def main(run: Callable[[Chosen], Report], doc: str | None) -> None:
    """The program around a benchmark. Its exit code is 0 if every target that was measured is reached."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print data, no tables")
    parser.add_argument("--quick", action="store_true", help="small sizes, one repetition")
    parser.add_argument("--repetitions", type=int, help="default 5, with --quick 1")
    parser.add_argument("--sizes", type=int, nargs="+", default=[], help="instead of the usual N")
    parser.add_argument("--plot", type=Path, help="write the growth as an SVG")
    asked = parser.parse_args()
    repetitions = asked.repetitions or (1 if asked.quick else 5)
    machine, began = machine_here(), time.perf_counter()
    report = run(Chosen(asked.quick, repetitions, tuple(asked.sizes)))
    machine["repetitions"], machine["seconds"] = (
        str(repetitions),
        f"{time.perf_counter() - began:.0f}",
    )
    if asked.plot:
        asked.plot.write_text(draw(report.plots))
    if asked.json:
        said = " ".join(each for each in sys.argv[1:] if each != "--json")
        print(json.dumps(_data(report, machine) | {"asked": said}, default=_value))
    else:
        show(report, machine, Console(width=None if sys.stdout.isatty() else 140))
    sys.exit(any(target.passed is False for target in report.targets))


def machine_here() -> dict[str, str]:
    """What a figure depends on, and nothing that tells where the machine stands."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    found = {
        "machine": f"{os.cpu_count()} cores, {cpu[1] if cpu else platform.machine()}, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB, {platform.system()}",
        "load": f"{os.getloadavg()[0]:.1f} when it began: others may have used the machine too",
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def show(report: Report, machine: Mapping[str, str], console: Console) -> None:
    console.print(report.question, style="bold")
    console.print(", ".join(f"{k} {v}" for k, v in machine.items()), style="dim", highlight=False)
    for table in report.tables:
        shown = RichTable(title=table.title, title_justify="left")
        for name in table.rows[0]:
            shown.add_column(name, justify="left" if name == next(iter(table.rows[0])) else "right")
        for each in table.rows:
            shown.add_row(*(_cell(each.get(name, "")) for name in table.rows[0]))
        console.print(shown)
    for note in report.notes:
        console.print(f"- {note}", highlight=False)
    if report.targets:
        console.print(targets_table(report.targets))


def targets_table(targets: Sequence[Target]) -> RichTable:
    shown = RichTable(title="targets", title_justify="left")
    for name in ("target", "reached", "bound", "verdict"):
        shown.add_column(name, justify="left" if name in ("target", "verdict") else "right")
    for each in targets:
        style = {True: "green", False: "red", None: "yellow"}[each.passed]
        reached = "" if each.reached is None else short(each.reached)
        bound = f"{'≤' if each.at_most else '≥'} {short(each.bound)}"
        shown.add_row(each.text, reached, bound, each.verdict, style=style)
    return shown


def _data(report: Report, machine: Mapping[str, str]) -> dict[str, Any]:
    return {
        "question": report.question,
        "machine": machine,
        "tables": [{"title": table.title, "rows": table.rows} for table in report.tables],
        "notes": report.notes,
        "targets": [asdict(t) | {"verdict": t.verdict} for t in report.targets],
        "plots": [asdict(plot) for plot in report.plots],
    }


def _value(value: Any) -> Any:
    if isinstance(value, Series):
        return {"median": value.median, "values": value.values}
    raise TypeError(type(value).__name__)


def _cell(value: Any) -> str:
    return short(value) if isinstance(value, int | float) else str(value)


def short(value: float) -> str:
    """Three digits that mean something."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
