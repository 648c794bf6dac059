"""The table of a job's life."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_webapi.engine.machine import TRANSITIONS, Event, next_state, place_change, takes_place
from prefect_webapi.ledger.records import JobState

MAY_BE_ALIVE = {JobState.CREATED, JobState.CANCELLING}


@pytest.mark.parametrize("state", list(JobState))
@pytest.mark.parametrize("event", list(Event))
def test_a_pair_is_in_the_table_or_refused(state: JobState, event: Event) -> None:
    """Every pair of state and event has one meaning: a next state, or a refusal."""
    if (state, event) in TRANSITIONS:
        assert next_state(state, event) is TRANSITIONS[state, event]
    else:
        with pytest.raises(ValueError, match="can't happen"):
            next_state(state, event)


@given(st.lists(st.sampled_from(list(Event)), max_size=30))
def test_no_path_creates_a_job_that_is_known_to_exist_again(events: list[Event]) -> None:
    """REQ-56: once a handle is known, create is never sent again, whatever happens."""
    state, known = JobState.INTENT, False
    for event in events:
        if (state, event) not in TRANSITIONS:
            continue
        state = next_state(state, event)
        known = known or event is Event.HANDLE_KNOWN
        assert not (known and state is JobState.CREATING)


@given(
    st.sampled_from([JobState.INTENT, JobState.SLOT_REQUESTED]),
    st.lists(st.sampled_from(list(Event)), max_size=30),
)
def test_a_place_is_taken_once_and_given_back_once(start: JobState, events: list[Event]) -> None:
    """REQ-75: the sum of all changes is 1 while the job may be alive, and 0 when it is over."""
    state, count = start, 0
    for event in events:
        if (state, event) not in TRANSITIONS:
            continue
        after = next_state(state, event)
        count += place_change(state, after)
        state = after
        assert count == int(takes_place(state))
        assert count == 1 or state not in MAY_BE_ALIVE


@given(st.lists(st.sampled_from(list(Event)), max_size=30))
def test_a_job_that_may_exist_is_over_only_when_it_is_known_to_be(events: list[Event]) -> None:
    """Nothing is forgotten before it is known to be over."""
    state = JobState.INTENT
    for event in events:
        if (state, event) not in TRANSITIONS:
            continue
        after = next_state(state, event)
        if after.is_over and state.job_may_exist:
            assert event in (Event.ENDED, Event.NOTHING_MADE)
        state = after
