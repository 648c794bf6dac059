"""A ledger that another version of the package wrote: every revision up and down, with rows in it."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from prefect_webapi.clock import Clock
from prefect_webapi.contract.errors import LedgerFormatTooNew, LedgerUnavailable
from prefect_webapi.contract.phase import PhaseInfo
from prefect_webapi.ledger import schema
from prefect_webapi.ledger.records import Details, JobState, Outputs, QuotaRow, RuntimeRow
from prefect_webapi.ledger.sql import SqlStore
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import ReportJob
from tests.ledger.migrating import REVISIONS, bring_to, revision_of
from tests.ledger.raw import raw
from tests.support.engine import at, run
from tests.support.ledger import another_store, draft_for, moved

WAYS: dict[JobState, tuple[JobState, ...]] = {
    JobState.INTENT: (),
    JobState.SLOT_REQUESTED: (),
    JobState.SLOT_HELD: (),
    JobState.CREATING: (),
    JobState.CREATED: (JobState.CREATED,),
    JobState.CANCELLING: (JobState.CREATED, JobState.CANCELLING),
    JobState.SUSPECT: (JobState.SUSPECT,),
    JobState.OVER: (JobState.CREATED, JobState.OVER),
    JobState.DELIVERED: (JobState.CREATED, JobState.OVER, JobState.DELIVERED),
    JobState.CLOSED: (JobState.CREATED, JobState.OVER, JobState.CLOSED),
}
"""How a record gets into each state."""


async def fill(store: SqlStore) -> None:
    """A job in every state with all that a record can hold, a limit, a process."""
    await store.set_quota("limit", 20)
    over = Details(task_name="näme", phase=PhaseInfo.success(), outputs=Outputs(value=[1, "ü"]))
    for state, way in WAYS.items():
        before = state if not way else JobState.CREATING
        draft = draft_for(state, state=before, quotas=("limit",), weight=2, deadline=None)
        record = (await store.intent(draft)).record
        if way:
            handle, details = '{"name": "häus"}', over if state.is_over else None
            await moved(store, record, *way, handle=handle, details=details)
    await store.ask_cancel([record.key for record in await store.select()], "enough")
    draft = draft_for("somebody's", quotas=())
    runtime = RuntimeRow(
        id="one", host="h", pid=1, born=1234.0625, started=draft.at, last_beat=draft.at
    )
    await store.intent(draft)
    await store.beat(runtime)


async def told(store: SqlStore) -> list[Any]:
    return [await store.select(), await store.quotas(), await store.runtimes()]


async def rows(url: str) -> list[Any]:
    """What no version may lose, whatever else it keeps."""
    lasting = "key, base, ordinal, attempt, state, fence, handle, weight, cancel_reason, details"
    return [
        await raw(url, f"SELECT {lasting} FROM webapi_job ORDER BY key"),
        await raw(url, "SELECT * FROM webapi_claim ORDER BY base, task_run, nth"),
        await raw(url, "SELECT name, live, lim FROM webapi_quota ORDER BY name"),
    ]


async def test_a_ledger_goes_down_and_up_through_every_revision_with_its_rows(
    ledger_url: str,
) -> None:
    """L6: of what this version wrote nothing is lost on the way; a claim made meanwhile is found."""
    async with another_store(ledger_url) as store:
        await fill(store)
        before = await told(store)
    kept = await rows(ledger_url)
    for revision in [*REVISIONS[::-1], *REVISIONS]:
        await bring_to(ledger_url, revision)
        assert await revision_of(ledger_url) == revision
        assert await rows(ledger_url) == kept
    async with another_store(ledger_url) as store:
        assert await told(store) == before
        assert not (await store.intent(draft_for("somebody's"))).made


@pytest.mark.parametrize("revision", REVISIONS)
async def test_each_older_ledger_is_brought_up_to_date_when_it_is_opened(
    ledger_url: str, revision: str
) -> None:
    """L6: by two at once, which then work on it as on a new one."""
    async with another_store(ledger_url) as store:
        await fill(store)
        before = await told(store)
    await bring_to(ledger_url, revision)

    async def draw(name: str) -> None:
        async with another_store(ledger_url) as store:
            await store.intent(draft_for(name))

    await asyncio.gather(draw("one"), draw("two"))
    assert await revision_of(ledger_url) == schema.REVISION
    async with another_store(ledger_url) as store:
        records, *others = await told(store)
        assert [record for record in records if record in before[0]] == before[0]
        assert others == before[1:]
        assert len(records) == len(before[0]) + 2


_JOB_OF_0001 = {
    **{"key": "k1", "base": "b1", "ordinal": 0, "attempt": 1, "state": "CREATED", "fence": 3},
    **{"runtime": "r1", "plugin": "p", "task_type": "t", "connection": "c", "fingerprint": "f"},
    **{"quota": 'webapi:p:c:"odd"', "weight": 1, "counted": 1, "failed": 1, "handle": '"h"'},
    **{"cancel_reason": None, "flow_run": "", "root_run": "", "task_run": "", "deadline": None},
    **{"created_at": 1, "updated_at": 2, "details": '{"format": 1, "task_name": "old"}'},
}


async def test_a_job_that_the_first_version_wrote_is_read(ledger_url: str) -> None:
    """L6, word for word as its columns were then."""
    await bring_to(ledger_url, "0001")
    names = ", ".join(_JOB_OF_0001)
    values = ", ".join(f":{name}" for name in _JOB_OF_0001)
    await raw(ledger_url, f"INSERT INTO webapi_job ({names}) VALUES ({values})", **_JOB_OF_0001)
    await raw(ledger_url, "INSERT INTO webapi_quota VALUES (:name, 1, 4)", name='webapi:p:c:"odd"')
    async with another_store(ledger_url) as store:
        [job] = await store.select()
        assert (job.state, job.fence, job.handle) == (JobState.CREATED, 3, '"h"')
        assert (job.quotas, job.counted) == (('webapi:p:c:"odd"',), True)
        assert job.details.task_name == "old"
        await moved(store, job, JobState.OVER, count=-1)
        assert await store.quotas() == [QuotaRow('webapi:p:c:"odd"', live=0, limit=4)]


async def test_nothing_is_left_of_a_ledger_that_is_taken_away(ledger_url: str) -> None:
    async with another_store(ledger_url) as store:
        await fill(store)
    await bring_to(ledger_url, "base")
    async with another_store(ledger_url) as store:
        assert await told(store) == [[], [], []]


@pytest.mark.parametrize(("older", "newer"), [*pairwise(REVISIONS)])
async def test_an_upgrade_that_fails_half_way_has_changed_nothing(
    ledger_url: str, older: str, newer: str
) -> None:
    """Its statements are one transaction: the version that wrote the ledger can go on with it."""
    async with another_store(ledger_url) as store:
        await fill(store)
    await bring_to(ledger_url, older)
    kept = await rows(ledger_url)

    def fail(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if f"SET version_num='{newer}'" in statement:  # the last one
            raise OSError("the machine stops here")

    event.listen(Engine, "before_cursor_execute", fail)
    try:
        store = SqlStore(ledger_url, clock=Clock())
        with pytest.raises(LedgerUnavailable, match="the machine stops here"):
            await store.open()
    finally:
        event.remove(Engine, "before_cursor_execute", fail)
    assert await revision_of(ledger_url) == older
    assert await rows(ledger_url) == kept
    async with another_store(ledger_url) as store:
        assert len(await store.select()) == len(WAYS) + 1


async def test_a_ledger_of_a_newer_version_lets_no_job_be_made(
    job_server: EmbeddedJobServer, tmp_path: Path, each_ledger: str
) -> None:
    """CASE-203: nothing is sent, and the ledger stays as the newer version wrote it."""
    with at(tmp_path, job_server) as host:
        await run(host, ReportJob(seconds=0.05))
    await raw(each_ledger, f"UPDATE {schema.VERSION_TABLE} SET version_num = '9999'")
    kept = await rows(each_ledger)
    with at(tmp_path, job_server) as host:
        with pytest.raises(LedgerFormatTooNew, match="schema 9999"):
            await run(host, ReportJob(day=2))
        with pytest.raises(LedgerFormatTooNew, match="schema 9999"):
            await run(host, ReportJob(seconds=0.05), execution="2")
    assert await rows(each_ledger) == kept
    assert len(job_server.log("create")) == 1
