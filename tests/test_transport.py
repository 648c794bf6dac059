"""Connections of a client: kept, closed by the service, asked after without detours, also through TLS."""

from __future__ import annotations

import asyncio
import gc
import ssl
import warnings
from asyncio.trsock import TransportSocket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from urllib.parse import urlsplit

import psutil
import pytest

from prefect_webapi import transport
from prefect_webapi.contract.errors import RemoteError
from prefect_webapi.http import RemoteClient
from prefect_webapi.transport import (
    READ_AHEAD_BYTES,
    _Stream,  # pyright: ignore[reportPrivateUsage]
)
from tests.support.certificates import self_signed
from tests.support.waiting import eventually

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


class Service:
    """Answers each request with `{}`; `hang_up` closes the connections that it has."""

    def __init__(self) -> None:
        self.url = ""
        self.connections: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.append(writer)
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(ANSWER)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    def hang_up(self) -> None:
        for each in self.connections:
            each.transport.abort()


@pytest.fixture(params=["http", "https"])
async def service(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncGenerator[Service]:
    async with served(request.param, tmp_path, monkeypatch) as service:
        yield service


@asynccontextmanager
async def served(
    scheme: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncGenerator[Service]:
    context: ssl.SSLContext | None = None
    if scheme == "https":
        key, certificate = self_signed()
        (folder / "server.pem").write_bytes(key + certificate)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.pem")
        trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trusting.load_verify_locations(cadata=certificate.decode())
        monkeypatch.setattr(transport, "_trusted", lambda: trusting)
    service = Service()
    server = await asyncio.start_server(service.serve, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    service.url = f"{scheme}://localhost:{port}"
    async with server:
        yield service


@asynccontextmanager
async def client_of(service: Service) -> AsyncGenerator[RemoteClient]:
    client = RemoteClient(service.url)
    try:
        yield client
    finally:
        await client.aclose()


async def test_requests_one_after_the_other_share_a_connection(service: Service) -> None:
    async with client_of(service) as client:
        for _ in range(5):
            assert await client.get("/") == {}
        assert len(service.connections) == 1


async def test_a_connection_that_the_service_has_closed_gets_no_request(service: Service) -> None:
    """It would be lost there, and whether a job was made unknown: also where the loop has not been told yet."""
    async with client_of(service) as client:
        assert await client.put("/", json={}) == {}
        ours = _connections_to(service)
        service.hang_up()
        await eventually(lambda: _connections_to(service) != ours, within=5, every=0)
        assert await client.put("/", json={}) == {}
        assert len(service.connections) == 2


def _connections_to(service: Service) -> list[str]:
    """The states of this process's own ends, as the system knows them."""
    port = urlsplit(service.url).port
    ours = [c for c in psutil.Process().net_connections() if c.raddr and c.raddr.port == port]
    return [c.status for c in ours]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_who_is_cancelled_while_it_connects_leaves_nothing_open(
    service: Service, host: str
) -> None:
    """At whichever step of it."""
    service.url = service.url.replace("localhost", host)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ResourceWarning)
        for turns in range(40):
            async with client_of(service) as client:
                asking = asyncio.create_task(client.get("/"))
                for _ in range(turns):
                    await asyncio.sleep(0)
                asking.cancel()
                with suppress(asyncio.CancelledError, RemoteError):
                    await asking
        await eventually(lambda: _connections_to(service) == [], within=5)
        gc.collect()
    assert [str(each.message) for each in told] == []


async def test_what_comes_unasked_is_no_answer_to_the_next_request(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    came: list[bytes] = []
    real = _Stream.data_received

    def seen(self: _Stream, data: bytes) -> None:
        real(self, data)
        came.append(data)

    monkeypatch.setattr(_Stream, "data_received", seen)
    unasked = ANSWER.replace(b"{}", b"[]")
    async with client_of(service) as client:
        assert await client.get("/") == {}
        service.connections[0].write(unasked)
        await eventually(lambda: unasked in came, within=5)
        assert await client.get("/") == {}
        assert len(service.connections) == 2


async def test_head_and_body_of_a_request_leave_together(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them alone is one more system call that gives Python's lock away, and wakes the service once more."""
    made = _watched(monkeypatch)
    async with client_of(service) as client:
        assert await client.put("/", json={"a": "b"}) == {}
    ((sent,),) = [call.args for each in made for call in each.write.call_args_list]
    assert sent.startswith(b"PUT / ")
    assert sent.endswith(b'\r\n\r\n{"a": "b"}')


async def test_who_sends_unasked_without_end_is_not_listened_to(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _watched(monkeypatch)
    async with client_of(service) as client:
        assert await client.get("/") == {}
        service.connections[0].write(bytes(READ_AHEAD_BYTES + 1))
        await eventually(lambda: made[0].pause_reading.called, within=5)
        assert await client.get("/") == {}


def _watched(monkeypatch: pytest.MonkeyPatch) -> list[Mock]:
    """What is asked of the connections' transports from now on."""
    made: list[Mock] = []
    real = _Stream.connection_made

    def connection_made(self: _Stream, transport: asyncio.BaseTransport) -> None:
        made.append(Mock(wraps=transport))
        real(self, made[-1])

    monkeypatch.setattr(_Stream, "connection_made", connection_made)
    return made


async def test_an_idle_connection_is_asked_without_detours(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them gives Python's lock away. If this fails, httpx no longer takes the pool that is put under it."""
    asked: list[Any] = []
    real = TransportSocket.getpeername

    def counted(self: TransportSocket) -> Any:
        asked.append(self)
        return real(self)

    monkeypatch.setattr(TransportSocket, "getpeername", counted)
    async with client_of(service) as client:
        await client.get("/")
        to_connect = len(asked)
        for _ in range(10):
            await client.get("/")
        assert len(asked) == to_connect


def test_clients_of_plain_addresses_share_what_trusts_nobody() -> None:
    one, other = (transport._trusting_nobody() for _ in range(2))  # pyright: ignore[reportPrivateUsage]
    assert one is other
    assert (one.verify_mode, one.check_hostname, one.get_ca_certs()) == (
        ssl.CERT_REQUIRED,
        True,
        [],
    )
