"""The gate before a remote service: how fast calls may leave, and when none may.

One gate stands for one endpoint and credential; reads and writes pass it apart. It belongs to one event
loop and owns no task: those who wait drive themselves. It never calls the service.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Coroutine
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import anyio
from aiolimiter import AsyncLimiter

from prefect_webapi.clock import Clock
from prefect_webapi.contract.errors import ConfigurationError
from prefect_webapi.metrics import Metrics

if TYPE_CHECKING:
    from prefect_webapi.contract.config import RateLimiterConfig

__all__ = ["Gate", "Gates", "Op"]

logger = logging.getLogger(__name__)

Op = Literal["read", "write"]
Turn = Callable[[], Awaitable[None]]

SLOWEST = 1 / 64
"""Part of the configured rate that is always left, however often the service says "too many"."""

RECOVERY_SECONDS = 60.0
"""Good answers bring the full rate back within this time."""

HALVING_SECONDS = 1.0
"""Calls that were under way together are refused together: they halve the rate once."""

GROWTH_SECONDS = 0.25
"""The rate grows in steps, not with every single answer."""

LOG_SECONDS = 60.0


class _Lane:
    """One kind of call at one gate.

    The queue is a lock: whoever holds it is the only one at the bucket, which would serve its own
    waiters by amount. A slowed-down rate is a surcharge: a call costs 1 / factor permits, the last of
    which is taken in the moment in which it leaves, so that never more than `burst` leave at once.
    """

    def __init__(self, where: str, op: Op, clock: Clock, metrics: Metrics) -> None:
        self.qps = 0
        self.burst = 0
        self._where = where
        self._op: Op = op
        self._clock = clock
        self._waited = metrics.histogram("permit_wait_seconds", op=op)
        self._bucket = AsyncLimiter(1)
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._scope: anyio.CancelScope | None = None
        self._version = 0
        self._closed_until = clock.monotonic()
        self._factor = 1.0
        self._halved_at = float("-inf")
        self._grown_at = clock.monotonic()
        self._throttles = 0
        self._logged_at = float("-inf")

    def set(self, qps: int, burst: int) -> None:
        """Change rate and burst. Permits that are left, are left; those who wait keep their place."""
        if (qps, burst) == (self.qps, self.burst):
            return
        bucket = AsyncLimiter(burst, self._clock.real(burst / qps))
        if self.qps and (spent := burst - min(burst, self._free(burst))):
            # A fresh bucket is empty, so this returns without waiting: nobody else knows it yet.
            _finish(bucket.acquire(spent))
        self.qps, self.burst, self._bucket = qps, burst, bucket
        self._changed()

    def close(self, seconds: float) -> None:
        self._closed_until = max(self._closed_until, self._clock.monotonic() + seconds)
        self._changed()

    def slow_down(self) -> None:
        now = self._clock.monotonic()
        if now - self._halved_at >= HALVING_SECONDS:
            self._halved_at = now
            self._factor = max(SLOWEST, self._factor / 2)
            self._changed()
        self._grown_at = now

    def speed_up(self) -> None:
        now = self._clock.monotonic()
        if self._factor < 1.0 and now - self._grown_at >= GROWTH_SECONDS:
            self._factor = min(1.0, self._factor + (now - self._grown_at) / RECOVERY_SECONDS)
            self._grown_at = now
            self._changed()

    def note_throttle(self, retry_after: float) -> None:
        """Tell people, at most once a minute."""
        self._throttles += 1
        now = self._clock.monotonic()
        if now - self._logged_at < LOG_SECONDS:
            return
        if retry_after <= 0:
            then = f"the rate is {self.qps * self._factor:.3g} per second of {self.qps}"
        else:
            then = f"none leaves for {retry_after:.0f} s"
        logger.warning(
            "%s throttles %ss: %d answers since the last such line; %s",
            self._where,
            self._op,
            self._throttles,
            then,
        )
        self._logged_at = now
        self._throttles = 0

    async def leave(self, cost: int, turn: Turn | None) -> None:
        if cost > self.burst:
            raise ConfigurationError(
                f"a {self._op} of cost {cost} can never pass: {self._op}_rate_limiter.burst is "
                f"{self.burst}. Raise it to {cost} or more."
            )
        began = self._clock.monotonic()
        if turn is None and self._may_pass(began, cost):
            _finish(self._bucket.acquire(cost))
            self._waited(0.0)
            return
        self._waiting += 1
        try:
            async with self._turn:
                await self._pay(cost)
                while turn is not None:
                    await turn()
                    if (closed := self._closed_until - self._clock.monotonic()) <= 0:
                        break
                    await self._clock.sleep(closed)  # the service asked for less meanwhile
        finally:
            self._waiting -= 1
        self._waited(self._clock.monotonic() - began)

    def opens_in(self) -> float:
        now = self._clock.monotonic()
        if (left := self._closed_until - now) > 0:
            return left
        if self._may_pass(now, 1):
            return 0.0
        return (self._waiting + 1) / (self.qps * self._factor)

    def _may_pass(self, now: float, cost: int) -> bool:
        """Whether a call may leave at once: nobody waits, the gate is open and the rate is whole."""
        return (
            not self._waiting
            and self._closed_until <= now
            and self._factor == 1.0
            and self._bucket.has_capacity(cost)
        )

    async def _pay(self, cost: int) -> None:
        surcharge = 0.0
        while True:
            while (closed := self._closed_until - self._clock.monotonic()) > 0:
                await self._clock.sleep(closed)
            owed = cost / self._factor - cost - surcharge
            if owed > 1e-9:
                piece = min(owed, self.burst)
                if await self._take(piece):
                    surcharge += piece
            elif await self._take(min(cost, self.burst)):
                return

    async def _take(self, amount: float) -> bool:
        """Take permits; False: gate, rate or bucket changed meanwhile and nothing counts."""
        version = self._version
        if self._bucket.has_capacity(amount):
            await self._bucket.acquire(amount)
            return True
        with anyio.CancelScope() as self._scope:
            try:
                await self._bucket.acquire(amount)
            finally:
                self._scope = None
            return version == self._version
        return False

    def _changed(self) -> None:
        self._version += 1
        if self._scope is not None:
            self._scope.cancel()

    def _free(self, most: int) -> int:
        """Whole permits the bucket has now, up to `most`; a full bucket has as many as anybody wants."""
        if self._bucket.has_capacity(self.burst):
            return most
        return bisect_left(
            range(1, self.burst + 1), True, key=lambda n: not self._bucket.has_capacity(n)
        )


def _finish(call: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine that never waits."""
    try:
        call.send(None)
    except StopIteration:
        return
    call.close()
    raise RuntimeError("this call was not expected to wait")


class Gate:
    """The way to one endpoint with one credential. Made by `Gates`.

    Never do more than ``burst + qps * w`` calls of a kind leave within w seconds.

    Source: SPEC REQ-14 to REQ-17, REQ-39 to REQ-41.
    """

    def __init__(
        self,
        key: str,
        read: RateLimiterConfig,
        write: RateLimiterConfig,
        *,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._lanes: dict[Op, _Lane] = {
            "read": _Lane(key, "read", clock, metrics),
            "write": _Lane(key, "write", clock, metrics),
        }
        self._heard: list[tuple[RateLimiterConfig, RateLimiterConfig]] = []
        self.configure(read, write)

    async def acquire(self, op: Op, *, cost: int = 1, turn: Turn | None = None) -> None:
        """Wait until a call of this kind may leave.

        First come, first served per operation. A cancelled waiter gives its permit back. While a `Retry-After`
        runs, nobody passes.

        Args:
            op: read (`get`, `get_many`, `find`) or write (`create`, `delete`, `do`).
            cost: permits taken at once, 1 to `burst`. A batch read costs 1.
            turn: waits for the call's turn among those of other processes; asked by one call of a kind at a time,
                last, and again if the gate has closed before it came.

        Raises:
            ConfigurationError: `cost` is above `burst`, so it could never pass.

        Source: SPEC REQ-14 to REQ-17, REQ-41.
        """
        await self._lanes[op].leave(cost, turn)

    def throttled(self, op: Op, retry_after: timedelta | None) -> None:
        """The service asked for less.

        Args:
            op: the kind of call that was refused.
            retry_after: no call of this kind leaves before that time is over; None, or a time that is over
                already: the rate is halved instead, and grows back with good answers. The caller has capped it.
        """
        lane = self._lanes[op]
        seconds = retry_after.total_seconds() if retry_after is not None else 0.0
        if seconds > 0:
            lane.close(seconds)
        else:
            lane.slow_down()
        lane.note_throttle(seconds)

    def succeeded(self, op: Op) -> None:
        """The service answered: a halved rate grows back, fully within a minute."""
        self._lanes[op].speed_up()

    def configure(self, read: RateLimiterConfig, write: RateLimiterConfig) -> None:
        """Set rates and bursts. Those who wait keep their place and go on at the new rate."""
        self._heard = [(read, write)]
        self._lanes["read"].set(read.qps, read.burst)
        self._lanes["write"].set(write.qps, write.burst)

    def lower(self, read: RateLimiterConfig, write: RateLimiterConfig) -> None:
        """Keep of each rate and burst the lower one: several plugins share this gate."""
        if any(read is r and write is w for r, w in self._heard):  # as at each call
            return
        self._heard.append((read, write))
        wishes: dict[Op, RateLimiterConfig] = {"read": read, "write": write}
        for op, wish in wishes.items():
            lane = self._lanes[op]
            lane.set(min(lane.qps, wish.qps), min(lane.burst, wish.burst))

    def opens_in(self, op: Op) -> float:
        """Seconds until a call could leave: exact while a `Retry-After` runs or nobody waits, else a guess."""
        return self._lanes[op].opens_in()


class Gates:
    """Every gate of a process.

    Args:
        clock: a sped-up one speeds up the rates.
    """

    def __init__(self, clock: Clock, metrics: Metrics) -> None:
        self._clock = clock
        self._metrics = metrics
        self._gates: dict[str, Gate] = {}

    def gate(self, key: str, read: RateLimiterConfig, write: RateLimiterConfig) -> Gate:
        """The gate of this key: whoever asks for the same one shares it, at the lower rates.

        To raise the rates of a gate that exists, `configure` it.

        Args:
            key: endpoint and credential, for people and log lines as well: no secret.
        """
        gate = self._gates.get(key)
        if gate is None:
            gate = Gate(key, read, write, clock=self._clock, metrics=self._metrics)
            self._gates[key] = gate
        else:
            gate.lower(read, write)
        return gate
