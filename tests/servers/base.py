"""What all of these servers share: a socket, a log of each request, faults on command, and a witness's count."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol, Self

from starlette.types import ASGIApp, Receive, Scope, Send

from prefect_webapi.testing import serve_app
from prefect_webapi.testing.asgi import Collected, abort, answer, replay, whole_body

__all__ = ["Fault", "Reply", "Seen", "Server", "serve", "strike"]


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer to give; `body` that is not bytes goes out as JSON."""

    status: int = 200
    body: Any = b""
    headers: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def content(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


@dataclass(slots=True)
class Fault:
    """Goes wrong with the next requests of this `op`; None: of any.

    Attributes:
        reply: the answer to give instead; None: the connection is dropped.
        carried_out: the request does its work first, and only its answer is lost.
        skip: so many fitting requests go well before; times: for how many requests after these.
    """

    op: str | None
    reply: Reply | None = None
    carried_out: bool = False
    skip: int = 0
    times: int = 1


def strike(faults: list[Fault], op: str) -> Fault | None:
    """The first fault that goes wrong with a request of this op; it is used up by one."""
    for fault in list(faults):
        if fault.op not in (None, op):
            continue
        if fault.skip > 0:
            fault.skip -= 1
            continue
        fault.times -= 1
        if fault.times <= 0:
            faults.remove(fault)
        return fault
    return None


@dataclass(slots=True)
class Seen:
    """One request.

    Attributes:
        op: what it asks for, in the engine's words: create, get, get_many, find, delete, outputs, token.
        at: seconds of the monotonic clock. headers: names in lower case.
        status: of the answer; None: none was given.
    """

    op: str
    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes
    at: float
    status: int | None = None

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server(ABC):
    """A service on 127.0.0.1, in a thread of its own. A context manager; it ends with the block.

    Attributes:
        url: its address, without a slash at the end.
        seen: each request, in the order in which they came. faults: used up in order.
    """

    def __init__(self, *, port: int = 0) -> None:
        self.url = ""
        self.seen: list[Seen] = []
        self.faults: list[Fault] = []
        self._port = port
        self._open = ExitStack()

    @property
    @abstractmethod
    def app(self) -> ASGIApp:
        """The service itself."""

    @abstractmethod
    def op_of(self, request: Seen) -> str:
        """What a request asks for; `request.op` is empty."""

    @abstractmethod
    def made(self) -> int:
        """How many jobs were ever made: the witness's count."""

    @abstractmethod
    def live(self) -> int:
        """How many jobs are neither over nor forgotten."""

    def reset(self) -> None:
        """Forget all jobs, requests and faults. Overriding methods call this one too."""
        self.seen.clear()
        self.faults.clear()

    @abstractmethod
    def forget(self) -> None:
        """Lose all jobs: they are gone and unknown, but were made."""

    def ops(self) -> list[str]:
        return [seen.op for seen in self.seen]

    def calls(self, op: str) -> list[Seen]:
        return [seen for seen in self.seen if seen.op == op]

    def times(self, op: str) -> list[float]:
        return [seen.at for seen in self.calls(op)]

    def spoil(self, fault: Fault) -> None:
        self.faults.append(fault)

    # --- the socket --------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.url = self._open.enter_context(serve_app(self._spoiled, port=self._port))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._open.close()

    async def _spoiled(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        body = await whole_body(receive)
        seen = Seen(
            op="",
            method=scope["method"],
            path=(scope.get("raw_path") or scope["path"].encode()).decode(),
            query=scope["query_string"].decode(),
            headers={k.decode(): v.decode("latin-1") for k, v in scope["headers"]},
            body=body,
            at=time.monotonic(),
        )
        seen.op = self.op_of(seen)
        self.seen.append(seen)
        fault = strike(self.faults, seen.op)
        true_answer = Collected()
        if fault is None or fault.carried_out:
            await self.app(scope, replay(body), true_answer.take)
        if fault is None:
            seen.status = true_answer.status
            await answer(send, true_answer.status, true_answer.headers, true_answer.content)
        elif fault.reply is None:
            abort(send)
        else:
            seen.status = fault.reply.status
            await answer(send, fault.reply.status, fault.reply.headers, fault.reply.content)


class Served(Protocol):
    """What `serve` needs of a server."""

    url: str

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc_info: object) -> None: ...


def serve(server: Served) -> None:
    """Run one as a program: prints `READY <url>`, and ends by SIGTERM, Ctrl-C or with its parent's pipe."""
    ended = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        ended.set()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    with server:
        print(f"READY {server.url}", flush=True)
        threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
        ended.wait()
