"""Which transport under our client: requests per second and CPU per request, with 10, 100 and 1,000 at once.

The same GET and the same parsing each time, over connections that are kept; as many connections as requests at once.

- httpx: its own transport.
- httpx, sharded: several clients that share the load, each with its part of the connections.
- httpx, HTTP/2: one connection for all, in the clear by prior knowledge; its service speaks it with the h2 package and
  is the slower end, so look at the CPU.
- httpx over aiohttp: the package httpx-aiohttp.
- aiohttp alone: what httpx itself adds.
- RemoteClient: ours, which sends straight through httpx's transports, each over one connection of asyncio's; and over
  aiohttp.

The second table tells what the figures do not: a PUT whose connection is lost after it was taken, as creates are. How
often it is sent, and whether the client still knows that it may have been.

Run: `uv run python -m benchmarks.transport [--quick] [--json] [--sizes 10 100] [--repetitions N]`
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport

from benchmarks.measure import (
    CPU,
    PEAK,
    WALL,
    Chosen,
    Figures,
    Report,
    Table,
    by_turns,
    in_child,
    main,
    using,
)
from benchmarks.plot import Curves
from benchmarks.service import Service
from prefect_webapi import RemoteClient, RemoteError

AT_ONCE, QUICK_AT_ONCE = (10, 100, 1_000), (100,)
SECONDS, QUICK_SECONDS = 5.0, 0.5
SHARDS = 8
RATE, CPU_PER_REQUEST = "requests/s", "CPU us per request"
Get = Callable[[], Awaitable[Any]]


@asynccontextmanager
async def _httpx(url: str, at_once: int, **more: Any) -> AsyncGenerator[Get]:
    limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once)
    async with httpx.AsyncClient(
        limits=limits, timeout=60, verify=False, trust_env=False, **more
    ) as client:

        async def get() -> Any:
            return (await client.get(url)).json()

        yield get


@asynccontextmanager
async def _sharded(url: str, at_once: int) -> AsyncGenerator[Get]:
    async with AsyncExitStack() as stack:
        part = -(-at_once // SHARDS)
        shards = [await stack.enter_async_context(_httpx(url, part)) for _ in range(SHARDS)]
        turns = itertools.cycle(shards)

        async def get() -> Any:
            return await next(turns)()

        yield get


@asynccontextmanager
async def _ours(
    url: str, at_once: int, transport: httpx.AsyncBaseTransport | None = None
) -> AsyncGenerator[Get]:
    base, path = url.rsplit("/jobs", 1)
    client = RemoteClient(base, max_connections=at_once, transport=transport)

    async def get() -> Any:
        return await client.get(f"/jobs{path}")

    try:
        yield get
    finally:
        await client.aclose()


def _ours_over_aiohttp(url: str, at_once: int) -> Any:
    return _ours(url, at_once, _aiohttp_transport(at_once))


@asynccontextmanager
async def _aiohttp(url: str, at_once: int) -> AsyncGenerator[Get]:
    connector = aiohttp.TCPConnector(limit=at_once)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def get() -> Any:
            async with session.get(url) as answer:
                return await answer.json()

        yield get


def _aiohttp_transport(at_once: int) -> AiohttpTransport:
    limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once)
    return AiohttpTransport(limits=limits)


def _over_aiohttp(url: str, at_once: int) -> Any:
    return _httpx(url, at_once, transport=_aiohttp_transport(at_once))


def _http2(url: str, at_once: int) -> Any:
    return _httpx(url, at_once, http1=False, http2=True)


WAYS = {
    "httpx": _httpx,
    f"httpx, sharded by {SHARDS}": _sharded,
    "httpx, HTTP/2": _http2,
    "httpx over aiohttp": _over_aiohttp,
    "aiohttp alone": _aiohttp,
    "RemoteClient": _ours,
    "RemoteClient over aiohttp": _ours_over_aiohttp,
}


def requests(url: str, way: str, at_once: int, seconds: float) -> Figures:
    return asyncio.run(_requests(url, way, at_once, seconds))


async def _requests(url: str, way: str, at_once: int, seconds: float) -> Figures:
    figures, answered = Figures(), 0
    async with WAYS[way](url, at_once) as get:

        async def loop(until: float) -> None:
            nonlocal answered
            while time.perf_counter() < until:
                assert (await get())["state"] == "running"
                answered += 1

        async def all_at_once(until: float) -> None:
            await asyncio.gather(*(loop(until) for _ in range(at_once)))

        await all_at_once(time.perf_counter() + seconds / 2)  # connections are there
        answered = 0
        with using(figures):
            await all_at_once(time.perf_counter() + seconds)
    return figures | {
        RATE: answered / figures[WALL],
        CPU_PER_REQUEST: 1e6 * figures[CPU] / answered,
    }


async def lost_put(transport: httpx.AsyncBaseTransport | None) -> dict[str, Any]:
    """A service that takes a PUT and goes before it answers."""
    taken = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal taken
        with suppress(asyncio.IncompleteReadError):
            while not (await reader.readuntil(b"\r\n\r\n")).startswith(b"PUT"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            taken += 1
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        client = RemoteClient(f"http://127.0.0.1:{port}", transport=transport)
        await client.get("/jobs")  # the connection is one that is kept
        try:
            await client.put("/jobs/x")
        except RemoteError as error:
            return {"sent": taken, "told that it may have arrived": str(error.job_may_exist)}
        finally:
            await client.aclose()
    raise AssertionError("a lost answer was none")


def run(chosen: Chosen) -> Report:
    sizes = chosen.sizes or (QUICK_AT_ONCE if chosen.quick else AT_ONCE)
    seconds = QUICK_SECONDS if chosen.quick else SECONDS
    with Service() as service, Service(http2=True) as service2:

        def on(way: str, at_once: int) -> Callable[[], Figures]:
            there = service2 if way.endswith("HTTP/2") else service
            return lambda: in_child(requests, f"{there.url}/jobs/first", way, at_once, seconds)

        measured = by_turns(
            chosen.repetitions,
            {f"{way}, {n}": on(way, n) for n in sizes for way in WAYS},
        )
    shown = (RATE, CPU_PER_REQUEST, PEAK)
    return Report(
        question="Which transport should be under our client?",
        tables=[
            Table(
                "one GET, parsed",
                [
                    {"at once": n, "way": way}
                    | {name: measured[f"{way}, {n}"][name] for name in shown}
                    for n in sizes
                    for way in WAYS
                ],
            ),
            Table(
                "a PUT whose answer is lost",
                [
                    {"way": way} | asyncio.run(lost_put(transport))
                    for way, transport in (
                        ("RemoteClient", None),
                        ("RemoteClient over aiohttp", AiohttpTransport()),
                    )
                ],
            ),
        ],
        notes=[
            "aiohttp sends a PUT or DELETE again by itself, and httpx-aiohttp tells a connection that was lost as one "
            "that was never made: a create could make two jobs, and none be known. So it is not under RemoteClient"
        ],
        plots=[
            Curves(
                CPU_PER_REQUEST,
                "requests at once",
                CPU_PER_REQUEST,
                {
                    way: [(n, measured[f"{way}, {n}"][CPU_PER_REQUEST].median) for n in sizes]
                    for way in WAYS
                },
            )
        ],
    )


if __name__ == "__main__":
    main(run, __doc__)
