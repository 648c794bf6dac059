"""Who is read when."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any, cast

import anyio
import anyio.lowlevel
import pytest

from prefect_webapi.clock import Clock
from prefect_webapi.poller import (
    COMPANY_SLACK,
    EASED_GAP,
    EASED_SECONDS,
    Observation,
    Poller,
    ReadingPolicy,
    Watched,
    next_delay,
)
from tests.support.waiting import eventually

POLICY = ReadingPolicy(initial=1.0, longest=30.0, workers=10)


def test_the_gap_grows_with_the_age_of_the_job() -> None:
    """REQ-18: a tenth of the age, from the first gap to the longest."""
    assert next_delay(POLICY, age=0, failures=0) == 1.0
    assert next_delay(POLICY, age=50, failures=0) == 5.0
    assert next_delay(POLICY, age=3600, failures=0) == 30.0


def test_until_an_end_is_expected_the_gap_is_twice_the_age_or_leads_there() -> None:
    """A job that ends before is seen at three times its age; a few are over when it is read first."""
    ages = [0.0]
    while ages[-1] < 100:
        ages.append(ages[-1] + next_delay(POLICY, age=ages[-1], expected=40.0))
    assert ages[:7] == [0.0, 2.0, 6.0, 18.0, 42.0, pytest.approx(46.2), pytest.approx(50.82)]
    assert next_delay(POLICY, age=0, expected=1.5) == 2.0
    assert next_delay(POLICY, age=200, expected=3_600) == 30.0
    assert next_delay(POLICY, age=1, failures=1, expected=3_600) == 7.5


def test_failures_in_a_row_space_the_reads_out() -> None:
    """REQ-18: a quarter of the longest gap, doubled by each further failure, never above the longest."""
    delays = [next_delay(POLICY, age=10, failures=n) for n in range(1, 6)]
    assert delays == [7.5, 15.0, 30.0, 30.0, 30.0]


class Scripted:
    """Answers by a function; remembers how many reads were open at once, per job and in all."""

    def __init__(self, answer: Any, *, seconds: float = 0.0) -> None:
        self.answer = answer
        self.seconds = seconds
        self.reads: list[list[Any]] = []
        self.open: list[Any] = []
        self.most_open = 0
        self.twice_open = False

    async def one(self, context: Any) -> Any:
        return (await self._read([context], single=True))[0]

    async def many(self, contexts: Sequence[Any]) -> Sequence[Any]:
        return await self._read(list(contexts), single=False)

    async def _read(self, contexts: list[Any], *, single: bool) -> list[Any]:
        self.reads.append(contexts)
        self.twice_open = self.twice_open or any(c in self.open for c in contexts)
        self.open += contexts
        self.most_open = max(self.most_open, len(self.open))
        try:
            await anyio.sleep(self.seconds)
            return [self.answer(c, single) for c in contexts]
        finally:
            for c in contexts:
                self.open.remove(c)


class Bench:
    """A running poller and what it delivered."""

    def __init__(self, policy: ReadingPolicy, reading: Scripted, speed: float) -> None:
        self.seen: list[Observation] = []
        self.times: list[tuple[float, Any]] = []
        self.clock = Clock(speed)
        self.repeat = True
        self.poller = Poller(policy, reading, self.take, self.clock)

    async def take(self, observation: Observation) -> None:
        self.seen.append(observation)
        self.times.append((self.clock.monotonic(), observation.watched.token))
        if self.repeat:
            self.poller.again(observation.watched, failed=observation.error is not None)

    def of(self, token: Any) -> list[float]:
        return [at for at, who in self.times if who == token]


@asynccontextmanager
async def running(
    policy: ReadingPolicy, reading: Scripted, *, speed: float = 1.0
) -> AsyncGenerator[Bench]:
    bench = Bench(policy, reading, speed)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(bench.poller.run)
        yield bench
        tasks.cancel_scope.cancel()


def fine(context: Any, single: bool) -> Any:
    return f"snapshot of {context}"


async def test_a_new_job_is_read_at_once() -> None:
    """CASE-070, REQ-19."""
    async with running(POLICY, Scripted(fine)) as bench:
        bench.poller.watch("a", "a")
        await eventually(lambda: bench.seen, within=1)
        assert bench.seen[0].resource == "snapshot of a"


async def test_a_job_whose_state_is_known_is_read_after_the_first_gap() -> None:
    policy = ReadingPolicy(initial=0.2, longest=30.0, workers=1)
    async with running(policy, Scripted(fine)) as bench:
        began = bench.clock.monotonic()
        bench.poller.watch("a", "a", is_known=True)
        await eventually(lambda: bench.seen, within=2)
        assert bench.of("a")[0] - began >= 0.9 * 0.2


def _highest(_: float, high: float) -> float:
    return high


class Still(Clock):
    """Stands until it is set."""

    now_at = 0.0

    def monotonic(self) -> float:
        return self.now_at


def test_a_job_that_is_nearly_due_is_read_along_with_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a thousand jobs each would have the process wake up for it alone."""
    monkeypatch.setattr("prefect_webapi.poller.chance.uniform", _highest)
    clock, policy = Still(), ReadingPolicy(initial=100.0, longest=100.0, workers=1)
    poller = Poller(policy, Scripted(fine), cast(Any, None), clock)
    for clock.now_at, name in ((0.0, "due"), (4.0, "nearly"), (6.0, "later")):
        poller.watch(name, name, is_known=True)
    clock.now_at = 99.0
    assert poller._take() == []  # pyright: ignore[reportPrivateUsage]
    clock.now_at = 100.0
    taken = [
        [watched.token for watched in poller._take(slack)]  # pyright: ignore[reportPrivateUsage]
        for slack in (0.0, 0.0, COMPANY_SLACK, COMPANY_SLACK)
    ]
    assert taken == [["due"], [], ["nearly"], []]


@pytest.mark.parametrize("max_batch", [1, 10])
def test_a_read_that_was_put_off_to_a_moment_is_not_early(max_batch: int) -> None:
    """A job that its service does not know is believed gone after a pause, and not before."""
    clock = Still()
    policy = ReadingPolicy(initial=1.0, longest=30.0, workers=1, max_batch=max_batch)
    poller = Poller(policy, Scripted(fine), cast(Any, None), clock)
    due, put_off = (poller.watch(name, name) for name in ("due", "put off"))
    assert poller._take() + poller._take(COMPANY_SLACK)  # pyright: ignore[reportPrivateUsage]
    for watched, delay in ((due, 100.0), (put_off, 101.0)):
        watched.in_flight = False
        poller.retry_at(watched, delay)
    clock.now_at = 100.0
    taken = poller._take() + poller._take(COMPANY_SLACK)  # pyright: ignore[reportPrivateUsage]
    assert taken == [due]


def test_a_job_is_read_when_its_end_is_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that is before the read that would come next, and neither early nor for one that could not be read."""
    monkeypatch.setattr("prefect_webapi.poller.chance.uniform", _highest)
    clock = Still()
    poller = Poller(POLICY, Scripted(fine), cast(Any, None), clock)
    watched = poller.watch("job", "job", is_known=True, ends=[4.1, 5.0])
    due: list[tuple[float, bool]] = []
    for clock.now_at, failed in (
        (0.0, False),
        (4.0, False),
        (4.1, False),
        (4.2, False),
        (5.0, False),
        (4.2, True),
    ):
        poller.again(watched, failed=failed, ends=[4.1, 5.0])
        due.append((watched.due, watched.is_exact))
    assert due == [
        (1.0, False),
        (pytest.approx(4.1), True),
        (5.0, True),
        (5.0, True),
        (6.0, False),
        (pytest.approx(11.7), False),
    ]
    assert poller.watch("new", "new", is_known=True, ends=[0.5]).due == pytest.approx(4.2 + 0.5)


@pytest.mark.parametrize(("max_batch", "requests"), [(1, 300), (50, 11)])
def test_the_foreseen_ends_of_a_moment_are_read_together(max_batch: int, requests: int) -> None:
    """Jobs of one length that begin one after the other: a service that can be asked for fifty is not asked for each.

    The ends in one hundredth of their age share a read, none of them is read early, nor later than that.
    """
    clock, length = Still(), 8.0
    policy = ReadingPolicy(initial=10.0, longest=30.0, workers=1, max_batch=max_batch)
    poller = Poller(policy, Scripted(fine), cast(Any, None), clock)
    # What is foreseen changes a little from end to end.
    lengths = [length + n % 3 / 1000 for n in range(300)]
    for n, each in enumerate(lengths):
        clock.now_at = 1000 + n / 500
        poller.watch(1000 + n / 500 + each, n, is_known=True, ends=[each])
    read, late = 0, list[float]()
    while poller._heap:  # pyright: ignore[reportPrivateUsage]
        clock.now_at = poller._heap[0].due  # pyright: ignore[reportPrivateUsage]
        taken = poller._take()  # pyright: ignore[reportPrivateUsage]
        read += 1
        late += [clock.now_at - watched.token for watched in taken]
    assert read == requests
    assert min(late) >= -1e-9
    assert max(late) <= (length * 0.01 if max_batch > 1 else 1e-9)


def test_the_first_reads_of_many_jobs_are_spread_over_the_first_gap() -> None:
    """A process that ended may have left a hundred thousand."""
    clock = Still()
    poller = Poller(POLICY, Scripted(fine), cast(Any, None), clock)
    due = sorted(poller.watch(n, n, is_one_of_many=True).due for n in range(500))
    assert 0 <= due[0] < 0.1
    assert 0.9 < due[-1] <= POLICY.initial
    assert 0.3 < due[250] < 0.7


def test_while_the_loop_is_needed_for_others_little_is_read() -> None:
    """And never nothing, nor for longer than that was said to last."""
    clock, taken = Still(), list[int]()
    poller = Poller(POLICY, Scripted(fine), cast(Any, None), clock)
    for n in range(10):
        poller.watch(n, n)
    poller.ease()
    for clock.now_at in (0.0, EASED_GAP / 2, EASED_GAP, EASED_SECONDS / 2, EASED_SECONDS + 0.1):
        taken.append(0)
        while poller._take():  # pyright: ignore[reportPrivateUsage]
            taken[-1] += 1
    assert taken == [1, 0, 1, 1, 7]


@pytest.mark.parametrize(("max_batch", "least"), [(1, 400), (500, 8)])
async def test_reads_that_wait_for_nothing_leave_others_their_turns(
    max_batch: int, least: int
) -> None:
    """One by one, and within the answer of a batch."""
    turns, delivered = 0, list[int]()

    class AtOnce:
        async def one(self, context: Any) -> Any:
            return context

        async def many(self, contexts: Sequence[Any]) -> Sequence[Any]:
            return contexts

    async def take(observation: Observation) -> None:
        delivered.append(turns)

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await anyio.lowlevel.checkpoint()

    policy = ReadingPolicy(initial=30.0, longest=30.0, workers=1, max_batch=max_batch)
    poller = Poller(policy, AtOnce(), take, Clock())
    for n in range(500):
        poller.watch(n, n)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(count)
        tasks.start_soon(poller.run)
        await eventually(lambda: len(delivered) == 500, within=10)
        tasks.cancel_scope.cancel()
    assert delivered[-1] - delivered[0] >= least


async def test_no_gap_leaves_its_bounds() -> None:
    """CASE-069: a job of 30 s with a longest gap of 5 s."""
    policy = ReadingPolicy(initial=1.0, longest=5.0, workers=10)
    async with running(policy, Scripted(fine), speed=20) as bench:
        began = bench.clock.monotonic()
        bench.poller.watch("a", "a")
        await eventually(lambda: bench.clock.monotonic() - began > 30, within=5)
        reads = bench.of("a")
    gaps = [b - a for a, b in pairwise(reads)]
    assert min(gaps) >= 0.9 * policy.initial
    assert (
        max(gaps) <= 1.1 * policy.longest + 1.0
    )  # one second of virtual time is 50 ms of this machine
    assert len(reads) <= 25


async def test_one_read_per_job_and_no_more_than_the_workers() -> None:
    """CASE-071, REQ-20: 1,000 jobs."""
    policy = ReadingPolicy(initial=0.01, longest=0.05, workers=10)
    reading = Scripted(fine, seconds=0.001)
    async with running(policy, reading) as bench:
        for n in range(1000):
            bench.poller.watch(n, n)
        await eventually(lambda: len({who for _, who in bench.times}) == 1000, within=20)
        await eventually(lambda: len(bench.seen) > 2000, within=20)
    assert reading.most_open == 10
    assert not reading.twice_open


async def test_a_forgotten_job_is_not_read_again() -> None:
    """CASE-072."""
    policy = ReadingPolicy(initial=0.02, longest=0.05, workers=2)
    async with running(policy, Scripted(fine)) as bench:
        kept = bench.poller.watch("kept", "kept")
        gone = bench.poller.watch("gone", "gone")
        await eventually(lambda: bench.of("gone"), within=2)
        bench.poller.forget(gone)
        reads = len(bench.of("gone"))
        more = len(bench.of("kept")) + 5
        await eventually(lambda: len(bench.of("kept")) >= more, within=5)
        assert len(bench.of("gone")) == reads
        assert isinstance(kept, Watched)
        assert len(bench.poller) == 1


async def test_a_batch_service_is_asked_in_batches() -> None:
    """CASE-081: 1,000 jobs and batches of 50 are 20 requests a cycle."""
    policy = ReadingPolicy(initial=1.0, longest=30.0, workers=10, max_batch=50)
    reading = Scripted(fine)
    async with running(policy, reading) as bench:
        bench.repeat = False
        for n in range(1000):
            bench.poller.watch(n, n)
        await eventually(lambda: len(bench.seen) == 1000, within=10)
    assert len(reading.reads) == 20


async def test_later_cycles_of_a_batch_service_stay_in_batches() -> None:
    """CASE-081: jitter doesn't tear the batches apart."""
    policy = ReadingPolicy(initial=1.0, longest=1.0, workers=10, max_batch=50)
    reading = Scripted(fine)
    async with running(policy, reading, speed=2) as bench:
        for n in range(500):
            bench.poller.watch(n, n)
        await eventually(lambda: len(bench.seen) >= 3000, within=20)
        assert len(reading.reads) <= 1.5 * len(bench.seen) / 50


async def test_only_the_jobs_that_a_batch_answer_lacks_fail() -> None:
    """CASE-082: one job not mentioned and gone, one with an error of its own."""

    def answer(context: Any, single: bool) -> Any:
        if context == 1:
            return KeyError("broken") if not single else "unused"
        if context == 2 and not single:
            return None
        if context == 2:
            raise LookupError("gone")
        return "fine"

    policy = ReadingPolicy(initial=1.0, longest=30.0, workers=1, max_batch=10)
    async with running(policy, Scripted(answer)) as bench:
        bench.repeat = False
        for n in range(4):
            bench.poller.watch(n, n)
        await eventually(lambda: len(bench.seen) == 4, within=2)
    failed = {o.watched.token: type(o.error) for o in bench.seen if o.error is not None}
    assert failed == {1: KeyError, 2: LookupError}


async def test_a_failed_batch_counts_for_each_of_its_jobs_and_for_no_other() -> None:
    """CASE-083."""

    def answer(context: Any, single: bool) -> Any:
        if context < 3:
            raise OSError("down")
        return "fine"

    policy = ReadingPolicy(initial=0.05, longest=0.4, workers=4, max_batch=3)
    async with running(policy, Scripted(answer)) as bench:
        bench.repeat = False
        for n in range(6):
            bench.poller.watch(n, n)
        await eventually(lambda: len(bench.seen) == 6, within=5)
        for observation in bench.seen:
            assert (observation.error is not None) == (observation.watched.token < 3)


async def test_a_hanging_read_holds_up_nobody_else() -> None:
    """CASE-079: of 20 jobs and 10 workers one hangs."""
    stuck = anyio.Event()

    class Hanging(Scripted):
        async def one(self, context: Any) -> Any:
            if context == 0:
                await stuck.wait()
            return await super().one(context)

    policy = ReadingPolicy(initial=0.02, longest=0.05, workers=10)
    async with running(policy, Hanging(fine)) as bench:
        for n in range(20):
            bench.poller.watch(n, n)
        await eventually(lambda: all(len(bench.of(n)) > 3 for n in range(1, 20)), within=5)
        assert not bench.of(0)
        stuck.set()
        await eventually(lambda: bench.of(0), within=2)


async def test_a_poller_starts_no_thread() -> None:
    """One loop reads everything."""
    before = threading.active_count()
    async with running(POLICY, Scripted(fine)) as bench:
        for n in range(100):
            bench.poller.watch(n, n)
        await eventually(lambda: len(bench.seen) >= 100, within=5)
        assert threading.active_count() == before
