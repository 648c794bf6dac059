"""How quotas are used: Prefect's counts beside the ledger's. It reads both and changes neither."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import anyio

from prefect_webapi._prefect.api import Api, server_is_here
from prefect_webapi._prefect.inspection import Limit, look_at_limits
from prefect_webapi._prefect.slots import PrefectSlots
from prefect_webapi.clock import Clock
from prefect_webapi.engine.channels import held_in
from prefect_webapi.ledger.inspection import LedgerInspector, Queue
from prefect_webapi.quotas import OURS, surplus

__all__ = ["Usage", "usage"]


@dataclass(frozen=True, slots=True)
class Usage:
    """One limit.

    Attributes:
        limit: as Prefect has it, else as the ledger has it.
        active_slots: taken by Prefect's count; None: Prefect has no such limit yet.
        is_on: whether Prefect keeps it.
        holders: jobs of this ledger that have places; places: how many they have.
        waiters: jobs of this ledger that wait; waiting_since: when the first of them began.
        leaked: slots that Prefect counts and nobody holds; None: can't be known, as others may use the limit whom
            this ledger does not know.
    """

    name: str
    limit: int
    active_slots: int | None
    is_on: bool
    holders: int
    places: int
    waiters: int
    waiting_since: datetime | None
    leaked: int | None


async def usage(api: Api, ledger: LedgerInspector, clock: Clock) -> list[Usage]:
    """Every limit of ours that Prefect or the ledger knows, by name.

    Takes some seconds where slots seem to have leaked: it looks again.

    Raises:
        PrefectUnavailable, SlotsUnavailable: Prefect can't be asked.
        LedgerUnavailable: the ledger can't be read.
    """
    limits = {each.name: each for each in await look_at_limits(api, OURS)}
    rows = {row.name: row.limit for row in await ledger.quotas()}
    queues = await ledger.queues()
    is_ours = ledger.is_shared or server_is_here()
    leaks = await _leaks(limits, queues, ledger, clock) if is_ours else {}
    return [
        _of(
            name,
            limits.get(name),
            rows.get(name, 0),
            queues,
            leaks.get(name, 0 if is_ours else None),
        )
        for name in sorted(limits.keys() | rows.keys())
    ]


def _of(
    name: str, limit: Limit | None, known: int, queues: Sequence[Queue], leaked: int | None
) -> Usage:
    mine = [queue for queue in queues if name in queue.names]
    return Usage(
        name,
        limit.limit if limit else known,
        limit.active_slots if limit else None,
        limit.active if limit else False,
        sum(queue.holders for queue in mine),
        sum(queue.places for queue in mine),
        sum(queue.waiters for queue in mine),
        min((since for queue in mine if (since := queue.waiting_since)), default=None),
        leaked,
    )


async def _leaks(
    limits: Mapping[str, Limit], queues: Sequence[Queue], ledger: LedgerInspector, clock: Clock
) -> dict[str, int]:
    """Leaked slots by limit, of those that have more taken than the ledger knows of."""
    found: dict[str, int] = {}

    async def look(name: str) -> None:
        found[name] = await surplus(name, slots.active, held, clock)

    async def held(name: str) -> int:
        return await held_in(ledger, name)

    async with PrefectSlots(clock) as slots, anyio.create_task_group() as looks:
        for name, limit in limits.items():
            places = sum(queue.places for queue in queues if name in queue.names)
            if limit.active_slots > places:
                looks.start_soon(look, name)
    return found
