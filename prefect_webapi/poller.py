"""Who is read next: a heap of due times, batches, one read in flight per job.

It knows handles and times, never tasks, states or the ledger. What a read brought leaves as an `Observation`; the
receiver says whether the job is read again. A poller serves one plugin instance's connection.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import anyio

from prefect_webapi.chance import chance
from prefect_webapi.clock import Clock
from prefect_webapi.portions import in_portions

__all__ = ["Observation", "Poller", "Reading", "ReadingPolicy", "Watched", "next_delay"]

JITTER = 0.1
AGE_SHARE = 0.1
"""The gap between two reads grows with the job's age: a tenth of it."""
EARLY_SHARE = 2.0
"""The same while the job is younger than those of its task ever were at their end."""
BATCH_SLACK = 0.2
"""Share of a job's gap by which it may be read early to fill a batch."""
COMPANY_SLACK = 0.05
"""Share of a job's gap by which it may be read early because others are read at that moment: of a thousand jobs each
would have the process wake up for it alone."""
GATHERED_SHARE = 0.01
"""Share of a job's foreseen age at its end by which the read for it may be late, to be one with those of others."""
EASED_SECONDS, EASED_GAP = 1.0, 0.01
"""For so long a process that takes up jobs by the hundred reads no more often than that: who is not taken up yet is
looked after by nobody."""
GIVEN_AT_ONCE = 50
"""Answers of one read that are delivered before others get their turn of the loop."""


@dataclass(frozen=True, slots=True)
class ReadingPolicy:
    """How often jobs are read, and how many reads run at once.

    Attributes:
        initial: first gap between two reads; longest: the longest gap of a live job. Both in seconds.
        workers: reads at once; max_batch: jobs per read, 1: no batches.
    """

    initial: float
    longest: float
    workers: int
    max_batch: int = 1


class Watched:
    """A job being read. `token` is the receiver's; the poller never looks into it.

    `expected`: the age in seconds that it will hardly end before; 0: nobody knows. `is_exact`: its next read is not
    made before it is due.
    """

    __slots__ = (
        "born",
        "context",
        "due",
        "expected",
        "failures",
        "gap",
        "in_flight",
        "is_exact",
        "late",
        "token",
        "wanted",
    )

    def __init__(self, token: Any, context: Any, born: float, expected: float = 0.0) -> None:
        self.token = token
        self.context = context
        self.born = born
        self.expected = expected
        self.due = 0.0
        self.gap = 0.0
        self.failures = 0
        self.late = 0.0
        self.in_flight = False
        self.is_exact = False
        self.wanted = True

    def __lt__(self, other: Watched) -> bool:
        """In the heap that which is due first comes first."""
        return self.due < other.due


@dataclass(frozen=True, slots=True)
class Observation:
    """What one read of one job brought: a snapshot, or why there is none.

    Attributes:
        late: seconds after it was due.
    """

    watched: Watched
    late: float
    resource: Any = None
    error: Exception | None = None

    @property
    def since(self) -> float:
        """Seconds from when the job was put off, or first watched, to this read."""
        return self.watched.gap + self.late


class Reading(Protocol):
    """Performs a read: limits, time-out, classification of errors are its business."""

    async def one(self, context: Any) -> Any:
        """The snapshot. Raises a `RemoteError`."""
        ...

    async def many(self, contexts: Sequence[Any]) -> Sequence[Any | Exception | None]:
        """One answer per context. Raises a `RemoteError` if the whole read failed."""
        ...


def next_delay(
    policy: ReadingPolicy, *, age: float, failures: int = 0, expected: float = 0.0
) -> float:
    """Seconds until the next read, without jitter.

    Good reads: a tenth of the job's age, between `initial` and `longest`. Before the age at which an end is expected
    twice the age, or straight to when a few will be over: one that ends before is seen at three times its age at the
    latest. After failures in a row: a quarter of `longest`, doubled by each further one, at most `longest`, so that
    contact counts as lost after minutes.
    """
    if failures:
        return min(policy.longest, policy.longest / 4 * 2 ** min(failures - 1, 16))
    gap = max(policy.initial, age * AGE_SHARE)
    if age < expected:
        until = expected - age + max(policy.initial, expected * AGE_SHARE) / 2
        gap = max(gap, min(until, EARLY_SHARE * max(policy.initial, age)))
    return min(policy.longest, gap)


class Poller:
    """Reads every watched job when it is due, `workers` at once, first due first.

    Use it as the body of one task: `run()` ends only by cancellation. Everything else may be called from the same
    loop at any time.

    Args:
        deliver: takes an observation; waits when its receiver is behind. Exactly one follows each read, and
            the job is not read again before `again` is called for it.
    """

    def __init__(
        self,
        policy: ReadingPolicy,
        reading: Reading,
        deliver: Callable[[Observation], Awaitable[None]],
        clock: Clock,
    ) -> None:
        self.policy = policy
        self._reading = reading
        self._deliver = deliver
        self._clock = clock
        self._heap: list[Watched] = []
        self._news = asyncio.Event()
        self._batches = asyncio.Queue[list[Watched]]()
        self._workers = 0
        self._busy = 0
        self._watched = 0
        self._eased_until = self._next_eased = 0.0

    def __len__(self) -> int:
        return self._watched

    def watch(
        self,
        token: Any,
        context: Any,
        *,
        age: float = 0.0,
        expected: float = 0.0,
        ends: Sequence[float] = (),
        is_known: bool = False,
        is_one_of_many: bool = False,
    ) -> Watched:
        """Read a job from now on.

        Args:
            age: of the job, in seconds. expected: the age before which it will hardly end; 0: nobody knows.
            ends: ages at which it may be over, the next of which is waited for; empty: nobody knows.
            is_known: how it stands now is known, so that the first read is due after a gap and not at once.
            is_one_of_many: more of them may come at this moment, so that their first reads are spread over the first
                gap of a new job.
        """
        watched = Watched(token, context, self._clock.monotonic() - age, expected)
        self._watched += 1
        if is_known:
            self._plan(watched, age, ends)
        else:
            self._push(watched, chance.uniform(0, self.policy.initial) if is_one_of_many else 0.0)
        return watched

    def again(self, watched: Watched, *, failed: bool = False, ends: Sequence[float] = ()) -> None:
        """Plan the next read of a job whose observation was taken; `ends` as for `watch`."""
        if not watched.wanted or watched.in_flight:
            return
        watched.failures = watched.failures + 1 if failed else 0
        self._plan(watched, self.age(watched), ends)

    def retry_at(self, watched: Watched, delay: float) -> None:
        """Plan the next read without touching the failure count: a throttled read is no failure. It is never early."""
        if watched.wanted and not watched.in_flight:
            watched.is_exact = True
            self._push(watched, delay)

    def forget(self, watched: Watched) -> None:
        """Read this job no more; an answer on its way is dropped."""
        if watched.wanted:
            watched.wanted = False
            self._watched -= 1

    def age(self, watched: Watched) -> float:
        """Of the job, in seconds."""
        return self._clock.monotonic() - watched.born

    def ease(self) -> None:
        """Read little for a moment: the loop is needed for what is more urgent. A read is made now and then all the
        same, so that nobody waits for ever.
        """
        self._eased_until = self._clock.monotonic() + EASED_SECONDS

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        async with anyio.create_task_group() as tasks:
            while True:
                self._news.clear()
                delay = self._until_due()
                if delay is None:
                    await self._news.wait()
                elif delay > 0:
                    alarm = loop.call_later(self._clock.real(delay), self._news.set)
                    await self._news.wait()
                    alarm.cancel()
                elif self._busy < self.policy.workers:
                    if batch := self._take():
                        self._busy += 1
                        self._batches.put_nowait(batch)
                        if self._busy > self._workers:
                            self._workers += 1
                            tasks.start_soon(self._work)
                else:
                    await self._news.wait()  # a worker that has nothing to do wakes us

    async def _work(self) -> None:
        """Read batch after batch; as long as something is due, without asking."""
        while True:
            batch = await self._batches.get()
            while batch:
                await self._read(batch)
                await asyncio.sleep(0)  # reads that wait for nothing give others their turn
                batch = self._take(COMPANY_SLACK)
            self._busy -= 1
            self._news.set()

    async def _read(self, batch: list[Watched]) -> None:
        if len(batch) == 1:
            await self._read_alone(batch[0])
            return
        answers: Sequence[Any | Exception | None]
        try:
            answers = await self._reading.many([w.context for w in batch])
        except Exception as error:  # noqa: BLE001 - whatever a read raises is its answer
            answers = [error] * len(batch)
        answered = list(zip(batch, answers, strict=True))
        async for watched, answer in in_portions(answered, GIVEN_AT_ONCE):
            if answer is None:  # the service did not mention this job
                await self._read_alone(watched)
            elif isinstance(answer, Exception):
                await self._give(Observation(watched, watched.late, error=answer))
            else:
                await self._give(Observation(watched, watched.late, resource=answer))

    async def _read_alone(self, watched: Watched) -> None:
        try:
            answer = await self._reading.one(watched.context)
        except Exception as error:  # noqa: BLE001 - whatever a read raises is its answer
            await self._give(Observation(watched, watched.late, error=error))
        else:
            await self._give(Observation(watched, watched.late, resource=answer))

    async def _give(self, observation: Observation) -> None:
        observation.watched.in_flight = False
        observation.watched.late = 0.0
        if observation.watched.wanted:
            await self._deliver(observation)

    def _plan(self, watched: Watched, age: float, ends: Sequence[float]) -> None:
        """The read that would come next, or at a foreseen end if that is before."""
        delay = next_delay(
            self.policy, age=age, failures=watched.failures, expected=watched.expected
        )
        delay *= chance.uniform(1 - JITTER, 1)
        end = next((end for end in ends if end > age), age)
        watched.is_exact = not watched.failures and age < end < age + delay
        self._push(watched, self._until_end(watched, end) if watched.is_exact else delay)

    def _until_end(self, watched: Watched, end: float) -> float:
        """Seconds. Jobs that began one after the other end so; where a read is of many, those of a moment share one."""
        due = watched.born + end
        if self.policy.max_batch > 1:
            # A power of two: moments for ages that differ a little fall on one another.
            step = 2.0 ** math.floor(math.log2(end * GATHERED_SHARE))
            due = math.ceil(due / step) * step
        return due - self._clock.monotonic()

    def _push(self, watched: Watched, delay: float) -> None:
        now = self._clock.monotonic()
        watched.gap = delay
        watched.due = now + delay
        heapq.heappush(self._heap, watched)
        if self._heap[0] is watched:
            self._news.set()

    def _until_due(self) -> float | None:
        while self._heap and not self._heap[0].wanted:
            heapq.heappop(self._heap)
        if not self._heap:
            return None
        due, now = self._heap[0].due, self._clock.monotonic()
        return max(due, self._barred_until(now)) - now

    def _barred_until(self, now: float) -> float:
        """Nothing is read before, whatever is due."""
        return self._next_eased if now < self._eased_until else now

    def _take(self, slack: float = 0.0) -> list[Watched]:
        """The next jobs to read together: due ones, and to fill a batch those that are nearly due.

        Args:
            slack: share of its gap by which the first one may be early.
        """
        batch: list[Watched] = []
        now = self._clock.monotonic()
        if now < self._barred_until(now):
            return batch
        self._next_eased = now + EASED_GAP
        while self._heap and len(batch) < self.policy.max_batch:
            watched = self._heap[0]
            early = 0.0 if watched.is_exact else watched.gap * (BATCH_SLACK if batch else slack)
            if watched.wanted and watched.due - early > now:
                break
            heapq.heappop(self._heap)
            if watched.wanted:
                watched.in_flight = True
                watched.late = max(0.0, now - watched.due)
                batch.append(watched)
        return batch
