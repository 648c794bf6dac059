"""The gate: never above the line, first come first served, closed while the service says so."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from prefect_webapi.contract.config import RateLimiterConfig
from prefect_webapi.contract.errors import ConfigurationError
from prefect_webapi.limiter import Gate, Gates, Op
from prefect_webapi.metrics import Metrics
from tests.support.virtualtime import LoopClock, run

FAST = RateLimiterConfig(qps=1000, burst=1000)


def make_gate(
    read: RateLimiterConfig = FAST, write: RateLimiterConfig = FAST, *, speed: float = 1.0
) -> Gate:
    gates = Gates(LoopClock(speed), Metrics(CollectorRegistry()))
    return gates.gate("jobs.example.com", read, write)


async def passes(gate: Gate, op: Op, count: int) -> list[float]:
    """Send `count` calls at once; when each of them left, in seconds from now."""
    began = asyncio.get_running_loop().time()
    left: list[float] = []

    async def call() -> None:
        await gate.acquire(op)
        left.append(round(asyncio.get_running_loop().time() - began, 6))

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(call())
    return left


def assert_below_the_line(left: Sequence[float], qps: float, burst: int) -> None:
    """In any window of w seconds at most burst + qps * w calls left."""
    times = sorted(left)
    for first in range(len(times)):
        for last in range(first, len(times)):
            most = burst + qps * (times[last] - times[first])
            assert last - first + 1 <= most + 1e-4, (times[first], times[last])


def test_thirty_writes_at_five_per_second_stay_below_the_line_and_use_it() -> None:
    """CASE-148, REQ-15: five at once, then five per second."""

    async def scenario() -> list[float]:
        return await passes(make_gate(write=RateLimiterConfig(qps=5, burst=5)), "write", 30)

    left = run(scenario())
    assert_below_the_line(left, 5, 5)
    assert left == pytest.approx([0.0] * 5 + [n / 5 for n in range(1, 26)])


EVENT = st.one_of(
    st.tuples(st.just("call"), st.integers(1, 12)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("bare"), st.just(0)),
    st.tuples(st.just("hint"), st.integers(-1, 4)),
    st.tuples(st.just("good"), st.just(0)),
)


@settings(max_examples=150)
@given(
    qps=st.integers(1, 40),
    burst=st.integers(5, 20),
    events=st.lists(st.tuples(st.floats(0, 2), EVENT), max_size=40),
)
def test_no_order_of_calls_and_answers_brings_a_gate_above_the_line(
    qps: int, burst: int, events: list[tuple[float, tuple[str, int]]]
) -> None:
    """CASE-148, CASE-151: cancelled waiters, throttles and recoveries included; closed means closed."""

    async def scenario() -> tuple[list[float], list[tuple[float, float]]]:
        gate = make_gate(RateLimiterConfig(qps=qps, burst=burst))
        loop = asyncio.get_running_loop()
        left: list[float] = []
        order: list[int] = []
        closed: list[tuple[float, float]] = []
        tasks: list[asyncio.Task[None]] = []

        async def call(number: int) -> None:
            await gate.acquire("read")
            left.append(loop.time())
            order.append(number)

        for pause, (what, amount) in events:
            await asyncio.sleep(pause)
            match what:
                case "call":
                    tasks += [loop.create_task(call(len(tasks) + n)) for n in range(amount)]
                case "cancel":
                    if amount < len(tasks):
                        tasks[amount].cancel()
                case "bare":
                    gate.throttled("read", None)
                case "hint":
                    gate.throttled("read", timedelta(seconds=amount))
                    closed.append((loop.time(), loop.time() + amount))
                case _:
                    gate.succeeded("read")
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == sorted(order)
        return left, closed

    left, closed = run(scenario())
    assert_below_the_line(left, qps, burst)
    for begin, end in closed:
        assert not [at for at in left if begin < at < end - 1e-6]


@settings(max_examples=60)
@given(
    changes=st.lists(
        st.tuples(st.floats(0, 3), st.integers(1, 40), st.integers(5, 20)), max_size=10
    )
)
def test_changing_rates_never_hands_out_more_than_the_highest_of_them(
    changes: list[tuple[float, int, int]],
) -> None:
    """CASE-020, CASE-148."""

    async def scenario() -> list[float]:
        gate = make_gate(RateLimiterConfig(qps=10, burst=10))

        async def edit() -> None:
            for pause, qps, burst in changes:
                await asyncio.sleep(pause)
                gate.configure(RateLimiterConfig(qps=qps, burst=burst), FAST)

        async with asyncio.TaskGroup() as group:
            group.create_task(edit())
            calls = group.create_task(passes(gate, "read", 60))
        return calls.result()

    left = run(scenario())
    assert len(left) == 60
    assert_below_the_line(
        left, max([10, *(q for _, q, _ in changes)]), max([10, *(b for _, _, b in changes)])
    )


def test_those_who_wait_go_on_at_a_new_rate_in_the_order_in_which_they_came() -> None:
    """CASE-020: 30 per second become 1 per second while 50 calls wait, and 30 again."""

    async def scenario() -> list[float]:
        gate = make_gate(RateLimiterConfig(qps=30, burst=5))

        async def edit() -> None:
            await asyncio.sleep(1)
            gate.configure(RateLimiterConfig(qps=1, burst=5), FAST)
            await asyncio.sleep(5)
            gate.configure(RateLimiterConfig(qps=30, burst=5), FAST)

        async with asyncio.TaskGroup() as group:
            group.create_task(edit())
            calls = group.create_task(passes(gate, "read", 50))
        return calls.result()

    left = run(scenario())
    assert len([at for at in left if at <= 1]) == pytest.approx(35, abs=1)
    assert len([at for at in left if 1 < at <= 6]) == pytest.approx(5, abs=1)
    assert max(left) < 6.5


def test_a_new_rate_reaches_the_call_that_waits_at_the_bucket_already() -> None:
    """CASE-020: no call sits out the rest of a wait that the old rate gave it."""

    async def scenario() -> list[float]:
        gate = make_gate(RateLimiterConfig(qps=1, burst=5))
        for _ in range(10):
            gate.throttled("read", None)
            await asyncio.sleep(1)
        async with asyncio.TaskGroup() as group:
            calls = group.create_task(passes(gate, "read", 1))
            await asyncio.sleep(1)
            gate.configure(FAST, FAST)
        return calls.result()

    assert run(scenario())[0] < 1.1


def test_a_call_that_costs_less_does_not_overtake() -> None:
    """REQ-15: first come, first served, whatever the amounts."""

    async def scenario() -> list[str]:
        gate = make_gate(RateLimiterConfig(qps=1, burst=5))
        order: list[str] = []

        async def call(name: str, cost: int) -> None:
            await gate.acquire("read", cost=cost)
            order.append(name)

        async with asyncio.TaskGroup() as group:
            for name, cost in (("all", 5), ("big", 4), ("small", 1), ("middle", 2)):
                group.create_task(call(name, cost))
        return order

    assert run(scenario()) == ["all", "big", "small", "middle"]


def test_a_call_that_could_never_pass_says_what_to_change() -> None:
    """REQ-15."""

    async def scenario() -> None:
        await make_gate(RateLimiterConfig(qps=1, burst=5)).acquire("read", cost=6)

    with pytest.raises(ConfigurationError, match=r"read_rate_limiter\.burst is 5"):
        run(scenario())


def test_saturated_reads_leave_writes_alone() -> None:
    """CASE-150."""

    async def scenario() -> list[float]:
        gate = make_gate(RateLimiterConfig(qps=1, burst=5), RateLimiterConfig(qps=5, burst=5))
        async with asyncio.TaskGroup() as group:
            group.create_task(passes(gate, "read", 50))
            writes = group.create_task(passes(gate, "write", 5))
        return writes.result()

    assert run(scenario()) == [0.0] * 5


def test_a_retry_after_stops_this_kind_of_call_at_this_endpoint_only() -> None:
    """CASE-151, REQ-41: also for the call that is next at the bucket already."""

    async def scenario() -> dict[str, list[float]]:
        gates = Gates(LoopClock(), Metrics(CollectorRegistry()))
        slow = RateLimiterConfig(qps=1, burst=5)
        here, there = gates.gate("here", slow, slow), gates.gate("there", slow, slow)

        async def throttle() -> None:
            await asyncio.sleep(0.5)
            here.throttled("read", timedelta(seconds=7))
            assert here.opens_in("read") == pytest.approx(7)
            assert here.opens_in("write") == 0

        async with asyncio.TaskGroup() as group:
            group.create_task(throttle())
            reads = group.create_task(passes(here, "read", 8))
            other = group.create_task(passes(there, "read", 8))
            await asyncio.sleep(1)
            writes = group.create_task(passes(here, "write", 5))
        return {"reads": reads.result(), "other": other.result(), "writes": writes.result()}

    left = run(scenario())
    assert left["reads"] == pytest.approx([0, 0, 0, 0, 0, 7.5, 7.5, 7.5])
    assert left["other"] == pytest.approx([0, 0, 0, 0, 0, 1, 2, 3])
    assert left["writes"] == [0.0] * 5


def test_a_longer_retry_after_wins_over_a_shorter_one() -> None:
    """CASE-151."""

    async def scenario() -> float:
        gate = make_gate()
        gate.throttled("write", timedelta(seconds=9))
        gate.throttled("write", timedelta(seconds=2))
        return (await passes(gate, "write", 1))[0]

    assert run(scenario()) == pytest.approx(9)


@pytest.mark.parametrize("hint", [None, timedelta(0), timedelta(seconds=-30)])
def test_without_a_time_in_the_future_nobody_waits_but_the_rate_is_halved(
    hint: timedelta | None,
) -> None:
    """CASE-152, CASE-153."""

    async def scenario() -> list[float]:
        gate = make_gate(RateLimiterConfig(qps=10, burst=10))
        gate.throttled("read", hint)
        await gate.acquire("read")
        return await passes(gate, "read", 24)

    left = run(scenario())
    assert left[:4] == [0.0] * 4
    assert left[-1] == pytest.approx(4.0)  # 20 more at 5 per second


def test_a_halved_rate_is_back_after_a_minute_of_good_answers() -> None:
    """CASE-153: from the lowest rate as well; calls refused together halve it once."""

    async def scenario() -> tuple[list[float], list[float], list[float]]:
        gate = make_gate(RateLimiterConfig(qps=10, burst=5))
        for _ in range(50):
            gate.throttled("read", None)
        once = await passes(gate, "read", 12)
        for _ in range(10):
            gate.throttled("read", None)
            await asyncio.sleep(1)
        await asyncio.sleep(20)
        slowest = await passes(gate, "read", 2)
        for _ in range(60):
            gate.succeeded("read")
            await asyncio.sleep(1)
        gate.succeeded("read")
        return once, slowest, await passes(gate, "read", 25)

    once, slowest, recovered = run(scenario())
    assert once[-1] == pytest.approx((12 * 2 - 5) / 10)
    assert slowest[-1] == pytest.approx((2 * 64 - 5) / 10, rel=0.02)
    assert recovered[-1] == pytest.approx(2.0)


def test_a_waiter_that_gives_up_takes_no_permit_along() -> None:
    """CASE-158, REQ-17: the rate stays at qps, and those behind move up."""

    async def scenario() -> list[float]:
        gate = make_gate(RateLimiterConfig(qps=2, burst=5))
        loop = asyncio.get_running_loop()
        await passes(gate, "read", 5)
        began = loop.time()
        waiters = [loop.create_task(passes(gate, "read", 1)) for _ in range(20)]
        for waiter in waiters[::2]:
            await asyncio.sleep(0)
            waiter.cancel()
        await asyncio.gather(*waiters, return_exceptions=True)
        return [loop.time() - began]

    assert run(scenario()) == pytest.approx([5.0])  # 10 of 20 at 2 per second


def test_who_names_the_same_endpoint_and_credential_shares_the_gate_at_the_lower_rates() -> None:
    """CASE-157."""

    async def scenario() -> None:
        gates = Gates(LoopClock(), Metrics(CollectorRegistry()))
        generous, strict = RateLimiterConfig(qps=100, burst=50), RateLimiterConfig(qps=2, burst=5)
        one = gates.gate("service, account a", generous, generous)
        two = gates.gate("service, account a", strict, generous)
        assert one is two
        assert gates.gate("service, account b", generous, generous) is not one
        gates.gate("service, account a", generous, generous)
        assert (await passes(one, "read", 7))[-1] == pytest.approx(1.0)
        assert await passes(one, "write", 50) == [0.0] * 50

    run(scenario())


def test_ten_minutes_of_throttling_are_ten_lines_with_a_count(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """CASE-160."""

    async def scenario() -> None:
        gate = make_gate()
        for _ in range(599):
            gate.throttled("read", timedelta(seconds=1))
            await asyncio.sleep(1)

    with caplog.at_level(logging.WARNING, "prefect_webapi.limiter"):
        run(scenario())
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 10
    assert "jobs.example.com throttles reads: 60 answers" in lines[1]


def test_a_faster_clock_makes_faster_rates() -> None:
    """REQ-15: tests of minutes run in seconds."""

    async def scenario() -> list[float]:
        gate = make_gate(RateLimiterConfig(qps=1, burst=5), speed=20)
        left = await passes(gate, "read", 25)
        gate.throttled("read", timedelta(seconds=60))
        return [left[-1], *await passes(gate, "read", 1)]

    assert run(scenario()) == pytest.approx([1.0, 3.0])


def test_the_wait_at_the_gate_is_measured() -> None:
    """REQ-77."""

    async def scenario() -> Metrics:
        metrics = Metrics(CollectorRegistry())
        slow = RateLimiterConfig(qps=1, burst=5)
        await passes(Gates(LoopClock(), metrics).gate("here", slow, slow), "write", 7)
        return metrics

    metrics = run(scenario())
    assert metrics.value("permit_wait_seconds_count", op="write") == 7
    assert metrics.value("permit_wait_seconds_sum", op="write") == pytest.approx(3.0)
