"""Connections to a service, one request at a time each. It knows httpx, and nothing of what is sent."""

from __future__ import annotations

import asyncio
import select
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import lru_cache
from ipaddress import ip_address
from typing import Any, cast

import httpcore
import httpx
from aiohappyeyeballs import (
    start_connection,  # pyright: ignore[reportUnknownVariableType] # an address is "a tuple" to it
)

__all__ = ["Transports", "connection"]

KEEPALIVE_SECONDS = 4.0
"""Below the 5 s after which many servers close: a request on a connection just closed has an unknown outcome."""

HAPPY_EYEBALLS_SECONDS = 0.25
"""So long one of a host's addresses has until the next is tried beside it (RFC 8305, 5)."""
READ_AHEAD_BYTES = 64 * 1024
"""So much may have come that nobody has read yet; then the service has to wait."""


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
    context = httpx.create_ssl_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


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
    """httpx's transport over a connection of its own, in place of a pool.

    A pool, its locks and anyio's streams give the loop a dozen more steps a request, and each system call of theirs
    gives Python's lock away: in a process full of task runs it is long until the thread has it again
    (`benchmarks.transport`, `benchmarks.overhead`).
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__(verify=context)
        self._pool: Any = _Connection(context)


class _Connection:
    """httpcore's, made with the first request, and anew where it has ended or was closed by the service."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self._current: httpcore.AsyncHTTP11Connection | None = None

    async def handle_async_request(self, request: httpcore.Request) -> httpcore.Response:
        if self._current is None or not self._current.is_available() or self._current.has_expired():
            await self.aclose()
            origin = request.url.origin
            limits: Mapping[str, float | None] = cast(Any, request).extensions["timeout"]
            stream = await _Stream.to(origin, self._context, limits["connect"])
            self._current = httpcore.AsyncHTTP11Connection(
                origin, stream, keepalive_expiry=KEEPALIVE_SECONDS
            )
        return await self._current.handle_async_request(request)

    async def aclose(self) -> None:
        if self._current is not None:
            current, self._current = self._current, None
            await current.aclose()


class _Stream(asyncio.Protocol, httpcore.AsyncNetworkStream):
    """A connection that asyncio reads. What is written leaves with the read that follows: head and body together."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._held: list[bytes] = []
        self._came = bytearray()
        self._is_over = False
        self._lost: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    @classmethod
    async def to(
        cls, origin: httpcore.Origin, context: ssl.SSLContext, timeout: float | None
    ) -> _Stream:
        """
        Raises:
            httpcore.ConnectTimeout, httpcore.ConnectError
        """
        host, loop = origin.host.decode("ascii"), asyncio.get_running_loop()
        is_encrypted = origin.scheme == b"https"
        try:
            async with asyncio.timeout(timeout):
                _, stream = await loop.create_connection(
                    cls,
                    sock=await _connected(host, origin.port, loop),
                    ssl=context if is_encrypted else None,
                    server_hostname=host if is_encrypted else None,
                )
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(str(error)) from error
        except (OSError, UnicodeError) as error:  # the latter: this can't be a host's name
            raise httpcore.ConnectError(str(error)) from error
        return stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._held:
            held, self._held = self._held, []
            self._transport.write(b"".join(held))
        if not self._came and not self._is_over:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(timeout):
                    await self._waiter
            except TimeoutError as error:
                raise httpcore.ReadTimeout(str(error)) from error
            finally:
                self._waiter = None
        if not self._came and self._lost is not None:
            raise httpcore.ReadError(str(self._lost)) from self._lost
        part = bytes(self._came[:max_bytes])
        del self._came[:max_bytes]
        if len(self._came) <= READ_AHEAD_BYTES:
            self._transport.resume_reading()
        return part

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._held.append(buffer)

    async def aclose(self) -> None:
        self._transport.abort()

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":
            return bool(self._came) or self._is_over or self._has_news()
        return self._transport.get_extra_info(info)

    def _has_news(self) -> bool:
        """What the system knows and the loop has not been told yet; a socket that was closed tells so at once."""
        if not _CAN_POLL:
            return False
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(poll.poll(0))

    # What asyncio tells.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._came += data
        if len(self._came) > READ_AHEAD_BYTES:
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        self._is_over = True
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_over, self._lost = True, exc
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


async def _connected(host: str, port: int, loop: asyncio.AbstractEventLoop) -> socket.socket:
    """The race of a host's addresses; asyncio's own leaves a socket open when it is cancelled."""
    try:
        family = socket.AF_INET6 if ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    else:  # without a thread that looks it up
        found = [(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port))]
    return await start_connection(found, happy_eyeballs_delay=HAPPY_EYEBALLS_SECONDS)


_CAN_POLL = hasattr(select, "poll")
