"""Held slots: what it costs to take, to hold and to give back 1,000 of them, against Prefect's own `concurrency()`.

All three ways count the same global concurrency limit on the same Prefect server, take every slot for itself as jobs
do (one after the other in a queue, or together), hold them all for a while and give them back.

- ours: `Quotas` over Prefect's leases, as the engine uses it: one task renews all.
- concurrency(), sync: in 1,000 threads, as sync tasks would; it starts a thread per slot to renew its lease.
- concurrency(), async: 1,000 coroutines; a thread per slot as well.

API calls are counted where httpx sends them. Ours renews a lease of 120 s, Prefect one of 300 s: the calls while held
are shown per slot and minute.

Run: `uv run python -m benchmarks.quota [--quick] [--json] [--sizes 100] [--repetitions N]`
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import anyio
import httpx
import psutil

from benchmarks.measure import (
    CPU,
    WALL,
    Chosen,
    Figures,
    Report,
    Table,
    Target,
    by_turns,
    in_child,
    main,
    using,
)
from benchmarks.plot import Curves
from benchmarks.servers import prefect_server

SIZES, QUICK_SIZES = (100, 1_000), (100,)
HELD_SECONDS, QUICK_HELD_SECONDS = 60.0, 2.0
LIMIT = "webapi:bench:bench:default"
PARTS = ("take", "hold", "give back")


class Calls:
    """Requests that this process sends."""

    def __init__(self) -> None:
        self.sent = 0
        for kind in (httpx.AsyncClient, httpx.Client):
            self._count(kind)

    def _count(self, kind: Any) -> None:
        real = kind.send

        def send(client: object, *given: object, **more: object) -> object:
            self.sent += 1
            return real(client, *given, **more)

        kind.send = send


class Parts:
    """What each part costs."""

    def __init__(self, slots: int) -> None:
        self.figures: Figures = {}
        self._slots = slots
        self._calls = Calls()
        self._threads = psutil.Process().num_threads()

    async def note(self, part: str, work: Awaitable[object]) -> None:
        used, sent = Figures(), self._calls.sent
        with using(used):
            await work
        sent = self._calls.sent - sent
        per = self._slots * (used[WALL] / 60 if part == "hold" else 1)
        unit = "per slot and minute" if part == "hold" else "per slot"
        if part != "hold":
            self.figures[f"{part}: ms {unit}"] = 1000 * used[WALL] / per
        self.figures |= {
            f"{part}: CPU ms {unit}": 1000 * used[CPU] / per,
            f"{part}: calls {unit}": sent / per,
        }
        if part == "hold":
            threads = psutil.Process().num_threads() - self._threads
            self.figures["threads per held slot"] = threads / self._slots


def ours(slots: int, seconds: float) -> Figures:
    from prefect_webapi._prefect.slots import PrefectSlots
    from prefect_webapi.clock import Clock
    from prefect_webapi.metrics import Metrics
    from prefect_webapi.quotas import Quotas, SlotLease

    async def admit(_: SlotLease) -> bool:
        return True

    async def all_of_them() -> Figures:
        clock = Clock()
        async with Quotas(PrefectSlots(clock), clock=clock, metrics=Metrics()) as quotas:
            await quotas.configure(LIMIT, slots)
            parts, leases = Parts(slots), list[SlotLease]()

            async def take() -> None:
                await asyncio.gather(*(one() for _ in range(slots)))

            async def one() -> None:
                leases.append(
                    await quotas.acquire(
                        [LIMIT], weight=1, holder="", admit=admit, waiting=lambda _: None
                    )
                )

            async def give_back() -> None:
                for lease in leases:
                    quotas.release([LIMIT], lease, weight=1)
                while quotas._leases.releasing:  # noqa: ASYNC110 - they end by themselves
                    await anyio.sleep(0.02)

            await parts.note("take", take())
            await parts.note("hold", anyio.sleep(seconds))
            await parts.note("give back", give_back())
        return parts.figures

    return asyncio.run(all_of_them())


def theirs_async(slots: int, seconds: float) -> Figures:
    from prefect.concurrency.asyncio import concurrency

    async def all_of_them() -> Figures:
        parts, held, over = Parts(slots), 0, asyncio.Event()

        async def one() -> None:
            nonlocal held
            async with concurrency(LIMIT, strict=True):
                held += 1
                await over.wait()

        async def take() -> None:
            while held < slots:  # noqa: ASYNC110 - counted by others
                await asyncio.sleep(0.01)

        async def give_back() -> None:
            over.set()
            await asyncio.gather(*holders)

        await _limit(slots)
        holders = [asyncio.ensure_future(one()) for _ in range(slots)]
        await parts.note("take", take())
        await parts.note("hold", asyncio.sleep(seconds))
        await parts.note("give back", give_back())
        return parts.figures

    return asyncio.run(all_of_them())


def theirs_sync(slots: int, seconds: float) -> Figures:
    from prefect.concurrency.sync import concurrency

    over, held = threading.Event(), threading.Semaphore(0)

    def one() -> None:
        with concurrency(LIMIT, strict=True):
            held.release()
            over.wait()

    async def all_of_them(pool: ThreadPoolExecutor) -> Figures:
        await _limit(slots)
        parts = Parts(slots)

        def take() -> None:
            holders.extend(pool.submit(one) for _ in range(slots))
            for _ in range(slots):
                held.acquire()

        def give_back() -> None:
            over.set()
            for holder in holders:
                holder.result()

        holders: list[Future[None]] = []
        await parts.note("take", asyncio.to_thread(take))
        await parts.note("hold", asyncio.sleep(seconds))
        await parts.note("give back", asyncio.to_thread(give_back))
        return parts.figures

    with ExitStack() as stack:
        return asyncio.run(all_of_them(stack.enter_context(ThreadPoolExecutor(slots))))


async def _limit(slots: int) -> None:
    from prefect import get_client
    from prefect.client.schemas.actions import (
        GlobalConcurrencyLimitCreate,
        GlobalConcurrencyLimitUpdate,
    )
    from prefect.exceptions import ObjectAlreadyExists

    async with get_client() as client:
        with suppress(ObjectAlreadyExists):
            await client.create_global_concurrency_limit(
                GlobalConcurrencyLimitCreate(name=LIMIT, limit=slots)
            )
        await client.update_global_concurrency_limit(
            LIMIT, GlobalConcurrencyLimitUpdate(limit=slots, active=True)
        )


WAYS: dict[str, Callable[[int, float], Figures]] = {
    "ours": ours,
    "concurrency(), sync": theirs_sync,
    "concurrency(), async": theirs_async,
}
QUICK_WAYS = ("ours", "concurrency(), async")


def run(chosen: Chosen) -> Report:
    sizes = chosen.sizes or (QUICK_SIZES if chosen.quick else SIZES)
    seconds = QUICK_HELD_SECONDS if chosen.quick else HELD_SECONDS
    ways = QUICK_WAYS if chosen.quick else tuple(WAYS)
    with prefect_server():

        def on(way: str, slots: int) -> Callable[[], Figures]:
            return lambda: in_child(WAYS[way], slots, seconds)

        measured = by_turns(
            chosen.repetitions,
            {f"{way}, {n}": on(way, n) for n in sizes for way in ways},
        )
    tables = [
        Table(
            part,
            [
                {"way": way, "slots": n}
                | {
                    name: value
                    for name, value in measured[f"{way}, {n}"].items()
                    if name.startswith(part) or (part == "hold" and name.startswith("threads"))
                }
                for n in sizes
                for way in ways
            ],
        )
        for part in PARTS
    ]
    most = measured[f"ours, {max(sizes)}"]
    return Report(
        question="What does a held slot cost?",
        tables=tables,
        targets=[
            Target("threads per held slot", most["threads per held slot"].median, 0.01),
            Target(
                "block leases: calls per slot to take 1,000",
                most["take: calls per slot"].median if max(sizes) >= 1_000 else None,
                0.5,
            ),
        ],
        plots=[
            Curves(
                "threads per held slot",
                "slots",
                "threads per held slot",
                {
                    way: [
                        (n, max(1e-3, measured[f"{way}, {n}"]["threads per held slot"].median))
                        for n in sizes
                    ]
                    for way in ways
                },
            )
        ],
    )


if __name__ == "__main__":
    main(run, __doc__)
