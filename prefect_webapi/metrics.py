"""What the engine counts. One table declares every metric; nothing else may be counted.

Where prometheus-client can't be imported all of it does nothing. No label holds a job's id: labels have few values.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar
from weakref import WeakKeyDictionary

from prefect_webapi.contract.contexts import MetricsScope

if TYPE_CHECKING:
    import prometheus_client as prometheus
    from prometheus_client import CollectorRegistry
else:
    try:
        import prometheus_client as prometheus
    except Exception:  # noqa: BLE001 - absent or broken: nobody's job shall suffer from it
        prometheus = None

__all__ = ["METRICS", "Add", "Metric", "Metrics", "served"]

logger = logging.getLogger(__name__)

Add = Callable[[float], None]
"""Counts into one series: a counter's amount, a histogram's value."""

C = TypeVar("C")

if TYPE_CHECKING:
    L = TypeVar("L", prometheus.Counter, prometheus.Histogram)

PREFIX = "prefect_webapi"
SERIES_PER_METRIC = 200
"""A plugin's metric keeps at most so many label combinations; the rest is counted as `other`."""

SPANS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200)
"""Histogram buckets in seconds: from a quick call to hours of waiting for a place."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: its kind, its labels, and what it tells."""

    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str


METRICS: Mapping[str, Metric] = {
    "calls_total": Metric("counter", ("plugin", "op", "outcome"), "Calls of the service."),
    "call_seconds": Metric("histogram", ("plugin", "op"), "Time until the service answered."),
    "throttled_total": Metric("counter", ("plugin", "op"), "Answers that asked for less."),
    "permit_wait_seconds": Metric("histogram", ("op",), "Time a call waited at its rate limit."),
    "tracked_jobs": Metric("gauge", ("plugin",), "Jobs this process looks after."),
    "waiting_jobs": Metric("gauge", ("plugin",), "Jobs that wait for a place in their quota."),
    "held_slots": Metric("gauge", ("plugin",), "Places in quotas that this process holds."),
    "slot_wait_seconds": Metric("histogram", ("plugin",), "Time a job waited for its place."),
    "slot_releases_total": Metric(
        "counter", ("plugin", "outcome"), "Attempts to give a place back: ok or failed."
    ),
    "lost_slots_total": Metric(
        "counter", ("plugin", "cause"), "Leases lost: server (it forgot them) or lapsed."
    ),
    "repaired_slots_total": Metric("counter", ("plugin",), "Leaked places given back."),
    "sync_errors_total": Metric("counter", ("plugin",), "Reads of a job that failed."),
    "evictions_total": Metric("counter", ("plugin",), "Live jobs dropped from memory: always 0."),
    "orphans_total": Metric("counter", ("plugin",), "Jobs that nobody claimed any more."),
    "pending_cancels": Metric("gauge", ("plugin",), "Jobs that must still be deleted."),
    "ledger_conflicts_total": Metric("counter", ("plugin",), "Writes lost to another process."),
    "phase_transitions_total": Metric("counter", ("plugin", "phase"), "Changes of phase."),
    "poll_lag_seconds": Metric("histogram", ("plugin",), "How late reads of jobs are."),
    "poll_interval_seconds": Metric(
        "histogram", ("plugin",), "Time between two reads of a job, as achieved."
    ),
    "blocked_total": Metric(
        "counter",
        ("plugin", "op"),
        "Times all jobs were held up for a second, by a plugin's code; without a plugin: by anything else.",
    ),
}


class _Family:
    """The collectors of one registry, made when first used; a second `Metrics` finds them here."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._known: dict[str, object] = {}
        self.prefixes: dict[str, str] = {}  # a plugin's prefix -> its id
        self.series: dict[str, set[tuple[str, ...]]] = {}
        self.told: set[str] = set()

    def get(self, kind: type[C], name: str, metric: Metric) -> C:
        known: object = self._known.get(name)
        if known is None:
            self._known[name] = known = self._make(kind, name, metric)
        if not isinstance(known, kind):
            raise TypeError(f"metric {name} is not a {kind.__name__.lower()}")
        return known

    def _make(self, kind: type[object], name: str, metric: Metric) -> object:
        if kind is prometheus.Histogram:
            return prometheus.Histogram(
                name, metric.help, metric.labels, buckets=SPANS, registry=self.registry
            )
        make = prometheus.Counter if kind is prometheus.Counter else prometheus.Gauge
        return make(name, metric.help, metric.labels, registry=self.registry)

    def prefix(self, plugin: str) -> str:
        """The plugin's prefix; two ids that look alike once sanitised get different ones."""
        clean = re.sub(r"[^a-zA-Z0-9_]", "_", plugin)
        if not re.match(r"[a-zA-Z_]", clean):
            clean = f"_{clean}"
        if clean == PREFIX or self.prefixes.setdefault(clean, plugin) != plugin:
            clean = f"{clean}_{hashlib.sha256(plugin.encode()).hexdigest()[:6]}"
            self.prefixes[clean] = plugin
        return clean


def _kind(metric: Metric) -> type[object]:
    match metric.kind:
        case "counter":
            return prometheus.Counter
        case "gauge":
            return prometheus.Gauge
        case "histogram":
            return prometheus.Histogram


def _nowhere(_: float) -> None:
    """Counts where there is no Prometheus."""


_families: WeakKeyDictionary[object, _Family] = WeakKeyDictionary()


class Metrics:
    """Counters, gauges and histograms named ``prefect_webapi_<name>``, declared in `METRICS`.

    Args:
        registry: None: the default one, which Prefect's own metrics port publishes too. Making a
            second `Metrics` on one registry goes on counting where the first stopped.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._family: _Family | None = None
        if prometheus is not None:
            registry = registry or prometheus.REGISTRY
            family = _families.get(registry)
            if family is None:
                family = _families[registry] = _Family(registry)
                # All are there before any of them is counted.
                for name, metric in METRICS.items():
                    family.get(_kind(metric), f"{PREFIX}_{name}", metric)
            self._family = family

    def counter(self, name: str, /, **labels: str) -> Add:
        """What adds to a counter: for places that count often, bound to its labels once."""
        metric = self._declared(name, "counter", labels)
        if self._family is None:
            return _nowhere
        return self._family.get(prometheus.Counter, f"{PREFIX}_{name}", metric).labels(**labels).inc

    def histogram(self, name: str, /, **labels: str) -> Add:
        """What notes a value of a histogram, as `counter`. Spans are in seconds."""
        metric = self._declared(name, "histogram", labels)
        if self._family is None:
            return _nowhere
        family = self._family.get(prometheus.Histogram, f"{PREFIX}_{name}", metric)
        return family.labels(**labels).observe

    def count(self, name: str, amount: float = 1, /, **labels: str) -> None:
        """Add to a counter."""
        self.counter(name, **labels)(amount)

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        """Note one value of a histogram. Spans are in seconds."""
        self.histogram(name, **labels)(value)

    def set(self, name: str, value: float, /, **labels: str) -> None:
        """Set a gauge."""
        metric = self._declared(name, "gauge", labels)
        if self._family is not None:
            gauge = self._family.get(prometheus.Gauge, f"{PREFIX}_{name}", metric)
            gauge.labels(**labels).set(value)

    def add(self, name: str, amount: float, /, **labels: str) -> None:
        """Raise a gauge, or lower it by a negative amount."""
        metric = self._declared(name, "gauge", labels)
        if self._family is not None:
            gauge = self._family.get(prometheus.Gauge, f"{PREFIX}_{name}", metric)
            gauge.labels(**labels).inc(amount)

    def value(self, name: str, /, **labels: str) -> float:
        """The sum over all series that have these labels; 0 where nothing was counted.

        Args:
            name: as declared; for a histogram with ``_count`` or ``_sum`` behind it.
        """
        base = re.sub(r"_(count|sum)$", "", name)
        if name not in METRICS and (base not in METRICS or METRICS[base].kind != "histogram"):
            raise ValueError(f"no metric is called {name!r}")
        return sum(
            value
            for sample, found, value in self._samples(f"{PREFIX}_{base}")
            if sample == f"{PREFIX}_{name}" and labels.items() <= found.items()
        )

    def scope(self, plugin_id: str) -> MetricsScope:
        """Metrics of a plugin's own, named ``<plugin id>_<name>``."""
        return _Scope(self._family, plugin_id)

    def _samples(self, name: str) -> Iterator[tuple[str, dict[str, str], float]]:
        if self._family is None:
            return
        for family in self._family.registry.collect():
            if family.name in (name, name.removesuffix("_total")):
                for sample in family.samples:
                    yield sample.name, sample.labels, sample.value

    @staticmethod
    def _declared(name: str, kind: str, labels: Mapping[str, str]) -> Metric:
        metric = METRICS.get(name)
        if metric is None or metric.kind != kind:
            raise ValueError(f"no {kind} is called {name!r}: declare it in METRICS")
        if set(labels) != set(metric.labels):
            raise ValueError(f"metric {name} has the labels {metric.labels}, not {tuple(labels)}")
        return metric


@contextmanager
def served(port: int | None, host: str) -> Generator[None]:
    """Publish this process's metrics at ``http://host:port/metrics`` until the block ends; None: don't.

    A port that can't be had is told in the log and does no harm.
    """
    if port is None or prometheus is None:
        yield
        return
    try:
        server, thread = prometheus.start_http_server(port, addr=host)
    except OSError as error:
        logger.warning(
            "metrics of this process are not served at %s:%s: %s. Its jobs go on. Only one process of a machine can "
            "have a port: give each its own in PREFECT_INTEGRATIONS_WEBAPI_METRICS_PORT, or off",
            host,
            port,
            error,
        )
        yield
        return
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Scope:
    """A plugin's metrics. A mistake here is logged once and never fails a job."""

    def __init__(self, family: _Family | None, plugin_id: str) -> None:
        self._family = family
        self._plugin = plugin_id
        self._prefix = family.prefix(plugin_id) if family is not None else ""

    def count(self, name: str, amount: float = 1, /, **labels: str) -> None:
        if self._family is None:
            return
        full = self._full(name)
        try:
            metric = Metric("counter", tuple(sorted(labels)), f"Of plugin {self._plugin}.")
            counter = self._family.get(prometheus.Counter, full, metric)
            self._bounded(full, counter, labels).inc(amount)
        except (ValueError, TypeError) as error:
            self._tell(full, error)

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        if self._family is None:
            return
        full = self._full(name)
        try:
            metric = Metric("histogram", tuple(sorted(labels)), f"Of plugin {self._plugin}.")
            histogram = self._family.get(prometheus.Histogram, full, metric)
            self._bounded(full, histogram, labels).observe(value)
        except (ValueError, TypeError) as error:
            self._tell(full, error)

    def _full(self, name: str) -> str:
        return f"{self._prefix}_{re.sub(r'[^a-zA-Z0-9_]', '_', name)}"

    def _bounded(self, full: str, collector: L, labels: dict[str, str]) -> L:
        if not labels:
            return collector
        assert self._family is not None
        series = self._family.series.setdefault(full, set())
        values = tuple(labels[key] for key in sorted(labels))
        if values not in series:
            if len(series) >= SERIES_PER_METRIC:
                return collector.labels(**dict.fromkeys(labels, "other"))
            series.add(values)
        return collector.labels(**labels)

    def _tell(self, full: str, error: Exception) -> None:
        assert self._family is not None
        if full not in self._family.told:
            self._family.told.add(full)
            logger.warning("metric %s of plugin %s is not counted: %s", full, self._plugin, error)
