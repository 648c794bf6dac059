"""Places for jobs: who gets the next one, and that it stays held until the job is gone.

A job takes places of one limit or of several (its namespace's quota, constraints), of all at once or of none.
`Quotas` keeps one queue per set of limits, first come, first served, takes leases from `Slots` for whoever is first
in one, and renews every lease of the process in one task. Queues of different sets don't wait for each other here: a
project that has used up its share must not hold up the next one. Where two sets share a limit the ledger says which
of their first ones goes first (`turn`; the rule is in `ledger/turns.py`), and so it does among processes. Whether a
job may start is not decided here alone either: the ledger's count is asked by `admit`. Without quotas nothing here
is called.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import islice
from typing import Protocol, Self

import anyio
import anyio.abc

from prefect_webapi.clock import Clock
from prefect_webapi.contract.errors import ConfigurationError, WebApiError
from prefect_webapi.metrics import Metrics

__all__ = [
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

ASK_SECONDS = 1.0
"""How often the first in a queue asks: a place freed by another process is seen within two of these."""

TELL_SECONDS = 10.0
"""How often a waiting job is told that it waits, if nothing else changes."""

TOLD_AT_ONCE = 100
"""So many of a queue hear at once that they moved up; those behind them at the next `TELL_SECONDS`."""

ADMIT_SECONDS = 30.0
LOG_SECONDS = 60.0
CLOSE_SECONDS = 5.0
PARALLEL_CALLS = 8

FRESH_SECONDS = 5.0
"""A lease confirmed so recently is released without asking whether the server still knows it."""

MARGIN_SECONDS = 10.0
"""Clocks of two machines may differ by this much."""

REMEMBERED_RELEASES = 10_000


class SlotsUnavailable(WebApiError):
    """Prefect's API can't be reached or did not do what was asked.

    Attributes:
        maybe_done: no answer came although the request may have arrived.
    """

    def __init__(self, message: str, *, maybe_done: bool = True) -> None:
        self.maybe_done = maybe_done
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class SlotLease:
    """Slots lent by Prefect. `until` is when they lapse unless renewed."""

    id: str
    until: datetime


@dataclass(frozen=True, slots=True)
class Busy:
    """No slots free now. `retry_after`: the server's guess in seconds."""

    retry_after: float


class Slots(Protocol):
    """Where slots come from. Seconds are real ones. Every method may raise `SlotsUnavailable`.

    If it is an async context manager, `Quotas` opens and closes it.
    """

    async def ensure(self, name: str, limit: int) -> None:
        """Create the limit, or set it to `limit`."""
        ...

    async def acquire(
        self, names: Sequence[str], slots: int, holder: str, seconds: float
    ) -> SlotLease | Busy:
        """Take that many slots of each limit, or of none.

        A limit that was `ensure`d and has vanished is made again with the same value.

        Args:
            holder: id of the task run, for people; "" where there is none.
            seconds: the lease's time, 60 to 86,400.
        """
        ...

    async def renew(self, lease_id: str, seconds: float) -> bool:
        """Hold on to a lease. False: the server does not know it (any more)."""
        ...

    async def release(self, lease_id: str) -> None:
        """End a lease. One that has ended already: nothing happens."""
        ...

    async def give_back(self, name: str, slots: int) -> None:
        """Lower the count of taken slots: only for slots whose lease the server has lost."""
        ...

    async def active(self, name: str) -> int:
        """How many slots the server counts as taken; 0 for a limit that does not exist."""
        ...


class Count(Protocol):
    """What the ledger knows of slots."""

    async def held(self, name: str) -> int:
        """How many slots of a limit jobs of the ledger have, or may have."""
        ...

    async def note_surplus(self, name: str, slots: int, at: datetime, since: datetime) -> int:
        """Remember what is counted beyond them; how many are to be given back now: see `ledger.store.Store`."""
        ...


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


def _ignore(_: SlotLease) -> None:
    return None


async def _always(_: bool, /) -> bool:
    return True


@dataclass(slots=True, eq=False)
class _Waiter:
    """One job in a queue. Times are monotonic, `since` is for people."""

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
    """Who waits for these limits. `freed` wakes the first of them; until `busy_until` no lost lease is taken anew."""

    names: tuple[str, ...]
    busy_until: float = -math.inf
    waiters: OrderedDict[_Waiter, None] = field(default_factory=OrderedDict[_Waiter, None])
    freed: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True, eq=False)
class _Held:
    """Slots of one job. Times are monotonic.

    Attributes:
        lease: None: lost, and to be taken anew.
        ids: every lease this job has had here.
        expires: until then the server can't have given the slots to others.
        due: when to look after it.
        owed: limits of which the server forgot the lease and still counts the slots.
        gone: nobody needs it any more.
        foreign: taken by a process that is dead; known by its id only.
    """

    names: tuple[str, ...]
    weight: int
    holder: str
    changed: Callable[[SlotLease], None] = _ignore
    lease: SlotLease | None = None
    ids: list[str] = field(default_factory=list[str])
    confirmed: float = -math.inf
    expires: float = -math.inf
    due: float = math.inf
    owed: list[str] = field(default_factory=list[str])
    gone: bool = False
    foreign: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Quotas:
    """The quotas of one process: an async context manager that owns the renewal of all leases.

    Leaving it stops the renewal: slots of jobs that go on elsewhere lapse after `lease`.

    Args:
        lease: how long slots stay held without renewal; Prefect allows 60 s to a day and counts real time.

    Source: SPEC REQ-73 to REQ-76.
    """

    def __init__(
        self,
        slots: Slots,
        *,
        clock: Clock,
        metrics: Metrics,
        lease: timedelta = timedelta(seconds=120),
    ) -> None:
        self._slots = slots
        self._clock = clock
        self._metrics = metrics
        self._seconds = lease.total_seconds()
        self._limits: dict[str, _Limit] = {}
        self._queues: dict[tuple[str, ...], _Queue] = {}
        self._held: dict[str, _Held] = {}
        self._restless: set[_Held] = set()  # all that the renewer looks after
        self._released: OrderedDict[str, None] = OrderedDict()
        self._nudge = asyncio.Event()
        self._releasing = 0
        self._quiet = asyncio.Event()
        self._troubles = 0
        self._logged_at = -math.inf
        self._open = False
        self._stack = AsyncExitStack()
        self._tasks: anyio.abc.TaskGroup
        self._calls: anyio.CapacityLimiter

    async def __aenter__(self) -> Self:
        self._calls = anyio.CapacityLimiter(PARALLEL_CALLS)
        if isinstance(self._slots, AbstractAsyncContextManager):
            await self._stack.enter_async_context(self._slots)
        self._tasks = await self._stack.enter_async_context(anyio.create_task_group())
        self._open = True
        self._tasks.start_soon(self._renew)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._open = False
        with anyio.move_on_after(self._clock.real(CLOSE_SECONDS), shield=True):
            while self._releasing:
                self._quiet.clear()
                await self._quiet.wait()
        self._tasks.cancel_scope.cancel()
        await self._stack.aclose()

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
            self._note_trouble(error)  # whoever is first in the queue tries again
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
        changed: Callable[[SlotLease], None] = _ignore,
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
            changed: the server lost the lease and lent this one instead.

        Returns:
            The lease, renewed from now on until `release` or `forget`.

        Raises:
            ConfigurationError: `weight` is above a limit, so the job could never start.
        """
        queue = self._queue(names)
        self._check(queue, weight)
        now = self._clock.monotonic()
        waiter = _Waiter(waiting, self._clock.now(), now, now, len(queue.waiters) + 1)
        held = _Held(queue.names, weight, holder, changed)
        queue.waiters[waiter] = None
        plugin = _plugin_of(queue.names)
        self._metrics.add("waiting_jobs", 1, plugin=plugin)
        try:
            if waiter.position > 1:
                self._tell(queue, waiter)
                await waiter.turn.wait()
            lease = await self._get_place(queue, waiter, held, admit, turn)
        except BaseException:
            self._let_go(held)
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
        if lease is None or lease.id in self._released:
            self._wake(names)
            return
        held = self._held.get(lease.id)
        if held is None:
            held = _Held(names, weight, "", lease=lease, ids=[lease.id], foreign=True)
        self._let_go(held)

    def adopt(
        self,
        names: Iterable[str],
        lease: SlotLease,
        *,
        weight: int,
        holder: str,
        changed: Callable[[SlotLease], None] = _ignore,
    ) -> None:
        """Renew the lease of a job taken over from another process.

        If the server has lost it, a new one is taken as soon as there is room. The job is never disturbed.

        Args:
            changed: told of the new lease.
        """
        if lease.id in self._held:
            self._held[lease.id].changed = changed
            return
        now = self._clock.monotonic()
        left = (lease.until - self._clock.now()).total_seconds()
        held = _Held(tuple(sorted(names)), weight, holder, changed, due=now)
        left = min(left, self._real(self._seconds))  # or a clock was set since
        held.expires = now + left - self._real(MARGIN_SECONDS)
        self._keep(held, lease)
        self._nudge.set()

    def forget(self, lease: SlotLease) -> None:
        """Stop renewing: another process looks after the job now. The slots stay as they are."""
        held = self._held.get(lease.id)
        if held is not None:
            held.gone = True
            self._drop(held)

    # --- the queue ---------------------------------------------------------------------------

    @property
    def has_waiting(self) -> bool:
        """Whether a job of this process waits for a place."""
        return any(queue.waiters for queue in self._queues.values())

    @property
    def look_again_after(self) -> float:
        """Seconds after which a second look for leaked slots may give some back."""
        return self._real(self._seconds + SECOND_LOOK_SECONDS)

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
        held: _Held,
        admit: Callable[[SlotLease], Awaitable[bool]],
        turn: Callable[[bool], Awaitable[bool]],
    ) -> SlotLease:
        """What the first in the queue does."""
        in_vain = has_said_so = False
        while True:
            queue.freed.clear()
            self._check(queue, held.weight)
            may_ask = await turn(in_vain)
            in_vain = True
            if may_ask and held not in self._restless:  # else the renewer sees to its lease
                in_vain = await self._ask(held)  # who is without Prefect holds nobody up
            lease = held.lease
            if lease is not None:
                admitted = False
                with anyio.move_on_after(self._clock.real(ADMIT_SECONDS), shield=True):
                    admitted = await admit(lease)
                if admitted:
                    return held.lease or lease
            if in_vain and not has_said_so:  # now, not with the next question
                has_said_so = True
                await turn(True)
            if waiter.position != 1 or waiter.told == waiter.began:
                waiter.position = 1
                self._tell(queue, waiter)
            self._tell_all(queue)
            with anyio.move_on_after(self._clock.real(ASK_SECONDS)):
                await queue.freed.wait()

    async def _ask(self, held: _Held) -> bool:
        """Ask for a lease in a task of our own: who stops waiting for the answer leaves no slot behind.

        Returns:
            Whether there was an answer.
        """
        done = asyncio.Event()
        was_answered = False

        async def ask() -> None:
            nonlocal was_answered
            try:
                was_answered = await self._take(held)
            finally:
                done.set()
            if held.gone and held.lease is not None:
                self._start_release(held)

        self._tasks.start_soon(ask)
        await done.wait()
        return was_answered

    async def _take(self, held: _Held) -> bool:
        sent = self._clock.monotonic()
        try:
            for name in held.names:
                limit = self._limits.get(name)
                if limit is not None and not limit.ensured:
                    await self._slots.ensure(name, limit.value)
                    limit.ensured = True
            answer = await self._slots.acquire(held.names, held.weight, held.holder, self._seconds)
        except SlotsUnavailable as error:
            self._note_trouble(error)
            return False
        if isinstance(answer, SlotLease):
            held.confirmed = sent
            held.expires = sent + self._real(self._seconds)
            held.due = self._next_round()
            self._keep(held, answer)
        return True

    def _move_up(self, queue: _Queue) -> None:
        """Somebody has left the queue: the first may act, those behind hear their new position.

        Those who let him go first in other queues may act as well.
        """
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

    # --- leases ------------------------------------------------------------------------------

    def _real(self, seconds: float) -> float:
        """Real seconds in seconds of our clock: Prefect's time is not sped up."""
        return seconds * self._clock.speed

    def _next_round(self) -> float:
        """All leases are renewed together, a third of their time apart."""
        period = self._real(self._seconds / 3)
        return (math.floor(self._clock.monotonic() / period) + 1) * period

    def _keep(self, held: _Held, lease: SlotLease) -> None:
        if held not in self._restless:
            self._restless.add(held)
            self._metrics.add("held_slots", held.weight, plugin=_plugin_of(held.names))
        held.lease = lease
        held.ids.append(lease.id)
        self._held[lease.id] = held

    def _drop(self, held: _Held) -> None:
        for lease_id in held.ids:
            self._held.pop(lease_id, None)
        if held in self._restless:
            self._restless.remove(held)
            self._metrics.add("held_slots", -held.weight, plugin=_plugin_of(held.names))

    def _let_go(self, held: _Held) -> None:
        if held.gone:
            return
        held.gone = True
        self._drop(held)
        for lease_id in held.ids:
            self._released[lease_id] = None
        while len(self._released) > REMEMBERED_RELEASES:
            self._released.popitem(last=False)
        if held.lease is not None or held.owed or held.lock.locked():
            self._start_release(held)

    def _start_release(self, held: _Held) -> None:
        self._drop(held)
        if self._open:  # else the slots lapse by themselves
            self._releasing += 1
            self._tasks.start_soon(self._free, held)

    async def _free(self, held: _Held) -> None:
        """Give slots back, however long it takes."""
        plugin = _plugin_of(held.names)
        pause = 0.25
        try:
            async with held.lock:
                self._drop(held)  # the renewer may have taken a new lease meanwhile
                while held.lease is not None or held.owed:
                    try:
                        async with self._calls:
                            await self._free_once(held)
                    except SlotsUnavailable as error:
                        self._note_trouble(error)
                        self._metrics.count("slot_releases_total", plugin=plugin, outcome="failed")
                        await self._clock.sleep(pause * random.uniform(0.5, 1.0))
                        pause = min(pause * 2, 10.0)
                    else:
                        self._metrics.count("slot_releases_total", plugin=plugin, outcome="ok")
        finally:
            self._releasing -= 1
            self._quiet.set()
        self._wake(held.names)

    async def _free_once(self, held: _Held) -> None:
        if held.lease is not None:
            stale = self._clock.monotonic() - held.confirmed > self._real(FRESH_SECONDS)
            if held.foreign or not stale or await self._confirm(held, held.lease):
                await self._slots.release(held.lease.id)
                held.lease = None
        await self._settle_debt(held)

    async def _confirm(self, held: _Held, lease: SlotLease) -> bool:
        """Renew a lease. False: it is lost, and `owed` says where its slots are still counted."""
        sent = self._clock.monotonic()
        if await self._slots.renew(lease.id, self._seconds):
            held.confirmed = sent
            held.expires = sent + self._real(self._seconds)
            held.due = self._next_round()
            return True
        held.lease = None
        # Within its time nobody but the server itself can have lost it, and that by a restart.
        held.owed = list(held.names) if sent < held.expires else []
        cause = "server" if held.owed else "lapsed"
        self._metrics.count(
            "lost_slots_total", held.weight, plugin=_plugin_of(held.names), cause=cause
        )
        logger.warning(
            "a lease of %d slots of %s was lost (%s); its job goes on",
            held.weight,
            " and ".join(held.names),
            "Prefect's server restarted" if held.owed else "it lapsed unrenewed",
        )
        return False

    async def _settle_debt(self, held: _Held) -> None:
        while held.owed:
            name = held.owed.pop()
            try:
                await self._slots.give_back(name, held.weight)
            except SlotsUnavailable as error:
                if not error.maybe_done:  # twice would free a place of somebody else
                    held.owed.append(name)
                raise

    async def _renew(self) -> None:
        """Look after every lease of the process."""
        while True:
            self._nudge.clear()
            now = self._clock.monotonic()
            due = [held for held in self._restless if held.due <= now]
            due.sort(key=lambda held: held.lease is None)  # what we have comes before what we miss
            if due:
                async with anyio.create_task_group() as batch:
                    for held in due:
                        batch.start_soon(self._attend, held)
            now = self._clock.monotonic()
            first = min((held.due for held in self._restless), default=self._next_round())
            with anyio.move_on_after(self._clock.real(max(0.0, first - now))):
                await self._nudge.wait()

    async def _attend(self, held: _Held) -> None:
        if held.gone:
            return
        async with held.lock, self._calls:
            now = self._clock.monotonic()
            held.due = now + self._real(ASK_SECONDS * random.uniform(1.0, 2.0))
            try:
                if held.lease is not None and await self._confirm(held, held.lease):
                    return
                if not held.gone:
                    await self._settle_debt(held)
            except SlotsUnavailable as error:
                self._note_trouble(error)
                return
            queue = self._queue(held.names)
            if held.gone or self._clock.monotonic() < queue.busy_until:
                return
            await self._take(held)
            if held.lease is None:
                queue.busy_until = self._clock.monotonic() + self._real(ASK_SECONDS)
            elif held.gone:
                self._start_release(held)
            else:
                held.changed(held.lease)

    def _note_trouble(self, error: SlotsUnavailable) -> None:
        """Tell people, at most once a minute."""
        self._troubles += 1
        now = self._clock.monotonic()
        if now - self._logged_at >= LOG_SECONDS:
            logger.warning(
                "%s (%d such failures since the last line; jobs go on, none starts without its slot)",
                error,
                self._troubles,
            )
            self._logged_at = now
            self._troubles = 0


def _plugin_of(names: Sequence[str]) -> str:
    parts = names[0].split(":")
    return parts[1] if len(parts) > 1 else ""


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
            metrics.count("repaired_slots_total", leaked, plugin=_plugin_of([name]))
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
