"""What goes wrong on command, around the service: answers replaced, delayed, dropped; and the log of all requests."""

from __future__ import annotations

import asyncio
import json
import random
import time
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal, cast
from urllib.parse import parse_qs, unquote, unquote_plus

from pydantic import BaseModel, ConfigDict, Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefect_webapi.testing.asgi import Collected, abort, answer, cycle, replay, start, whole_body

__all__ = ["Fault", "FaultyService", "Garbage", "LoggedRequest", "Op"]

Op = Literal["create", "get", "batch", "find", "delete"]
PIECE_BYTES = 1_000_000
HUGE_PIECES = 100
Garbage = Literal["html", "empty", "truncated", "huge", "charset"]
READS: frozenset[str] = frozenset({"get", "batch", "find"})


class Fault(BaseModel):
    """Something that goes wrong with the next requests it fits. The first fault that fits is used.

    Of a batch read a fault with a `name` spoils this job's row only: `drop` leaves it out, `status` makes it an error,
    `patch` changes it.

    Attributes:
        op: which requests; ``any``: all but those of the control API.
        name: only requests about this job: its name or the key it was made with.
        skip: so many fitting requests go well first.
        times: for how many requests; None: until reset.
        probability: chance per fitting request, drawn from `seed`.
        after_acceptance: the request is carried out at once; the fault is in its answer.
        delay: real seconds before anything (else) happens.
        status, headers, body: the answer to give instead. `retry_after` is the header's text.
        patch: fields of the jobs in the true answer to change: an older state, an unknown word.
        drop: close the connection without an answer.
        garbage: send 200 with a body that is no use.
        echo_authorization: put the request's Authorization header into the body of the answer.
    """

    model_config = ConfigDict(extra="forbid")

    op: Op | Literal["any"] = "any"
    name: str | None = None
    skip: int = Field(default=0, ge=0)
    times: int | None = 1
    probability: float = Field(default=1.0, ge=0, le=1)
    seed: int | None = None
    after_acceptance: bool = False
    delay: float = Field(default=0.0, ge=0)
    status: int | None = None
    headers: dict[str, str] = Field(default_factory=dict)
    retry_after: str | None = None
    body: Any = None
    patch: dict[str, Any] | None = None
    drop: bool = False
    garbage: Garbage | None = None
    echo_authorization: bool = False

    @property
    def replaces_answer(self) -> bool:
        return self.status is not None or self.garbage is not None


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
        body = await whole_body(receive)
        entry = self._note(scope, op, body)
        self._open[op] = self._open.get(op, 0) + 1
        try:
            await self._serve(scope, send, body, entry)
        finally:
            self._open[op] -= 1
            entry.seconds = time.monotonic() - entry.mono

    async def _serve(self, scope: Scope, send: Send, body: bytes, entry: LoggedRequest) -> None:
        rows = self._row_faults(scope, entry)
        fault = None if rows else self._fault_for(entry)
        if fault is None and not rows:
            await self._refuse_or_serve(scope, send, body, entry)
            return
        resets, accepted = self._resets, None
        if fault is not None and fault.after_acceptance:
            accepted = await self._true_answer(scope, body, entry)
            entry.status = None
        delays = (each.delay for each in (fault, *rows.values()) if each is not None)
        await asyncio.sleep(max(delays))
        if resets != self._resets or (fault is not None and fault.drop):
            abort(send)  # told to, or the request belongs to a time that was forgotten
            return
        if fault is not None and fault.replaces_answer:
            await self._spoil(fault, scope, send, entry)
            return
        true = accepted or await self._true_answer(scope, body, entry)
        if true.status < 300:
            if fault is not None and fault.patch is not None:
                true.change(partial(_patched, fault.patch))
            if rows:
                true.change(partial(_spoilt_row, rows))
        entry.status = true.status
        await answer(send, true.status, true.headers, true.content)

    async def _spoil(self, fault: Fault, scope: Scope, send: Send, entry: LoggedRequest) -> None:
        status, headers, content = _spoilt(fault, scope)
        if fault.retry_after is not None:
            headers["Retry-After"] = fault.retry_after
            self._close(entry, fault.retry_after)
        entry.status = status
        if fault.garbage == "huge":
            await _huge_answer(send, status, headers)
        else:
            await answer(send, status, headers, content)

    async def _true_answer(self, scope: Scope, body: bytes, entry: LoggedRequest) -> Collected:
        true = Collected()
        await self._refuse_or_serve(scope, true.take, body, entry)
        return true

    async def _refuse_or_serve(
        self, scope: Scope, send: Send, body: bytes, entry: LoggedRequest
    ) -> None:
        if self.token is not None and _header(scope, b"authorization") != f"Bearer {self.token}":
            entry.status = 401
            await answer(send, 401, {}, b'{"message": "the token is missing or no longer valid"}')
            return

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry.status = message["status"]
            await send(message)

        await self._app(scope, replay(body), noted)

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
        return self._first(entry.op, None, entry.name, entry.key)

    def _row_faults(self, scope: Scope, entry: LoggedRequest) -> dict[str, Fault]:
        """The faults about single jobs of a batch read, by name."""
        if entry.op != "batch":
            return {}
        asked = parse_qs(scope["query_string"].decode()).get("names", [""])[0].split(",")
        found = {name: self._first("batch", name) for name in asked if name}
        return {name: fault for name, fault in found.items() if fault is not None}

    def _first(self, op: Op, *names: str | None) -> Fault | None:
        """The first fault of one of these names that strikes; it is used up by one."""
        for fault in list(self.faults):
            if fault.op not in ("any", op) or fault.name not in names:
                continue
            if fault.skip > 0:
                fault.skip -= 1
                continue
            if fault.probability < 1:
                dice = self._dice.setdefault(id(fault), random.Random(fault.seed))
                if dice.random() >= fault.probability:
                    continue
            if fault.times is not None:
                fault.times -= 1
                if fault.times <= 0:
                    self.faults.remove(fault)
                    self._dice.pop(id(fault), None)
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
    fields = cast(dict[str, Any], data) if isinstance(data, dict) else {}
    return str(fields.get("key", ""))


def _header(scope: Scope, name: bytes) -> str:
    return next((v.decode("latin-1") for k, v in scope["headers"] if k == name), "")


def _data(body: bytes) -> Any:
    try:
        return json.loads(body) if body else None
    except ValueError:
        return {"unreadable": body[:200].decode("utf-8", "replace")}


def _patched(fields: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    return {**row, **fields}


def _spoilt_row(faults: dict[str, Fault], row: dict[str, Any]) -> dict[str, Any] | None:
    """A job's row of a batch answer with what was told to go wrong with it."""
    fault = faults.get(row["name"])
    if fault is None:
        return row
    if fault.drop:
        return None
    if fault.status is not None:
        return {"name": row["name"], "error": f"told to answer {fault.status}"}
    return _patched(fault.patch or {}, row)


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
        case "charset":
            return status, headers, '{"state": "l\u00e4uft"}'.encode("latin-1")
        case "huge" | None:
            pass
    body = fault.body
    if fault.echo_authorization:
        body = {"message": f"no access with {_header(scope, b'authorization')}"}
    if body is None:
        body = {"message": f"told to answer {status}"}
    content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    return status, headers, content


async def _huge_answer(send: Send, status: int, headers: dict[str, str]) -> None:
    """100 MB of one JSON string, in pieces; stops when nobody reads any more."""
    await start(send, status, headers)
    for nth in range(HUGE_PIECES):
        if cycle(send).disconnected:
            return
        piece = b"x" * PIECE_BYTES if nth else b'"' + b"x" * (PIECE_BYTES - 1)
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b'"'})
