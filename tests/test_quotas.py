"""Places in quotas: whose turn it is, and what happens to slots when things fail.

Faults that no real server can be made to show on time (it is down for a minute, a renewal comes late) are
played against `Server` in virtual time; `tests/_prefect/test_slots.py` has the same class at a real one.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import timedelta
from itertools import pairwise

import anyio
import pytest
from prometheus_client import CollectorRegistry

from prefect_webapi.contract.errors import ConfigurationError
from prefect_webapi.metrics import Metrics
from prefect_webapi.quotas import (
    Quotas,
    Repair,
    SlotLease,
    Waiting,
    repair,
)
from tests.support.leaks import GivenCount
from tests.support.slots import (
    NAME,
    Ledger,
    Server,
    admit_all,
    nobody_listens,
    open_quotas,
    take,
)
from tests.support.virtualtime import run


def test_ten_waiters_get_their_places_in_order_of_arrival_and_at_once() -> None:
    """CASE-137: and hear of each step forward."""

    async def scenario() -> None:
        server = Server()
        loop = asyncio.get_running_loop()
        order: list[int] = []
        starts: list[float] = []
        heard: list[int] = []

        async def job(number: int, quotas: Quotas) -> None:
            def waiting(wait: Waiting) -> None:
                if number == 9:
                    heard.append(wait.position)

            lease = await take(quotas, waiting=waiting)
            order.append(number)
            starts.append(loop.time())
            await asyncio.sleep(5.5)
            quotas.release([NAME], lease, weight=1)

        async with open_quotas(server, limit=1) as quotas, anyio.create_task_group() as group:
            for number in range(10):
                group.start_soon(job, number, quotas)
        assert order == list(range(10))
        assert heard[0] == 10
        assert [*dict.fromkeys(heard)] == list(range(10, 0, -1))
        gaps = [later - earlier for earlier, later in pairwise(starts)]
        assert max(gaps) < 5.5 + 0.2  # the release wakes the next one, not its next look
        assert server.taken[NAME] == 0

    run(scenario())


def test_a_waiting_job_hears_every_ten_seconds_how_long_it_waits() -> None:
    """CASE-136, REQ-76."""

    async def scenario() -> None:
        heard: list[Waiting] = []
        async with open_quotas(Server(), limit=1) as quotas:
            await take(quotas)
            with anyio.move_on_after(65):
                await take(quotas, waiting=heard.append)
        assert all((wait.limits, wait.position) == ({NAME: 1}, 1) for wait in heard)
        waited = [wait.waited.total_seconds() for wait in heard]
        assert waited == pytest.approx([0, 10, 20, 30, 40, 50, 60], abs=4)
        assert len({wait.since for wait in heard}) == 1

    run(scenario())


def test_a_place_freed_by_another_process_is_seen_within_two_seconds() -> None:
    """CASE-140, REQ-76: whatever the server's Retry-After says (30 s here)."""

    async def scenario() -> None:
        server = Server()
        async with open_quotas(server, limit=1) as here, open_quotas(server, limit=1) as there:
            lease = await take(there)
            async with anyio.create_task_group() as group:
                group.start_soon(take, here)
                await asyncio.sleep(7.3)
                there.release([NAME], lease, weight=1)
                await asyncio.sleep(2)
                assert server.count("acquire") > 2
                assert server.taken[NAME] == 1

    run(scenario())


def test_a_second_release_frees_nobody_elses_place() -> None:
    """CASE-138."""

    async def scenario() -> None:
        server = Server()
        async with open_quotas(server, limit=2) as quotas:
            mine, _ = await take(quotas), await take(quotas)
            for _ in range(3):
                quotas.release([NAME], mine, weight=1)
                await asyncio.sleep(1)
            assert server.taken[NAME] == 1
            assert server.count("release") == 1

    run(scenario())


def test_a_lowered_limit_starts_nobody_until_there_is_room_and_a_raised_one_starts_at_once() -> (
    None
):
    """CASE-139, CASE-140."""

    async def scenario() -> None:
        server = Server()
        started = 0

        async def job(quotas: Quotas) -> None:
            nonlocal started
            await take(quotas)
            started += 1

        async with open_quotas(server, limit=10) as quotas:
            leases = [await take(quotas) for _ in range(10)]
            await quotas.configure(NAME, 5)
            async with anyio.create_task_group() as group:
                for _ in range(4):
                    group.start_soon(job, quotas)
                for lease in leases[:5]:
                    quotas.release([NAME], lease, weight=1)
                await asyncio.sleep(5)
                assert (started, server.taken[NAME]) == (0, 5)
                quotas.release([NAME], leases[5], weight=1)
                await asyncio.sleep(0.5)
                assert started == 1
                await quotas.configure(NAME, 8)
                await asyncio.sleep(0.5)
                assert (started, server.taken[NAME]) == (4, 8)
            assert server.count("ensure") == 3
            await quotas.configure(NAME, 8)
            assert server.count("ensure") == 3

    run(scenario())


def test_a_job_that_could_never_start_is_refused_with_both_numbers() -> None:
    """CASE-139, REQ-73: at the call, and in the queue when the limit is lowered below its weight."""

    async def scenario() -> None:
        server = Server()
        async with open_quotas(server, limit=4) as quotas:
            with pytest.raises(ConfigurationError, match=r"5 places of quota webapi:.* has 4"):
                await take(quotas, weight=5)
            await take(quotas, weight=4)

            async def lower() -> None:
                await asyncio.sleep(2.5)
                await quotas.configure(NAME, 2)

            async with anyio.create_task_group() as group:
                group.start_soon(lower)
                with pytest.raises(ConfigurationError, match=r"3 places .* has 2"):
                    await take(quotas, weight=3)
        with pytest.raises(ConfigurationError, match="has no limit yet"):
            async with open_quotas(server) as quotas:
                await take(quotas)

    run(scenario())


def test_a_full_ledger_keeps_the_first_waiting_with_its_lease_until_it_admits() -> None:
    """CASE-141: a slot that Prefect has given away is not enough while the ledger counts its job."""

    async def scenario() -> None:
        server = Server()
        ledger = Ledger(room=0)
        loop = asyncio.get_running_loop()
        async with open_quotas(server, limit=1) as quotas:

            async def make_room() -> None:
                await asyncio.sleep(300)
                assert server.count("acquire") == 1
                assert server.count("renew") >= 7  # the lease is held meanwhile
                ledger.room = 1
                await asyncio.sleep(0)
                quotas.release([NAME], None, weight=1)  # a job without a lease is gone

            async with anyio.create_task_group() as group:
                group.start_soon(make_room)
                await quotas.acquire(
                    [NAME], weight=1, holder="", admit=ledger.admit, waiting=nobody_listens
                )
            assert loop.time() < 301.3
            assert server.taken[NAME] == 1

    run(scenario())


@pytest.mark.parametrize("moment", [0.005, 0.015, 0.023, 0.5, 3.0])
def test_a_cancelled_waiter_leaves_at_once_and_leaves_no_slot_behind(moment: float) -> None:
    """REQ-76: while its request is under way, while the answer is, while the ledger is asked, while it waits."""

    async def scenario() -> None:
        server = Server()
        ledger = Ledger(room=0)
        loop = asyncio.get_running_loop()
        async with open_quotas(server, limit=1) as quotas:
            began = loop.time()
            with anyio.move_on_after(moment):
                await quotas.acquire(
                    [NAME], weight=1, holder="", admit=ledger.admit, waiting=nobody_listens
                )
            assert loop.time() - began < moment + 0.02
            await asyncio.sleep(1)
            assert (server.taken[NAME], server.leases) == (0, {})
            await take(quotas)  # and those behind it can go on

    run(scenario())


def test_a_place_that_the_ledger_has_noted_is_never_lost_to_a_cancellation() -> None:
    """REQ-76: the note and its lease reach the caller, who gives them back in order."""

    async def scenario() -> None:
        server = Server()
        ledger = Ledger()
        got: SlotLease | None = None
        async with open_quotas(server, limit=1) as quotas:
            with anyio.move_on_after(0.023) as scope:
                got = await quotas.acquire(
                    [NAME], weight=1, holder="", admit=ledger.admit, waiting=nobody_listens
                )
            assert scope.cancel_called
            assert ledger.live == 1
            assert got is not None
            assert [got.id] == list(server.leases)

    run(scenario())


def test_a_waiter_cancelled_in_the_middle_of_the_queue_is_not_missed() -> None:
    """CASE-137, REQ-76."""

    async def scenario() -> None:
        server = Server()
        order: list[int] = []
        async with open_quotas(server, limit=1) as quotas, anyio.create_task_group() as group:
            first = await take(quotas)
            scopes = [anyio.CancelScope() for _ in range(5)]

            async def job(number: int) -> None:
                with scopes[number]:
                    lease = await take(quotas)
                    order.append(number)
                    quotas.release([NAME], lease, weight=1)

            for number in range(5):
                group.start_soon(job, number)
                await asyncio.sleep(0.1)
            scopes[2].cancel()
            scopes[0].cancel()
            quotas.release([NAME], first, weight=1)
        assert order == [1, 3, 4]

    run(scenario())


def test_an_error_of_the_ledger_gives_the_lease_back_and_reaches_the_caller() -> None:
    """REQ-75."""

    async def broken(lease: SlotLease) -> bool:
        raise OSError("disk full")

    async def scenario() -> None:
        server = Server()
        async with open_quotas(server, limit=1) as quotas:
            with pytest.raises(OSError, match="disk full"):
                await quotas.acquire(
                    [NAME], weight=1, holder="", admit=broken, waiting=nobody_listens
                )
            await asyncio.sleep(1)
            assert server.taken[NAME] == 0

    run(scenario())


def test_a_thousand_held_slots_are_renewed_in_one_batch_per_period_without_threads() -> None:
    """CASE-143."""

    async def scenario() -> None:
        server = Server(latency=0.0)
        async with open_quotas(server, limit=1000) as quotas:
            threads = threading.active_count()
            for _ in range(1000):
                await take(quotas)
                await asyncio.sleep(0.03)
            await asyncio.sleep(120)
            assert server.count("renew") == 3 * 1000
            assert len({round(at) for what, at in server.calls if what == "renew"}) == 3
            assert threading.active_count() == threads
            assert server.taken[NAME] == 1000

    run(scenario())


def test_a_server_that_lost_its_leases_gets_exactly_the_leaked_slots_back() -> None:
    """CASE-141: it restarted; the jobs go on under new leases, and nobody else got their places."""

    async def scenario() -> None:
        server = Server()
        metrics = Metrics(CollectorRegistry())
        news: list[str] = []
        async with open_quotas(server, limit=5, metrics=metrics) as quotas:
            for weight in (2, 2, 1):
                await take(quotas, weight=weight, changed=lambda lease: news.append(lease.id))
            server.restart()
            assert server.taken[NAME] == 5
            await asyncio.sleep(60)
            assert server.taken[NAME] == 5
            assert sum(slots for _, slots, _ in server.leases.values()) == 5
            assert server.count("give_back") == 3
            assert sorted(news) == sorted(server.leases)
            assert metrics.value("lost_slots_total", plugin="jobs", cause="server") == 5
            assert server.highest == 5

    run(scenario())


def test_a_lease_that_lapsed_is_taken_anew_when_there_is_room_and_nothing_is_given_back() -> None:
    """CASE-141: renewal was blocked for too long and the slot went to somebody else."""

    async def scenario() -> None:
        server = Server()
        changed: list[SlotLease] = []
        async with open_quotas(server, limit=1) as quotas:
            mine = await take(quotas, changed=changed.append)
            server.is_down = True
            await asyncio.sleep(200)
            server.is_down = False
            other = await server.acquire([NAME], 1, "", 500)
            assert isinstance(other, SlotLease)
            await asyncio.sleep(60)
            assert changed == []
            assert server.count("give_back") == 0
            await server.release(other.id)
            await asyncio.sleep(3)
            assert [lease.id for lease in changed] == list(server.leases)
            quotas.release([NAME], mine, weight=1)  # the caller may still know only the first one
            await asyncio.sleep(1)
            assert (server.taken[NAME], server.leases) == (0, {})

    run(scenario())


def test_while_prefect_is_down_nothing_starts_and_nothing_that_runs_is_touched(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """CASE-142: down for a minute; recovery without help."""

    async def scenario() -> None:
        server = Server()
        loop = asyncio.get_running_loop()
        async with open_quotas(server, limit=2) as quotas:
            await take(quotas)
            server.is_down = True

            async def come_back() -> None:
                await asyncio.sleep(60)
                server.is_down = False

            began = loop.time()
            async with anyio.create_task_group() as group:
                group.start_soon(come_back)
                await take(quotas)
            assert 60 <= loop.time() - began < 62
            await asyncio.sleep(100)
            assert len(server.leases) == 2
            assert server.count("give_back") == 0

    with caplog.at_level(logging.WARNING, "prefect_webapi.quotas"):
        run(scenario())
    assert len(caplog.records) <= 2


def test_a_limit_that_could_not_be_set_is_set_before_anybody_starts() -> None:
    """CASE-142: the API was down when the block was read."""

    async def scenario() -> None:
        server = Server(is_down=True)
        async with open_quotas(server, limit=3) as quotas:
            server.is_down = False
            await take(quotas)
            assert server.limits == {NAME: 3}

    run(scenario())


def test_a_release_is_repeated_until_it_is_done_and_each_try_is_counted() -> None:
    """CASE-247: the caller waits for none of it."""

    async def scenario() -> None:
        server = Server(failures={"release": 1})
        metrics = Metrics(CollectorRegistry())
        async with open_quotas(server, limit=1, metrics=metrics) as quotas:
            lease = await take(quotas)
            assert metrics.value("held_slots", plugin="jobs") == 1
            quotas.release([NAME], lease, weight=1)
            await asyncio.sleep(0.05)
            assert metrics.value("slot_releases_total", plugin="jobs", outcome="failed") == 1
            assert metrics.value("slot_releases_total", plugin="jobs", outcome="ok") == 0
            await take(quotas)
            assert metrics.value("slot_releases_total", plugin="jobs", outcome="ok") == 1
            assert metrics.value("held_slots", plugin="jobs") == 1
            assert metrics.value("waiting_jobs", plugin="jobs") == 0

    run(scenario())


def test_a_release_after_a_restart_of_the_server_still_frees_the_slot() -> None:
    """CASE-138: the server answers a release of a lost lease with success and does nothing."""

    async def scenario() -> None:
        server = Server()
        async with open_quotas(server, limit=1) as quotas:
            lease = await take(quotas)
            await asyncio.sleep(10)
            server.restart()
            quotas.release([NAME], lease, weight=1)
            await asyncio.sleep(1)
            assert server.taken[NAME] == 0

    run(scenario())


def test_leaving_waits_for_releases_and_leaves_what_runs_alone() -> None:
    """REQ-75: the slots of detached jobs lapse or are adopted."""

    async def scenario() -> None:
        server = Server(latency=1.0)
        async with open_quotas(server, limit=2) as quotas:
            gone, _ = await take(quotas), await take(quotas)
            quotas.release([NAME], gone, weight=1)
        assert server.taken[NAME] == 1
        server.is_down = True
        async with open_quotas(server, limit=2) as quotas:
            quotas.release([NAME], SlotLease("lease-2", server.clock.now()), weight=1)
        assert server.taken[NAME] == 1

    run(scenario())


def test_the_wait_for_a_place_is_measured() -> None:
    """CASE-147: about nothing where there was room."""

    async def scenario() -> None:
        metrics = Metrics(CollectorRegistry())
        async with open_quotas(Server(), limit=1, metrics=metrics) as quotas:
            lease = await take(quotas)
            assert metrics.value("slot_wait_seconds_sum", plugin="jobs") < 0.1
            async with anyio.create_task_group() as group:
                group.start_soon(take, quotas)
                await asyncio.sleep(20)
                assert metrics.value("waiting_jobs", plugin="jobs") == 1
                quotas.release([NAME], lease, weight=1)
            assert metrics.value("slot_wait_seconds_sum", plugin="jobs") == pytest.approx(20, abs=1)
            assert metrics.value("slot_wait_seconds_count", plugin="jobs") == 2

    run(scenario())


def test_an_adopted_lease_is_renewed_at_once_and_released_like_any_other() -> None:
    """CASE-131: the job of a dead process keeps its place."""

    async def scenario() -> None:
        server = Server()
        async with open_quotas(server, limit=1) as quotas:
            lease = await take(quotas)
        await asyncio.sleep(115)
        async with open_quotas(server, limit=1) as quotas:
            quotas.adopt([NAME], lease, weight=1, holder="")
            await asyncio.sleep(300)
            assert list(server.leases) == [lease.id]
            quotas.release([NAME], lease, weight=1)
            await asyncio.sleep(1)
            assert (server.taken[NAME], server.leases) == (0, {})

    run(scenario())


@pytest.mark.parametrize(("away", "given_back"), [(5, 1), (300, 0)])
def test_an_adopted_lease_that_is_lost_is_replaced_and_the_new_one_told(
    away: float, given_back: int
) -> None:
    """CASE-131, CASE-141: inside its time the server must have lost it, after it the slot is somebody else's."""

    async def scenario() -> None:
        server = Server()
        changed: list[SlotLease] = []
        async with open_quotas(server, limit=1) as quotas:
            lease = await take(quotas)
        if given_back:
            server.restart()
        await asyncio.sleep(away)
        async with open_quotas(server, limit=1) as quotas:
            quotas.adopt([NAME], lease, weight=1, holder="", changed=changed.append)
            await asyncio.sleep(5)
            assert server.count("give_back") == given_back
            assert [new.id for new in changed] == list(server.leases)
            assert server.taken[NAME] == 1

    run(scenario())


def test_an_adopted_lease_lasts_no_longer_than_any_other_whatever_the_clock_says() -> None:
    """CASE-206: the clock was set back an hour, Prefect is away until the lease has lapsed: nothing was leaked."""

    async def scenario() -> None:
        server = Server()
        async with open_quotas(server, limit=1) as quotas:
            lease = await server.acquire([NAME], 1, "", 120)
            assert isinstance(lease, SlotLease)
            server.is_down = True
            late = SlotLease(lease.id, lease.until + timedelta(hours=1))
            quotas.adopt([NAME], late, weight=1, holder="")
            await server.clock.sleep(150)
            server.is_down = False
            await server.clock.sleep(60)
            assert server.taken[NAME] == 1
            assert server.count("give_back") == 0

    run(scenario())


def test_a_forgotten_lease_is_left_to_its_new_owner() -> None:
    """CASE-131: neither renewed nor released by the process that lost the job."""

    async def scenario() -> None:
        server = Server()
        async with open_quotas(server, limit=1) as quotas:
            lease = await take(quotas)
            quotas.forget(lease)
            await asyncio.sleep(100)
            assert server.count("renew") == 0
        assert list(server.leases) == [lease.id]

    run(scenario())


def test_many_lost_leases_do_not_storm_a_server_without_room() -> None:
    """CASE-143: one question per limit and second, and what is still held is renewed in time."""

    async def scenario() -> None:
        server = Server()
        async with open_quotas(server, limit=100) as quotas:
            kept = [await take(quotas) for _ in range(50)]
            for _ in range(50):
                await take(quotas)
            for lease_id in list(server.leases)[50:]:
                del server.leases[lease_id]  # lost, and not given back to anybody
            server.taken[NAME] += 50
            await asyncio.sleep(45)
            asked = server.count("acquire")
            await asyncio.sleep(130)
            assert server.count("acquire") - asked <= 131
            assert {lease.id for lease in kept} <= set(server.leases)

    run(scenario())


AB, ABC = f"{NAME}:project=ab", f"{NAME}:project=abc"


@asynccontextmanager
async def open_constrained(server: Server) -> AsyncGenerator[Quotas]:
    """Ten places, two of them for each of two projects."""
    async with open_quotas(server, limit=10) as quotas:
        await quotas.configure(AB, 2)
        await quotas.configure(ABC, 2)
        yield quotas


async def take_of(quotas: Quotas, *names: str, weight: int = 1) -> SlotLease:
    return await quotas.acquire(
        names, weight=weight, holder="", admit=admit_all, waiting=nobody_listens
    )


def test_a_project_that_has_used_up_its_share_holds_nobody_up() -> None:
    """CASE-134: whole names count, so `ab` and `abc` are counted apart."""

    async def scenario() -> None:
        server = Server()
        heard: list[Waiting] = []
        async with open_constrained(server) as quotas:
            held = [await take_of(quotas, NAME, AB) for _ in range(2)]
            async with anyio.create_task_group() as group:
                for _ in range(3):
                    group.start_soon(take_of, quotas, NAME, AB)
                await asyncio.sleep(1)
                with anyio.fail_after(0.2):
                    await take_of(quotas, NAME, ABC)
                    await take_of(quotas, NAME)
                assert server.taken == {NAME: 4, AB: 2, ABC: 1}
                with anyio.move_on_after(5):
                    await quotas.acquire(
                        [NAME, AB], weight=1, holder="", admit=admit_all, waiting=heard.append
                    )
                assert (heard[0].limits, heard[0].position) == ({NAME: 10, AB: 2}, 4)
                quotas.release([NAME, AB], held[0], weight=1)
                await asyncio.sleep(0.2)
                assert server.taken == {NAME: 4, AB: 2, ABC: 1}
                group.cancel_scope.cancel()
            assert (server.highest, server.limits[AB]) == (4, 2)

    run(scenario())


def test_halves_are_never_held_so_crossing_wishes_end() -> None:
    """CASE-135: each wants a place of both limits, asked for in either order; all get them, one by one."""

    async def scenario() -> None:
        server = Server()
        live = highest = 0

        async def job(*names: str) -> None:
            nonlocal live, highest
            lease = await take_of(quotas, *names)
            live += 1
            highest = max(highest, live)
            await asyncio.sleep(1)
            live -= 1
            quotas.release(names, lease, weight=1)

        async with open_quotas(server) as quotas:
            await quotas.configure(AB, 1)
            await quotas.configure(ABC, 1)
            with anyio.fail_after(30):
                async with anyio.create_task_group() as group:
                    for _ in range(5):
                        group.start_soon(job, AB, ABC)
                        group.start_soon(job, ABC, AB)
            await asyncio.sleep(0.5)
        assert (highest, server.taken) == (1, {AB: 0, ABC: 0})

    run(scenario())


def test_a_freed_place_is_seen_at_once_by_all_who_wait_for_one_of_its_limits() -> None:
    """CASE-135, REQ-76: two heavy jobs end; the first of each queue starts, each as soon as it is its turn."""

    async def scenario() -> None:
        server = Server()
        loop = asyncio.get_running_loop()
        started: list[float] = []
        line: list[tuple[str, ...]] = []
        freed = 0.0

        async def job(*names: str) -> None:
            async def turn(_: bool) -> bool:
                return line[0] == names

            line.append(names)
            await quotas.acquire(
                names, weight=1, holder="", admit=leave_line, waiting=nobody_listens, turn=turn
            )
            started.append(loop.time())

        async def leave_line(lease: SlotLease) -> bool:
            del line[0]
            return True

        async with open_constrained(server) as quotas:
            held = [await take_of(quotas, NAME, weight=5) for _ in range(2)]
            async with anyio.create_task_group() as group:
                for names in ((NAME,), (NAME, AB), (NAME, ABC)):
                    group.start_soon(job, *names)
                await asyncio.sleep(5.5)
                freed = loop.time()
                for lease in held:
                    quotas.release([NAME], lease, weight=5)
        assert len(started) == 3
        assert max(started) - freed < 0.2

    run(scenario())


def test_a_server_that_lost_a_lease_of_two_limits_gets_both_back_once() -> None:
    """CASE-141: though the first try to give one of them back fails."""

    async def scenario() -> None:
        server = Server()
        changed: list[SlotLease] = []
        async with open_constrained(server) as quotas:
            lease = await quotas.acquire(
                [NAME, AB],
                weight=2,
                holder="",
                admit=admit_all,
                waiting=nobody_listens,
                changed=changed.append,
            )
            server.restart()
            server.failures["give_back"] = 1
            await asyncio.sleep(60)
            assert server.taken == {NAME: 2, AB: 2, ABC: 0}
            assert [new.id for new in changed] == list(server.leases)
            quotas.release([AB, NAME], lease, weight=2)
            await asyncio.sleep(1)
            assert (server.taken, server.leases) == ({NAME: 0, AB: 0, ABC: 0}, {})

    run(scenario())


def test_who_lets_others_go_first_asks_for_no_slot_and_says_that_he_waits() -> None:
    """REQ-76: he looks every second; without an answer of Prefect he does not count as waiting."""

    async def scenario() -> None:
        server = Server()
        loop = asyncio.get_running_loop()
        told: list[bool] = []

        async def turn(in_vain: bool) -> bool:
            told.append(in_vain)
            return loop.time() >= 5.5

        async with open_quotas(server, limit=1) as quotas:
            lease = await quotas.acquire(
                [NAME], weight=1, holder="", admit=admit_all, waiting=nobody_listens, turn=turn
            )
            assert loop.time() == pytest.approx(6, abs=0.2)
            assert server.count("acquire") == 1
            assert told == [
                False,
                *[True] * 7,
            ]  # once more at the first refusal: others shall know at once
            told.clear()
            server.is_down = True
            with anyio.move_on_after(3.5):
                await quotas.acquire(
                    [NAME], weight=1, holder="", admit=admit_all, waiting=nobody_listens, turn=turn
                )
            assert told == [False] * 4
            server.is_down = False
            quotas.release([NAME], lease, weight=1)

    run(scenario())


def test_a_surplus_that_stays_is_given_back_and_one_that_goes_is_not() -> None:
    """CASE-131, CASE-286: slots leaked by a server's restart and the holder's death; no pass waits for the next."""

    async def scenario() -> None:
        server, count = Server(), GivenCount({NAME: 1})
        metrics = Metrics(CollectorRegistry())
        other = "webapi:jobs:prod:other"
        names = [NAME, other, "tag:theirs", "webapi:gone"]
        for name in names[:3]:
            await server.ensure(name, 10)
        server.taken = {NAME: 3, other: 0, "tag:theirs": 5}
        await server.acquire([NAME], 2, "", 120)  # of a process that died: lapses
        await server.acquire([other], 1, "", 120)

        async def one_pass() -> Repair:
            began = server.clock.monotonic()
            done = await repair(server, names, count, clock=server.clock, metrics=metrics)
            assert server.clock.monotonic() - began < 5
            return done

        assert await one_pass() == Repair({}, {NAME: 4, other: 1})
        await server.clock.sleep(60)
        assert await one_pass() == Repair({}, {NAME: 4, other: 1})
        await server.clock.sleep(95)
        assert await one_pass() == Repair({NAME: 2}, {})
        assert server.taken == {NAME: 1, other: 0, "tag:theirs": 5}
        assert metrics.value("repaired_slots_total", plugin="jobs") == 2
        assert await one_pass() == Repair({}, {})

    run(scenario())


def test_of_a_surplus_that_shrinks_the_smallest_counts_and_one_that_was_gone_begins_anew() -> None:
    """CASE-286."""

    async def scenario() -> None:
        server, count = Server(), GivenCount()
        metrics = Metrics(CollectorRegistry())
        await server.ensure(NAME, 10)
        told: list[dict[str, int]] = []
        for taken in (3, 1, 3, 0, 3, 3):
            server.taken[NAME] = taken
            done = await repair(server, [NAME], count, clock=server.clock, metrics=metrics)
            told.append(dict(done.given))
            await server.clock.sleep(80)
        assert told == [{}, {}, {NAME: 1}, {}, {}, {}]

    run(scenario())


def test_places_that_change_hands_while_we_look_are_no_surplus() -> None:
    """CASE-131."""

    async def scenario() -> None:
        server = Server()
        ledger = Ledger()

        class Counted(GivenCount):
            async def held(self, name: str) -> int:
                return ledger.live

        async with open_quotas(server, limit=3) as quotas, anyio.create_task_group() as group:

            async def jobs() -> None:
                while True:
                    lease = await quotas.acquire(
                        [NAME], weight=1, holder="", admit=ledger.admit, waiting=nobody_listens
                    )
                    await asyncio.sleep(0.07)
                    ledger.live -= 1
                    quotas.release([NAME], lease, weight=1)

            for _ in range(8):
                group.start_soon(jobs)
            metrics, count = Metrics(CollectorRegistry()), Counted()
            for _ in range(20):
                done = await repair(server, [NAME], count, clock=server.clock, metrics=metrics)
                assert done.given == {}
                await server.clock.sleep(10)
            group.cancel_scope.cancel()

    run(scenario())
