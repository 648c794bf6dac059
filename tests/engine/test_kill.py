"""A process is killed between any two acts: the next one finds every job, and makes none twice."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from prefect_webapi.ledger.records import JobState, Record
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import ReportJob
from tests.support.engine_child import End, Work, carry_out, child, hosted
from tests.support.ledger import another_store, sqlite_url

QUOTA = {"resourceQuotas": {"default": 2}}
SPECS = tuple(ReportJob(day=day, seconds=0.15, result=f"report {day}") for day in range(3))


async def records(work: Work) -> list[Record]:
    """What the ledger says, asked by nobody who works on it."""
    async with another_store(sqlite_url(work.folder / "webapi.db")) as store:
        return list(await store.select())


async def places_taken(work: Work) -> int:
    async with another_store(sqlite_url(work.folder / "webapi.db")) as store:
        return sum(row.live for row in await store.quotas())


async def run_again(work: Work) -> list[End]:
    """The same calls of the same run, as a new execution in this process."""
    again = replace(work, execution="execution-2", die_at=None)
    with hosted(again) as host:
        calls = (carry_out(again, host, nth) for nth in range(len(again.specs)))
        return await asyncio.gather(*calls)


def work_at(
    server: EmbeddedJobServer, folder: Path, mood: Literal["keys", "search", "neither"], **more: Any
) -> Work:
    server.behave(mood)
    return Work(folder=folder, server=server.url, task_type=mood, **{"specs": SPECS, **more})


EVERYWHERE = (
    *("KP-01", "KP-06", "KP-08", "KP-09", "KP-10", "KP-11", "KP-11:2", "KP-12", "KP-13"),
    *("KP-14", "KP-16", "KP-17", "KP-18", "KP-19", "KP-20"),
)
WITH_QUOTA = ("KP-02", "KP-03", "KP-04", "KP-05")


@pytest.mark.parametrize("mood", ["keys", "search", "neither"])
@pytest.mark.parametrize(
    ("place", "quota"),
    [*((p, False) for p in EVERYWHERE), *((p, True) for p in (*WITH_QUOTA, *EVERYWHERE))],
)
async def test_every_job_is_made_once_wherever_the_process_dies(
    job_server: EmbeddedJobServer,
    tmp_path: Path,
    mood: Literal["keys", "search", "neither"],
    place: str,
    quota: bool,
) -> None:
    """x"""
    work = work_at(job_server, tmp_path, mood, config=QUOTA if quota else {}, die_at=place)
    with child(work) as first:
        told = first.ends()
        assert first.code == -signal.SIGKILL
    left = {record.details.task_key: record for record in await records(work)}
    unknown = {r.key for r in await records(work) if r.state is JobState.CREATING}
    if mood != "neither":
        unknown = set()
    elif place in ("KP-06", "KP-08"):
        assert unknown
    ends = await run_again(work)

    assert {end.job_key for end in ends if end.code == "CreateOutcomeUnknown"} == unknown
    good = [end for end in ends if end.job_key not in unknown]
    assert [(e.phase, e.data) for e in good] == [("SUCCESS", f"report {e.nth}") for e in good]
    assert {(e.job_key, e.data) for e in told} <= {(e.job_key, e.data) for e in ends}
    made = job_server.stats()
    assert not made.duplicates
    assert made.live == 0 or unknown
    if mood == "neither":
        assert max(Counter(entry.key for entry in job_server.log("create")).values()) == 1
    else:
        assert made.created == len(SPECS)
    assert await places_taken(work) == (len(unknown) if quota else 0)
