"""An event loop whose time jumps to the next timer: hours of waiting in milliseconds, for code without sockets."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from prefect_webapi.clock import Clock

T = TypeVar("T")


class _Jumping(selectors.SelectSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if not events:
            if timeout is None:
                raise AssertionError("everybody waits for something that no timer brings")
            self.now += max(timeout, 1e-10)  # as on any machine, nothing takes no time
        return events


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


class LoopClock(Clock):
    """Reads the running loop's time."""

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time() * self.speed

    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.monotonic())


def run(scenario: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in virtual time; fails if a task outlives it."""
    with asyncio.Runner(loop_factory=_VirtualLoop) as runner:

        async def alone() -> T:
            result = await scenario
            await asyncio.sleep(0)
            others = asyncio.all_tasks() - {asyncio.current_task()}
            assert not others, f"left over: {others}"
            return result

        return runner.run(alone())
