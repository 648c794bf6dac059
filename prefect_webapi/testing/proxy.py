"""A proxy that stands between a plugin and any service over HTTP, notes what passes, and spoils it on command.

It runs in a thread of its own and knows nothing of the service's API. What a request is for is said by `asking`, which
the plugin's own calls set. Which request of a create makes the job is seen at the witness, asked before and after.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from prefect_webapi.testing.asgi import abort, answer, cycle, whole_body
from prefect_webapi.testing.serving import serve_app

__all__ = ["Exchange", "FaultProxy", "Reply", "WireFault"]

ANSWER_SECONDS = 60.0
_MAKING = ("create", "do")
_OF_ONE_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length"})


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer given in the service's place. `body` as text, bytes, or data that goes out as JSON."""

    status: int
    body: Any = b""
    headers: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def content(self) -> bytes:
        match self.body:
            case bytes():
                return self.body
            case str():
                return self.body.encode()
            case data:
                return json.dumps(data).encode()


@dataclass(slots=True)
class WireFault:
    """Goes wrong with the next requests that serve one of these calls of the plugin.

    Attributes:
        ops: names of plugin methods. Of `create` and `do`: the request that makes the job; one for a token never is.
        reply: the answer to give; None: the connection is closed without one.
        carried_out: the service gets the request and does its work; only its answer is lost.
        seconds: how long the answer is held back; with `carried_out` and no `reply`, it then comes as it is.
        times: for how many requests.
    """

    ops: Collection[str]
    reply: Reply | None = None
    carried_out: bool = False
    seconds: float = 0.0
    times: int = 1


@dataclass(slots=True)
class Exchange:
    """One request and what became of it.

    Attributes:
        op: the plugin's method that it served; "": none that is known.
        at: seconds of the monotonic clock. status: of the answer that the plugin got; None: it got none.
        made: jobs that the service made meanwhile (creates, and `do`). spoiled: what the proxy did, in words.
        body: of the service's own answer.
    """

    op: str
    method: str
    target: str
    at: float
    is_token: bool = False
    status: int | None = None
    made: int = 0
    spoiled: str = ""
    body: bytes = field(default=b"", repr=False)
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)

    def __str__(self) -> str:
        told = f"HTTP {self.status}" if self.status else "no answer"
        spoiled = f" ({self.spoiled})" if self.spoiled else ""
        path = self.target.partition("?")[0]
        return f"{self.op or '?'}: {self.method} {path} -> {told}{spoiled}"


class FaultProxy:
    """Listens on 127.0.0.1 and hands requests on as they are, `Host` included.

    Attributes:
        exchanges: all of them, in the order in which they came. faults: still to come.
        asking: tells the plugin's method that is at work; "": none.
        creating: which request of a create (or a `do`), token requests left out, makes the job; from 0.
    """

    def __init__(
        self,
        upstream: str,
        *,
        witness: Callable[[], int],
        asking: Callable[[], str],
        token_paths: Collection[str] = (),
    ) -> None:
        parts = urlsplit(upstream)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"{upstream!r} is no http:// address of a server")
        self._host, self._port, self._root = (
            parts.hostname,
            parts.port or 80,
            parts.path.rstrip("/"),
        )
        self._witness = witness
        self._token_paths = tuple(token_paths)
        self._seen_of_create = 0
        self.asking = asking
        self.creating = 0
        self.exchanges: list[Exchange] = []
        self.faults: list[WireFault] = []

    def serving(self) -> AbstractContextManager[str]:
        """Listen while the block lasts; gives the address to use in the service's place."""
        return serve_app(self._serve)

    def reset(self) -> None:
        self.faults.clear()
        self.exchanges.clear()

    def begins(self, op: str) -> None:
        """A call of the plugin begins: its requests are counted anew."""
        if op in _MAKING:
            self._seen_of_create = 0

    def of(self, *ops: str) -> list[Exchange]:
        """The exchanges that served these calls, without those for tokens."""
        return [each for each in self.exchanges if each.op in ops and not each.is_token]

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        body = await whole_body(receive)
        path = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1").partition("?")[0]
        query = scope["query_string"].decode("latin-1")
        seen = Exchange(
            op=self.asking(),
            method=scope["method"],
            target=f"{path}?{query}" if query else path,
            at=time.monotonic(),
            is_token=any(path.endswith(each) for each in self._token_paths),
        )
        self.exchanges.append(seen)
        creates = seen.op in _MAKING and not seen.is_token
        nth, self._seen_of_create = self._seen_of_create, self._seen_of_create + creates
        fault = self._due(seen, nth)
        if fault is not None and not fault.carried_out:
            await self._spoil(fault, seen, send)
            return
        before = await asyncio.to_thread(self._witness) if creates else 0
        try:
            status, headers, content = await asyncio.to_thread(
                self._forward, seen, scope["headers"], body
            )
        except (OSError, http.client.HTTPException) as error:
            seen.spoiled = f"the service gave no answer: {error!r}"
            await _close(send)
            return
        seen.body, seen.headers = content, headers
        if creates:
            seen.made = await asyncio.to_thread(self._witness) - before
            if seen.made > 0 and fault is None:
                self.creating = nth
        if fault is not None:
            if fault.reply is None and fault.seconds:
                seen.spoiled = f"held back for {fault.seconds:g} s"
                await asyncio.sleep(fault.seconds)
            else:
                await self._spoil(fault, seen, send)
                return
        seen.status = status
        await answer(
            send, status, {k: v for k, v in headers.items() if k not in _OF_ONE_HOP}, content
        )

    def _due(self, seen: Exchange, nth: int) -> WireFault | None:
        if seen.is_token or (seen.op in _MAKING and nth != self.creating):
            return None
        for fault in self.faults:
            if seen.op in fault.ops:
                fault.times -= 1
                if fault.times <= 0:
                    self.faults.remove(fault)
                return fault
        return None

    async def _spoil(self, fault: WireFault, seen: Exchange, send: Any) -> None:
        seen.spoiled = "carried out, but its answer lost" if fault.carried_out else "never arrived"
        if fault.reply is None:
            await _close(send)
            return
        seen.spoiled = f"{seen.spoiled}, {fault.reply.status} given instead"
        seen.status = fault.reply.status
        await answer(send, fault.reply.status, fault.reply.headers, fault.reply.content)

    def _forward(
        self, seen: Exchange, headers: list[tuple[bytes, bytes]], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=ANSWER_SECONDS)
        try:
            connection.putrequest(
                seen.method, self._root + seen.target, skip_host=True, skip_accept_encoding=True
            )
            for name, value in headers:
                if name.decode("latin-1").lower() not in _OF_ONE_HOP:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            content = response.read()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, content
        finally:
            connection.close()


async def _close(send: Any) -> None:
    """Close the connection, and let the server see that it is closed before it looks for an answer."""
    abort(send)
    while not cycle(send).disconnected:  # noqa: ASYNC110 - uvicorn tells nobody
        await asyncio.sleep(0)
