"""Who comes by the thousand waits outside, where waiting costs no task."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

__all__ = ["Lobby"]

T = TypeVar("T", bound=Hashable)


@dataclass(slots=True, eq=False)
class _Line(Generic[T]):
    """Those who don't wait for other lines. `free`: of the `places` inside, below 0 while more are in than may be;
    `outside`: first come first.
    """

    places: int
    free: int
    outside: OrderedDict[T, None] = field(default_factory=OrderedDict[T, None])
    is_about_to_open: bool = False


class Lobby(Generic[T]):
    """Lets so many in at once, in the order of their coming; those who come one upon the other come in together.

    Args:
        line_of: whose line somebody waits in; it must stay the same until he leaves.
        places: how many of a line may be inside.
        party: how many come in together at most; others get their turn of the loop before the next ones.
        let_in: takes those who come in, all of one line; `leave` is called once for each of them.
        soon: has something done after what is to be done already.
    """

    def __init__(
        self,
        line_of: Callable[[T], Hashable],
        places: int,
        party: int,
        let_in: Callable[[Sequence[T]], None],
        soon: Callable[[Callable[[], None]], None],
    ) -> None:
        self._line_of = line_of
        self._places = places
        self._party = party
        self._let_in = let_in
        self._soon = soon
        self._lines: dict[Hashable, _Line[T]] = {}

    @property
    def is_crowded(self) -> bool:
        """Whether anybody is outside."""
        return any(line.outside for line in self._lines.values())

    def come(self, who: T) -> None:
        key = self._line_of(who)
        line = self._line(key)
        line.outside[who] = None
        self._open_soon(key, line)

    def enter(self, who: T) -> None:
        """Be let in at once, or come as others do."""
        if self.enter_now(who):
            self._let_in([who])
        else:
            self.come(who)

    def enter_now(self, who: T) -> bool:
        """Come in past nobody, without being let in; False: others are before him, and he has not come at all."""
        line = self._line(self._line_of(who))
        if line.outside or line.free <= 0:
            return False
        line.free -= 1
        return True

    def leave(self, who: T) -> None:
        """Somebody who was let in makes room."""
        key = self._line_of(who)
        line = self._lines[key]
        line.free += 1
        self._open_soon(key, line)
        self._tidy(key, line)

    def withdraw(self, who: T) -> bool:
        """He waits no longer; False: he is not outside."""
        key = self._line_of(who)
        line = self._lines.get(key)
        if line is None or who not in line.outside:
            return False
        del line.outside[who]
        self._tidy(key, line)
        return True

    def position(self, who: T) -> int:
        """Of the last of his line, those inside counted."""
        line = self._lines[self._line_of(who)]
        return line.places - line.free + len(line.outside)

    def allow(self, who: T, places: int) -> None:
        """So many of his line may be inside, until it is empty. He is inside."""
        key = self._line_of(who)
        line = self._lines[key]
        line.free += places - line.places
        line.places = places
        self._open_soon(key, line)

    def _line(self, key: Hashable) -> _Line[T]:
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line(self._places, self._places)
        return line

    def _tidy(self, key: Hashable, line: _Line[T]) -> None:
        if line.free == line.places and not line.outside:
            del self._lines[key]

    def _open_soon(self, key: Hashable, line: _Line[T]) -> None:
        if line.outside and line.free > 0 and not line.is_about_to_open:
            line.is_about_to_open = True
            self._soon(lambda: self._open(key, line))

    def _open(self, key: Hashable, line: _Line[T]) -> None:
        line.is_about_to_open = False
        some = min(line.free, self._party, len(line.outside))
        if some <= 0:
            return
        line.free -= some
        coming = [line.outside.popitem(last=False)[0] for _ in range(some)]
        self._open_soon(key, line)
        self._let_in(coming)
