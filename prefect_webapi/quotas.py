"""Places for jobs: who gets the next one, and that it stays held until the job is gone.

A job takes places of one limit or of several (its namespace's quota, constraints), of all at once or of none.
`Quotas` keeps one queue per set of limits, first come, first served, and has whoever is first in one take a lease;
`leases.py` keeps them. Queues of different sets don't wait for each other here: a
project that has used up its share must not hold up the next one. Where two sets share a limit the ledger says which
of their first ones goes first (`turn`; the rule is in `ledger/turns.py`), and so it does among processes. Whether a
job may start is not decided here alone either: the ledger's count is asked by `admit`. Without quotas nothing here
is called.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import islice, takewhile
from typing import Self

import anyio

from prefect_webapi.clock import Clock
from prefect_webapi.contract.errors import ConfigurationError
from prefect_webapi.leases import (
    ASK_SECONDS,
    BLOCK,
    MARGIN_SECONDS,
    Busy,
    Count,
    Leases,
    Place,
    SlotLease,
    Slots,
    SlotsUnavailable,
    always,
    ignore,
    plugin_of,
)
from prefect_webapi.metrics import Metrics

__all__ = [
    "MARGIN_SECONDS",
    "Busy",
    "Count",
    "Quotas",
    "Repair",
    "SlotLease",
    "Slots",
    "SlotsUnavailable",
    "Waiting",
    "repair",
    "surplus",
]

logger = logging.getLogger(__name__)

OURS = "webapi:"
"""Limits that are named otherwise belong to somebody else and are never repaired."""

TELL_SECONDS = 10.0
"""How often a waiting job is told that it waits, if nothing else changes."""

TOLD_AT_ONCE = 100
"""So many of a queue hear at once that they moved up; those behind them at the next `TELL_SECONDS`."""

ADMIT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Repair:
    """Slots by limit: `given` back, and `waiting` for a later look that finds them again."""

    given: Mapping[str, int]
    waiting: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Waiting:
    """What a waiting job can tell. `position` 1 is next of those who wait for these limits (name to places)."""

    limits: Mapping[str, int]
    position: int
    since: datetime
    waited: timedelta


async def _always(_: bool, /) -> bool:
    return True


@dataclass(slots=True, eq=False)
class _Waiter:
    """One job in a queue. Times are monotonic, `since` is for people."""

    weight: int
    tell: Callable[[Waiting], None]
    since: datetime
    began: float
    told: float
    position: int
    turn: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True, eq=False)
class _Limit:
    """`ensured`: Prefect has it with this value."""

    value: int
    ensured: bool = False


@dataclass(slots=True, eq=False)
class _Queue:
    """Who waits for these limits. `freed` wakes the first of them."""

    names: tuple[str, ...]
    waiters: OrderedDict[_Waiter, None] = field(default_factory=OrderedDict[_Waiter, None])
    freed: asyncio.Event = field(default_factory=asyncio.Event)


class Quotas:
    """The quotas of one process: an async context manager that owns the renewal of all leases.

    Leaving it stops the renewal: slots of jobs that go on elsewhere lapse after `lease`.

    Args:
        lease: how long slots stay held without renewal; Prefect allows 60 s to a day and counts real time.
        ledger: told when slots are held for a moment that no job has, so that nobody takes them for leaked.

    Source: SPEC REQ-73 to REQ-76.
    """

    def __init__(
        self,
        slots: Slots,
        *,
        clock: Clock,
        metrics: Metrics,
        lease: timedelta = timedelta(seconds=120),
        ledger: Count | None = None,
    ) -> None:
        self._slots = slots
        self._clock = clock
        self._metrics = metrics
        self._seconds = lease.total_seconds()
        self._limits: dict[str, _Limit] = {}
        self._queues: dict[tuple[str, ...], _Queue] = {}
        self._leases = Leases(
            slots,
            clock=clock,
            metrics=metrics,
            seconds=self._seconds,
            prepare=self._prepare,
            freed=self._wake,
            ledger=ledger,
        )

    async def __aenter__(self) -> Self:
        await self._leases.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._leases.__aexit__(*exc_info)

    # --- what the engine asks ----------------------------------------------------------------

    async def configure(self, name: str, limit: int) -> None:
        """Set a limit. Those who wait are served by the new one at once; nothing that runs is touched."""
        known = self._limits.get(name)
        if known is not None and known.value == limit and known.ensured:
            return
        self._limits[name] = limit_now = _Limit(limit)
        try:
            await self._slots.ensure(name, limit)
        except SlotsUnavailable as error:
            self._leases.note_trouble(error)  # whoever is first in the queue tries again
        else:
            limit_now.ensured = True
        self._wake([name])

    async def acquire(
        self,
        names: Iterable[str],
        *,
        weight: int,
        holder: str,
        admit: Callable[[SlotLease], Awaitable[bool]],
        waiting: Callable[[Waiting], None],
        turn: Callable[[bool], Awaitable[bool]] = _always,
        changed: Callable[[SlotLease], None] = ignore,
        written: Callable[[SlotLease], Awaitable[bool]] = always,
    ) -> SlotLease:
        """Wait for a place, first come, first served.

        Args:
            names: limits that were `configure`d.
            weight: slots the job takes of each.
            turn: whether the first in the queue may ask for a lease now, or somebody elsewhere goes first. Its
                argument: it has asked before, and there was no room.
            admit: asked by the first in the queue with its lease: the ledger's count, and the durable note of the
                lease. False: full; it is asked again when a place is freed here, or a second later. It runs
                under a shield.
            waiting: told when the wait begins, when the position changes and about every ten seconds.
            changed: the job has this lease instead: the server had lost the other one, or it is wanted elsewhere.
            written: write down such a lease in the ledger. The other one is given back once that is done; False:
                it is left alone, as another process may own the job.

        Returns:
            The lease, renewed from now on until `release` or `forget`.

        Raises:
            ConfigurationError: `weight` is above a limit, so the job could never start.
        """
        queue = self._queue(names)
        self._check(queue, weight)
        now = self._clock.monotonic()
        waiter = _Waiter(weight, waiting, self._clock.now(), now, now, len(queue.waiters) + 1)
        place = self._leases.place(queue.names, weight, holder, changed, written)
        queue.waiters[waiter] = None
        plugin = plugin_of(queue.names)
        self._metrics.add("waiting_jobs", 1, plugin=plugin)
        try:
            if waiter.position > 1:
                self._tell(queue, waiter)
                await waiter.turn.wait()
            lease = await self._get_place(queue, waiter, place, admit, turn)
        except BaseException:
            self._leases.let_go(place)
            raise
        finally:
            del queue.waiters[waiter]
            self._metrics.add("waiting_jobs", -1, plugin=plugin)
            self._move_up(queue)
        self._metrics.observe(
            "slot_wait_seconds", self._clock.monotonic() - waiter.began, plugin=plugin
        )
        return lease

    def release(self, names: Iterable[str], lease: SlotLease | None, *, weight: int) -> None:
        """Give a place back after its job is gone and the ledger no longer counts it.

        Returns at once; the call is repeated until Prefect has taken it. A second release of a lease does
        nothing.

        Args:
            lease: any lease the job has had; None: it had none, only the queue is told.
        """
        names = tuple(sorted(names))
        if lease is None or self._leases.was_released(lease):
            self._wake(names)
        elif (place := self._leases.place_of(lease)) is not None:
            self._leases.let_go(place)
        else:
            self._leases.end_foreign(self._leases.place(names, weight), lease)

    def adopt(
        self,
        names: Iterable[str],
        lease: SlotLease,
        *,
        weight: int,
        holder: str,
        changed: Callable[[SlotLease], None] = ignore,
        written: Callable[[SlotLease], Awaitable[bool]] = always,
    ) -> None:
        """Renew the lease of a job taken over from another process.

        If the server has lost it, or it is a part of a block of that process, a new one is taken as soon as there
        is room. The job is never disturbed.

        Args:
            changed, written: as for `acquire`.
        """
        place = self._leases.place_of(lease)
        if place is None:
            place = self._leases.place(tuple(sorted(names)), weight, holder, changed, written)
            self._leases.adopt(place, lease)
        else:
            self._leases.keep_on(place, changed, written)

    def forget(self, lease: SlotLease) -> None:
        """Stop renewing: another process looks after the job now. The slots stay as they are."""
        place = self._leases.place_of(lease)
        if place is not None:
            self._leases.forget(place)

    # --- the queue ---------------------------------------------------------------------------

    @property
    def has_waiting(self) -> bool:
        """Whether a job of this process waits for a place."""
        return any(queue.waiters for queue in self._queues.values())

    @property
    def look_again_after(self) -> float:
        """Seconds after which a second look for leaked slots may give some back."""
        return (self._seconds + SECOND_LOOK_SECONDS) * self._clock.speed

    async def repair(self, names: Iterable[str], ledger: Count) -> Repair:
        """Look for leaked slots: see the function `repair`."""
        return await repair(
            self._slots,
            names,
            ledger,
            clock=self._clock,
            metrics=self._metrics,
            lease=timedelta(seconds=self._seconds),
        )

    def _queue(self, names: Iterable[str]) -> _Queue:
        key = tuple(sorted(names))
        return self._queues.setdefault(key, _Queue(key))

    def _wake(self, names: Iterable[str]) -> None:
        """Let those who wait for one of these limits look again."""
        for queue in self._queues.values():
            if queue.waiters and not set(queue.names).isdisjoint(names):
                queue.freed.set()

    def _check(self, queue: _Queue, weight: int) -> None:
        for name in queue.names:
            limit = self._limits.get(name)
            if limit is None:
                raise ConfigurationError(
                    f"quota {name} has no limit yet. Add its namespace to the block's resource quotas."
                )
            if weight > limit.value:
                raise ConfigurationError(
                    f"a job asks for {weight} places of quota {name}, which has {limit.value}: it could never "
                    "start. Raise the quota or ask for less."
                )

    async def _get_place(
        self,
        queue: _Queue,
        waiter: _Waiter,
        place: Place,
        admit: Callable[[SlotLease], Awaitable[bool]],
        turn: Callable[[bool], Awaitable[bool]],
    ) -> SlotLease:
        """What the first in the queue does."""

        def behind() -> int:
            first = islice(queue.waiters, BLOCK)
            return sum(1 for _ in takewhile(lambda other: other.weight == waiter.weight, first)) - 1

        in_vain = has_said_so = False
        while True:
            queue.freed.clear()
            self._check(queue, waiter.weight)
            may_ask = await turn(in_vain)
            in_vain = True
            if may_ask and place.loan is None:  # else the renewer sees to its lease
                # Who is without Prefect holds nobody up.
                in_vain = await self._leases.take(place, behind)
            lease = place.lease if place.is_held else None
            if lease is not None:
                admitted = False
                with anyio.move_on_after(self._clock.real(ADMIT_SECONDS), shield=True):
                    admitted = await admit(lease)
                if admitted:
                    place.is_noted = True
                    return place.lease or lease
            self._leases.tidy(queue.names, refused=lease is not None)
            if in_vain and not has_said_so:  # now, not with the next question
                has_said_so = True
                await turn(True)
            if waiter.position != 1 or waiter.told == waiter.began:
                waiter.position = 1
                self._tell(queue, waiter)
            self._tell_all(queue)
            with anyio.move_on_after(self._clock.real(ASK_SECONDS)):
                await queue.freed.wait()

    async def _prepare(self, names: Sequence[str]) -> None:
        for name in names:
            limit = self._limits.get(name)
            if limit is not None and not limit.ensured:
                await self._slots.ensure(name, limit.value)
                limit.ensured = True

    def _move_up(self, queue: _Queue) -> None:
        """Somebody has left the queue: the first may act, those behind hear their new position.

        Those who let him go first in other queues may act as well.
        """
        following = next(iter(queue.waiters), None)
        self._leases.tidy(queue.names, wanted=following.weight if following is not None else 0)
        self._wake(queue.names)
        for position, waiter in enumerate(islice(queue.waiters, TOLD_AT_ONCE), start=1):
            if position == 1:
                waiter.turn.set()  # says itself that it waits, should it have to
            elif waiter.position != position:
                waiter.position = position
                self._tell(queue, waiter)

    def _tell_all(self, queue: _Queue) -> None:
        """Tell everybody who has heard nothing for some time."""
        now = self._clock.monotonic()
        if now - next(iter(queue.waiters)).told < TELL_SECONDS:
            return
        for position, waiter in enumerate(queue.waiters, start=1):
            waiter.position = position
            if now - waiter.told >= TELL_SECONDS / 2:
                self._tell(queue, waiter)

    def _tell(self, queue: _Queue, waiter: _Waiter) -> None:
        waiter.told = self._clock.monotonic()
        waiter.tell(
            Waiting(
                {name: limit.value for name in queue.names if (limit := self._limits.get(name))},
                waiter.position,
                waiter.since,
                timedelta(seconds=max(0.0, waiter.told - waiter.began)),
            )
        )


LOOKS = 3
SECOND_LOOK_SECONDS = 30.0


async def repair(
    slots: Slots,
    names: Iterable[str],
    ledger: Count,
    *,
    clock: Clock,
    metrics: Metrics,
    lease: timedelta = timedelta(seconds=120),
) -> Repair:
    """Look for slots that the server counts and nobody holds, as their holder and their lease are both gone.

    A surplus is given back once it was there at every look of a lease and half a minute: by then every lease that
    nobody renews has lapsed. The ledger remembers it between the looks, whoever makes them, and hands it to one of
    them: a process that dies then gives nothing back, and the next looks find it again. Only where everybody who
    uses these limits shares one ledger: slots of others look like a surplus.

    Args:
        names: limits to look at; those not named ``webapi:…`` are left alone.
    """
    settled = timedelta(seconds=(lease.total_seconds() + SECOND_LOOK_SECONDS) * clock.speed)
    given: dict[str, int] = {}
    waiting: dict[str, int] = {}
    for name in names:
        if not name.startswith(OURS):
            continue
        extra = await surplus(name, slots.active, ledger.held, clock)
        now = clock.now()
        leaked = await ledger.note_surplus(name, extra, now, now - settled)
        if leaked:
            await slots.give_back(name, leaked)
            given[name] = leaked
            metrics.count("repaired_slots_total", leaked, plugin=plugin_of([name]))
            logger.warning("gave %d leaked slots of %s back", leaked, name)
        elif extra:
            waiting[name] = extra
    return Repair(given, waiting)


async def surplus(
    name: str,
    active: Callable[[str], Awaitable[int]],
    held: Callable[[str], Awaitable[int]],
    clock: Clock,
) -> int:
    """How many more slots of a limit Prefect counts (`active`) than the ledger does (`held`).

    The smallest of a few looks: places change hands while we look.
    """
    least = 0
    for look in range(LOOKS):
        if look:
            await clock.sleep(clock.speed)
        before = await held(name)
        taken = await active(name)
        extra = max(0, taken - max(before, await held(name)))
        least = extra if look == 0 else min(least, extra)
        if not least:
            break
    return least
