"""How long the jobs of a task take, learned from those that ended well: one is read seldom until it may be over, and at
the moment when others of the same length were.

Kept in the ledger from time to time, so a task's next run knows it from its first job on. It is a help and no duty:
what a process that is killed has not kept is learned again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from prefect_webapi.chance import chance

__all__ = ["Durations"]

SAMPLE = 100
MOST = 2_000
"""A sample stands for so many jobs at most: what comes later counts at least that much."""
SHORT = 0.1
"""The share of jobs that were faster than what is expected."""
LATEST, FEWEST = 20, 3
"""The end of the next job is foreseen from so many that ended last, and from so many at least."""
ALIKE = 0.1
"""They are of one length if they differ by no more than this share of it."""
SURE = 0.02
"""A length that is known to this share of it is not looked for more closely."""
AGAIN = 0.05
"""A job that lives on when it should be over is looked at again this share of its age later."""


class _Sample:
    """Of all that was told, each with the same chance: jobs that begin together end in the order of their length."""

    def __init__(self, seconds: Sequence[float]) -> None:
        self.seconds = list(seconds[-SAMPLE:])
        self._told = len(self.seconds)
        self._expected: float | None = None
        self._latest = deque[tuple[float, float]](maxlen=LATEST)
        self._ends: tuple[float, ...] | None = None

    def add(self, alive: float, over: float) -> None:
        seconds = round((alive + over) / 2, 3)
        self._told = min(self._told + 1, MOST)
        if len(self.seconds) < SAMPLE:
            self.seconds.append(seconds)
        elif (place := chance.randrange(self._told)) < SAMPLE:
            self.seconds[place] = seconds
        self._expected = self._ends = None
        self._latest.append((alive, over))

    @property
    def expected(self) -> float:
        if self._expected is None:
            self._expected = sorted(self.seconds)[int(len(self.seconds) * SHORT)]
        return self._expected

    @property
    def ends(self) -> tuple[float, ...]:
        if self._ends is None:
            self._ends = self._foreseen() if len(self._latest) >= FEWEST else ()
        return self._ends

    def _foreseen(self) -> tuple[float, ...]:
        alive = max(alive for alive, _ in self._latest)
        over = min(over for _, over in self._latest)
        end = max(alive, over)
        if alive - over > ALIKE * end:
            return ()
        if alive - over > SURE * end:
            return (end,)
        if over - alive > SURE * end:
            return (alive + over) / 2, over
        if alive >= over:  # at that very age one was alive
            end *= 1 + SURE
        return end, end * (1 + AGAIN)


class Durations:
    """Seconds from create to end, by plugin and task.

    Args:
        known: samples of earlier processes.
    """

    def __init__(self, known: Mapping[tuple[str, str], Sequence[float]]) -> None:
        self._of = {task: _Sample(seconds) for task, seconds in known.items() if seconds}
        self._news = set[tuple[str, str]]()

    def note(self, plugin: str, task: str, alive: float, over: float) -> None:
        """A job of the task ended well.

        Args:
            alive: its age in seconds when it was last seen alive; over: when it was seen over.
        """
        key = plugin, task
        if key not in self._of:
            self._of[key] = _Sample([])
        self._of[key].add(alive, over)
        self._news.add(key)

    def expected(self, plugin: str, task: str) -> float:
        """The age in seconds before which few jobs of the task end; 0: nobody knows."""
        sample = self._of.get((plugin, task))
        return 0.0 if sample is None else sample.expected

    def ends(self, plugin: str, task: str) -> Sequence[float]:
        """The ages in seconds at which the next job may be over, judged by the last ones in this process.

        One where their lengths are nearly the same. Two where they are the same: as long as it is not well known the
        first is tried to know it better, which takes a few jobs one read more each; then the second is for a job that
        takes a little longer. None: nobody knows, or they differ.
        """
        sample = self._of.get((plugin, task))
        return () if sample is None else sample.ends

    def news(self) -> Mapping[tuple[str, str], Sequence[float]]:
        """Those of each task about which something new was told since the last time."""
        told = {key: tuple(self._of[key].seconds) for key in self._news}
        self._news.clear()
        return told
