"""Who comes in by the thousand waits outside, where waiting costs no task."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

__all__ = ["Lobby"]

T = TypeVar("T")


class Lobby(Generic[T]):
    """Lets so many in at once, in the order of their coming; those who come one upon the other come in together.

    Args:
        places: how many may be inside.
        party: how many come in together at most.
        let_in: takes those who come in; `leave` is called once for each of them.
        soon: has something done after what is to be done already.
    """

    def __init__(
        self,
        places: int,
        party: int,
        let_in: Callable[[Sequence[T]], None],
        soon: Callable[[Callable[[], None]], None],
    ) -> None:
        self._places = self._free = places
        self._party = party
        self._let_in = let_in
        self._soon = soon
        self._outside: deque[T] = deque()
        self._is_about_to_open = False

    @property
    def is_empty(self) -> bool:
        return self._free == self._places and not self._outside

    @property
    def is_crowded(self) -> bool:
        return bool(self._outside)

    def come(self, who: T) -> None:
        self._outside.append(who)
        self._open_soon()

    def leave(self) -> None:
        self._free += 1
        self._open_soon()

    def _open_soon(self) -> None:
        if self._outside and self._free and not self._is_about_to_open:
            self._is_about_to_open = True
            self._soon(self._open)

    def _open(self) -> None:
        self._is_about_to_open = False
        while some := min(self._free, self._party, len(self._outside)):
            self._free -= some
            self._let_in([self._outside.popleft() for _ in range(some)])
