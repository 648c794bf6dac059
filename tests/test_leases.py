"""One lease for many places: what it costs, and that no place is ever without its slot, or a slot without its use.

Most of it is played in virtual time against `Server`; `tests/_prefect/test_slots.py` has a real one.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime

import anyio
import pytest

from prefect_webapi import leases
from prefect_webapi.quotas import Busy, Quotas, SlotLease
from tests.support.leaks import GivenCount
from tests.support.slots import NAME, Ledger, Server, nobody_listens, open_quotas, take
from tests.support.virtualtime import run

BLOCK = 25


async def take_many(quotas: Quotas, number: int, weight: int = 1) -> list[SlotLease]:
    """So many places at once; the latest lease of each is told."""
    held: list[SlotLease] = []

    async def one(nth: int) -> None:
        def changed(lease: SlotLease) -> None:
            held[nth] = lease

        lease = await take(quotas, weight=weight, changed=changed)
        held[nth] = lease

    async with anyio.create_task_group() as group:
        for nth in range(number):
            held.append(SlotLease("", datetime.min.replace(tzinfo=UTC)))
            group.start_soon(one, nth)
    return held


def slots_lent(server: Server) -> int:
    return sum(slots for _, slots, _ in server.leases.values())


@pytest.fixture
def few_singles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "SINGLES", 5)


def test_a_thousand_places_cost_a_quarter_of_a_call_each_to_take_to_hold_and_to_give_back() -> None:
    """CASE-143."""

    async def scenario() -> None:
        server = Server()
        async with open_quotas(server, limit=1000) as quotas:
            held = await take_many(quotas, 1000)
            assert server.count("acquire") == 200 + 32
            assert (server.taken[NAME], slots_lent(server)) == (1000, 1000)
            began = server.clock.monotonic()
            await asyncio.sleep(120)
            assert server.count("renew") == 3 * (200 + 32)
            renewed = {at // 40 for what, at in server.calls if what == "renew" and at > began}
            assert len(renewed) == 3
            for lease in held:
                quotas.release([NAME], lease, weight=1)
            await asyncio.sleep(5)
            assert server.count("release") == 200 + 32
            assert (server.taken[NAME], server.leases) == (0, {})

    run(scenario())


def test_with_two_hundred_places_each_has_a_lease_of_its_own() -> None:
    """CASE-143: also if all come at once, and there are more who wait."""

    async def scenario() -> None:
        server = Server()
        async with open_quotas(server, limit=200) as quotas, anyio.create_task_group() as group:
            held = await take_many(quotas, 200)
            assert not any(lease.part for lease in held)
            assert {lease.id for lease in held} == set(server.leases)
            assert server.count("acquire") == 200
            group.start_soon(take_many, quotas, 3)
            await asyncio.sleep(10)
            for lease in held[:3]:
                quotas.release([NAME], lease, weight=1)
            await asyncio.sleep(1)
            assert server.taken[NAME] == len(server.leases) == 200

    run(scenario())


def test_where_there_is_no_room_nobody_asks_more_often_than_without_blocks(
    few_singles: None,
) -> None:
    """CASE-143: once a second, and once for each place that is freed."""

    async def scenario() -> None:
        server = Server()
        async with open_quotas(server, limit=20) as quotas, anyio.create_task_group() as group:
            held = await take_many(quotas, 20)
            for _ in range(40):
                group.start_soon(take, quotas)
            await asyncio.sleep(5)
            asked = server.count("acquire")
            await asyncio.sleep(60)
            assert server.count("acquire") - asked <= 61
            asked = server.count("acquire")
            for lease in held:
                quotas.release([NAME], lease, weight=1)
                await asyncio.sleep(0.5)
            assert server.count("acquire") - asked <= 2 * 20 + 10
            group.cancel_scope.cancel()

    run(scenario())


def test_the_last_places_are_taken_in_blocks_that_fit(few_singles: None) -> None:
    """CASE-143: after one refusal, one, two, four and eight."""

    async def scenario() -> None:
        server = Server()
        async with open_quotas(server, limit=20) as quotas, anyio.create_task_group() as group:
            for _ in range(60):
                group.start_soon(take, quotas)
            await asyncio.sleep(0.9)
            assert server.taken[NAME] == 20
            assert server.count("acquire") == 5 + 2 + 3 + 2
            group.cancel_scope.cancel()

    run(scenario())


def test_a_job_whose_lease_the_ledger_is_just_noting_is_not_moved(few_singles: None) -> None:
    """REQ-75: what is noted is what it has, whenever a part becomes free."""

    async def scenario() -> None:
        server = Written()
        jobs = [Job(server) for _ in range(30)]
        async with open_quotas(server, limit=100) as quotas, anyio.create_task_group() as group:
            await start_all(quotas, jobs)
            for job in jobs[:5]:
                job.end(quotas)
            await asyncio.sleep(1)
            late = Job(server)
            group.start_soon(late.start, quotas)
            await asyncio.sleep(0.022)
            assert (server.taken[NAME], late.record) == (26, None)
            jobs[-1].end(quotas)
            await asyncio.sleep(0.5)
            assert late.record is not None
            assert late.record == late.lease
            assert server.taken[NAME] == slots_lent(server) == 25

    run(scenario())


def test_places_that_end_in_any_order_give_their_slots_back_at_once() -> None:
    """CASE-138: while there are single leases no slot stays idle; afterwards for a second."""

    async def scenario() -> None:
        server = Server()
        chance = random.Random(1)
        async with open_quotas(server, limit=1000) as quotas:
            held = [*await take_many(quotas, 600)]
            chance.shuffle(held)
            for left in range(599, 0, -1):
                quotas.release([NAME], held.pop(), weight=1)
                await asyncio.sleep(0.3)
                if left >= 400:  # as many ends as there were single leases
                    assert server.taken[NAME] == slots_lent(server) == left
                else:
                    assert left <= server.taken[NAME] < left + BLOCK
                if left in (300, 100):
                    await asyncio.sleep(2)
                    assert server.taken[NAME] == slots_lent(server) == left

    run(scenario())


def test_a_part_that_is_free_is_for_the_next_who_waits_and_costs_no_call(few_singles: None) -> None:
    """REQ-76: in the order of arrival; with fewer calls than jobs."""

    async def scenario() -> None:
        server = Server()
        order: list[int] = []

        async def job(number: int) -> None:
            await take(quotas)
            order.append(number)

        async with open_quotas(server, limit=100) as quotas, anyio.create_task_group() as group:
            for number in range(55):
                group.start_soon(job, number)
            await asyncio.sleep(5)
            assert order == [*range(55)]
            assert server.count("acquire") == 5 + 2
            assert server.taken[NAME] == 55

    run(scenario())


@pytest.mark.parametrize("moment", [0.0, 0.005, 0.015, 0.021, 0.035])
@pytest.mark.parametrize("all_of_them", [True, False])
def test_who_stops_waiting_while_a_block_is_asked_for_leaves_no_slot_behind(
    few_singles: None, moment: float, all_of_them: bool
) -> None:
    """REQ-76: before the question arrives, while its answer is on its way, while the ledger is asked."""

    async def scenario() -> None:
        server = Server()
        ledger = Ledger()
        async with open_quotas(server, limit=100) as quotas, anyio.create_task_group() as group:
            await take_many(quotas, 5)
            scopes = [anyio.CancelScope() for _ in range(30)]

            async def job(scope: anyio.CancelScope) -> None:
                with scope:
                    await quotas.acquire(
                        [NAME], weight=1, holder="", admit=ledger.admit, waiting=nobody_listens
                    )

            for scope in scopes:
                group.start_soon(job, scope)
            await asyncio.sleep(moment)
            for scope in scopes if all_of_them else scopes[:20]:
                scope.cancel()
            await asyncio.sleep(5)
            assert server.taken[NAME] == slots_lent(server) == 5 + ledger.live
            assert ledger.live >= (0 if all_of_them else 10)

    run(scenario())


def test_parts_that_the_ledger_has_no_room_for_are_not_kept_idle(few_singles: None) -> None:
    """CASE-141: the first who waits keeps one; the others are filled with those who have single leases."""

    async def scenario() -> None:
        server = Server()
        ledger = Ledger()

        async def job() -> None:
            await quotas.acquire(
                [NAME], weight=1, holder="", admit=ledger.admit, waiting=nobody_listens
            )

        async with open_quotas(server, limit=100) as quotas, anyio.create_task_group() as group:
            await take_many(quotas, 10)
            ledger.room = 4
            for _ in range(30):
                group.start_soon(job)
            await asyncio.sleep(3)
            assert ledger.live == 4
            assert server.taken[NAME] == slots_lent(server) == 10 + 4 + 1
            group.cancel_scope.cancel()

    run(scenario())


class Written(Server):
    """Knows what the ledger says of each job, so that it sees when a lease is ended that a record still names."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[Job] = []
        self.under_way = 0
        self.look = lambda: None

    async def acquire(
        self, names: Sequence[str], slots: int, holder: str, seconds: float
    ) -> SlotLease | Busy:
        self.under_way += 1
        try:
            return await super().acquire(names, slots, holder, seconds)
        finally:
            self.under_way -= 1
            asyncio.get_running_loop().call_soon(self.look)

    async def release(self, lease_id: str) -> None:
        assert lease_id not in {job.record.id for job in self.jobs if job.record is not None}
        await super().release(lease_id)
        self.look()


@dataclass(eq=False)
class Job:
    """A job as the engine drives it."""

    server: Written
    names: tuple[str, ...] = (NAME,)
    weight: int = 1
    record: SlotLease | None = None
    lease: SlotLease | None = None
    writes: bool = True
    ledger: Ledger = field(default_factory=Ledger)

    async def admit(self, lease: SlotLease) -> bool:
        if not await self.ledger.admit(lease):
            return False
        self.record = self.lease = lease
        self.server.jobs.append(self)
        return True

    def changed(self, lease: SlotLease) -> None:
        self.lease = lease

    async def written(self, lease: SlotLease) -> bool:
        await asyncio.sleep(0.01)
        if self.writes and self.record is not None:
            self.record = lease
        return self.writes or self.record is None

    async def start(self, quotas: Quotas) -> None:
        await quotas.acquire(
            self.names,
            weight=self.weight,
            holder="",
            admit=self.admit,
            waiting=nobody_listens,
            changed=self.changed,
            written=self.written,
        )

    def end(self, quotas: Quotas) -> None:
        self.ledger.live -= 1
        self.record = None
        self.server.jobs.remove(self)
        quotas.release(self.names, self.lease, weight=self.weight)

    def adopted(self, quotas: Quotas) -> None:
        assert self.record is not None
        self.lease = self.record
        quotas.adopt(
            self.names,
            self.record,
            weight=self.weight,
            holder="",
            changed=self.changed,
            written=self.written,
        )


async def start_all(quotas: Quotas, jobs: Sequence[Job]) -> None:
    async with anyio.create_task_group() as group:
        for job in jobs:
            group.start_soon(job.start, quotas)


AB = f"{NAME}:project=ab"
SETS = ((NAME,), (NAME,), (AB, NAME))


@pytest.mark.parametrize("seed", range(25))
def test_no_job_is_without_its_slot_and_few_slots_without_a_job_whatever_happens(
    few_singles: None, seed: int
) -> None:
    """CASE-135, CASE-137, CASE-138, CASE-143, REQ-75, REQ-76.

    Two processes; jobs of several weights and limits come, are no longer wanted, and end in any order.
    """

    async def scenario() -> None:
        chance = random.Random(seed)
        server = Written()
        room = chance.choice([60, 120])
        ledger = Ledger()
        order: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        most_idle = 0

        def look() -> None:
            if len(both) < 2:
                return
            nonlocal most_idle
            lent, used = Counter[str](), Counter[str]()
            for names, slots, _ in server.leases.values():
                lent.update(dict.fromkeys(names, slots))
            for job in server.jobs:
                used.update(dict.fromkeys(job.names, job.weight))
            for name in server.limits:
                assert used[name] <= lent[name] == server.taken[name] <= server.limits[name]
            if not server.under_way and not any(quotas._leases.releasing for quotas in both):  # pyright: ignore[reportPrivateUsage] - slots on their way back
                idle = lent[NAME] - used[NAME]
                most_idle = max(most_idle, idle)
                firsts = sum(2 * 2 for quotas in both if quotas.has_waiting)
                # By process, set of limits and weight: a block less one.
                assert idle <= sum((BLOCK - 1) * weight for weight in (1, 2)) * 4 + firsts

        async def look_on() -> None:
            while True:
                look()
                await asyncio.sleep(0.37)

        async def life(process: int, number: int) -> None:
            names = chance.choice(SETS)
            job = Job(server, names, chance.choice([1, 1, 1, 1, 2]), ledger=ledger)
            with anyio.move_on_after(chance.choice([0.01, 0.5, 3, 300, 300, 300, 300])) as waits:
                await job.start(both[process])
            if job.record is not None:
                if not waits.cancelled_caught:
                    order.setdefault((process, names), []).append(number)
                look()
                await asyncio.sleep(chance.choice([0.05, 1.0, 10.0, 150.0]) * chance.random())
                job.end(both[process])
                look()

        both: list[Quotas] = []
        server.look = look
        async with AsyncExitStack() as stack:
            both[:] = [await stack.enter_async_context(open_quotas(server, room)) for _ in range(2)]
            for quotas in both:
                await quotas.configure(AB, room // 2)
            async with anyio.create_task_group() as watch:
                watch.start_soon(look_on)
                async with anyio.create_task_group() as group:
                    for number in range(400):
                        group.start_soon(life, chance.randrange(2), number)
                        if chance.random() < 0.05:
                            await asyncio.sleep(chance.choice([0.1, 2.0, 40.0]))
                await asyncio.sleep(5)
                watch.cancel_scope.cancel()
            assert (server.taken, server.leases) == ({NAME: 0, AB: 0}, {})
            assert server.count("give_back") == 0
            assert most_idle > 0
            for numbers in order.values():
                assert numbers == sorted(numbers)

    run(scenario())


def test_a_restarted_server_gets_what_it_leaked_back_and_lends_it_anew_in_blocks() -> None:
    """CASE-141: each place once, though blocks are lost as a whole; a job that has ended meanwhile included."""

    async def scenario() -> None:
        server = Server()
        async with open_quotas(server, limit=1000) as quotas:
            held = await take_many(quotas, 1000)
            asked = server.count("acquire")
            await asyncio.sleep(10)
            server.restart()
            for lease in [*held[:30], *held[-40:]]:  # those who had single leases, and parts
                quotas.release([NAME], lease, weight=1)
            await asyncio.sleep(60)
            assert server.taken[NAME] == slots_lent(server) == 930
            assert server.highest == 1000
            assert server.count("acquire") - asked <= 200 + 40
            for lease in held:
                quotas.release([NAME], lease, weight=1)
            await asyncio.sleep(5)
            assert (server.taken[NAME], server.leases) == (0, {})

    run(scenario())


def test_blocks_that_lapsed_are_taken_anew_as_there_is_room_and_nobody_storms() -> None:
    """CASE-141, CASE-143: Prefect was away for too long, and others have got half of the slots."""

    async def scenario() -> None:
        server = Server()
        async with open_quotas(server, limit=1000) as quotas:
            held = await take_many(quotas, 300)
            server.is_down = True
            await asyncio.sleep(200)
            server.is_down = False
            other = await server.acquire([NAME], 850, "", 5000)
            assert isinstance(other, SlotLease)
            await asyncio.sleep(30)
            assert server.taken[NAME] == 1000
            asked = server.count("acquire")
            await asyncio.sleep(30)
            assert server.count("acquire") - asked <= 31
            await server.release(other.id)
            await asyncio.sleep(60)
            assert server.taken[NAME] == slots_lent(server) == 300
            assert server.count("give_back") == 0
            assert len({lease.id for lease in held}) == 300

    run(scenario())


@pytest.mark.parametrize("restarts", [False, True])
def test_jobs_of_a_dead_process_get_leases_of_their_own_and_its_blocks_lapse(
    few_singles: None, restarts: bool
) -> None:
    """CASE-131, CASE-141: its parts are neither renewed nor ended by the next one, and nothing is given back for them.

    Some jobs had moved from single leases into parts; some were ended by the next process, some twice.
    """

    async def scenario() -> None:
        server = Written()
        jobs = [Job(server) for _ in range(60)]
        async with open_quotas(server, limit=100) as dead:
            await start_all(dead, jobs)
            for job in jobs[20:23]:
                job.end(dead)
            await asyncio.sleep(1)
        jobs = list(server.jobs)
        parts = [job for job in jobs if job.record is not None and job.record.part]
        assert len(parts) == 55
        blocks = {lease for lease, (_, slots, _) in server.leases.items() if slots > 1}
        if restarts:
            server.restart()
        calls = len(server.calls)
        async with open_quotas(server, limit=100) as quotas:
            for job in jobs[:40]:
                job.adopted(quotas)
            gone = [job for job in parts if job in jobs[40:]]
            for job in gone[:10] * 2:
                assert job.record is not None
                quotas.release([NAME], job.record, weight=1)
            await asyncio.sleep(60)
            alive = sum(
                slots for lease, (_, slots, _) in server.leases.items() if lease not in blocks
            )
            assert server.count("give_back") == (2 if restarts else 0)
            await asyncio.sleep(90)
            await server.active(NAME)  # it looks
            assert not blocks & server.leases.keys()
            assert slots_lent(server) == 40
            assert server.taken[NAME] == (40 + 55 if restarts else 40)
            assert alive == 40 if restarts else 40 <= alive <= 43
            assert "release" not in {call for call, _ in server.calls[calls:]}
            for job in jobs[:40]:
                job.end(quotas)
            await asyncio.sleep(1)
            assert server.leases == {}

    run(scenario())


def test_a_lease_that_a_record_still_names_is_left_alone_when_its_job_has_moved(
    few_singles: None,
) -> None:
    """REQ-75: another process may have taken the job over, and renew that lease by now."""

    async def scenario() -> None:
        server = Written()
        jobs = [Job(server) for _ in range(30)]
        async with open_quotas(server, limit=100) as quotas:
            await start_all(quotas, jobs)
            singles = [job for job in jobs if job.record and not job.record.part]
            for job in singles:
                job.writes = False  # fenced
            [*_, last] = jobs
            last.end(quotas)
            await asyncio.sleep(1)
            [moved] = [job for job in singles if job.lease and job.lease.part]
            assert moved.record is not None
            assert moved.record.id in server.leases
            async with open_quotas(server) as other:
                moved.adopted(other)
                quotas.forget(moved.lease or moved.record)
                await asyncio.sleep(300)
                assert moved.record.id in server.leases
                assert server.count("give_back") == 0

    run(scenario())


def test_a_part_whose_job_was_let_go_is_kept_for_as_long_as_a_lease_and_comes_back_with_it(
    few_singles: None,
) -> None:
    """CASE-131: paused and resumed in one process; or resumed elsewhere, or never."""

    async def scenario() -> None:
        server = Written()
        jobs = [Job(server) for _ in range(30)]
        async with open_quotas(server, limit=100) as quotas:
            await start_all(quotas, jobs)
            back, away = [job for job in jobs if job.lease and job.lease.part][:2]
            for job in (back, away):
                assert job.lease is not None
                quotas.forget(job.lease)
            await asyncio.sleep(100)
            assert server.taken[NAME] == 30
            back.adopted(quotas)
            await asyncio.sleep(60)
            assert server.taken[NAME] == slots_lent(server) == 29
            assert server.count("acquire") == 6
            back.end(quotas)
            await asyncio.sleep(5)
            assert server.taken[NAME] == slots_lent(server) == 28

    run(scenario())


def test_slots_that_are_idle_for_a_moment_are_never_taken_for_leaked(few_singles: None) -> None:
    """CASE-286: there is no room to take smaller leases, and no single one left: looks find them again and again."""

    async def scenario() -> None:
        server, count = Server(), GivenCount({NAME: 0})
        async with open_quotas(server, limit=60, ledger=count) as quotas:
            held = await take_many(quotas, 60)
            live = 60

            async def end(number: int) -> None:
                nonlocal live
                for _ in range(number):
                    live -= 1
                    quotas.release([NAME], held.pop(), weight=1)
                await asyncio.sleep(0.2)

            await end(5)
            other = await server.acquire([NAME], 5, "", 5000)
            assert isinstance(other, SlotLease)
            await end(3)
            assert server.taken[NAME] == 60
            count.jobs[NAME] = live + 5
            for _ in range(20):
                assert (await quotas.repair([NAME], count)).given == {}
                await server.clock.sleep(30)
            assert server.taken[NAME] == 60
            await server.release(other.id)
            await end(0)

    run(scenario())


@pytest.mark.parametrize("what", ["acquire", "renew", "release"])
def test_calls_that_fail_leave_no_slot_behind(few_singles: None, what: str) -> None:
    """CASE-142, CASE-247."""

    async def scenario() -> None:
        server = Server()
        async with open_quotas(server, limit=100) as quotas:
            server.failures[what] = 10
            held = await take_many(quotas, 60)
            await asyncio.sleep(100)
            assert server.taken[NAME] == slots_lent(server) == 60
            for lease in held:
                quotas.release([NAME], lease, weight=1)
                await asyncio.sleep(0.1)
            await asyncio.sleep(60)
            assert (server.taken[NAME], server.leases) == (0, {})

    run(scenario())
