"""The frame of the benchmarks; what they measure is no business of a test."""

from __future__ import annotations

import importlib
from itertools import islice, pairwise
from xml.etree import ElementTree

import pytest

from benchmarks.all import NAMES
from benchmarks.lag import exponential, fewest_reads
from benchmarks.measure import Figures, Series, Target, by_turns
from benchmarks.plot import Curves, draw


@pytest.mark.parametrize("name", NAMES)
def test_each_benchmark_that_all_runs_is_there(name: str) -> None:
    assert callable(importlib.import_module(f"benchmarks.{name}").run)


def test_a_target_passes_up_to_its_bound_and_tells_the_ratio_beyond() -> None:
    assert Target("seconds", 10.0, 10.0).verdict == "PASS"
    assert Target("seconds", 15.0, 10.0).verdict == "1.50 x the bound"
    assert Target("jobs/s", 5.0, 10.0, at_most=False).verdict == "0.50 x the bound"
    assert Target("jobs/s", None, 10.0).passed is None


def test_variants_take_turns_in_turned_order() -> None:
    order: list[str] = []

    def variant(name: str) -> Figures:
        order.append(name)
        return {"n": float(len(order))}

    measured = by_turns(3, {"a": lambda: variant("a"), "b": lambda: variant("b")})
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert measured["a"]["n"] == Series((1.0, 4.0, 5.0))
    assert measured["a"]["n"].median == 4.0
    assert str(measured["a"]["n"]) == "4 (1-5)"


def test_the_fewest_reads_keep_the_lag_with_the_largest_gaps() -> None:
    """Half of the ends in a gap wait for at most half of it: no more than ours promises at that age."""
    for read, following in pairwise(islice(fewest_reads(), 200)):
        half = (following - read) / 2
        allowed = min(15.0, max(0.5, 0.05 * (read + half)))
        assert half == pytest.approx(allowed)


def test_the_exponential_gaps_grow_to_their_cap() -> None:
    gaps = [b - a for a, b in pairwise([0.0, *islice(exponential(), 12)])]
    assert gaps[:3] == pytest.approx([1.0, 1.5, 2.25])
    assert gaps[-1] == pytest.approx(20.0)


def test_a_plot_is_xml_with_a_line_per_name() -> None:
    lines = {"ours": [(1.0, 2.0), (1000.0, 2.5)], "a < b": [(1.0, 20.0), (1000.0, 1e4)]}
    root = ElementTree.fromstring(draw([Curves("growth", "jobs", "seconds", lines)]))
    svg = "{http://www.w3.org/2000/svg}"
    assert len(list(root.iter(f"{svg}polyline"))) == 2
    assert "a < b" in [text.text for text in root.iter(f"{svg}text")]
