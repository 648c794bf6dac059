"""Whose turn it is: the order in which processes that share a ledger ask for places.

A process has one queue for each set of limits, and its first asks about once a second. When it asks in vain, it
leaves a mark in `webapi_queue`, so that a process that is dead, stopped or without its Prefect holds nobody up for
longer than a mark counts. An earlier job goes first wherever two of them want places of the same limit, with one
exception: if it waits for room in a limit that is none of ours, we may pass. So nobody starves (what an earlier
job waits for is not given to a later one, and once all it waits for is free, nothing of it is), nobody waits for a
limit that it does not want, and as nobody holds a place while it waits for another, there is no deadlock.

Only the order depends on this, never the count: clocks that differ by more than a mark counts mix the order up.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import text

from prefect_webapi.ledger.records import QuotaRow

__all__ = ["MARK", "MARK_LASTS", "WAITING", "Waiter", "is_next"]

MARK_LASTS = timedelta(seconds=5)

MARK = text(
    "INSERT INTO webapi_queue (runtime, quotas, asked_at) VALUES (:runtime, :quotas, :asked_at)"
    " ON CONFLICT (runtime, quotas) DO UPDATE SET asked_at = excluded.asked_at"
)
WAITING = text(
    "SELECT q.runtime, q.quotas, j.weight, j.created_at FROM webapi_queue q"
    " JOIN webapi_job j ON j.key = (SELECT w.key FROM webapi_job w"
    " WHERE w.runtime = q.runtime AND w.quotas = q.quotas AND w.state = 'SLOT_REQUESTED'"
    " ORDER BY w.created_at LIMIT 1)"
    " WHERE q.asked_at >= :since AND j.created_at < :before"
    " AND NOT (q.runtime = :runtime AND q.quotas = :quotas)"
)
"""The earliest of each queue that has asked since then, if it is earlier than this one; our own queue left out."""


@dataclass(frozen=True, slots=True)
class Waiter:
    """The first of another queue."""

    quotas: frozenset[str]
    weight: int


def is_next(
    quotas: Collection[str], earlier: Iterable[Waiter], rows: Mapping[str, QuotaRow]
) -> bool:
    """Whether none of those who came earlier goes before a job that wants places of `quotas`."""
    return not any(_goes_first(waiter, quotas, rows) for waiter in earlier)


def _goes_first(waiter: Waiter, quotas: Collection[str], rows: Mapping[str, QuotaRow]) -> bool:
    if waiter.quotas.isdisjoint(quotas):
        return False
    full = {name for name in waiter.quotas if not _has_room(rows.get(name), waiter.weight)}
    return not full or not full.isdisjoint(quotas)


def _has_room(row: QuotaRow | None, weight: int) -> bool:
    return row is not None and row.live + weight <= row.limit
