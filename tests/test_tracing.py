"""Spans of remote calls: joined to the caller's, with the job's ids, without secrets; none where nobody wants any."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from prefect_webapi import tracing
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import ReportJob
from tests.support.engine import at, request, run
from tests.support.jobserver import TOKEN
from tests.support.prefect import Scripts
from tests.support.waiting import eventually

ENDLESS = ReportJob(outcome="never")


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """What this process's tracer provider was given; there is none before and after the test."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    monkeypatch.setattr(tracing, "_TRACER", provider.get_tracer("prefect_webapi"))
    return exporter


def _named(spans: Sequence[ReadableSpan], *names: str) -> list[ReadableSpan]:
    return [span for span in spans if span.name in names]


async def test_each_remote_call_is_a_child_of_what_was_current_at_the_call(
    job_server: EmbeddedJobServer, tmp_path: Path, spans: InMemorySpanExporter
) -> None:
    """The engine runs on a thread of its own; the context goes there with the request."""
    begin = trace.get_tracer("user").start_as_current_span
    with at(tmp_path, job_server) as host, begin("task run") as own:
        outcome = await run(host, ReportJob(seconds=0.1), "single", task_run="t-1")
    found = spans.get_finished_spans()
    calls = _named(found, "create single", "get single")
    assert {span.name for span in calls} == {"create single", "get single"}
    for span in calls:
        assert span.kind is SpanKind.CLIENT
        assert span.parent is not None
        assert span.parent.span_id == own.get_span_context().span_id
        assert span.context is not None
        assert span.context.trace_id == own.get_span_context().trace_id
        assert dict(span.attributes or {}) == {
            "prefect_webapi.op": span.name.partition(" ")[0],
            "prefect_webapi.plugin": "single",
            "prefect_webapi.connection": "default",
            "prefect_webapi.job.key": outcome.job_key,
            "prefect.flow_run.id": "run-1",
            "prefect.task_run.id": "t-1",
        }
    inside = {span.context.span_id for span in calls if span.context is not None}
    requests = _named(found, "PUT", "GET")
    assert all(span.parent is not None and span.parent.span_id in inside for span in requests)
    assert {str((span.attributes or {})["server.address"]) for span in requests} == {"127.0.0.1"}
    codes = {str((span.attributes or {})["http.response.status_code"]) for span in requests}
    assert codes <= {"200", "201"}
    assert TOKEN not in "".join(span.to_json() for span in found)


async def test_a_batch_links_to_the_spans_of_its_jobs(
    job_server: EmbeddedJobServer, tmp_path: Path, spans: InMemorySpanExporter
) -> None:
    own: list[int] = []
    with at(tmp_path, job_server) as host:
        for number in range(20):
            with trace.get_tracer("user").start_as_current_span("task run") as span:
                own.append(span.get_span_context().span_id)
                host.admit(request(ENDLESS, task_type="keys", task_run=f"t-{number}"))

        def linked() -> list[ReadableSpan]:
            reads = _named(spans.get_finished_spans(), "get_many keys")
            return [each for each in reads if len(each.links) > 1]

        read = (await eventually(linked, within=10))[0]
    assert {link.context.span_id for link in read.links} <= set(own)
    assert read.parent is None
    assert (read.attributes or {})["prefect_webapi.jobs"] == len(read.links)


async def test_a_failed_call_says_what_kind_and_not_what_was_told(
    job_server: EmbeddedJobServer, tmp_path: Path, spans: InMemorySpanExporter
) -> None:
    job_server.fault("create", status=429, times=1)
    with at(tmp_path, job_server) as host:
        await run(host, ReportJob(seconds=0), "single")
    first, second = _named(spans.get_finished_spans(), "create single")
    assert (first.status.status_code, first.status.description) == (StatusCode.ERROR, None)
    assert (first.attributes or {})["error.type"] == "Throttled"
    assert second.status.status_code is StatusCode.UNSET
    assert not first.events


class BrokenProcessor(SpanProcessor):
    """Somebody else's, and it fails: at a span's begin, or at its end."""

    def __init__(self, at: str) -> None:
        self._at = at

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        if self._at == "start":
            raise RuntimeError("the collector is away")

    def on_end(self, span: ReadableSpan) -> None:
        if self._at == "end":
            raise RuntimeError("the collector's queue is full")


@pytest.mark.parametrize("when", ["start", "end"])
async def test_a_span_processor_that_fails_costs_no_answer_and_is_told_of_once(
    job_server: EmbeddedJobServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    when: str,
) -> None:
    """The answer to a create that is sent once only is the one that must not be lost."""
    provider = TracerProvider()
    provider.add_span_processor(BrokenProcessor(when))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    monkeypatch.setattr(tracing, "_TRACER", provider.get_tracer("prefect_webapi"))
    with at(tmp_path, job_server) as host:
        outcome = await run(host, ReportJob(seconds=0.1), "neither")
    assert outcome.info.phase.name == "SUCCESS"
    assert job_server.stats().created == 1
    assert [each.name for each in caplog.records] == ["prefect_webapi.tracing"]


async def test_without_a_tracer_provider_no_span_is_begun(
    job_server: EmbeddedJobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor are the jobs of a call looked at for one."""
    monkeypatch.setattr(tracing, "_TRACER", None)
    assert not tracing.is_on()
    with at(tmp_path, job_server) as host:
        outcome = await run(host, ReportJob(seconds=0), "single")
    assert outcome.info.phase.name == "SUCCESS"


@pytest.mark.chaos
def test_spans_are_joined_to_those_of_prefects_task_run(
    scripts: Scripts, job_server: EmbeddedJobServer
) -> None:
    """In a real flow: flow run, task run and remote calls are one trace."""
    told = scripts.run(
        f"""
        import json
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
        from prefect import flow
        from pydantic import HttpUrl, SecretStr
        from prefect_webapi_jobserver import JobServer, run_job_sync

        exporter, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        trace.set_tracer_provider(provider)

        @flow
        def nightly():
            block = JobServer(base_url=HttpUrl({job_server.url!r}), token=SecretStr({TOKEN!r}))
            run_job_sync.with_options(connection=block)(day=1)
            run_job_sync.with_options(connection=block).submit(day=2).result()

        if __name__ == "__main__":
            nightly()
            for span in exporter.get_finished_spans():
                print("SPAN", json.dumps({{
                    "name": span.name,
                    "trace": span.context.trace_id,
                    "id": span.context.span_id,
                    "parent": span.parent and span.parent.span_id,
                    "run": span.attributes.get("prefect.task_run.id"),
                    "own": span.attributes.get("prefect.run.id"),
                }}))
        """,
        within=120,
    )
    found = [json.loads(line.removeprefix("SPAN ")) for line in told.splitlines() if "SPAN" in line]
    by_id = {span["id"]: span for span in found}
    creates = [span for span in found if span["name"] == "create job-server"]
    assert len(creates) == 2
    for create in creates:
        task_run = by_id[create["parent"]]
        assert task_run["own"] == create["run"]
        assert task_run["trace"] == create["trace"]
    assert len({span["trace"] for span in creates}) == 1
