"""The public API as users write it. Checked by pyright, not run: wrong uses must be refused."""

import asyncio
from datetime import timedelta
from typing import assert_type

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from pydantic import BaseModel

from prefect_webapi.contract.task import JobSpec
from prefect_webapi.tasks import RemoteTask, run_key, sync_task_for, task_for, webapi_task


class Report(BaseModel):
    uri: str


class ReportJob(JobSpec[Report]):
    kind: str
    day: int = 0


run_job = task_for("job-server", ReportJob, name="run job", retries=2)
run_job_sync = sync_task_for("job-server", ReportJob, deadline=timedelta(minutes=5))


@webapi_task("job-server", connection="prod", tags=["nightly"], timeout_seconds=60)
async def build_index(days: int) -> ReportJob:
    return ReportJob(kind="index", day=days)


@webapi_task("job-server")
def build_index_sync(days: int, *, kind: str = "index") -> ReportJob:
    return ReportJob(kind=kind, day=days)


@flow
async def async_flow() -> None:
    assert_type(await run_job(kind="report", day=1), Report)
    assert_type(await build_index(3), Report)
    first, second = await asyncio.gather(run_job(kind="a"), build_index(days=2))
    assert_type(first, Report)
    assert_type(second, Report)
    with run_key("2026-11-24"):
        job = run_job.with_options(connection=None, retries=2, on_exit="leave")
    assert_type((await job(kind="report")).uri, str)
    assert_type(run_job.submit(kind="report"), PrefectFuture[Report])
    assert_type(build_index.submit(3).result(), Report)
    assert_type(build_index_sync(3), Report)
    build_index.map([1, 2, 3])
    build_index.delay(3)

    await run_job(kind=1)  # pyright: ignore[reportArgumentType, reportCallIssue] # a wrong type
    await run_job(day=1)  # pyright: ignore[reportCallIssue] # a missing argument
    await build_index("three")  # pyright: ignore[reportArgumentType, reportCallIssue] # a wrong type
    run_job.submit(kind=1)  # pyright: ignore[reportArgumentType, reportCallIssue] # a wrong type
    run_job.with_options(conection="prod")  # pyright: ignore[reportCallIssue] # a misspelt option
    run_job.with_options(on_exit="stay")  # pyright: ignore[reportArgumentType] # a wrong word
    print((await build_index(3)).url)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownArgumentType] # a wrong field


@flow
def sync_flow() -> None:
    assert_type(run_job_sync(kind="report"), Report)
    assert_type(build_index_sync(3), Report)
    assert_type(build_index_sync.submit(3), PrefectFuture[Report])
    assert_type(
        build_index_sync.submit(3, wait_for=[run_job_sync.submit(kind="a")]).result(), Report
    )
    assert_type(build_index_sync.submit(3, return_state=True), State[Report])
    assert_type(build_index_sync.with_options(deadline=timedelta(hours=1))(3), Report)
    task: RemoteTask[[int], Report] = webapi_task("job-server")(_describe)
    assert_type(task(1), Report)

    build_index_sync(3, sort="index")  # pyright: ignore[reportCallIssue] # an unknown argument
    run_job_sync(kind=3)  # pyright: ignore[reportArgumentType] # a wrong type


def _describe(day: int) -> ReportJob:
    return ReportJob(kind="report", day=day)


def _not_a_spec(day: int) -> str:
    return str(day)


webapi_task("job-server")(_not_a_spec)  # pyright: ignore[reportArgumentType, reportCallIssue] # describes no job
task_for("job-server", str)  # pyright: ignore[reportArgumentType] # no spec
webapi_task("job-server", retries="two")  # pyright: ignore[reportArgumentType] # a wrong type
