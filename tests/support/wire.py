"""Ports where nobody listens, or nobody that makes sense."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, closing

__all__ = ["free_port", "garbled"]


@asynccontextmanager
async def garbled(port: int) -> AsyncGenerator[list[bytes]]:
    """A port where something answers that speaks neither TLS nor HTTP: what it was sent."""
    heard: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            heard.append(await reader.read(1024))
            writer.write(b"what?\r\n")
            await writer.drain()

    server = await asyncio.start_server(answer, "127.0.0.1", port)
    async with server:
        yield heard


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
