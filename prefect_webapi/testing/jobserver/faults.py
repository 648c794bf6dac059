"""What goes wrong on command, around the service: answers replaced, delayed, dropped; and the log of all requests."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import unquote, unquote_plus

from pydantic import BaseModel, ConfigDict, Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Fault", "FaultyService", "LoggedRequest", "Op"]

Op = Literal["create", "get", "batch", "find", "delete"]
READS: frozenset[str] = frozenset({"get", "batch", "find"})


class Fault(BaseModel):
    """Something that goes wrong with the next requests it fits. The first fault that fits is used.

    Attributes:
        op: which requests; ``any``: all but those of the control API.
        name: only requests about this job.
        times: for how many requests; None: until reset.
        probability: chance per fitting request, drawn from `seed`.
        after_acceptance: the request is carried out before its answer is spoilt.
        delay: seconds before anything else happens.
        status, headers, body: the answer to give instead. `retry_after` is the header's text.
        drop: close the connection without an answer.
        garbage: send 200 with a body that is no use.
        echo_authorization: put the request's Authorization header into the body of the answer.
    """

    model_config = ConfigDict(extra="forbid")

    op: Op | Literal["any"] = "any"
    name: str | None = None
    times: int | None = 1
    probability: float = Field(default=1.0, ge=0, le=1)
    seed: int | None = None
    after_acceptance: bool = False
    delay: float = Field(default=0.0, ge=0)
    status: int | None = None
    headers: dict[str, str] = Field(default_factory=dict)
    retry_after: str | None = None
    body: Any = None
    drop: bool = False
    garbage: Literal["html", "empty", "truncated", "huge", "charset"] | None = None
    echo_authorization: bool = False


class LoggedRequest(BaseModel):
    """One request to the service (not to the control API).

    Attributes:
        at: when it arrived; mono: the same in seconds of the server's monotonic clock; seconds: until its answer.
        name: job the path names; key: the key that a create carries.
        body: what was sent, as data. Headers are left out, but for whether a token was there.
        status: of the answer; None: the connection was dropped.
        inside_retry_after: it came while a Retry-After for its kind ran.
        open_at_arrival: requests of the same op that had no answer yet.
    """

    index: int
    at: datetime
    mono: float
    op: Op
    method: str
    path: str
    query: str = ""
    name: str = ""
    key: str = ""
    body: Any = None
    authorized: bool = False
    status: int | None = None
    seconds: float = 0.0
    inside_retry_after: bool = False
    open_at_arrival: int = 0


class FaultyService:
    """Wraps the service: logs each request, spoils some answers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.faults: list[Fault] = []
        self.log: list[LoggedRequest] = []
        self.token: str | None = None
        self._dice: dict[int, random.Random] = {}
        self._closed_until: dict[str, float] = {}
        self._open: dict[str, int] = {}
        self._resets = 0

    def reset(self) -> None:
        self.faults.clear()
        self.log.clear()
        self._dice.clear()
        self._closed_until.clear()
        self._resets += 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        op = _op_of(scope) if scope["type"] == "http" else None
        if op is None:
            await self._app(scope, receive, send)
            return
        body = await _whole_body(receive)
        entry = self._note(scope, op, body)
        self._open[op] = self._open.get(op, 0) + 1
        try:
            await self._serve(scope, send, body, entry)
        finally:
            self._open[op] -= 1
            entry.seconds = time.monotonic() - entry.mono

    async def _serve(self, scope: Scope, send: Send, body: bytes, entry: LoggedRequest) -> None:
        fault = self._fault_for(entry)
        if fault is None:
            await self._refuse_or_serve(scope, send, body, entry)
            return
        resets = self._resets
        await asyncio.sleep(fault.delay)
        if resets != self._resets:  # the request belongs to a time that was forgotten
            _abort(send)
            return
        spoils = fault.drop or fault.status is not None or fault.garbage is not None
        if not spoils:
            await self._refuse_or_serve(scope, send, body, entry)
            return
        if fault.after_acceptance:
            await self._refuse_or_serve(scope, _nowhere, body, entry)
        if fault.drop:
            entry.status = None
            _abort(send)
            return
        status, headers, content = _spoilt(fault, scope)
        if fault.retry_after is not None:
            headers["Retry-After"] = fault.retry_after
            self._close(entry, fault.retry_after)
        entry.status = status
        await _answer(send, status, headers, content)

    async def _refuse_or_serve(
        self, scope: Scope, send: Send, body: bytes, entry: LoggedRequest
    ) -> None:
        if self.token is not None and _header(scope, b"authorization") != f"Bearer {self.token}":
            entry.status = 401
            await _answer(send, 401, {}, b'{"message": "the token is missing or no longer valid"}')
            return

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry.status = message["status"]
            await send(message)

        await self._app(scope, _replay(body), noted)

    def _note(self, scope: Scope, op: Op, body: bytes) -> LoggedRequest:
        now = time.monotonic()
        kind = "read" if op in READS else "write"
        data = _data(body)
        parts = scope["path"].strip("/").split("/")
        entry = LoggedRequest(
            index=len(self.log),
            at=datetime.now(UTC),
            mono=now,
            op=op,
            method=scope["method"],
            path=scope["path"],
            query=unquote_plus(scope["query_string"].decode()),
            name=_name_of(scope) if len(parts) > 1 else "",
            key=_key_of(data),
            body=data,
            authorized=bool(_header(scope, b"authorization")),
            inside_retry_after=now < self._closed_until.get(kind, 0.0),
            open_at_arrival=self._open.get(op, 0),
        )
        self.log.append(entry)
        return entry

    def _fault_for(self, entry: LoggedRequest) -> Fault | None:
        for fault in list(self.faults):
            if fault.op not in ("any", entry.op) or fault.name not in (None, entry.name, entry.key):
                continue
            if fault.probability < 1:
                dice = self._dice.setdefault(id(fault), random.Random(fault.seed))
                if dice.random() >= fault.probability:
                    continue
            if fault.times is not None:
                fault.times -= 1
                if fault.times <= 0:
                    self.faults.remove(fault)
            return fault
        return None

    def _close(self, entry: LoggedRequest, retry_after: str) -> None:
        """Remember until when a client that listens stays away. A tenth is forgiven for the way back."""
        try:
            seconds = float(retry_after)
        except ValueError:
            return
        kind = "read" if entry.op in READS else "write"
        until = time.monotonic() + seconds * 0.9
        self._closed_until[kind] = max(self._closed_until.get(kind, 0.0), until)


def _op_of(scope: Scope) -> Op | None:
    path, method = scope["path"], scope["method"]
    if not (path == "/jobs" or path.startswith("/jobs/")):
        return None
    if method in ("PUT", "POST"):
        return "create"
    if method == "DELETE":
        return "delete"
    query = scope["query_string"]
    if path == "/jobs":
        return "find" if b"key=" in query else "batch"
    return "get"


def _name_of(scope: Scope) -> str:
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    return unquote(raw.split(b"?")[0].decode().removeprefix("/jobs/"))


def _key_of(data: Any) -> str:
    fields: dict[str, Any] = data if isinstance(data, dict) else {}
    return str(fields.get("key", ""))


def _header(scope: Scope, name: bytes) -> str:
    return next((v.decode("latin-1") for k, v in scope["headers"] if k == name), "")


def _data(body: bytes) -> Any:
    try:
        return json.loads(body) if body else None
    except ValueError:
        return {"unreadable": body[:200].decode("utf-8", "replace")}


async def _whole_body(receive: Receive) -> bytes:
    parts: list[bytes] = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _replay(body: bytes) -> Callable[[], Awaitable[Message]]:
    sent = False

    async def receive() -> Message:
        nonlocal sent
        if sent:
            return {"type": "http.disconnect"}
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def _nowhere(message: Message) -> None:
    """An answer that nobody gets."""


def _abort(send: Send) -> None:
    """Close the connection under the server: ASGI has no word for it, uvicorn's cycle holds the transport."""
    cycle: Any = getattr(send, "__self__", None)
    cycle.transport.abort()


def _spoilt(fault: Fault, scope: Scope) -> tuple[int, dict[str, str], bytes]:
    headers = dict(fault.headers)
    status = fault.status or 200
    match fault.garbage:
        case "html":
            return (
                status,
                {"Content-Type": "text/html", **headers},
                b"<html><body>Bad gateway</body></html>",
            )
        case "empty":
            return status, headers, b""
        case "truncated":
            return status, headers, b'{"name": "half a job", "state": "runn'
        case "huge":
            return status, headers, b'"' + b"x" * 100_000_000 + b'"'
        case "charset":
            return status, headers, '{"state": "l\u00e4uft"}'.encode("latin-1")
        case None:
            pass
    body = fault.body
    if fault.echo_authorization:
        body = {"message": f"no access with {_header(scope, b'authorization')}"}
    if body is None:
        body = {"message": f"told to answer {status}"}
    content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    return status, headers, content


async def _answer(send: Send, status: int, headers: dict[str, str], content: bytes) -> None:
    sent = {"Content-Type": "application/json", **headers, "Content-Length": str(len(content))}
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(k.lower().encode(), v.encode()) for k, v in sent.items()],
        }
    )
    await send({"type": "http.response.body", "body": content})
