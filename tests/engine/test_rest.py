"""What a live job does without between two reads, and has again when somebody looks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect_webapi import PhaseInfo
from prefect_webapi.engine.job import Job, persist
from prefect_webapi.engine.machine import Event
from prefect_webapi.engine.runtime import Runtime
from prefect_webapi.ledger.records import JobState, Record
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import ReportJob
from tests.support.engine import Told, at, request
from tests.support.waiting import eventually
from tests.support.witness import records

SPEC = ReportJob(outcome="never", queued_seconds=0.5, result="kept")


class Shown(Told):
    """Remembers the records that people were shown, too."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Record] = []

    def phase(self, record: Record, info: PhaseInfo, *, waiting_for_quota: bool) -> None:
        super().phase(record, info, waiting_for_quota=waiting_for_quota)
        self.records.append(record)


def live(runtime: Runtime) -> Sequence[Job]:
    return list(runtime._jobs.values())  # pyright: ignore[reportPrivateUsage] - what it holds is the point


async def test_a_job_at_rest_keeps_no_text_of_its_handle_and_loses_none(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """Who is shown the record has its handle, and a write leaves it in the ledger."""
    shown = Shown()
    with at(tmp_path, job_server) as host:
        host.admit(request(SPEC, task_type="keys", reporter=shown))
        await eventually(lambda: "RUNNING" in shown.names, within=10)

        async def look(runtime: Runtime) -> tuple[Record, Record]:
            [job] = live(runtime)
            return job.record, job.shown

        [written] = await records(tmp_path)
        await eventually(lambda: host.perform(look).result(5)[0].handle == "", within=5)
        _, seen = host.perform(look).result(5)
        assert seen.handle == written.handle
        assert [step.name for step in seen.details.steps] == ["ADMITTED", "QUEUED", "RUNNING"]

        async def want_it_gone(runtime: Runtime) -> Any:
            [job] = live(runtime)
            await persist(runtime.services, job, Event.END_ASKED, cancel_reason="enough")

        host.perform(want_it_gone).result(5)
        [record] = await records(tmp_path)
    assert all(each.handle == written.handle for each in shown.records)
    assert record.state is JobState.CANCELLING
    assert (record.handle, record.details.spec) == (written.handle, written.details.spec)
    assert record.details.steps == seen.details.steps


class Untold:
    """What an author has put into a handle that has no JSON form."""


async def test_a_handle_that_its_author_has_changed_harms_nobody(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """The ledger keeps it as create gave it; what it has become is not shown, and the job ends as any other."""
    shown = Shown()
    with at(tmp_path, job_server) as host:
        ticket = host.admit(request(SPEC, task_type="keys", reporter=shown))
        await eventually(lambda: "QUEUED" in shown.names, within=10)

        async def change(runtime: Runtime) -> None:
            [job] = live(runtime)
            job.rest()
            job.handle = job.handle.model_copy(update={"name": Untold()})
            job.report(PhaseInfo.running("on node 7"))
            job.handle = job.handle.model_copy(update={"name": job_server.jobs()[0].name})

        host.perform(change).result(5)
        assert shown.records[-1].handle is None
        job_server.end(job_server.jobs()[0].name, "succeeded")
        outcome = await ticket.outcome()
    assert outcome.value.data == "kept"
    [record] = await records(tmp_path)
    assert record.handle == shown.records[0].handle
