"""Waiting on a condition with a deadline."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

__all__ = ["eventually", "eventually_blocking"]

T = TypeVar("T")


async def eventually(
    condition: Callable[[], T | Awaitable[T]], *, within: float, every: float = 0.02
) -> T:
    """Wait until `condition()` is truthy and return its value; fail after `within` real seconds."""
    end = time.monotonic() + within
    while True:
        found = condition()
        value = cast(T, await found if inspect.isawaitable(found) else found)
        if value:
            return value
        if time.monotonic() >= end:
            raise AssertionError(f"not true within {within} s: {condition}, last value {value!r}")
        await asyncio.sleep(every)


def eventually_blocking(condition: Callable[[], T], *, within: float, every: float = 0.02) -> T:
    """The same for tests without a loop."""
    end = time.monotonic() + within
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= end:
            raise AssertionError(f"not true within {within} s: {condition}, last value {value!r}")
        time.sleep(every)
