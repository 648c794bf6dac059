"""What a job returns reaches its task whole, once, within bounds, or not at all."""

from __future__ import annotations

import asyncio
import logging
import signal
import tracemalloc
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import pytest

from prefect_webapi import (
    CreateResult,
    JobSpec,
    Phase,
    PhaseInfo,
    RemoteClient,
    StatusContext,
    TaskExecutionContextReader,
    path,
)
from prefect_webapi.ledger.records import Record
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import ReportJob
from prefect_webapi_jobserver.models import JobHandle, JobView
from prefect_webapi_jobserver.plugin import PHASES
from tests.support.engine import at, request, run
from tests.support.engine_child import Work, child
from tests.support.ledger import another_store, ledger_of
from tests.support.plugins import SinglePlugin, entry
from tests.support.waiting import eventually

BIG = ReportJob(seconds=0.1, result="x" * 100_000)
"""Its result is too large for the record and goes to the result storage."""


class TextJob(JobSpec[str]):
    """A job whose result is a text. `kind` names what the author puts."""

    kind: str = ""
    seconds: float = 0.0
    outcome: Literal["succeed", "fail", "fail-first", "never"] = "succeed"
    result: Any = None


class RowsJob(JobSpec[list[int]]):
    """A job whose result is fetched. `kind` names how."""

    kind: str = "pages"
    seconds: float = 0.0
    result: Any = None


class QuietJob(JobSpec[None]):
    """A job that promises no result."""

    seconds: float = 0.0
    result: Any = None


class TextPlugin(SinglePlugin):
    """The author's ways with `output_writer`. Create's answer is the first snapshot."""

    async def create(self, ctx: TaskExecutionContextReader) -> CreateResult[JobHandle, JobView]:
        job = ctx.task_execution_metadata
        spec = ctx.task_reader.read().custom
        spec.pop("kind", None)
        prefix = ctx.output_writer.raw_output_prefix
        made = JobView.model_validate(
            await self._api.put(
                path("jobs", job.generated_name), json={"spec": spec, "labels": {"prefix": prefix}}
            )
        )
        return CreateResult(JobHandle(name=made.name), made)

    def status(self, ctx: StatusContext[JobHandle, JobView]) -> PhaseInfo:
        match ctx.task_reader.read().custom.get("kind"):
            case "nothing":
                pass
            case "twice":
                ctx.output_writer.put("first")
                ctx.output_writer.put("last")
            case "prefix":
                ctx.output_writer.put(ctx.output_writer.raw_output_prefix)
            case _:
                ctx.output_writer.put(ctx.resource.result)
        return PHASES[ctx.resource.state](ctx.resource.message)


class RowsPlugin(TextPlugin):
    """The result is fetched after the end: in pages, from a stream, or from where it is no more."""

    async def outputs(self, ctx: StatusContext[JobHandle, JobView]) -> Any:
        where = path("jobs", ctx.resource_meta.name)
        if ctx.task_reader.read().custom["kind"] == "stream":
            limit = ctx.max_dataset_size_bytes
            api = RemoteClient(ctx.resource.result, max_answer_bytes=limit)
            try:
                return await api.get("/")
            finally:
                await api.aclose()
        rows: list[int] = []
        for page in range(7):
            job = JobView.model_validate(await self._api.get(where, params={"page": page}))
            rows += job.result[page * 10 : page * 10 + 10]
        return rows


TEXT = entry(TextPlugin, "text")
ROWS = entry(RowsPlugin, "rows")


async def recorded(folder: Path) -> list[Record]:
    async with another_store(ledger_of(folder)) as store:
        return list(await store.select())


def stored(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "outputs").rglob("*") if path.is_file())


@pytest.mark.parametrize("result", ["small", "x" * 100_000])
async def test_a_result_outlives_its_process(
    job_server: EmbeddedJobServer, tmp_path: Path, result: str
) -> None:
    """CASE-232: small ones in the record, large ones in the storage; the next run asks nobody."""
    spec = ReportJob(seconds=0.1, result={"rows": [1, result]})
    with at(tmp_path, job_server) as host:
        first = await run(host, spec)
    asked = len(job_server.log())
    with at(tmp_path, job_server) as host:
        second = await run(host, spec, execution="2")
    assert first.value.data == {"rows": [1, result]}
    assert second.value == first.value
    assert second.info.phase is Phase.SUCCESS
    assert len(job_server.log()) == asked
    assert len(stored(tmp_path)) == int(len(result) > 1000)


class FloatsJob(JobSpec[list[float]]):
    """A job whose result is numbers, if that."""

    seconds: float = 0.0
    result: Any = None


class FloatJob(JobSpec[float]):
    """A `FloatsJob` after somebody has edited what it returns."""

    seconds: float = 0.0
    result: Any = None


class FloatsPlugin(TextPlugin):
    def status(self, ctx: StatusContext[JobHandle, JobView]) -> PhaseInfo:
        ctx.output_writer.put([float(each) for each in ctx.resource.result])
        return PHASES[ctx.resource.state](ctx.resource.message)


FLOATS = entry(FloatsPlugin, "floats")


async def test_a_result_that_is_no_number_is_the_same_for_the_next_run(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    spec = FloatsJob(result=["nan", "inf", "-inf", "1.5"])
    with at(tmp_path, job_server, entries=[FLOATS]) as host:
        first = await run(host, spec, "floats", task_run="t")
        second = await run(host, spec, "floats", task_run="t", execution="2")
    assert str(first.value) == str(second.value) == "[nan, inf, -inf, 1.5]"
    assert job_server.stats().created == 1


async def test_a_stored_result_that_an_edited_spec_no_longer_promises_says_what_to_do(
    job_server: EmbeddedJobServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = {"seconds": 0.0, "result": ["1.5"]}
    with at(tmp_path, job_server, entries=[FLOATS]) as host:
        await run(host, FloatsJob.model_validate(kept), "floats", task_run="t")
        spec = FloatJob.model_validate(kept)
        outcome = await run(host, spec, "floats", task_run="t", execution="2")
    assert outcome.info.err is not None
    assert (outcome.info.err.code, outcome.info.kind) == ("OutputsInvalid", "user")
    assert "Input should be a valid number" in outcome.info.reason
    assert "reuse_results=False" in outcome.info.reason
    assert job_server.stats().created == 1
    assert "failed in the engine" not in caplog.text


async def test_a_result_that_the_spec_does_not_promise_is_dropped(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-233."""
    with at(tmp_path, job_server, entries=[TEXT]) as host:
        outcome = await run(host, QuietJob(result="put all the same"), "text")
    assert outcome.info.phase is Phase.SUCCESS
    assert outcome.value is None
    [record] = await recorded(tmp_path)
    assert record.details.outputs is None


async def test_a_promised_result_that_nobody_put_is_a_failure_to_retry(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-234."""
    with at(tmp_path, job_server, entries=[TEXT]) as host:
        outcome = await run(host, TextJob(kind="nothing"), "text")
    assert outcome.info.phase is Phase.RETRYABLE_FAILURE
    assert outcome.info.err is not None
    assert outcome.info.err.code == "OutputsNotFound"
    assert outcome.info.kind == "user"


@pytest.mark.parametrize(("more", "fits"), [(-1, True), (0, True), (1, False)])
@pytest.mark.parametrize("limit", [1_000, 100_000])
async def test_the_bound_on_results_includes_itself(
    job_server: EmbeddedJobServer, tmp_path: Path, limit: int, more: int, fits: bool
) -> None:
    """CASE-235, REQ-69: of what is larger nothing is stored."""
    text = "x" * (limit + more - len('""'))
    with at(tmp_path, job_server, entries=[TEXT], maxDatasetSizeBytes=limit) as host:
        outcome = await run(host, TextJob(result=text), "text")
    if fits:
        assert outcome.value == text
        assert len(stored(tmp_path)) == int(limit > 64 * 1024)
        return
    assert outcome.info.phase is Phase.PERMANENT_FAILURE
    assert outcome.info.err is not None
    assert (outcome.info.err.code, outcome.info.kind) == ("OutputSizeExceeded", "user")
    assert str(limit + 1) in outcome.info.reason
    assert str(limit) in outcome.info.reason
    assert outcome.value is None
    assert not stored(tmp_path)


@asynccontextmanager
async def endless_stream() -> AsyncGenerator[tuple[str, list[int]]]:
    """A server whose answers never end: its address, and the bytes it has sent."""
    sent: list[int] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + b"1" * 0x10000 + b"\r\n"
        try:
            while True:
                writer.write(chunk)
                await writer.drain()
                sent.append(0x10000)
        except ConnectionError:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", sent


async def test_an_endless_stream_is_cut_at_the_bound(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-236, REQ-69: it is counted while it is read, and asked for once."""
    limit = 4 * 1024 * 1024
    async with endless_stream() as (url, sent):
        with at(tmp_path, job_server, entries=[ROWS], maxDatasetSizeBytes=limit) as host:
            await run(host, RowsJob(result=list(range(70))), "rows")  # what is loaded once
            tracemalloc.start()
            try:
                outcome = await run(host, RowsJob(kind="stream", result=url), "rows")
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
    assert outcome.info.phase is Phase.PERMANENT_FAILURE
    assert outcome.info.err is not None
    assert (outcome.info.err.code, outcome.info.kind) == ("OutputSizeExceeded", "user")
    assert str(limit) in outcome.info.reason
    assert sum(sent) < limit + 16 * 1024 * 1024
    assert peak < limit + 16 * 1024 * 1024


async def test_a_storage_that_hiccups_is_asked_again(
    job_server: EmbeddedJobServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """CASE-237: the job is not run again."""
    in_the_way = tmp_path / "outputs"
    in_the_way.write_text("no folder can be made here")
    with at(tmp_path, job_server) as host, caplog.at_level(logging.WARNING):
        ticket = host.admit(request(BIG, task_type="keys"))
        await eventually(lambda: caplog.text.count("storing the result of job") >= 2, within=10)
        in_the_way.unlink()
        outcome = await ticket.outcome()
    assert outcome.info.phase is Phase.SUCCESS
    assert outcome.value.data == BIG.result
    assert job_server.stats().created == 1
    assert len(stored(tmp_path)) == 1


async def test_a_storage_that_stays_broken_is_given_up_at_the_deadline(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """A finished job waits for its storage no longer than its task may take."""
    (tmp_path / "outputs").write_text("no folder can be made here")
    with at(tmp_path, job_server, deadline="800ms", cancelGrace="5s") as host:
        outcome = await run(host, BIG)
        # Then the record is closed, too: nothing goes on trying.
        await eventually(lambda: _states(tmp_path), within=5)
    assert outcome.info.err is not None
    assert outcome.info.err.code == "Timeout"
    assert job_server.stats().created == 1


async def _states(folder: Path) -> bool:
    return all(record.state == "CLOSED" for record in await recorded(folder))


async def test_the_last_put_wins(job_server: EmbeddedJobServer, tmp_path: Path) -> None:
    """CASE-238, REQ-66."""
    with at(tmp_path, job_server, entries=[TEXT]) as host:
        outcome = await run(host, TextJob(kind="twice"), "text")
    assert outcome.value == "last"


async def test_what_was_put_before_a_failure_is_seen_by_nobody(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-239, REQ-66."""
    spec = TextJob(kind="twice", outcome="fail", seconds=0.2)
    with at(tmp_path, job_server, entries=[TEXT]) as host:
        outcome = await run(host, spec, "text")
    assert outcome.info.phase.is_failure
    assert outcome.value is None
    [record] = await recorded(tmp_path)
    assert record.details.outputs is None
    assert not stored(tmp_path)


async def test_each_attempt_has_a_prefix_of_its_own_and_keeps_it(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-240, REQ-66: also when another process takes the attempt up."""
    spec = TextJob(kind="prefix", outcome="fail-first", seconds=0.2)
    attempt: dict[str, Any] = {"task_type": "text", "attempt": 2, "max_attempts": 2}
    with at(tmp_path, job_server, entries=[TEXT]) as host:
        await run(host, spec, "text", max_attempts=2, task_run="t")
        host.admit(request(spec, task_run="t", **attempt))
        await eventually(lambda: job_server.stats().created == 2, within=5)
    with at(tmp_path, job_server, entries=[TEXT]) as host:
        outcome = await host.admit(request(spec, execution="2", task_run="t2", **attempt)).outcome()
    first, second = (job.labels["prefix"] for job in job_server.jobs())
    assert first != second
    assert outcome.value == second
    assert job_server.stats().created == 2


async def test_a_result_of_many_pages_is_whole_although_one_page_failed(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-241: and no row is there twice."""
    job_server.fault("get", times=4)  # four good pages
    job_server.fault("get", status=500)
    with at(tmp_path, job_server, entries=[ROWS]) as host:
        outcome = await run(host, RowsJob(result=list(range(70))), "rows")
    assert outcome.info.phase is Phase.SUCCESS
    assert outcome.value == list(range(70))
    assert [entry.status for entry in job_server.log("get")].count(500) == 1
    assert len(job_server.log("get")) > 7
    assert job_server.stats().created == 1


async def test_a_process_that_is_killed_while_it_stores_leaves_no_half_result(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-242: the next one stores it whole, in the same place."""
    work = Work(folder=tmp_path, server=job_server.url, specs=(BIG,), execution="1", die_at="KP-15")
    with child(work) as dying:
        assert dying.ends() == []
        assert dying.code == -signal.SIGKILL
    [half] = stored(tmp_path)
    assert half.stat().st_size < len(BIG.result)
    with at(tmp_path, job_server) as host:
        outcome = await run(host, BIG, execution="2")
    assert outcome.info.phase is Phase.SUCCESS
    assert outcome.value.data == BIG.result
    [whole] = stored(tmp_path)
    assert whole.stat().st_size > len(BIG.result)
    assert job_server.stats().created == 1


async def test_a_result_that_the_service_has_no_more_is_a_failure_to_read(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-243: by nobody's fault, and never an empty success."""
    job_server.fault("get", status=404, body={"message": "kept for 24 hours"}, times=None)
    with at(tmp_path, job_server, entries=[ROWS]) as host:
        outcome = await run(host, RowsJob(result=list(range(70))), "rows")
    assert outcome.info.phase is Phase.PERMANENT_FAILURE
    assert outcome.info.err is not None
    assert (outcome.info.err.code, outcome.info.kind) == ("ResultExpired", "system")
    assert "kept for 24 hours" in outcome.info.reason


async def test_a_stored_result_that_is_gone_is_a_failure_to_read(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-243: when a later run asks for it."""
    with at(tmp_path, job_server) as host:
        await run(host, BIG)
        [file] = stored(tmp_path)
        file.unlink()
        outcome = await run(host, BIG, execution="2")
    assert outcome.info.err is not None
    assert (outcome.info.err.code, outcome.info.kind) == ("ResultExpired", "system")
    assert "reuse_results=False" in outcome.info.reason
    assert outcome.value is None


async def test_a_result_that_is_not_what_the_spec_promises_is_refused(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """A number is no text."""
    with at(tmp_path, job_server, entries=[TEXT]) as host:
        outcome = await run(host, TextJob(result=42), "text")
    assert outcome.info.phase is Phase.PERMANENT_FAILURE
    assert outcome.info.err is not None
    assert outcome.info.err.code == "OutputsInvalid"


async def test_a_cancel_while_the_result_is_fetched_comes_too_late(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """REQ-42: the job was seen over before; nothing is deleted, and nothing is started."""
    job_server.fault("get", delay=1.0)
    with at(tmp_path, job_server, entries=[ROWS]) as host:
        ticket = host.admit(request(RowsJob(result=list(range(70))), task_type="rows"))
        await eventually(lambda: job_server.log("get"), within=5)
        ticket.cancel("no longer wanted")
        outcome = await ticket.outcome()
    assert outcome.info.phase is Phase.SUCCESS
    assert outcome.value == list(range(70))
    assert not job_server.log("delete")
    assert job_server.stats().created == 1
