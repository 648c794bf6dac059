"""Slots and quotas at a real Prefect server: the count of taken slots is asked of the server."""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.settings import PREFECT_API_URL, temporary_settings
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from prefect_webapi import leases
from prefect_webapi._prefect.slots import PrefectSlots
from prefect_webapi.clock import Clock
from prefect_webapi.metrics import Metrics
from prefect_webapi.quotas import Busy, Quotas, SlotLease, SlotsUnavailable, Waiting
from tests.servers.base import Fault, Reply, Seen, Server
from tests.support.leaks import GivenCount, given_back
from tests.support.prefect import PrefectServer, free_port, pointed_at
from tests.support.waiting import eventually

LEASE = 60.0


@pytest.fixture
def name() -> str:
    """A limit of this test's own."""
    return f"webapi:jobs:prod:{uuid.uuid4().hex[:8]}:gpu"


@pytest.fixture
async def slots(prefect_api: PrefectServer) -> AsyncIterator[PrefectSlots]:
    async with PrefectSlots(Clock()) as slots:
        yield slots


def make_quotas(slots: PrefectSlots, metrics: Metrics | None = None) -> Quotas:
    return Quotas(
        slots,
        clock=Clock(),
        metrics=metrics or Metrics(CollectorRegistry()),
        lease=timedelta(seconds=LEASE),
    )


async def taken(name: str) -> int:
    async with get_client() as client:
        return int((await client.read_global_concurrency_limit_by_name(name)).active_slots)


async def lease_of(slots: PrefectSlots, name: str, weight: int = 1) -> SlotLease:
    answer = await slots.acquire([name], weight, str(uuid.uuid4()), LEASE)
    assert isinstance(answer, SlotLease)
    return answer


class Later(Clock):
    """A clock that a test sets forward."""

    later = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.later


async def admit_all(lease: SlotLease) -> bool:
    return True


def nobody_listens(wait: Waiting) -> None:
    return None


async def take(quotas: Quotas, name: str, weight: int = 1) -> SlotLease:
    return await quotas.acquire(
        [name], weight=weight, holder="", admit=admit_all, waiting=nobody_listens
    )


async def test_slots_are_taken_renewed_and_given_back_once(slots: PrefectSlots, name: str) -> None:
    """CASE-138."""
    await slots.ensure(name, 3)
    before = datetime.now(UTC)
    two = await lease_of(slots, name, 2)
    assert timedelta(seconds=58) < two.until - before < timedelta(seconds=62)
    busy = await slots.acquire([name], 2, "not a task run", LEASE)
    assert isinstance(busy, Busy)
    one = await lease_of(slots, name)
    assert await slots.active(name) == await taken(name) == 3
    assert await slots.renew(two.id, LEASE)
    for _ in range(3):
        await slots.release(two.id)
    assert await taken(name) == 1
    assert not await slots.renew(two.id, LEASE)
    await slots.release(one.id)
    await slots.give_back(name, 5)
    assert await taken(name) == 0


async def test_a_limit_can_be_lowered_below_what_is_taken_and_raised_again(
    slots: PrefectSlots, name: str
) -> None:
    """CASE-139, CASE-140."""
    await slots.ensure(name, 3)
    leases = [await lease_of(slots, name) for _ in range(3)]
    await slots.ensure(name, 1)
    assert isinstance(await slots.acquire([name], 1, "", LEASE), Busy)
    assert isinstance(await slots.acquire([name], 2, "", LEASE), Busy)  # more than the limit
    await slots.release(leases[0].id)
    assert isinstance(await slots.acquire([name], 1, "", LEASE), Busy)
    await slots.ensure(name, 3)
    assert isinstance(await slots.acquire([name], 1, "", LEASE), SlotLease)
    assert await taken(name) == 3


async def test_a_deleted_limit_is_made_again_with_its_value_and_one_warning(
    slots: PrefectSlots, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """CASE-146: also one of two; nothing stays taken on the one that was there."""
    other = f"{name}:project"
    await slots.ensure(name, 2)
    await slots.ensure(other, 1)
    async with get_client() as client:
        await client.delete_global_concurrency_limit_by_name(name)
    with caplog.at_level(logging.WARNING, "prefect_webapi._prefect.slots"):
        both = await slots.acquire([name, other], 1, "", LEASE)
        await lease_of(slots, name)
    assert isinstance(both, SlotLease)
    assert (await taken(name), await taken(other)) == (2, 1)
    assert isinstance(await slots.acquire([name], 1, "", LEASE), Busy)
    assert len(caplog.records) == 1
    assert f"limit {name} had been deleted; it was made again with 2" in caplog.text


async def test_a_limit_that_nobody_configured_gives_no_slot(slots: PrefectSlots, name: str) -> None:
    """CASE-146: Prefect itself would answer with a lease on nothing."""
    assert isinstance(await slots.acquire([name], 1, "", LEASE), Busy)
    assert await slots.active(name) == 0


async def switch_off(name: str) -> None:
    async with get_client() as client:
        await client.update_global_concurrency_limit(
            name, GlobalConcurrencyLimitUpdate(active=False)
        )


async def test_a_limit_switched_off_in_the_ui_is_switched_on_by_the_next_start(
    slots: PrefectSlots, name: str
) -> None:
    """CASE-146."""
    await slots.ensure(name, 1)
    await switch_off(name)
    await slots.ensure(name, 1)
    await lease_of(slots, name)
    assert await taken(name) == 1


async def test_a_limit_switched_off_meanwhile_is_on_again_within_a_minute_and_nothing_stays_leaked(
    prefect_api: PrefectServer, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """CASE-146: off, it lends without counting, and forgets to count down; both are found and mended."""
    clock = Later()
    async with PrefectSlots(clock) as slots:
        await slots.ensure(name, 2)
        held, freed = await lease_of(slots, name), await lease_of(slots, name)
        await switch_off(name)
        await slots.release(freed.id)
        uncounted = await lease_of(slots, name)  # a grant does not tell; the ledger's count holds
        clock.later = 61.0
        with caplog.at_level(logging.WARNING, "prefect_webapi._prefect.slots"):
            assert isinstance(await slots.acquire([name], 1, "", LEASE), Busy)
        assert f"limit {name} had been off; it was switched on with 2 slots" in caplog.text
        assert await taken(name) == 2

        assert await given_back(slots, name, GivenCount({name: 1})) == {name: 1}
        assert await taken(name) == 1
        await slots.release(held.id)
        await slots.release(uncounted.id)
        assert await taken(name) == 0


async def test_slots_of_several_limits_are_lent_together_or_not_at_all(
    slots: PrefectSlots, name: str
) -> None:
    """CASE-134, CASE-135: three of each; a lease is renewed and ended for all its limits."""
    other = f"{name}:project=ab"
    await slots.ensure(name, 10)
    await slots.ensure(other, 4)
    three = await slots.acquire([name, other], 3, "", LEASE)
    assert isinstance(three, SlotLease)
    assert (await taken(name), await taken(other)) == (3, 3)
    assert isinstance(await slots.acquire([name, other], 3, "", LEASE), Busy)
    assert (await taken(name), await taken(other)) == (3, 3)
    assert await slots.renew(three.id, LEASE)
    await slots.release(three.id)
    assert (await taken(name), await taken(other)) == (0, 0)


async def test_many_processes_may_set_the_same_limit_at_once(
    slots: PrefectSlots, name: str
) -> None:
    """CASE-130: reading and creating it is not one step at the server."""

    async def one_process() -> None:
        async with PrefectSlots(Clock()) as own:
            await own.ensure(name, 7)

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(one_process)
    assert await slots.active(name) == 0


async def test_without_a_quota_prefect_is_never_asked() -> None:
    """CASE-132: nobody listens at this address, and nobody notices."""
    nowhere = f"http://127.0.0.1:{free_port()}/api"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", nowhere)
        async with make_quotas(PrefectSlots(Clock())) as quotas:
            quotas.release(["webapi:jobs:prod:default"], None, weight=1)
            await asyncio.sleep(0.05)


async def test_a_server_that_is_away_is_named_without_credentials(
    prefect_api: PrefectServer, name: str
) -> None:
    """CASE-142: and no exception of Prefect's or its transport gets out."""
    port = free_port()
    with pointed_at(prefect_api, PREFECT_API_URL=f"http://ann:canary@127.0.0.1:{port}/api"):
        async with PrefectSlots(Clock()) as slots:
            with pytest.raises(SlotsUnavailable) as caught:
                await slots.ensure(name, 1)
    assert f"http://127.0.0.1:{port}/api" in str(caught.value)
    assert "canary" not in str(caught.value)
    assert not caught.value.maybe_done


async def test_a_refusal_says_what_was_asked_and_answered(slots: PrefectSlots, name: str) -> None:
    """CASE-142: a lease shorter than the server allows, say."""
    await slots.ensure(name, 1)
    with pytest.raises(SlotsUnavailable, match="answered 422 when asked to take slots"):
        await slots.acquire([name], 1, "", 5)


async def test_waiters_of_one_process_are_served_in_order_and_the_count_ends_at_zero(
    slots: PrefectSlots, name: str
) -> None:
    """CASE-129, CASE-137, CASE-147."""
    metrics = Metrics(CollectorRegistry())
    order: list[int] = []
    live = highest = 0

    async def job(number: int) -> None:
        nonlocal live, highest
        lease = await take(quotas, name)
        order.append(number)
        live += 1
        highest = max(highest, live)
        await eventually(lambda: highest >= 3, within=20)
        await asyncio.sleep(0.05)
        live -= 1
        quotas.release([name], lease, weight=1)

    async with make_quotas(slots, metrics) as quotas:
        await quotas.configure(name, 3)
        async with anyio.create_task_group() as group:
            for number in range(12):
                group.start_soon(job, number)
    assert order == list(range(12))
    assert highest == 3
    assert metrics.value("slot_releases_total", outcome="ok") == 12
    assert await taken(name) == 0


async def test_a_raised_limit_lets_waiters_start(slots: PrefectSlots, name: str) -> None:
    """CASE-140."""
    started = 0

    async def job() -> None:
        nonlocal started
        await take(quotas, name)
        started += 1

    async with make_quotas(slots) as quotas, anyio.create_task_group() as group:
        await quotas.configure(name, 1)
        for _ in range(5):
            group.start_soon(job)
        await eventually(lambda: started == 1, within=5)
        await quotas.configure(name, 5)
        await eventually(lambda: started == 5, within=5)
    assert await taken(name) == 5


async def test_slots_that_a_restarted_server_leaked_come_back(
    own_prefect_server: PrefectServer, name: str
) -> None:
    """CASE-141, CASE-142: 410 within the lease's time; given back exactly, and the job's place taken anew.

    The default lease storage is the server's memory. What a dead process had held is found by `repair`.
    """
    server = own_prefect_server
    changed: list[SlotLease] = []
    with pointed_at(server):
        async with PrefectSlots(Clock()) as slots:
            await slots.ensure(name, 5)
            live, dead = await lease_of(slots, name, 2), await lease_of(slots, name)
            await asyncio.to_thread(server.kill)
            with pytest.raises(SlotsUnavailable):
                await slots.renew(live.id, LEASE)
            await asyncio.to_thread(server.start)
            assert await taken(name) == 3
            assert not await slots.renew(dead.id, LEASE)
            fresh = SlotLease(live.id, datetime.now(UTC) + timedelta(seconds=LEASE))
            async with make_quotas(slots) as quotas:
                quotas.adopt([name], fresh, weight=2, holder="", changed=changed.append)
                await eventually(lambda: changed, within=10)
                assert await taken(name) == 3

                assert await given_back(slots, name, GivenCount({name: 2})) == {name: 1}
                assert await taken(name) == 2
                quotas.release([name], fresh, weight=2)
            assert await taken(name) == 0


async def test_places_of_one_lease_are_given_back_one_by_one_and_their_count_is_that_of_the_jobs(
    slots: PrefectSlots, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CASE-138, CASE-143: 60 places, 10 of them with leases of their own; they end in any order, some twice."""
    monkeypatch.setattr(leases, "SINGLES", 10)
    calls = [0]
    acquire = slots.acquire

    async def counted(*given: Any) -> SlotLease | Busy:
        calls[0] += 1
        return await acquire(*given)

    monkeypatch.setattr(slots, "acquire", counted)
    async with make_quotas(slots) as quotas:
        await quotas.configure(name, 64)
        held: list[SlotLease] = []

        async def job() -> None:
            held.append(await take(quotas, name))

        async with anyio.create_task_group() as group:
            for _ in range(60):
                group.start_soon(job)
        assert calls[0] == 10 + 2
        assert await taken(name) == 60
        random.Random(1).shuffle(held)
        for left in (50, 27, 3, 0):
            while len(held) > left:
                lease = held.pop()
                for _ in range(2):
                    quotas.release([name], lease, weight=1)
            await eventually(lambda n=left: is_taken(name, n), within=20)
        assert calls[0] <= 10 + 2 + 4


async def is_taken(name: str, slots: int) -> bool:
    return await taken(name) == slots


async def test_blocks_of_a_restarted_server_come_back_once_and_are_lent_anew(
    own_prefect_server: PrefectServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CASE-141: a process renews late, finds that all is lost, and has its 55 places again; one ended meanwhile."""
    monkeypatch.setattr(leases, "SINGLES", 5)
    server, clock = own_prefect_server, Later()
    with pointed_at(server):
        async with (
            PrefectSlots(clock) as slots,
            Quotas(
                slots,
                clock=clock,
                metrics=Metrics(CollectorRegistry()),
                lease=timedelta(seconds=LEASE),
            ) as quotas,
        ):
            await quotas.configure(name, 55)
            held: list[SlotLease] = []
            async with anyio.create_task_group() as group:

                async def job() -> None:
                    held.append(await take(quotas, name))

                for _ in range(55):
                    group.start_soon(job)
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
            await eventually(lambda: is_taken(name, 55), within=20)  # a round may be under way
            clock.later = 20.0  # the next round is due
            quotas.release([name], held[-1], weight=1)
            await eventually(lambda: is_taken(name, 54), within=40)
            for lease in held:
                quotas.release([name], lease, weight=1)
            await eventually(lambda: is_taken(name, 0), within=40)


class Colliding(Server):
    """Prefect's API as far as taking slots goes: two of its writes have met, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.faults = [
            Fault("create", Reply(503, {"exception_message": "Service Unavailable"}), times=2)
        ]

    @property
    def app(self) -> ASGIApp:
        async def grant(_: Request) -> Response:
            limit = {"id": str(uuid.uuid4()), "name": "x", "limit": 1}
            return JSONResponse({"lease_id": str(uuid.uuid4()), "limits": [limit]})

        taking = "/api/v2/concurrency_limits/increment-with-lease"
        return Starlette(routes=[Route(taking, grant, methods=["POST"])])

    def op_of(self, request: Seen) -> str:
        return "create" if request.path.endswith("/increment-with-lease") else ""

    def made(self) -> int:
        return 0

    def live(self) -> int:
        return 0

    def forget(self) -> None:
        return None


async def test_writes_of_prefects_server_that_collide_cost_no_seconds() -> None:
    """Its client alone would wait two seconds, then four: with many jobs that adds up to hours."""
    with Colliding() as server, temporary_settings({PREFECT_API_URL: f"{server.url}/api"}):
        async with PrefectSlots(Clock()) as slots:
            assert isinstance(await slots.acquire(["x"], 1, "", LEASE), SlotLease)
    first, *_, last = server.times("create")
    assert len(server.calls("create")) == 3
    assert last - first < 1.5
