"""Who comes in by the thousand waits outside, where waiting costs no task."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Lobby"]

T = TypeVar("T")


class Lobby(Generic[T]):
    """Lets so many in at once, in the order of their coming.

    Args:
        places: how many may be inside.
        let_in: takes who comes in; `leave` is called once for each of them.
    """

    def __init__(self, places: int, let_in: Callable[[T], None]) -> None:
        self._places = self._free = places
        self._let_in = let_in
        self._outside: deque[T] = deque()

    @property
    def is_empty(self) -> bool:
        return self._free == self._places and not self._outside

    def come(self, who: T) -> None:
        self._outside.append(who)
        self._open()

    def leave(self) -> None:
        self._free += 1
        self._open()

    def _open(self) -> None:
        while self._free and self._outside:
            self._free -= 1
            self._let_in(self._outside.popleft())
