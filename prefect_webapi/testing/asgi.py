"""Small parts of an ASGI application that stands between a service and its clients."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

from starlette.types import Message, Receive, Send

__all__ = ["Collected", "abort", "answer", "cycle", "replay", "start", "whole_body"]


async def whole_body(receive: Receive) -> bytes:
    parts: list[bytes] = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def replay(body: bytes) -> Callable[[], Awaitable[Message]]:
    sent = False

    async def receive() -> Message:
        nonlocal sent
        if sent:
            return {"type": "http.disconnect"}
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


class Collected:
    """The service's true answer, kept back."""

    def __init__(self) -> None:
        self.status = 500
        self.headers: dict[str, str] = {}
        self.content = b""

    async def take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers: dict[bytes, bytes] = dict(message.get("headers", ()))
            headers.pop(b"content-length", None)
            self.headers = {key.decode(): value.decode("latin-1") for key, value in headers.items()}
        else:
            self.content += message.get("body", b"")

    def change(self, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
        """Change each job in the answer; None leaves it out of a list."""
        data = json.loads(self.content)
        if isinstance(data, list):
            rows = map(change, cast(list[dict[str, Any]], data))
            data = [row for row in rows if row is not None]
        else:
            data = change(data)
        self.content = json.dumps(data).encode()


def cycle(send: Send) -> Any:
    """uvicorn's side of the request: it knows the connection, for which ASGI has no words."""
    return getattr(send, "__self__", None)


def abort(send: Send) -> None:
    """Close the connection without an answer."""
    cycle(send).transport.abort()


async def answer(send: Send, status: int, headers: Mapping[str, str], content: bytes) -> None:
    await start(send, status, {**headers, "Content-Length": str(len(content))})
    await send({"type": "http.response.body", "body": content})


async def start(send: Send, status: int, headers: Mapping[str, str]) -> None:
    sent = {"content-type": "application/json", **{k.lower(): v for k, v in headers.items()}}
    pairs = [(key.encode(), value.encode("latin-1")) for key, value in sent.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
