"""The life of a job as a table: (state, event) to the next state. Pure: no I/O, no clock, no chance.

Numbers in comments are the transitions of the specification. A pair that is not in the table can't happen:
`next_state` raises, so an unforeseen event never changes a record, and no path leads from a state in which a
job may exist back to one in which it would be created anew. Only CREATING sends create, and only CREATED or
the decision that nothing was made leaves it.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from prefect_webapi.ledger.records import JobState

__all__ = ["TRANSITIONS", "Event", "next_state", "place_change", "takes_place"]


class Event(StrEnum):
    """What happened, or what is about to happen and must be written down first."""

    PLACE_GRANTED = "place granted"  # the quota has room; nothing is sent yet
    SENDING = "sending"  # create (or do) is about to be sent
    HANDLE_KNOWN = "handle known"  # create answered, or the job was found
    NOTHING_MADE = "nothing made"  # the service surely made no job and won't
    NO_ANSWER = "no answer"  # whether a job exists can't be found out now
    ENDED = "ended"  # the job was seen over; its result is stored
    END_ASKED = "end asked"  # somebody wants it gone: cancel, deadline, lost contact, clean-up
    GIVEN_UP = "given up"  # no longer wanted, and nothing remote was done
    DELIVERED = "delivered"  # handed to the caller
    SETTLED = "settled"  # handed over and the slot given back


S = JobState
E = Event

TRANSITIONS: Mapping[tuple[JobState, Event], JobState] = MappingProxyType(
    {
        # waiting for a place
        (S.SLOT_REQUESTED, E.PLACE_GRANTED): S.SLOT_HELD,  # T-03
        (S.SLOT_REQUESTED, E.SENDING): S.CREATING,  # T-03 and T-04 in one write
        # nothing remote yet
        (S.INTENT, E.SENDING): S.CREATING,  # T-04
        (S.SLOT_HELD, E.SENDING): S.CREATING,  # T-04
        (S.INTENT, E.GIVEN_UP): S.OVER,  # T-14
        (S.SLOT_REQUESTED, E.GIVEN_UP): S.OVER,  # T-14
        (S.SLOT_HELD, E.GIVEN_UP): S.OVER,  # T-14
        # create
        (S.CREATING, E.SENDING): S.CREATING,  # T-06: the same key again
        (S.CREATING, E.HANDLE_KNOWN): S.CREATED,  # T-05
        (S.CREATING, E.NO_ANSWER): S.SUSPECT,  # T-07
        (S.CREATING, E.NOTHING_MADE): S.OVER,  # T-08
        (S.CREATING, E.ENDED): S.OVER,  # a synchronous call: create and end in one answer
        # suspect: a service that can be asked again by key or by search goes on as CREATING would
        (S.SUSPECT, E.SENDING): S.CREATING,
        (S.SUSPECT, E.HANDLE_KNOWN): S.CREATED,  # T-15
        (S.SUSPECT, E.NOTHING_MADE): S.OVER,  # T-16
        # alive
        (S.CREATED, E.ENDED): S.OVER,  # T-09, T-11
        (S.CREATED, E.END_ASKED): S.CANCELLING,  # T-12
        (S.CANCELLING, E.END_ASKED): S.CANCELLING,  # delete was repeated
        (S.CANCELLING, E.ENDED): S.OVER,  # T-13
        # over
        (S.OVER, E.DELIVERED): S.DELIVERED,  # T-17
        (S.OVER, E.SETTLED): S.CLOSED,  # T-17 and T-18 in one write
        (S.DELIVERED, E.SETTLED): S.CLOSED,  # T-18
    }
)

_PLACED = frozenset({S.SLOT_HELD, S.CREATING, S.CREATED, S.CANCELLING, S.SUSPECT})


def next_state(state: JobState, event: Event) -> JobState:
    """Where `event` leads.

    Raises:
        ValueError: the pair can't happen; a defect of the caller.
    """
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise ValueError(f"{event.value!r} can't happen to a job in state {state}") from None


def takes_place(state: JobState) -> bool:
    """Whether a job in this state counts against its quota: from the grant until it is gone."""
    return state in _PLACED


def place_change(old: JobState, new: JobState) -> int:
    """What a change of state does to the quota's count: +1, 0 or -1 times the job's weight."""
    return takes_place(new) - takes_place(old)
