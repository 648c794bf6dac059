"""What a job returns that the sweeper saw end: the call that comes back gets it, as if nobody had looked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import ConfigDict

from prefect_webapi import (
    JobSpec,
    Phase,
    PluginEntry,
    RemoteUserError,
    StatusContext,
    TaskExecutionContextReader,
    path,
)
from prefect_webapi.engine.call import Call
from prefect_webapi.engine.faults import arm
from prefect_webapi.engine.host import Host
from prefect_webapi.engine.reaper import sweep
from prefect_webapi.engine.runtime import Runtime
from prefect_webapi.ledger.records import JobState, Record
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi.testing.engine import engine as given_secrets
from prefect_webapi_jobserver import JobServer, JobServerPlugin, Report, ReportJob
from prefect_webapi_jobserver.models import JobHandle, JobView
from tests.support.engine import Told, at, block, request, run
from tests.support.waiting import eventually
from tests.support.witness import records

QUOTA = {"resourceQuotas": {"default": 1}}


class Query(ReportJob):
    """`sql` may be longer than what the ledger keeps of a spec."""

    sql: str


class QueryPlugin(JobServerPlugin):
    """What is fetched depends on the spec, as at most services that run queries."""

    async def create(self, ctx: TaskExecutionContextReader) -> JobHandle:
        job = ctx.task_execution_metadata
        spec = ctx.spec(Query).model_dump(mode="json", exclude={"sql"})
        await self._api.put(
            path("jobs", job.generated_name), json={"spec": spec, "fingerprint": job.fingerprint}
        )
        return JobHandle(name=job.generated_name)

    async def outputs(self, ctx: StatusContext[JobHandle, JobView]) -> Any:
        assert ctx.spec(Query).sql
        return {"uri": ctx.resource.link, "data": ctx.resource.result}


class LooseJob(JobSpec[Any]):
    """What the entry says of specs is less than what the task's own says."""

    model_config = ConfigDict(extra="allow")


def queries(
    spec: type[JobSpec[Any]] = Query, plugin: type[QueryPlugin] = QueryPlugin
) -> PluginEntry[JobServer]:
    return PluginEntry(
        id="queries",
        supported_task_types=["queries"],
        connection=JobServer,
        spec=spec,
        plugin_loader=lambda setup: plugin(setup.connection),
    )


async def left_over(
    folder: Path, server: EmbeddedJobServer, spec: Query, entry: PluginEntry[JobServer]
) -> Record:
    """A job that ended well after its process had."""
    with at(folder, server, QUOTA, entries=[entry]) as host:
        told = Told()
        host.admit(request(spec, task_type="queries", task_run="t", reporter=told))
        await eventually(lambda: "RUNNING" in told.names, within=20)
    await eventually(lambda: server.stats().live == 0, within=20)
    [record] = await records(folder)
    return record


def _unheard(say: object) -> None:
    """The caller says nothing."""


def come(runtime: Runtime, record: Record) -> Call:
    """A call comes to a swept job, at this very moment."""
    call = Call(request(Query(sql="x"), task_type="queries"), _unheard)
    runtime._attach(call, runtime._jobs[record.key])  # pyright: ignore[reportPrivateUsage]
    return call


async def adopted(host: Host, record: Record, *, come_at: str = "") -> list[Call]:
    """Have the sweeper look after a job that nobody wants; `come_at`: where a call comes to it."""
    calls: list[Call] = []

    async def adopt(runtime: Runtime) -> None:
        def reach(place: str) -> None:
            if place == come_at:
                arm(None)
                calls.append(come(runtime, record))

        arm(reach)
        loaded = await runtime.services.plugins.get("queries", None, "default")
        await runtime.adopt(record, loaded)

    await asyncio.wrap_future(host.perform(adopt))
    return calls


@pytest.mark.parametrize("size", [10, 70_000])
async def test_a_success_that_a_sweep_saw_is_one_for_the_run_that_comes_back(
    job_server: EmbeddedJobServer, tmp_path: Path, size: int
) -> None:
    """Of a spec that was not kept nothing can be fetched: its job waits for its caller."""
    spec = Query(seconds=0.5, result=7, sql="x" * size)
    record = await left_over(tmp_path, job_server, spec, queries())
    with at(tmp_path, job_server, QUOTA, entries=[queries()], sweeps=False) as host:
        report = await asyncio.wrap_future(host.perform(partial(sweep, stay=True)))
        assert len(report.jobs) == 1

        async def is_left_alone(runtime: Runtime) -> bool:
            return not runtime.drives(record.key)

        await eventually(lambda: asyncio.wrap_future(host.perform(is_left_alone)), within=20)
        outcome = await run(host, spec, "queries", task_run="t", execution="execution-2")
    assert outcome.info.phase is Phase.SUCCESS
    assert outcome.value == Report(uri=outcome.value.uri, data=7)
    assert job_server.stats().created == 1


async def test_an_orphan_whose_result_nobody_could_fetch_says_so(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """It is closed as the success that it is; who comes back all the same is told what to do."""
    spec = Query(seconds=0.5, result=7, sql="x" * 70_000)
    record = await left_over(tmp_path, job_server, spec, queries())
    with at(tmp_path, job_server, QUOTA, entries=[queries()], sweeps=False) as host:
        await adopted(host, record)

        async def is_closed() -> bool:
            [found] = await records(tmp_path)
            return found.state is JobState.CLOSED

        await eventually(is_closed, within=20)
        [found] = await records(tmp_path)
        assert found.details.phase is not None
        assert found.details.phase.phase is Phase.SUCCESS
        outcome = await run(host, spec, "queries", task_run="t", execution="execution-2")
    assert outcome.info.err is not None
    assert outcome.info.err.code == "ResultExpired"
    assert "reuse_results=False" in outcome.info.reason


@pytest.mark.parametrize("place", ["KP-16", "KP-17"])
async def test_a_call_that_comes_while_a_swept_result_is_kept_gets_what_its_spec_promises(
    job_server: EmbeddedJobServer, tmp_path: Path, place: str
) -> None:
    """The sweeper knew less of the result's type than the call."""
    entry = queries(LooseJob)
    spec = Query(seconds=0.5, result=7, sql="x")
    record = await left_over(tmp_path, job_server, spec, entry)
    with at(tmp_path, job_server, QUOTA, entries=[entry], sweeps=False) as host:
        try:
            calls = await adopted(host, record, come_at=place)
            await eventually(lambda: calls and not calls[0].is_waiting, within=20)
        finally:
            arm(None)
    assert isinstance(calls[0].result().value, Report)
    assert calls[0].result().value.data == 7


class EchoPlugin(QueryPlugin):
    """The service echoes a secret that it was sent, after a call has come for the job."""

    before: ClassVar[list[Callable[[], None]]] = []

    async def outputs(self, ctx: StatusContext[JobHandle, JobView]) -> Any:
        secret = await ctx.secret_manager.get("DB_PASSWORD")
        for come_first in EchoPlugin.before:
            come_first()
        raise RemoteUserError(f"no result for {secret}")


async def test_a_call_that_comes_to_a_swept_job_hears_no_secret_that_the_sweeper_looked_up(
    job_server: EmbeddedJobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_PASSWORD", "canary-of-the-sweeper")
    entry = queries(plugin=EchoPlugin)
    record = await left_over(tmp_path, job_server, Query(seconds=0.5, sql="x"), entry)
    blocks = {"default": block(job_server, QUOTA)}
    calls: list[Call] = []
    with given_secrets(tmp_path, [entry], blocks, sweeps=False) as host:

        async def adopt(runtime: Runtime) -> None:
            EchoPlugin.before[:] = [lambda: calls.append(come(runtime, record))]
            loaded = await runtime.services.plugins.get("queries", None, "default")
            await runtime.adopt(record, loaded)

        await asyncio.wrap_future(host.perform(adopt))
        await eventually(lambda: calls and not calls[0].is_waiting, within=20)
    assert calls[0].result().info.reason == "no result for ***"
