"""Waking the engine's loop: never missed, and once for a crowd."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from prefect_webapi.bell import Bell


async def test_who_rings_from_a_thread_wakes_who_waits() -> None:
    bell = Bell()
    with bell.heard():
        bell.look()
        threading.Thread(target=bell.ring).start()
        async with asyncio.timeout(5):
            await bell.wait()


async def test_who_rings_during_the_look_is_not_missed() -> None:
    bell = Bell()
    with bell.heard():
        for _ in range(3):
            bell.look()
            bell.ring()
            async with asyncio.timeout(5):
                await bell.wait()


async def test_who_has_looked_waits_for_the_next_ring() -> None:
    bell = Bell()
    with bell.heard():
        bell.look()
        bell.ring()
        await bell.wait()
        bell.look()
        waiting = asyncio.create_task(bell.wait())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not waiting.done()
        bell.ring()
        async with asyncio.timeout(5):
            await waiting


async def test_a_wait_ends_by_itself() -> None:
    bell = Bell()
    with bell.heard():
        bell.look()
        await bell.wait(0.01)


async def test_a_crowd_rings_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _calls(monkeypatch)
    bell = Bell()
    with bell.heard():
        for expected in (1, 2):
            bell.look()
            for _ in range(100):
                bell.ring()
            assert len(calls) == expected


async def test_whose_ring_was_interrupted_is_rung_for_by_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A signal's handler may raise at any place."""
    calls = _calls(monkeypatch, KeyboardInterrupt())
    bell = Bell()
    with bell.heard():
        bell.look()
        with pytest.raises(KeyboardInterrupt):
            bell.ring()
        bell.ring()
        assert len(calls) == 2


async def test_where_nobody_hears_nothing_happens() -> None:
    bell = Bell()
    bell.ring()
    with bell.heard():
        bell.look()
    bell.ring()


async def test_a_loop_that_has_closed_hears_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _calls(monkeypatch, RuntimeError("Event loop is closed"))
    bell = Bell()
    with bell.heard():
        bell.look()
        bell.ring()


def _calls(monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None) -> list[Any]:
    """What is handed to the running loop from now on; the first time it raises."""
    calls: list[Any] = []
    loop = asyncio.get_running_loop()

    def call_soon_threadsafe(callback: Any, *args: Any) -> None:
        calls.append(callback)
        if error is not None and len(calls) == 1:
            raise error

    monkeypatch.setattr(loop, "call_soon_threadsafe", call_soon_threadsafe)
    return calls
