"""A job's history as it is kept."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from pydantic_core import PydanticSerializationError

from prefect_webapi.ledger.records import KEPT_STEPS, Details, Outputs, Step, Steps

NOON = datetime(2026, 7, 1, 12, tzinfo=UTC)
LATER = NOON + timedelta(seconds=3)
TWO = Steps().then("QUEUED", NOON).then("RUNNING", LATER, "on node 7")


def test_steps_are_a_sequence_of_what_was_noted() -> None:
    queued, running = (
        Step(name="QUEUED", at=NOON),
        Step(name="RUNNING", at=LATER, reason="on node 7"),
    )
    assert list(TWO) == [queued, running]
    assert (len(TWO), TWO[0], TWO[-1]) == (2, queued, running)
    assert list(TWO[:-1]) == [queued]
    assert Steps([queued, running]) == TWO
    assert not Steps()
    with pytest.raises(IndexError):
        TWO[2]


def test_a_phase_that_repeats_is_not_a_new_step() -> None:
    assert TWO.then("RUNNING", NOON) is TWO
    assert len(TWO.then("QUEUED", NOON)) == 3


def test_of_a_long_history_the_middle_is_left_out() -> None:
    steps = Steps()
    for n in range(1_000):
        steps = steps.then(f"PHASE {n}", NOON + timedelta(seconds=n))
    kept = [(step.at - NOON).seconds for step in steps]
    assert kept == [*range(KEPT_STEPS), *range(1_000 - KEPT_STEPS, 1_000)]


def test_they_are_stored_as_they_were_before_they_had_a_class() -> None:
    """A ledger of an earlier version is read, and reads what this one writes."""
    text = Details(steps=TWO).to_json()
    assert '"steps":[{"name":"QUEUED","at":"2026-07-01T12:00:00Z","reason":""},{"name":' in text
    assert Details.from_json(text).steps == TWO


def test_nothing_else_without_a_json_form_is_written() -> None:
    with pytest.raises(PydanticSerializationError, match="object"):
        Details(outputs=Outputs(value=object())).to_json()
