"""Waking a task of a loop, from any thread."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import contextmanager

__all__ = ["Bell"]


class Bell:
    """It is rung once until who hears it has looked: that takes a system call, and crowds ring together.

    Who hears it says `look` before looking for what there is, then `wait`.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event: asyncio.Event | None = None
        self._looks = 0
        self._rung_before = 0

    @contextmanager
    def heard(self) -> Generator[None]:
        """Who runs this block hears it; outside of it rings are lost."""
        self._event, self._loop = asyncio.Event(), asyncio.get_running_loop()
        try:
            yield
        finally:
            self._loop = self._event = None

    def ring(self) -> None:
        """From any thread, and from a signal handler."""
        loop, event, looks = self._loop, self._event, self._looks
        if loop is None or event is None or self._rung_before == looks:
            return
        try:
            loop.call_soon_threadsafe(event.set)
        except RuntimeError:  # that loop has closed
            return
        # Not sooner: a signal or a time-out may raise at any place here, and then the next one must ring.
        self._rung_before = looks

    def ring_here(self) -> None:
        """As `ring`, from the loop on which it is heard: that takes no system call."""
        if self._event is not None:
            self._event.set()

    def look(self) -> None:
        assert self._event is not None
        self._looks += 1  # before the look: who comes later rings again
        self._event.clear()

    async def wait(self, seconds: float | None = None) -> None:
        """Until it is rung, or for so long."""
        assert self._event is not None
        try:
            async with asyncio.timeout(seconds):
                await self._event.wait()
        except TimeoutError:
            pass
