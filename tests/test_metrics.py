"""What is counted, under which names, and that counting never gets in the way."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import urllib.request
from itertools import count
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
from prefect import flow
from prefect.settings import (
    PREFECT_CLIENT_METRICS_ENABLED,
    PREFECT_CLIENT_METRICS_PORT,
    temporary_settings,
)
from prefect.utilities.services import start_client_metrics_server, stop_client_metrics_server
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest, start_http_server

from prefect_webapi._prefect import service
from prefect_webapi.engine.host import Ticket
from prefect_webapi.metrics import METRICS, SERIES_PER_METRIC, Metrics, served
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import ReportJob, run_job
from tests.support.engine import at, block, request, run
from tests.support.prefect import free_port, prefect_leaks
from tests.support.waiting import eventually


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_what_was_counted_can_be_read_whole_or_by_label(registry: CollectorRegistry) -> None:
    """CASE-245, CASE-248: exact counts."""
    metrics = Metrics(registry)
    metrics.count("throttled_total", plugin="a", op="read")
    metrics.count("throttled_total", 2, plugin="a", op="write")
    metrics.count("throttled_total", plugin="b", op="read")
    metrics.observe("call_seconds", 0.5, plugin="a", op="get")
    metrics.observe("call_seconds", 1.5, plugin="a", op="get")
    metrics.set("tracked_jobs", 7, plugin="a")
    metrics.add("waiting_jobs", 3, plugin="a")
    metrics.add("waiting_jobs", -2, plugin="a")

    assert metrics.value("throttled_total") == 4
    assert metrics.value("throttled_total", plugin="a") == 3
    assert metrics.value("throttled_total", plugin="a", op="read") == 1
    assert metrics.value("throttled_total", plugin="nobody") == 0
    assert metrics.value("call_seconds_count", plugin="a") == 2
    assert metrics.value("call_seconds_sum") == 2.0
    assert metrics.value("tracked_jobs", plugin="a") == 7
    assert metrics.value("waiting_jobs") == 1


def test_the_published_names_carry_our_prefix_and_the_plugin(registry: CollectorRegistry) -> None:
    """CASE-245."""
    Metrics(registry).count("calls_total", plugin="job-server", op="get", outcome="ok")
    told = generate_latest(registry).decode()
    assert 'prefect_webapi_calls_total{op="get",outcome="ok",plugin="job-server"} 1.0' in told


@pytest.mark.parametrize("name", sorted(METRICS))
def test_every_declared_metric_can_be_counted(name: str, registry: CollectorRegistry) -> None:
    """REQ-77."""
    metrics = Metrics(registry)
    metric = METRICS[name]
    labels = dict.fromkeys(metric.labels, "x")
    match metric.kind:
        case "counter":
            metrics.count(name, **labels)
            assert metrics.value(name) == 1
        case "gauge":
            metrics.set(name, 1, **labels)
            assert metrics.value(name) == 1
        case "histogram":
            metrics.observe(name, 1, **labels)
            assert metrics.value(f"{name}_count") == 1


def test_no_declared_label_could_hold_a_job_id() -> None:
    """CASE-249: the only labels there are have few values."""
    labels = {label for metric in METRICS.values() for label in metric.labels}
    assert labels == {"plugin", "op", "outcome", "phase", "cause"}


def test_a_name_or_label_that_is_not_declared_is_an_error(registry: CollectorRegistry) -> None:
    """REQ-77: a typo is found by the first test that runs over it, with or without Prometheus."""
    metrics = Metrics(registry)
    with pytest.raises(ValueError, match="no counter is called 'cals_total'"):
        metrics.count("cals_total", plugin="a")
    with pytest.raises(ValueError, match="no gauge is called 'calls_total'"):
        metrics.set("calls_total", 1, plugin="a")
    with pytest.raises(ValueError, match="has the labels"):
        metrics.count("calls_total", plugin="a", op="get", outcome="ok", job="wa-1")
    with pytest.raises(ValueError, match="no metric is called"):
        metrics.value("cals_total")


def test_a_second_engine_in_the_same_process_goes_on_counting() -> None:
    """CASE-246: Prometheus refuses a name twice; who made it first keeps it."""
    first, second = Metrics(), Metrics()
    before = first.value("evictions_total", plugin="test-metrics")
    first.count("evictions_total", plugin="test-metrics")
    second.count("evictions_total", plugin="test-metrics")
    assert first.value("evictions_total", plugin="test-metrics") == before + 2
    assert b"prefect_webapi_evictions_total" in generate_latest(REGISTRY)


def test_a_plugins_own_metrics_begin_with_its_id(registry: CollectorRegistry) -> None:
    """CASE-039, CASE-245, REQ-77."""
    scope = Metrics(registry).scope("job-server")
    scope.count("rows_total", 5, table="a")
    scope.count("starts_total")
    scope.observe("wait_seconds", 2.0)
    assert registry.get_sample_value("job_server_rows_total", {"table": "a"}) == 5
    assert registry.get_sample_value("job_server_starts_total") == 1
    assert registry.get_sample_value("job_server_wait_seconds_sum") == 2.0


def test_plugins_never_count_into_each_others_metrics(registry: CollectorRegistry) -> None:
    """CASE-246: not even those whose ids look alike to Prometheus, nor one that is called like us."""
    metrics = Metrics(registry)
    for plugin in ("my-plugin", "my_plugin", "prefect-webapi", "7up"):
        metrics.scope(plugin).count("rows_total")
        metrics.scope(plugin).count("rows_total")
    counts = [
        sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name.endswith("rows_total")
    ]
    assert counts == [2] * 4
    assert registry.get_sample_value("my_plugin_rows_total") == 2
    assert registry.get_sample_value("_7up_rows_total") == 2


def test_a_label_with_endless_values_is_cut_off(registry: CollectorRegistry) -> None:
    """CASE-249: a plugin that labels by job does not fill the memory."""
    scope = Metrics(registry).scope("careless")
    for number in range(10_000):
        scope.count("jobs_total", job=f"job-{number}")
    samples = [s for f in registry.collect() for s in f.samples if s.name == "careless_jobs_total"]
    assert len(samples) == SERIES_PER_METRIC + 1
    assert sum(s.value for s in samples) == 10_000


def test_a_plugins_mistake_is_logged_once_and_fails_nothing(
    registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    """CASE-245: other labels than before, another kind than before, a name that is taken."""
    scope = Metrics(registry).scope("clumsy")
    with caplog.at_level(logging.WARNING, "prefect_webapi.metrics"):
        scope.count("rows_total", table="a")
        scope.count("rows_total", file="b")
        scope.count("rows_total", file="b")
        scope.observe("rows_total", 1.0, table="a")
        scope.count("other_total", -1)
    assert [r.getMessage().split(" is not counted")[0] for r in caplog.records] == [
        "metric clumsy_rows_total of plugin clumsy",
        "metric clumsy_other_total of plugin clumsy",
    ]
    assert registry.get_sample_value("clumsy_rows_total", {"table": "a"}) == 1


def test_without_prometheus_client_counting_does_nothing() -> None:
    """CASE-244."""
    script = """
import sys
sys.modules["prometheus_client"] = None  # as if it were not installed
from prefect_webapi.metrics import Metrics
metrics = Metrics()
metrics.count("evictions_total", plugin="a")
metrics.set("tracked_jobs", 1, plugin="a")
metrics.add("tracked_jobs", 1, plugin="a")
metrics.observe("poll_lag_seconds", 1, plugin="a")
metrics.scope("a").count("x_total", label="b")
metrics.scope("a").observe("y_seconds", 1)
assert metrics.value("tracked_jobs") == 0
try:
    metrics.count("typo", plugin="a")
except ValueError:
    print("works")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout == "works\n", done.stderr


@pytest.mark.chaos
def test_an_engine_runs_jobs_where_prometheus_client_is_broken(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-244: Prefect itself can't do without it; one that fails us at import costs the numbers only."""
    script = f"""
import asyncio, sys, pathlib
import prefect.main

whole = sys.modules["prometheus_client"]
sys.modules["prometheus_client"] = None
from prefect_webapi.metrics import served
sys.modules["prometheus_client"] = whole

from prefect_webapi_jobserver import ReportJob
from tests.support.engine import at, run

async def main():
    with served(9, "127.0.0.1"), at(pathlib.Path({str(tmp_path)!r}), {job_server.url!r}) as host:
        print((await run(host, ReportJob(seconds=0))).info.phase.name)

asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert done.stdout == "SUCCESS\n", done.stderr
    assert job_server.stats().created == 1


# --- a run -------------------------------------------------------------------------------------


async def test_the_counters_move_with_the_jobs(
    job_server: EmbeddedJobServer, tmp_path: Path, registry: CollectorRegistry
) -> None:
    """CASE-245, CASE-248, REQ-77: a good job, a failed one, one that is throttled at each call and cancelled."""
    metrics = Metrics(registry)
    config = {"resourceQuotas": {"default": 5}, "caching": {"maxSystemFailures": 5}}
    with at(tmp_path, job_server, config, metrics=metrics) as host:
        await run(host, ReportJob(seconds=0.2), "single", task_run="good")
        await run(host, ReportJob(seconds=0, outcome="fail"), "single", task_run="bad")
        job_server.fault("create", status=429, times=5)
        job_server.fault("get", status=429, times=3)
        job_server.fault("get", status=500, times=2)
        job_server.fault("delete", status=429, times=2)
        ticket = host.admit(request(ReportJob(outcome="never"), task_type="single"))
        await eventually(lambda: job_server.stats().created == 3, within=10)
        await eventually(lambda: job_server.log("get")[-1:] and _last(job_server) == 200, within=10)
        assert await eventually(lambda: metrics.value("tracked_jobs", plugin="single"), within=5)
        assert metrics.value("held_slots") == 1
        ticket.cancel("enough")
        await ticket.outcome()
        await eventually(lambda: metrics.value("tracked_jobs") == 0, within=5)

    def calls(op: str, outcome: str) -> float:
        return metrics.value("calls_total", plugin="single", op=op, outcome=outcome)

    def answered(op: Any, *, ok: bool) -> int:
        return len([call for call in job_server.log(op) if ok == ((call.status or 500) < 300)])

    assert (calls("create", "ok"), calls("create", "Throttled")) == (3, 5)
    assert (calls("delete", "ok"), calls("delete", "Throttled")) == (1, 2)
    assert (calls("get", "Throttled"), calls("get", "RemoteSystemError")) == (3, 2)
    assert calls("get", "ok") == answered("get", ok=True)
    assert metrics.value("throttled_total", plugin="single", op="write") == 7
    assert metrics.value("throttled_total", plugin="single", op="read") == 3
    assert metrics.value("sync_errors_total", plugin="single") == 2
    assert metrics.value("call_seconds_count", plugin="single", op="create") == 8
    assert metrics.value("slot_wait_seconds_count") == 3
    assert metrics.value("slot_releases_total", outcome="ok") == 3
    assert metrics.value("phase_transitions_total", plugin="single", phase="RUNNING") >= 1
    assert metrics.value("poll_lag_seconds_count", plugin="single") > 0
    reads, gaps = (
        metrics.value(f"poll_{each}_seconds_count", plugin="single") for each in ("lag", "interval")
    )
    assert 0 < gaps < reads  # a read at once, after the delete, has none before it
    for name in ("evictions_total", "ledger_conflicts_total", "held_slots", "pending_cancels"):
        assert metrics.value(name) == 0


async def test_jobs_are_counted_by_plugin_and_those_that_must_be_deleted_apart(
    job_server: EmbeddedJobServer,
    tmp_path: Path,
    registry: CollectorRegistry,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CASE-245: in portions, each of which is counted."""
    monkeypatch.setattr("prefect_webapi.engine.runtime.COUNTED_AT_ONCE", 2)
    metrics = Metrics(registry)
    with at(tmp_path, job_server, metrics=metrics) as host:

        def start(task_type: str) -> Ticket:
            spec = ReportJob(outcome="never")
            return host.admit(request(spec, task_type=task_type, task_run=str(next(numbers))))

        def counted(name: str) -> list[float]:
            return [metrics.value(name, plugin=plugin) for plugin in ("single", "keys")]

        numbers = count()
        single, keys = [start("single") for _ in range(5)], [start("keys") for _ in range(3)]
        await eventually(lambda: job_server.stats().created == 8, within=10)
        assert await eventually(lambda: counted("tracked_jobs") == [5, 3], within=10)
        assert counted("pending_cancels") == [0, 0]
        job_server.fault("delete", status=503, times=1000)
        for ticket in [*single[:3], keys[0]]:
            ticket.cancel("enough")
        assert await eventually(lambda: counted("pending_cancels") == [3, 1], within=10)
        assert counted("tracked_jobs") == [5, 3]
        job_server.clear_faults()
        assert await eventually(lambda: counted("tracked_jobs") == [2, 2], within=30)
        assert counted("pending_cancels") == [0, 0]


def _last(server: EmbeddedJobServer) -> int | None:
    return server.log("get")[-1].status


def _published(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return answer.read().decode()


def test_a_port_that_another_process_has_is_told_once_and_does_no_harm(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """REQ-77: the one that has it goes on serving."""
    port = free_port()
    with served(port, "127.0.0.1"):
        with caplog.at_level(logging.WARNING), served(port, "127.0.0.1"):
            assert "prefect_webapi_tracked_jobs" in _published(port)
        assert "prefect_webapi_tracked_jobs" in _published(port)
    (told,) = [record.getMessage() for record in caplog.records]
    assert f"127.0.0.1:{port}" in told
    assert "Its jobs go on" in told
    with served(None, "127.0.0.1"):
        pass


def test_prefects_own_client_metrics_endpoint_shows_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """REQ-77: `PREFECT_CLIENT_METRICS_ENABLED`, which runners and task workers have."""
    begun: list[Any] = []

    def on_loopback(port: int) -> Any:  # Prefect would listen on every address
        begun.append(start_http_server(port, addr="127.0.0.1"))
        return begun[-1]

    monkeypatch.setattr("prometheus_client.start_http_server", on_loopback)
    port = free_port()
    Metrics().set("tracked_jobs", 3, plugin="test-endpoint")
    with temporary_settings(
        {PREFECT_CLIENT_METRICS_ENABLED: True, PREFECT_CLIENT_METRICS_PORT: port}
    ):
        start_client_metrics_server()
        told = _published(port)
    stop_client_metrics_server()
    begun[0][0].server_close()  # which Prefect leaves open
    assert 'prefect_webapi_tracked_jobs{plugin="test-endpoint"} 3.0' in told


def test_bound_once_or_looked_up_each_time_it_is_the_same_series(
    registry: CollectorRegistry,
) -> None:
    """CASE-248: places that count often bind their labels once."""
    metrics = Metrics(registry)
    add = metrics.counter("throttled_total", plugin="a", op="read")
    observe = metrics.histogram("poll_interval_seconds", plugin="a")
    for _ in range(3):
        add(2)
        observe(0.5)
    metrics.count("throttled_total", plugin="a", op="read")
    assert metrics.value("throttled_total", plugin="a", op="read") == 7
    assert metrics.value("poll_interval_seconds_sum") == 1.5
    with pytest.raises(ValueError, match="has the labels"):
        metrics.counter("throttled_total", plugin="a", job="wa-1")


@prefect_leaks
async def test_the_port_serves_every_metric_while_the_engine_lives(
    engine_here: Path, job_server: EmbeddedJobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """REQ-77: `METRICS_PORT`; a port that another process has is no reason to fail."""
    port = free_port()
    monkeypatch.setenv("PREFECT_INTEGRATIONS_WEBAPI_METRICS_PORT", str(port))

    def told() -> str:
        return _published(port)

    @flow
    async def one(day: int) -> None:
        await run_job.with_options(connection=block(job_server))(seconds=0, day=day)

    await one(1)
    published = told()
    for name, metric in METRICS.items():
        assert f"# TYPE prefect_webapi_{name} {metric.kind}" in published
    assert 'prefect_webapi_evictions_total{plugin="job-server"} 0.0' in published
    assert 'prefect_webapi_calls_total{op="create",outcome="ok",plugin="job-server"}' in published
    service.close()
    with pytest.raises(URLError):
        told()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        await one(2)
    assert job_server.stats().created == 2
