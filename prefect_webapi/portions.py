"""Work on many things that shares the loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TypeVar

__all__ = ["in_portions"]

T = TypeVar("T")


async def in_portions(things: Sequence[T], size: int) -> AsyncIterator[T]:
    """Each of them; after every `size` others get their turn of the loop."""
    for nth, thing in enumerate(things, start=1):
        yield thing
        if nth % size == 0:
            await asyncio.sleep(0)
