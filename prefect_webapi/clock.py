"""The only reader of time. Spans are measured by the monotonic clock, instants are aware UTC."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta

__all__ = ["Clock", "process_clock", "use_clock"]


class Clock:
    """Real time, or `speed` times real time for tests that would take minutes.

    Args:
        speed: how many seconds of this clock pass in one real second; above 0.
        epoch: the instant (seconds since 1970) at which a sped-up clock and the real one agree. Give
            processes that share a ledger the same one; None: now.
    """

    __slots__ = ("_origin_mono", "_origin_wall", "speed")

    def __init__(self, speed: float = 1.0, *, epoch: float | None = None) -> None:
        if speed <= 0:
            raise ValueError(f"speed is {speed}; it must be above 0")
        self.speed = speed
        self._origin_mono = time.monotonic()
        self._origin_wall = time.time()
        if epoch is not None:
            self._origin_mono -= self._origin_wall - epoch
            self._origin_wall = epoch

    def monotonic(self) -> float:
        """Seconds; only differences mean something."""
        return self._origin_mono + (time.monotonic() - self._origin_mono) * self.speed

    def now(self) -> datetime:
        """The present instant, aware, UTC. A sped-up clock ignores later jumps of the wall clock."""
        if self.speed == 1.0:
            return datetime.now(UTC)
        elapsed = (time.monotonic() - self._origin_mono) * self.speed
        return datetime.fromtimestamp(self._origin_wall, UTC) + timedelta(seconds=elapsed)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(max(0.0, seconds) / self.speed)

    def real(self, seconds: float) -> float:
        """How many real seconds `seconds` of this clock take: for the event loop's own timers."""
        return seconds / self.speed


_chosen: Clock | None = None


def process_clock() -> Clock:
    """The clock of this process's engine: real time, unless a test chose another before the engine started."""
    return _chosen or Clock()


def use_clock(clock: Clock | None) -> None:
    """Let engines that start from now on live by `clock`; None: by real time. Only tests do this."""
    global _chosen
    _chosen = clock
