"""A call whose job another process took while create was under way enters anew, with all that it was told before."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

from prefect_webapi import Phase
from prefect_webapi.clock import Clock
from prefect_webapi.contract.phase import PhaseInfo
from prefect_webapi.engine.liveness import this_process
from prefect_webapi.ledger.records import JobState, Move, MoveResult, Record
from prefect_webapi.ledger.sql import SqlStore
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import ReportJob
from tests.support.engine import at, request
from tests.support.ledger import another_store, ledger_of
from tests.support.waiting import eventually
from tests.support.witness import records

ENDLESS = ReportJob(outcome="never")


async def taken_by_other(store: SqlStore, record: Record) -> Record:
    """The record as another process has taken it."""
    move = Move(
        old=record, state=record.state, at=record.updated_at, take_over=True, runtime="other"
    )
    assert await store.move(move) is MoveResult.OK
    return replace(record, fence=record.fence + 1, runtime="other")


async def test_a_cancelled_call_that_lost_its_job_gets_no_new_one(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """Its process stood still while create was away, and a sweeper ended the job and closed its record."""
    job_server.fault("create", delay=2, times=1)
    with at(tmp_path, job_server, cancelGrace="20s") as host:
        ticket = host.admit(request(ENDLESS, task_type="keys", task_run="t"))
        await eventually(lambda: job_server.log("create"), within=20)
        ticket.cancel("the flow run was cancelled")
        await asyncio.sleep(0.5)
        [record] = await records(tmp_path)
        async with another_store(ledger_of(tmp_path)) as store:
            now = record.updated_at
            taken = await taken_by_other(store, record)
            ended = replace(
                record.details, phase=PhaseInfo.aborted("orphan"), orphaned=True, spec=None
            )
            over = Move(old=taken, state=JobState.OVER, at=now, details=ended)
            assert await store.move(over) is MoveResult.OK
            closed = Move(old=replace(taken, state=over.state), state=JobState.CLOSED, at=now)
            assert await store.move(closed) is MoveResult.OK
        outcome = await asyncio.wait_for(ticket.outcome(), 15)
        assert outcome.info.phase is Phase.ABORTED
        assert job_server.stats().created == 1


async def test_a_call_that_lost_its_job_and_follows_hears_that_the_process_ends(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    job_server.fault("create", delay=1, times=1)
    told = threading.Event()
    with at(tmp_path, job_server) as host:
        ticket = host.admit(request(ENDLESS, task_type="keys", task_run="t"))
        ticket.when_over(told.set)
        await eventually(lambda: job_server.log("create"), within=20)
        [record] = await records(tmp_path)
        async with another_store(ledger_of(tmp_path)) as store:
            await store.beat(replace(this_process(Clock().now()), id="other"))
            await taken_by_other(store, record)
        await asyncio.sleep(2)  # create has answered, and its write is lost
        assert not told.is_set()
    assert told.is_set()
