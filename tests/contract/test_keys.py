"""Names that survive a crash, and the two pure functions of the ordinal rule."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from prefect_webapi import BadTaskSpecification
from prefect_webapi.contract.keys import (
    Base,
    Fingerprint,
    base_of,
    canonical_json,
    fingerprint_of,
    fit_name,
    idempotent_base,
    is_visible,
    job_key,
    lowest_free,
)

ROOT = Path(__file__).parents[2]

# --- names -----------------------------------------------------------------------------------

lengths = st.integers(26, 200).flatmap(lambda most: st.tuples(st.integers(0, most), st.just(most)))


@given(st.text(max_size=300), lengths)
def test_a_fitted_name_keeps_its_bounds_and_its_alphabet(
    name: str, bounds: tuple[int, int]
) -> None:
    """CASE-062."""
    fitted = fit_name(name, *bounds)
    assert bounds[0] <= len(fitted) <= bounds[1]
    assert re.fullmatch(r"[a-z][a-z0-9-]*", fitted)
    assert fit_name(name, *bounds) == fitted


@pytest.mark.parametrize("bounds", [(32, 128), (8, 64), (1, 80)])
@pytest.mark.parametrize(
    "name", ["j", "short", "UPPER and blanks", "9 lives", "ü", "", "x" * 26, "long-" * 60]
)
def test_names_short_and_long_are_fitted(name: str, bounds: tuple[int, int]) -> None:
    """CASE-062."""
    fitted = fit_name(name, *bounds)
    assert bounds[0] <= len(fitted) <= bounds[1]
    assert re.fullmatch(r"[a-z][a-z0-9-]*", fitted)


def test_a_name_that_fits_stays_readable() -> None:
    assert fit_name("nightly-report", 1, 80) == "nightly-report"
    assert fit_name("Nightly report", 1, 80).startswith("nightly-report-")
    assert fit_name("nightly-report-" + "x" * 100, 1, 80).startswith("nightly-report-")


@given(st.lists(st.text(max_size=40), unique=True, max_size=8), lengths)
def test_unequal_names_that_had_to_be_changed_stay_unequal(
    names: list[str], bounds: tuple[int, int]
) -> None:
    """Capitals, blanks and cut ends are told apart by the hash."""
    hashed = [n for n in names if not re.fullmatch(r"[a-z][a-z0-9-]*", n)]
    assert len({fit_name(n, *bounds) for n in hashed}) == len(hashed)


@pytest.mark.parametrize("bounds", [(1, 25), (0, 0), (40, 30)])
def test_bounds_that_could_make_names_collide_are_refused(bounds: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"max_length|min_length"):
        fit_name("name", *bounds)


@pytest.mark.parametrize("names", [40_000, pytest.param(10**6, marks=pytest.mark.chaos)])
def test_very_many_names_do_not_collide(names: int) -> None:
    """CASE-062: names that differ only where they are cut; the hash keeps 129 bits of each."""
    stem = "a-name-that-is-longer-than-what-is-left-of-it-" * 2
    assert len({fit_name(f"{stem}{n}", 8, 64) for n in range(names)}) == names
    assert len({fit_name(f"{stem}{n}", 1, 26) for n in range(names)}) == names


def test_keys_of_all_attempts_and_ordinals_differ() -> None:
    base = Base("b")
    keys = {job_key(base, n, attempt) for n in range(120) for attempt in range(120)}
    assert len(keys) == 120 * 120
    assert all(re.fullmatch(r"j[a-z0-9]{25}", key) for key in keys)


def test_bases_differ_by_run_task_and_fingerprint_and_by_who_named_them() -> None:
    one, two = Fingerprint("1"), Fingerprint("2")
    bases = [
        base_of("run", "task", one),
        base_of("run", "task", two),
        base_of("run", "other", one),
        base_of("other", "task", one),
        idempotent_base("run"),
        idempotent_base("other"),
    ]
    assert len(set(bases)) == len(bases)


@given(st.text(max_size=30), st.text(max_size=30))
def test_a_base_is_the_hash_of_the_call_as_canonical_json(run: str, task: str) -> None:
    """Another form would give calls of an earlier version new jobs."""
    fingerprint = Fingerprint("0af1" * 16)
    text = canonical_json([run, task, fingerprint])
    assert (
        base_of(run, task, fingerprint) == sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    )


# --- fingerprints ----------------------------------------------------------------------------


@dataclass
class Point:
    x: int
    label: str


class Inner(BaseModel):
    ratio: float = 0.1


class Spec(BaseModel):
    text: str = "ünïcode 🚀"
    inner: Inner = Inner()
    point: Point = Point(1, "here")
    at: datetime = datetime(2030, 1, 2, 3, 4, 5, 6, tzinfo=UTC)
    day: date = date(2030, 1, 2)
    span: timedelta = timedelta(seconds=1.5)
    raw: bytes = b"bytes"
    table: dict[str, int] = {"b": 2, "a": 1}
    tags: frozenset[str] = frozenset("abcdefgh")
    points: dict[str, list[frozenset[str]]] = {"x": [frozenset("ijklmnop")]}


def test_a_fingerprint_is_the_same_in_every_process() -> None:
    """CASE-267: pydantic model, dataclass, datetime, bytes and sets, under another hash seed."""
    code = (
        "from tests.contract.test_keys import Spec, fingerprint_of\n"
        "print(fingerprint_of('type', 'connection', Spec()))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "77"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert other.stdout.strip() == fingerprint_of("type", "connection", Spec())


def test_a_fingerprint_tells_what_is_sent_and_where_to() -> None:
    spec = Spec()
    changed = [
        fingerprint_of("type", "connection", spec),
        fingerprint_of("other", "connection", spec),
        fingerprint_of("type", "other", spec),
        fingerprint_of("type", "connection", Spec(text="")),
        fingerprint_of("type", "connection", Spec(inner=Inner(ratio=0.2))),
    ]
    assert len(set(changed)) == len(changed)


@given(st.dictionaries(st.text(max_size=5), st.integers()))
def test_the_order_of_a_mapping_does_not_change_the_fingerprint(table: dict[str, int]) -> None:
    back = dict(reversed(table.items()))
    one = fingerprint_of("type", "connection", Spec(table=table))
    assert fingerprint_of("type", "connection", Spec(table=back)) == one


def test_a_spec_that_has_no_json_form_is_refused() -> None:
    """CASE-267: a readable error, before anything is sent."""

    class Odd(BaseModel):
        fine: int = 1
        thing: Any

    for thing, told in ((object(), "unknown type"), (b"\xff", "utf-8")):
        with pytest.raises(BadTaskSpecification, match=f"Odd.thing has no JSON form: .*{told}"):
            fingerprint_of("type", "connection", Odd(thing=[thing]))


# --- the ordinal rule ------------------------------------------------------------------------

runs = st.sampled_from(["flow", "subflow", "outer task"])
levels = st.dictionaries(runs, st.sampled_from(["state 1", "state 2"]))


@given(st.sets(st.integers(0, 12)))
def test_the_lowest_free_ordinal_is_free_and_all_below_are_taken(taken: set[int]) -> None:
    free = lowest_free(taken)
    assert free not in taken
    assert set(range(free)) <= taken


@given(levels, levels)
def test_a_claim_is_hidden_only_by_a_run_that_runs_again(
    theirs: dict[str, str], mine: dict[str, str]
) -> None:
    shared = theirs.keys() & mine.keys()
    assert is_visible(theirs, mine) == all(theirs[run] == mine[run] for run in shared)
    assert is_visible(theirs, mine) == is_visible(mine, theirs)


@given(levels)
def test_a_call_sees_the_claims_of_its_own_run(mine: dict[str, str]) -> None:
    assert is_visible(mine, mine)
    assert is_visible({}, mine)
    assert is_visible(mine, {})


@given(st.lists(levels, max_size=12))
def test_calls_that_see_each_other_never_share_an_ordinal(callers: list[dict[str, str]]) -> None:
    """REQ-27: two different calls of one execution get different jobs."""
    claims: list[tuple[dict[str, str], int]] = []
    for mine in callers:
        claims.append((mine, lowest_free(n for theirs, n in claims if is_visible(theirs, mine))))
    for index, (mine, ordinal) in enumerate(claims):
        seen = [n for theirs, n in claims[:index] if is_visible(theirs, mine)]
        assert ordinal not in seen


@given(st.lists(levels.filter(bool), min_size=1, max_size=8), st.data())
def test_a_subflow_that_makes_the_same_calls_again_meets_the_same_ordinals(
    callers: list[dict[str, str]], data: st.DataObject
) -> None:
    """With nothing else going on in between."""
    first = [{**mine, "subflow": "first"} for mine in callers]
    claims: list[tuple[dict[str, str], int]] = []

    def draw(mine: dict[str, str]) -> int:
        ordinal = lowest_free(n for theirs, n in claims if is_visible(theirs, mine))
        claims.append((mine, ordinal))
        return ordinal

    before = [draw(mine) for mine in first]
    number = data.draw(st.integers(0, len(callers)))
    again = [draw({**mine, "subflow": "second"}) for mine in callers[:number]]
    assert again == before[:number]
