"""Prefect's limits without Prefect, in virtual time, and a process that takes slots of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta

from prometheus_client import CollectorRegistry

from prefect_webapi.metrics import Metrics
from prefect_webapi.quotas import Busy, Count, Quotas, SlotLease, SlotsUnavailable, Waiting
from tests.support.virtualtime import LoopClock

__all__ = ["NAME", "Ledger", "Server", "admit_all", "nobody_listens", "open_quotas", "take"]

NAME = "webapi:jobs:prod:default"


@dataclass
class Server:
    """Prefect's limits as measured: leases in memory, counts on disk."""

    clock: LoopClock = field(default_factory=LoopClock)
    limits: dict[str, int] = field(default_factory=dict[str, int])
    taken: dict[str, int] = field(default_factory=dict[str, int])
    leases: dict[str, tuple[Sequence[str], int, float]] = field(
        default_factory=dict[str, tuple[Sequence[str], int, float]]
    )
    calls: list[tuple[str, float]] = field(default_factory=list[tuple[str, float]])
    highest: int = 0
    is_down: bool = False
    latency: float = 0.01
    failures: dict[str, int] = field(default_factory=dict[str, int])
    made: int = 0

    async def _call(self, what: str) -> None:
        self.calls.append((what, self.clock.monotonic()))
        if self.is_down or self.failures.get(what, 0) > 0:
            self.failures[what] = self.failures.get(what, 0) - 1
            raise SlotsUnavailable("Prefect's API can't be reached", maybe_done=False)
        await asyncio.sleep(self.latency)
        now = self.clock.monotonic()
        for lease_id, (_, _, until) in list(self.leases.items()):
            if until < now:
                self._end(lease_id)

    def _end(self, lease_id: str) -> None:
        names, slots, _ = self.leases.pop(lease_id, ((), 0, 0.0))
        for name in names:
            self.taken[name] -= slots

    def restart(self) -> None:
        self.leases.clear()

    def count(self, what: str) -> int:
        return len([call for call, _ in self.calls if call == what])

    async def ensure(self, name: str, limit: int) -> None:
        await self._call("ensure")
        self.limits[name] = limit
        self.taken.setdefault(name, 0)

    async def acquire(
        self, names: Sequence[str], slots: int, holder: str, seconds: float
    ) -> SlotLease | Busy:
        await self._call("acquire")
        if any(self.taken[name] + slots > self.limits[name] for name in names):
            return Busy(30.0)
        for name in names:
            self.taken[name] += slots
            self.highest = max(self.highest, self.taken[name])
        self.made += 1
        lease_id = f"lease-{self.made}"
        self.leases[lease_id] = (names, slots, self.clock.monotonic() + seconds)
        await asyncio.sleep(self.latency)  # the answer is on its way
        return SlotLease(lease_id, self.clock.now() + timedelta(seconds=seconds))

    async def renew(self, lease_id: str, seconds: float) -> bool:
        await self._call("renew")
        if lease_id not in self.leases:
            return False
        names, slots, _ = self.leases[lease_id]
        self.leases[lease_id] = (names, slots, self.clock.monotonic() + seconds)
        return True

    async def release(self, lease_id: str) -> None:
        await self._call("release")
        self._end(lease_id)

    async def give_back(self, name: str, slots: int) -> None:
        await self._call("give_back")
        self.taken[name] = max(0, self.taken[name] - slots)

    async def active(self, name: str) -> int:
        await self._call("active")
        return self.taken.get(name, 0)


class Ledger:
    """Admits up to `room` jobs, as the ledger's count does."""

    def __init__(self, room: int = 1_000_000) -> None:
        self.room = room
        self.live = 0

    async def admit(self, lease: SlotLease) -> bool:
        await asyncio.sleep(0.005)
        if self.live >= self.room:
            return False
        self.live += 1
        return True


async def admit_all(lease: SlotLease) -> bool:
    return True


def nobody_listens(wait: Waiting) -> None:
    return None


@asynccontextmanager
async def open_quotas(
    server: Server,
    limit: int | None = None,
    metrics: Metrics | None = None,
    ledger: Count | None = None,
) -> AsyncGenerator[Quotas]:
    metrics = metrics or Metrics(CollectorRegistry())
    async with Quotas(server, clock=server.clock, metrics=metrics, ledger=ledger) as quotas:
        if limit is not None:
            await quotas.configure(NAME, limit)
        yield quotas


async def take(
    quotas: Quotas,
    *,
    weight: int = 1,
    waiting: Callable[[Waiting], None] = nobody_listens,
    changed: Callable[[SlotLease], None] = lambda lease: None,
) -> SlotLease:
    return await quotas.acquire(
        [NAME], weight=weight, holder="", admit=admit_all, waiting=waiting, changed=changed
    )
