"""Leases of slots: kept alive by one task, shared out among jobs, given back until Prefect has taken them.

The first `SINGLES` places of a set of limits have a lease each. Beyond them one lease, a block, is taken for several
places: it costs one call to take, one to renew, one to give back. Prefect can't take back a part of a lease, so when
a job in a block ends, another job moves into its part, one whose lease then can be given back as a whole: a single one
while there is any. Nothing of this is asked of Prefect, and the job that moves never lacks a lease. What its record
says comes first: only when the ledger has it that the job no longer stands on the old lease is that one given back.

A part is known by an id of ours. Another process can't keep or end it: it lets the block lapse, and takes a lease of
its own for the job that it has taken over.
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from typing import Protocol, Self

import anyio
import anyio.abc

from prefect_webapi.chance import chance
from prefect_webapi.clock import Clock
from prefect_webapi.contract.errors import WebApiError
from prefect_webapi.metrics import Metrics

__all__ = [
    "ASK_SECONDS",
    "BLOCK",
    "MARGIN_SECONDS",
    "Busy",
    "Count",
    "Leases",
    "Place",
    "SlotLease",
    "Slots",
    "SlotsUnavailable",
    "always",
    "ignore",
    "plugin_of",
]

logger = logging.getLogger(__name__)

SINGLES = 200
"""So many places of a set of limits have a lease each, and are there to move into parts of blocks that are left."""

BLOCK = 25
"""Most places of one lease: what may stay idle, for a moment, is one less."""

ASK_SECONDS = 1.0
"""How often somebody who has no lease asks: a place freed by another process is seen within two of these."""

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
    """Slots lent by Prefect. `until` is when they lapse unless renewed.

    `part`: of a block; `id` is then ours, and means nothing to Prefect or to another process.
    """

    id: str
    until: datetime
    part: bool = False


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


def ignore(_: SlotLease) -> None:
    return None


async def always(_: SlotLease) -> bool:
    return True


@dataclass(slots=True, eq=False)
class _Pool:
    """Leases of one set of limits for places of one weight.

    Attributes:
        lost: single ones that are to be taken anew.
        most: of how many places the next block may be: Prefect had no room for more.
        changed_at: when a part was last taken or left.
        is_minded: somebody looks after parts that are free.
    """

    names: tuple[str, ...]
    weight: int
    singles: dict[Loan, None] = field(default_factory=dict["Loan", None])
    blocks: dict[Loan, None] = field(default_factory=dict["Loan", None])
    lost: dict[Loan, None] = field(default_factory=dict["Loan", None])
    most: int = BLOCK
    changed_at: float = -math.inf
    is_minded: bool = False
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(slots=True, eq=False)
class Place:
    """What one job has, or is to have.

    Attributes:
        lease: the last one, as the job knows it.
        ids: every lease this job has had here.
        is_noted: a record says which lease it has, and `written` can change that.
        is_gone: nobody needs it any more.
    """

    pool: _Pool
    holder: str = ""
    changed: Callable[[SlotLease], None] = ignore
    written: Callable[[SlotLease], Awaitable[bool]] = always
    loan: Loan | None = None
    lease: SlotLease | None = None
    ids: list[str] = field(default_factory=list[str])
    is_noted: bool = False
    is_gone: bool = False
    was_refused: bool = False
    lapses_at: float = math.inf

    @property
    def is_held(self) -> bool:
        return self.loan is not None and self.loan.lease is not None


@dataclass(slots=True, eq=False)
class Loan:
    """A lease at Prefect, for `size` places of the pool's weight. Times are monotonic.

    Attributes:
        lease: None: lost.
        expires: until then the server can't have given the slots to others.
        due: when to look after it.
        owed: limits of which the server forgot the lease and still counts the slots.
        has_ended: nobody needs it any more.
        is_foreign: taken by a process that is dead; known by its id only.
    """

    pool: _Pool
    size: int = 1
    lease: SlotLease | None = None
    places: dict[Place, None] = field(default_factory=dict[Place, None])
    confirmed: float = -math.inf
    expires: float = -math.inf
    due: float = math.inf
    owed: list[str] = field(default_factory=list[str])
    has_ended: bool = False
    is_foreign: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def slots(self) -> int:
        return self.size * self.pool.weight

    @property
    def free(self) -> int:
        """Parts that nobody has."""
        return self.size - len(self.places)


class Leases:
    """All leases of one process: an async context manager that owns their renewal.

    Args:
        prepare: called before slots of these limits are asked for.
        freed: told of limits of which a slot is free, here or at Prefect.
        ledger: told, while parts of blocks are idle, that nothing has leaked.
    """

    def __init__(
        self,
        slots: Slots,
        *,
        clock: Clock,
        metrics: Metrics,
        seconds: float,
        prepare: Callable[[Sequence[str]], Awaitable[None]],
        freed: Callable[[Sequence[str]], None],
        ledger: Count | None,
    ) -> None:
        self._slots = slots
        self._clock = clock
        self._metrics = metrics
        self._seconds = seconds
        self._prepare = prepare
        self._freed = freed
        self._ledger = ledger
        self._pools: dict[tuple[str, ...], dict[int, _Pool]] = {}
        self._busy_until: dict[tuple[str, ...], float] = {}  # nobody who misses a lost lease asks
        self._places: dict[str, Place] = {}
        self._kept: dict[Loan, None] = {}  # all that the renewer looks after
        self._released: OrderedDict[str, None] = OrderedDict()
        self._nudge = asyncio.Event()
        self._quiet = asyncio.Event()
        self._troubles = 0
        self._logged_at = -math.inf
        self._open = False
        self._stack = AsyncExitStack()
        self._tasks: anyio.abc.TaskGroup
        self._calls: anyio.CapacityLimiter
        self.releasing = 0

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
            while self.releasing:
                self._quiet.clear()
                await self._quiet.wait()
        self._tasks.cancel_scope.cancel()
        await self._stack.aclose()

    # --- places ------------------------------------------------------------------------------

    def place(
        self,
        names: tuple[str, ...],
        weight: int,
        holder: str = "",
        changed: Callable[[SlotLease], None] = ignore,
        written: Callable[[SlotLease], Awaitable[bool]] = always,
    ) -> Place:
        """A place that has no lease yet."""
        pools = self._pools.setdefault(names, {})
        pool = pools.setdefault(weight, _Pool(names, weight))
        return Place(pool, holder, changed, written)

    def place_of(self, lease: SlotLease) -> Place | None:
        return self._places.get(lease.id)

    def was_released(self, lease: SlotLease) -> bool:
        return lease.id in self._released

    async def take(self, place: Place, behind: Callable[[], int]) -> bool:
        """Ask for a lease in a task of our own: who stops waiting for the answer leaves no slot behind.

        Args:
            behind: how many want the same after this place; a block may be taken for all of them.

        Returns:
            Whether there was an answer.
        """
        done = asyncio.Event()
        was_answered = False

        async def ask() -> None:
            nonlocal was_answered
            try:
                was_answered = await self._take(place, behind)
            finally:
                done.set()

        self._tasks.start_soon(ask)
        await done.wait()
        return was_answered

    def adopt(self, place: Place, lease: SlotLease) -> None:
        """Keep the lease of a job of another process; instead of a part of its block, which lapses, take one."""
        now = self._clock.monotonic()
        loan = Loan(place.pool, due=now)
        place.is_noted = True
        if lease.part:
            place.ids.append(lease.id)
            self._places[lease.id] = place
        else:
            left = (lease.until - self._clock.now()).total_seconds()
            left = min(left, self._real(self._seconds))  # or a clock was set since
            loan.expires = now + left - self._real(MARGIN_SECONDS)
            loan.lease = lease
        self._keep(loan)
        self._enter(place, loan)
        self._nudge.set()

    def end_foreign(self, place: Place, lease: SlotLease) -> None:
        """Give back the lease of a job that this process never had. A part lapses with its block."""
        if lease.part:
            self._remember([lease.id])
            self._freed(place.pool.names)
        else:
            place.ids.append(lease.id)
            self._remember(place.ids)
            self._start_release(Loan(place.pool, lease=lease, is_foreign=True))

    def forget(self, place: Place) -> None:
        """Renew it no more, and leave it as it is: who has a part keeps it as long as a lease lasts unrenewed."""
        loan = place.loan
        if loan is not None and loan.size > 1:
            place.lapses_at = self._clock.monotonic() + self._real(self._seconds)
            if self._open:
                self._tasks.start_soon(self._lapse, place)
            return
        place.is_gone = True
        self._drop(place)
        if loan is not None:
            loan.has_ended = True
            self._sort(loan)

    def keep_on(
        self,
        place: Place,
        changed: Callable[[SlotLease], None],
        written: Callable[[SlotLease], Awaitable[bool]],
    ) -> None:
        """The job of a place that is held here, though it may have been forgotten, has come back."""
        place.changed, place.written = changed, written
        place.lapses_at = math.inf

    async def _lapse(self, place: Place) -> None:
        await self._clock.sleep(self._real(self._seconds))
        if self._clock.monotonic() >= place.lapses_at:
            self.let_go(place)

    def let_go(self, place: Place) -> None:
        """Give a place back."""
        if place.is_gone:
            return
        place.is_gone = True
        self._drop(place)
        self._remember(place.ids)
        if place.loan is not None:
            self._leave(place, place.loan)

    def tidy(self, names: tuple[str, ...], *, wanted: int = 0, refused: bool = False) -> None:
        """Let no part of a block stay free.

        Args:
            wanted: who waits next wants parts of blocks of this weight.
            refused: the ledger has no room for those who come next.
        """
        for weight, pool in self._pools.get(names, {}).items():
            if weight != wanted:
                if refused:
                    pool.most = 1
                self._fill(pool)

    # --- who has which part ------------------------------------------------------------------

    def _enter(self, place: Place, loan: Loan) -> None:
        """Put a place into a lease, out of the one that it had."""
        old, had_one = place.loan, bool(place.ids)
        place.loan = loan
        loan.places[place] = None
        if loan.size > 1:
            place.pool.changed_at = self._clock.monotonic()
        if loan.lease is not None and (
            loan.size == 1 or place.lease is None or not place.lease.part
        ):
            place.lease = loan.lease
            if loan.size > 1:
                place.lease = replace(loan.lease, id=str(uuid.uuid4()), part=True)
            place.ids.append(place.lease.id)
            self._places[place.lease.id] = place
            if had_one:
                place.changed(place.lease)
        if old is not None:
            self._leave(place, old)

    def _leave(self, place: Place, loan: Loan) -> None:
        """A place is out of a lease, which is given back with the last one, or has a free part."""
        loan.places.pop(place, None)
        if not loan.places:
            moved = loan.size == 1 and loan.lease is not None and place.loan is not loan
            self._end(loan, partial(place.written, place.lease) if moved and place.lease else None)
        elif not place.is_gone:
            return
        else:
            loan.pool.changed_at = self._clock.monotonic()
            self._fill(loan.pool)
            self._freed(loan.pool.names)

    def _part(self, pool: _Pool) -> Loan | None:
        """The block with a free part that has the most places."""
        now = self._clock.monotonic()
        partly = (block for block in pool.blocks if block.free and now < block.expires)
        return max(partly, key=lambda block: len(block.places), default=None)

    def _fill(self, pool: _Pool) -> None:
        """Move places out of single leases into free parts, without these out of the blocks with the fewest."""
        while (into := self._part(pool)) is not None:
            if not into.places:
                self._end(into)
                continue
            source = next(
                (one for one in pool.singles if all(place.is_noted for place in one.places)), None
            ) or min(
                (block for block in pool.blocks if block is not into),
                key=lambda block: len(block.places),
                default=None,
            )
            if source is None or len(source.places) > len(into.places):
                break
            if not source.places:
                self._end(source)
                continue
            self._enter(next(iter(source.places)), into)
        self._mind(pool)

    def _mind(self, pool: _Pool) -> None:
        if not pool.is_minded and self._open and self._part(pool) is not None:
            pool.is_minded = True
            self._tasks.start_soon(self._see_to_parts, pool)

    async def _see_to_parts(self, pool: _Pool) -> None:
        """Look after free parts until there are none.

        Who looks for leaked slots takes them for leaked. So the ledger hears that they are not, more often than
        a surplus has to be there to be given back.
        """
        told, is_over = self._clock.monotonic(), False
        while not is_over:
            await self._clock.sleep(self._real(ASK_SECONDS))
            now = self._clock.monotonic()
            if now - pool.changed_at >= self._real(ASK_SECONDS):
                self._fill(pool)
                await self._shrink(pool)
            is_over = self._part(pool) is None
            if is_over or now - told >= self._real(self._seconds / 3):
                is_told = await self._tell(pool.names)
                told = now if is_told else told
                is_over = is_told and self._part(pool) is None
        pool.is_minded = False

    async def _tell(self, names: Sequence[str]) -> bool:
        """Have the ledger forget what has been counted beyond the jobs; whether it has."""
        now = self._clock.now()
        try:
            if self._ledger is not None:
                for name in names:
                    await self._ledger.note_surplus(name, 0, now, now)
        except WebApiError as error:
            logger.info("the ledger was not told of idle slots: %s", error)
            return False
        return True

    async def _shrink(self, pool: _Pool) -> None:
        """Take a smaller lease for those who are left in a block, as soon as Prefect has room for both."""
        block = self._part(pool)
        if block is None or self._is_busy(pool):
            return
        size, smaller = len(block.places), None
        try:
            async with self._calls:
                smaller = await self._borrow(pool, size)
        except SlotsUnavailable as error:
            self.note_trouble(error)
        if smaller is None:
            self._note_busy(pool)
            return
        if block.lease is not None and len(block.places) <= size:
            for place in list(block.places):
                self._enter(place, smaller)
        if not smaller.places:
            self._end(smaller)
        self._fill(pool)

    # --- leases ------------------------------------------------------------------------------

    async def _take(self, place: Place, behind: Callable[[], int]) -> bool:
        pool = place.pool
        try:
            if place.is_gone or self._use_part(place):
                return True
            if self._size(pool, behind) == 1:
                await self._ask(place, 1)
            else:
                async with pool.asking:
                    if place.is_gone or place.is_held or self._use_part(place):
                        return True
                    await self._ask(place, self._size(pool, behind))
        except SlotsUnavailable as error:
            self.note_trouble(error)
            return False
        return True

    def _use_part(self, place: Place) -> bool:
        block = self._part(place.pool)
        if block is None:
            return False
        self._enter(place, block)
        return True

    def _size(self, pool: _Pool, behind: Callable[[], int]) -> int:
        return 1 if len(pool.singles) < SINGLES else min(pool.most, 1 + behind())

    async def _ask(self, place: Place, size: int) -> None:
        pool = place.pool
        loan = await self._borrow(pool, size, place.holder)
        if loan is None and size > 1:
            size = pool.most = 1
            loan = await self._borrow(pool, size, place.holder)
        if loan is None:
            place.was_refused, pool.most = True, 1
            return
        if not place.was_refused:
            pool.most = min(BLOCK, max(pool.most, 2 * size))
        place.was_refused = False
        if not place.is_gone:
            self._enter(place, loan)
        for lost in list(pool.lost):
            if loan.free and not lost.owed:
                self._enter(next(iter(lost.places)), loan)
        if not loan.places:
            self._end(loan)
        self._mind(pool)

    async def _borrow(self, pool: _Pool, size: int, holder: str = "") -> Loan | None:
        """A new lease; None: Prefect has no room."""
        sent = self._clock.monotonic()
        await self._prepare(pool.names)
        holder = holder if size == 1 else ""
        answer = await self._slots.acquire(pool.names, size * pool.weight, holder, self._seconds)
        if isinstance(answer, Busy):
            return None
        loan = Loan(pool, size, answer, confirmed=sent, due=self._next_round())
        loan.expires = sent + self._real(self._seconds)
        self._keep(loan)
        return loan

    def _is_busy(self, pool: _Pool) -> bool:
        """Whether Prefect has just had no room; who waits for a first lease asks all the same."""
        return self._clock.monotonic() < self._busy_until.get(pool.names, -math.inf)

    def _note_busy(self, pool: _Pool) -> None:
        self._busy_until[pool.names] = self._clock.monotonic() + self._real(ASK_SECONDS)

    def _real(self, seconds: float) -> float:
        """Real seconds in seconds of our clock: Prefect's time is not sped up."""
        return seconds * self._clock.speed

    def _next_round(self) -> float:
        """All leases are renewed together, a third of their time apart."""
        period = self._real(self._seconds / 3)
        return (math.floor(self._clock.monotonic() / period) + 1) * period

    def _keep(self, loan: Loan) -> None:
        self._kept[loan] = None
        self._metrics.add("held_slots", loan.slots, plugin=plugin_of(loan.pool.names))
        self._sort(loan)

    def _sort(self, loan: Loan) -> None:
        """Where a lease is looked for from now on."""
        pool = loan.pool
        for kind in (pool.singles, pool.blocks, pool.lost):
            kind.pop(loan, None)
        if loan.has_ended:
            if loan in self._kept:
                del self._kept[loan]
                self._metrics.add("held_slots", -loan.slots, plugin=plugin_of(pool.names))
        elif loan.size > 1:
            if loan.lease is not None:
                pool.blocks[loan] = None
        else:
            (pool.lost if loan.lease is None else pool.singles)[loan] = None

    def _drop(self, place: Place) -> None:
        for lease_id in place.ids:
            self._places.pop(lease_id, None)

    def _remember(self, ids: Iterable[str]) -> None:
        for lease_id in ids:
            self._released[lease_id] = None
        while len(self._released) > REMEMBERED_RELEASES:
            self._released.popitem(last=False)

    def _end(self, loan: Loan, written: Callable[[], Awaitable[bool]] | None = None) -> None:
        if loan.has_ended:
            return
        loan.has_ended = True
        self._sort(loan)
        if loan.lease is not None or loan.owed or loan.lock.locked():
            self._start_release(loan, written)

    def _start_release(
        self, loan: Loan, written: Callable[[], Awaitable[bool]] | None = None
    ) -> None:
        if self._open:  # else the slots lapse by themselves
            self.releasing += 1
            self._tasks.start_soon(self._free, loan, written)

    async def _free(self, loan: Loan, written: Callable[[], Awaitable[bool]] | None) -> None:
        """Give slots back, however long it takes.

        Args:
            written: False: a record may still name the lease, and another process may live by it: it is left.
        """
        plugin = plugin_of(loan.pool.names)
        pause = 0.25
        try:
            async with loan.lock:
                if written is not None and not await written():
                    loan.lease = None
                while loan.lease is not None or loan.owed:
                    try:
                        async with self._calls:
                            await self._free_once(loan)
                    except SlotsUnavailable as error:
                        self.note_trouble(error)
                        self._metrics.count("slot_releases_total", plugin=plugin, outcome="failed")
                        await self._clock.sleep(pause * chance.uniform(0.5, 1.0))
                        pause = min(pause * 2, 10.0)
                    else:
                        self._metrics.count("slot_releases_total", plugin=plugin, outcome="ok")
        finally:
            self.releasing -= 1
            self._quiet.set()
        self._freed(loan.pool.names)

    async def _free_once(self, loan: Loan) -> None:
        if loan.lease is not None:
            stale = self._clock.monotonic() - loan.confirmed > self._real(FRESH_SECONDS)
            if loan.is_foreign or not stale or await self._confirm(loan, loan.lease):
                await self._slots.release(loan.lease.id)
                loan.lease = None
        await self._settle_debt(loan)

    async def _confirm(self, loan: Loan, lease: SlotLease) -> bool:
        """Renew a lease. False: it is lost, and `owed` says where its slots are still counted."""
        sent = self._clock.monotonic()
        names = loan.pool.names
        if await self._slots.renew(lease.id, self._seconds):
            loan.confirmed = sent
            loan.expires = sent + self._real(self._seconds)
            loan.due = self._next_round()
            return True
        loan.lease = None
        # Within its time nobody but the server itself can have lost it, and that by a restart.
        loan.owed = list(names) if sent < loan.expires else []
        cause = "server" if loan.owed else "lapsed"
        self._metrics.count("lost_slots_total", loan.slots, plugin=plugin_of(names), cause=cause)
        logger.warning(
            "a lease of %d slots of %s was lost (%s); its job goes on",
            loan.slots,
            " and ".join(names),
            "Prefect's server restarted" if loan.owed else "it lapsed unrenewed",
        )
        self._sort(loan)
        return False

    async def _settle_debt(self, loan: Loan) -> None:
        while loan.owed:
            name = loan.owed.pop()
            try:
                await self._slots.give_back(name, loan.slots)
            except SlotsUnavailable as error:
                if not error.maybe_done:  # twice would free a place of somebody else
                    loan.owed.append(name)
                raise

    async def _renew(self) -> None:
        """Look after every lease of the process."""
        while True:
            self._nudge.clear()
            now = self._clock.monotonic()
            due = [loan for loan in self._kept if loan.due <= now]
            due.sort(key=lambda loan: loan.lease is None)  # what we have comes before what we miss
            if due:
                async with anyio.create_task_group() as batch:
                    for loan in due:
                        batch.start_soon(self._attend, loan)
            now = self._clock.monotonic()
            first = min((loan.due for loan in self._kept), default=self._next_round())
            with anyio.move_on_after(self._clock.real(max(0.0, first - now))):
                await self._nudge.wait()

    async def _attend(self, loan: Loan) -> None:
        if loan.has_ended:
            return
        async with loan.lock, self._calls:
            if loan.has_ended:
                return
            pool, now = loan.pool, self._clock.monotonic()
            loan.due = now + self._real(ASK_SECONDS * chance.uniform(1.0, 2.0))
            try:
                if loan.lease is not None and await self._confirm(loan, loan.lease):
                    self._mind(pool)
                    return
                if not loan.has_ended:
                    await self._settle_debt(loan)
            except SlotsUnavailable as error:
                self.note_trouble(error)
                return
            if loan.size > 1:
                self._scatter(loan)
                return
            if loan.has_ended or self._is_busy(pool):
                return
            [place] = loan.places
            await self._take(place, lambda: len(pool.lost) - 1)
            if loan.places:
                self._note_busy(pool)

    def _scatter(self, block: Loan) -> None:
        """Those of a lost block take leases anew, each for itself or again in blocks."""
        now = self._clock.monotonic()
        for place in list(block.places):
            loan = Loan(block.pool, due=now)
            self._keep(loan)
            self._enter(place, loan)
        self._end(block)
        self._nudge.set()

    def note_trouble(self, error: SlotsUnavailable) -> None:
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


def plugin_of(names: Sequence[str]) -> str:
    parts = names[0].split(":")
    return parts[1] if len(parts) > 1 else ""
