"""The Grafana dashboard asks for metrics and labels that there are, and shows each of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import promql_parser
import pytest
from prometheus_client import CollectorRegistry

from prefect_webapi.metrics import METRICS, PREFIX, Metrics

FILE = Path(__file__).parents[1] / "docs/grafana/dashboard.json"
DASHBOARD: dict[str, Any] = json.loads(FILE.read_text())
QUERIES = [
    pytest.param(target["expr"], target["legendFormat"], id=f"{panel['title']} {target['refId']}")
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
]


@pytest.fixture(scope="module")
def published() -> dict[str, set[str]]:
    """The real series: name to labels, each metric counted once."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    for name, metric in METRICS.items():
        labels = dict.fromkeys(metric.labels, "x")
        count = {"counter": metrics.count, "gauge": metrics.add, "histogram": metrics.observe}
        count[metric.kind](name, 1, **labels)
    samples = [sample for family in registry.collect() for sample in family.samples]
    return {sample.name: set(sample.labels) for sample in samples}


@dataclass(slots=True)
class Asked:
    """What a query asks for."""

    metrics: dict[str, set[str]] = field(
        default_factory=dict[str, set[str]]
    )  # to the labels that select
    grouped: set[str] = field(default_factory=set[str])
    functions: list[str] = field(default_factory=list[str])


def _asked(query: str) -> Asked:
    asked = Asked()

    def visit(expr: promql_parser.Expr) -> None:
        match expr:
            case promql_parser.VectorSelector():
                assert expr.name is not None
                labels = {matcher.name for matcher in expr.matchers.matchers}
                asked.metrics.setdefault(expr.name, set()).update(labels)
            case promql_parser.AggregateExpr():
                assert expr.modifier is not None
                assert expr.modifier.type == promql_parser.AggModifierType.By
                asked.grouped |= set(expr.modifier.labels)
            case promql_parser.MatrixSelector():
                visit(expr.vector_selector)
            case promql_parser.Call():
                asked.functions.append(expr.func.name)
            case _:
                pass

    as_sent = query.replace("$__rate_interval", "5m").replace("$plugin", "job-server|http")
    promql_parser.walk(promql_parser.parse(as_sent), visit)
    return asked


@pytest.mark.parametrize(("query", "legend"), QUERIES)
def test_each_query_asks_for_what_is_published(
    published: dict[str, set[str]], query: str, legend: str
) -> None:
    """REQ-77: names, labels that select and group, and the function that fits the kind of metric."""
    asked = _asked(query)
    assert asked.metrics, query
    for name, labels in asked.metrics.items():
        assert name in published
        assert labels | asked.grouped <= published[name]
        is_total = re.search(r"_(total|bucket|sum|count)$", name) is not None
        assert is_total == bool({"rate", "increase"} & set(asked.functions))
        assert name.endswith("_bucket") == ("histogram_quantile" in asked.functions)
        assert name.endswith("_bucket") == ("le" in asked.grouped)
    assert set(re.findall(r"{{(\w+)}}", legend)) == asked.grouped - {"le"}


def _names() -> Iterator[str]:
    for param in QUERIES:
        yield from _asked(str(param.values[0])).metrics


def test_every_metric_is_shown() -> None:
    shown = {re.sub(r"_bucket$", "", name).removeprefix(f"{PREFIX}_") for name in _names()}
    assert shown == set(METRICS)


def test_the_choice_of_plugins_comes_from_a_metric_that_all_of_them_have() -> None:
    """`evictions_total` is there, as 0, from a plugin's first job on."""
    (plugin,) = [v for v in DASHBOARD["templating"]["list"] if v["name"] == "plugin"]
    asked = re.fullmatch(r"label_values\((\w+), (\w+)\)", plugin["query"])
    assert asked is not None
    assert asked.groups() == (f"{PREFIX}_evictions_total", "plugin")
