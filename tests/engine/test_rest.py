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


async def test_a_job_at_rest_keeps_no_text_and_loses_none(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """Memory: a spec may have 64 KiB. Who is shown the record, and who writes it again, has the whole of it."""
    shown = Shown()
    with at(tmp_path, job_server) as host:
        host.admit(request(SPEC, task_type="keys", reporter=shown))
        await eventually(lambda: "RUNNING" in shown.names, within=10)

        async def look(runtime: Runtime) -> tuple[Record, Record]:
            [job] = live(runtime)
            return job.record, job.whole

        [written] = await records(tmp_path)
        await eventually(lambda: host.perform(look).result(5)[0].handle == "", within=5)
        at_rest, whole = host.perform(look).result(5)
        assert at_rest.details.spec == ""
        assert (whole.handle, whole.details.spec) == (written.handle, written.details.spec)
        assert [step.name for step in whole.details.steps] == ["ADMITTED", "QUEUED", "RUNNING"]

        async def want_it_gone(runtime: Runtime) -> Any:
            [job] = live(runtime)
            await persist(runtime.services, job, Event.END_ASKED, cancel_reason="enough")

        host.perform(want_it_gone).result(5)
        [record] = await records(tmp_path)
    assert all(each.handle == written.handle for each in shown.records)
    assert all(each.details.spec == written.details.spec for each in shown.records)
    assert record.state is JobState.CANCELLING
    assert (record.handle, record.details.spec) == (written.handle, written.details.spec)
    assert record.details.steps == whole.details.steps
