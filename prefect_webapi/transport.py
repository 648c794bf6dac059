"""Connections to a service, one request at a time each. It knows httpx, and nothing of what is sent."""

from __future__ import annotations

import asyncio
import select
import ssl
import time
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import httpcore
import httpx

__all__ = ["Transports", "connection"]

KEEPALIVE_SECONDS = 4.0
"""Below the 5 s after which many servers close: a request on a connection just closed has an unknown outcome."""


class Transports:
    """httpx transports with a connection each; the one that was used last is taken first.

    A pool of httpx looks through all of its connections, and asks the idle ones whether they still are, at each
    request and at each answer: the more it has, the more CPU a request takes (`benchmarks.transport`).

    Args:
        most: so many at once; None: one for all, which sees to its connections itself.
        patience: seconds to wait for one.
    """

    def __init__(
        self,
        make: Callable[[], httpx.AsyncBaseTransport],
        *,
        most: int | None = None,
        patience: float = 0.0,
    ) -> None:
        self._make = make
        self._patience = patience
        self._places = None if most is None else asyncio.Semaphore(most)
        self._all: set[httpx.AsyncBaseTransport] = set()
        self._idle: deque[tuple[httpx.AsyncBaseTransport, float]] = deque()

    async def take(self) -> httpx.AsyncBaseTransport:
        """One for a request, to be given back.

        Raises:
            httpx.PoolTimeout: all were busy for too long.
        """
        if self._places is None:
            return next(iter(self._all), None) or self._new()
        while self._idle and time.monotonic() - self._idle[0][1] > KEEPALIVE_SECONDS:
            transport, _ = self._idle.popleft()
            self._all.discard(transport)
            await transport.aclose()
        try:
            async with asyncio.timeout(self._patience if self._places.locked() else None):
                await self._places.acquire()
        except TimeoutError:
            raise httpx.PoolTimeout(f"no connection was free for {self._patience:g} s") from None
        if self._idle:
            return self._idle.pop()[0]
        try:
            return self._new()
        except BaseException:
            self._places.release()
            raise

    def give(self, transport: httpx.AsyncBaseTransport) -> None:
        if self._places is not None:
            self._idle.append((transport, time.monotonic()))
            self._places.release()

    def _new(self) -> httpx.AsyncBaseTransport:
        transport = self._make()
        self._all.add(transport)
        return transport

    async def aclose(self) -> None:
        for transport in list(self._all):
            await transport.aclose()


def connection(url: str, proxy: httpx.Proxy | None) -> httpx.AsyncBaseTransport:
    """A transport for one request at a time to this address."""
    context = _trusted() if url.startswith("https:") else _trusting_nobody()
    return _Single(context) if proxy is None else _through(proxy, context)


@lru_cache(maxsize=1)
def _trusted() -> ssl.SSLContext:
    """The certificates that are trusted; reading them takes longer than many a request."""
    return httpx.create_ssl_context()


@lru_cache(maxsize=1)
def _trusting_nobody() -> ssl.SSLContext:
    """Where nothing is encrypted: without one httpx makes another for each transport, which takes milliseconds."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _through(proxy: httpx.Proxy, context: ssl.SSLContext) -> httpx.AsyncBaseTransport:
    limits = httpx.Limits(
        max_connections=1, max_keepalive_connections=1, keepalive_expiry=KEEPALIVE_SECONDS
    )
    return httpx.AsyncHTTPTransport(verify=context, limits=limits, proxy=proxy)


class _Single(httpx.AsyncHTTPTransport):
    """httpx's transport over a pool of one connection that is asked without detours whether it still stands."""

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__(verify=context)
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=context,
            max_connections=1,
            max_keepalive_connections=1,
            keepalive_expiry=KEEPALIVE_SECONDS,
            network_backend=_Network(),
        )


class _Network(httpcore.AsyncNetworkBackend):
    """httpcore's own."""

    def __init__(self) -> None:
        self._own: httpcore.AsyncNetworkBackend = cast(Any, httpcore.AnyIOBackend)()

    async def connect_tcp(self, *args: Any, **options: Any) -> httpcore.AsyncNetworkStream:
        return _Stream(await self._own.connect_tcp(*args, **options))

    async def sleep(self, seconds: float) -> None:
        await self._own.sleep(seconds)


class _Stream(httpcore.AsyncNetworkStream):
    """httpcore's own, but for the question whether an idle connection was closed, which it is asked twice a request.

    anyio looks up the peer's address for it each time: a system call in which the thread gives Python's lock away, and
    in a process full of task runs it is long until it has it again (`benchmarks.overhead`).
    """

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream
        self._socket: Any = stream.get_extra_info("socket")

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return await self._stream.read(max_bytes, timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.AsyncNetworkStream:
        return _Stream(await self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable" and _CAN_POLL:
            return _is_readable(self._socket.fileno())
        return self._stream.get_extra_info(info)


_CAN_POLL = hasattr(select, "poll")


def _is_readable(descriptor: int) -> bool:
    """What a closed socket would tell at once; one that we have closed counts as such."""
    if descriptor < 0:
        return True
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))
