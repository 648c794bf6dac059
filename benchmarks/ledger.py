"""Jobs per second through all states of the ledger, on SQLite and on Postgres; writes and commits per job.

A job is what the engine writes: its intent, its handle, its end with the result, its closing; with quotas one more, the
grant of its place. `at once` jobs are on their way together, each waits for every one of its writes to be committed.
The baseline commits each write by itself, over the same store and statements.

Commits are counted where SQLAlchemy makes them. On SQLite with WAL and `synchronous=FULL` each is one fsync, and each
checkpoint (about every 1,000 pages) two more; on Postgres at most one each. What the whole engine writes per job is
counted as well, over a service in memory.

Run: `uv run python -m benchmarks.ledger [--quick] [--json] [--repetitions N]`
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event

from benchmarks.inmemory import ENTRY, Connection, Memory, Number, Silent, unlimited
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
from prefect_webapi.clock import Clock
from prefect_webapi.contract.phase import PhaseInfo
from prefect_webapi.ledger import writer
from prefect_webapi.ledger.records import (
    Details,
    JobState,
    Move,
    MoveResult,
    Outputs,
    Record,
    Steps,
)
from prefect_webapi.ledger.sql import SqlStore
from tests.support.engine import engine, request
from tests.support.ledger import PostgresServer, draft_for, postgres, sqlite_url

AT_ONCE, QUICK_AT_ONCE = (1, 10, 100, 1_000), (1_000,)
JOBS_PER_SLOT, JOBS_PER_SLOT_ALONE = {1: 100, 10: 50, 100: 30, 1_000: 6}, {1: 100, 10: 30, 100: 4}
ENGINE_JOBS = 200
JOBS, WRITES = "jobs/s", "writes per job"
S = JobState
PLAIN = ((S.CREATED, 0), (S.OVER, 0), (S.CLOSED, 0))
WITH_QUOTA = ((S.CREATING, 1), (S.CREATED, 0), (S.OVER, -1), (S.CLOSED, 0))


# --- the store alone -------------------------------------------------------------------------


def through(url: str, at_once: int, *, quota: bool = False, grouped: bool = True) -> Figures:
    """All jobs through all states."""
    if not grouped:
        writer.MAX_BATCH = 1
    jobs = at_once * (JOBS_PER_SLOT if grouped else JOBS_PER_SLOT_ALONE)[at_once]
    return asyncio.run(_through(url, at_once, jobs, quota))


async def _through(url: str, at_once: int, jobs: int, quota: bool) -> Figures:
    store, figures = SqlStore(url, clock=Clock()), Figures()
    await store.open()
    try:
        if quota:
            await store.set_quota("webapi:bench", 1_000_000)
        numbers, commits, writes = iter(range(jobs)), 0, 0

        def committed(_: Any) -> None:
            nonlocal commits
            commits += 1

        event.listen(Engine, "commit", committed)

        async def one_after_the_other() -> None:
            nonlocal writes
            for n in numbers:
                written = await _life(store, n, quota)
                writes += written

        with using(figures):
            async with asyncio.TaskGroup() as group:
                for _ in range(at_once):
                    group.create_task(one_after_the_other())
    finally:
        await store.aclose()
    return figures | {
        JOBS: jobs / figures[WALL],
        WRITES: writes / jobs,
        "commits per job": commits / jobs,
        "CPU us per job": 1e6 * figures[CPU] / jobs,
    }


async def _life(store: SqlStore, number: int, quota: bool) -> int:
    """One job; how many writes it took."""
    now = datetime.now(UTC)
    details = Details(
        task_name="bench",
        task_key="bench.task",
        spec=f'{{"kind":"report","day":{number}}}',
        steps=Steps().then("ADMITTED", now),
    )
    draft = draft_for(
        f"call-{number}",
        state=S.SLOT_REQUESTED if quota else S.CREATING,
        quotas=("webapi:bench",) if quota else (),
        details=details,
        task_run=f"task-run-{number}",
        at=now,
    )
    record = (await store.intent(draft)).record
    states = WITH_QUOTA if quota else PLAIN
    for state, count in states:
        record = await _moved(store, record, state, count)
    return 1 + len(states)


async def _moved(store: SqlStore, old: Record, state: JobState, count: int) -> Record:
    now = datetime.now(UTC)
    steps = old.details.steps.then(str(state), now)
    more: dict[str, Any] = {"steps": steps}
    if state is S.OVER:
        more |= {"phase": PhaseInfo.success(), "outputs": Outputs(value={"uri": "job#1"})}
    details = replace(old.details, **more)
    handle = '{"name": "a-name-of-some-length"}' if state is S.CREATED else None
    move = Move(old=old, state=state, at=now, handle=handle, details=details, count=count)
    assert await store.move(move) is MoveResult.OK
    return replace(old, state=state, updated_at=now, handle=handle or old.handle, details=details)


# --- the whole engine ------------------------------------------------------------------------


class CountedStore(SqlStore):
    """Counts what the engine writes for its jobs."""

    writes = 0

    async def intent(self, draft: Any) -> Any:
        CountedStore.writes += 1
        return await super().intent(draft)

    async def intents(self, drafts: Sequence[Any]) -> Any:
        CountedStore.writes += len(drafts)
        return await super().intents(drafts)

    async def move(self, move: Move) -> MoveResult:
        CountedStore.writes += 1
        return await super().move(move)


def whole_engine(jobs: int, quota: bool) -> Figures:
    """Jobs that are over at the first read."""
    Memory.over = True
    config = unlimited()
    if quota:
        config = config.model_copy(update={"resource_quotas": {"default": 1_000_000}})
    figures: Figures = {}

    async def all_over() -> None:
        silent = Silent()
        tickets = [
            host.admit(
                request(Number(number=n), task_type="memory", task_run=str(n), reporter=silent)
            )
            for n in range(jobs)
        ]
        for outcome in await asyncio.gather(*(ticket.outcome() for ticket in tickets)):
            assert outcome.value == 1

    with (
        tempfile.TemporaryDirectory() as folder,
        engine(
            Path(folder), [ENTRY], {"default": Connection(engine=config)}, store=CountedStore
        ) as host,
    ):
        host.start()
        with using(figures):
            asyncio.run(all_over())
    # Closed: what the engine writes after it has delivered is written too.
    return figures | {JOBS: jobs / figures[WALL], WRITES: CountedStore.writes / jobs}


# --- the report ------------------------------------------------------------------------------


@contextmanager
def _ledgers(folder: str) -> Generator[dict[str, Callable[[], str]]]:
    """``dict[kind, URL of a fresh one]``."""
    number = itertools.count()

    def fresh_postgres(server: PostgresServer) -> str:
        name = f"bench_{next(number)}"
        server.psql(f"CREATE DATABASE {name}")
        return server.get_uri(name)

    with postgres() as server:
        yield {
            "SQLite": lambda: sqlite_url(Path(folder) / f"{next(number)}.db"),
            "Postgres": partial(fresh_postgres, server),
        }


def run(chosen: Chosen) -> Report:
    sizes = chosen.sizes or (QUICK_AT_ONCE if chosen.quick else AT_ONCE)
    with tempfile.TemporaryDirectory() as folder, _ledgers(folder) as ledgers:

        def on(kind: str, at_once: int, **how: bool) -> Callable[[], Figures]:
            return lambda: in_child(partial(through, **how), ledgers[kind](), at_once)

        cases: dict[tuple[str, str, int], Callable[[], Figures]] = {}
        for kind, at_once in itertools.product(ledgers, sizes):
            cases[kind, "grouped", at_once] = on(kind, at_once)
            if at_once <= 100:
                cases[kind, "a commit per write", at_once] = on(kind, at_once, grouped=False)
        for kind in ledgers:
            cases[kind, "grouped, with a quota", max(sizes)] = on(kind, max(sizes), quota=True)
        measured = by_turns(
            chosen.repetitions, {" ".join(map(str, case)): work for case, work in cases.items()}
        )
        engines = by_turns(
            chosen.repetitions,
            {
                "no quota": partial(in_child, whole_engine, ENGINE_JOBS, False),
                "with a quota": partial(in_child, whole_engine, ENGINE_JOBS, True),
            },
        )

    def of(*case: Any) -> dict[str, Any]:
        return dict(measured[" ".join(map(str, case))])

    shown = (JOBS, WRITES, "commits per job", "CPU us per job")
    best = of("SQLite", "grouped", max(sizes))[JOBS].median
    return Report(
        question="How many jobs per second can the ledger remember, and what does each cost it?",
        tables=[
            Table(
                "the store alone",
                [
                    {"ledger": kind, "how": how, "at once": at_once}
                    | {name: of(kind, how, at_once)[name] for name in shown}
                    for kind, how, at_once in cases
                ],
            ),
            Table(
                f"the whole engine, {ENGINE_JOBS} jobs over a service in memory, SQLite",
                [
                    {"jobs": name, JOBS: each[JOBS], WRITES: each[WRITES]}
                    for name, each in engines.items()
                ],
            ),
        ],
        targets=[
            Target("SQLite, synchronous=FULL: jobs/s", best, 2_000, at_most=False),
            Target("the engine's writes per job", engines["no quota"][WRITES].median, 4),
            Target("with a quota", engines["with a quota"][WRITES].median, 5),
        ],
        plots=[
            Curves(
                "jobs/s of the ledger",
                "jobs on their way at once",
                "jobs/s",
                {
                    kind: [(n, of(kind, "grouped", n)[JOBS].median) for n in sizes]
                    for kind in ("SQLite", "Postgres")
                },
            )
        ],
    )


if __name__ == "__main__":
    main(run, __doc__)
