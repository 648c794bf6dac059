"""A queue of messages that are worked on. Every answer is HTTP 200: whether it went well stands in the body.

API: `POST /v1/messages` (`Idempotency-Key`: one message per key), `GET /v1/messages/{id}`, `POST …/cancel`,
`GET …/rows` in pages. Ids are whole numbers of 19 digits. A message is done however its work ended: see `exit`.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlencode

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from tests.servers.base import Seen, Server, serve

__all__ = ["MessageQueue"]

PAGE = 2


@dataclass
class _Message:
    id: int
    key: str
    body: dict[str, Any]
    waits: float
    takes: float
    born: float
    cancelled: str | None = None

    @property
    def state(self) -> str:
        age = time.monotonic() - self.born
        if self.cancelled is not None:
            return "CANCELLED"
        return (
            "WAITING" if age < self.waits else "BUSY" if age < self.waits + self.takes else "DONE"
        )


class Refusal(Exception):
    """Told to the client as `{"ok": false, …}`."""

    def __init__(self, kind: str, text: str) -> None:
        self.kind = kind
        self.text = text


class MessageQueue(Server):
    """Attributes: api_key: what the header `X-Api-Key` must hold."""

    def __init__(self, *, port: int = 0, api_key: str = "local") -> None:
        super().__init__(port=port)
        self.api_key = api_key
        self._messages: dict[int, _Message] = {}
        self._by_key: dict[str, int] = {}
        self._made = 0
        routes = [
            Route("/v1/messages", self._post, methods=["POST"]),
            Route("/v1/messages/{id}", self._get, methods=["GET"]),
            Route("/v1/messages/{id}/cancel", self._cancel, methods=["POST"]),
            Route("/v1/messages/{id}/rows", self._rows, methods=["GET"]),
        ]
        self._app = Starlette(routes=routes, exception_handlers={Refusal: _refused})

    @property
    def app(self) -> ASGIApp:
        return self._app

    def op_of(self, request: Seen) -> str:
        match request.method, request.path.removeprefix("/v1/messages").count("/"):
            case "POST", 0:
                return "create"
            case "POST", _:
                return "delete"
            case _, 1:
                return "get"
            case _:
                return "outputs"

    def made(self) -> int:
        return self._made

    def live(self) -> int:
        return sum(each.state in ("WAITING", "BUSY") for each in self._messages.values())

    def reset(self) -> None:
        super().reset()
        self.forget()
        self._made = 0

    def forget(self) -> None:
        self._messages.clear()
        self._by_key.clear()

    # --- the API -----------------------------------------------------------------------------

    def _admit(self, request: Request) -> None:
        if request.headers.get("x-api-key") != self.api_key:
            raise Refusal("denied", "unknown key in X-Api-Key")

    def _known(self, request: Request) -> _Message:
        self._admit(request)
        text = request.path_params["id"]
        message = self._messages.get(int(text)) if re.fullmatch("[0-9]{19}", text) else None
        if message is None:
            raise Refusal("absent", f"no message {text}")
        return message

    async def _post(self, request: Request) -> JSONResponse:
        self._admit(request)
        key = request.headers.get("idempotency-key")
        if not key:
            raise Refusal("invalid", "Idempotency-Key is missing")
        body = await _body(request, {"queue": str, "work": dict, "tags": dict})
        work = _checked(
            body["work"],
            {"waits": float, "takes": float, "exit": int, "says": str, "rows": list},
        )
        if key in self._by_key:
            message = self._messages[self._by_key[key]]
            if message.body != body:
                raise Refusal("conflict", f"key {key} was used for another message")
            return JSONResponse({"ok": True, "message": self._shown(message)})
        self._made += 1
        message = _Message(
            id=9_007_199_254_740_993_000 + self._made,
            key=key,
            body=body,
            waits=work["waits"],
            takes=work["takes"],
            born=time.monotonic(),
        )
        self._messages[message.id] = message
        self._by_key[key] = message.id
        return JSONResponse({"ok": True, "message": self._shown(message)})

    def _shown(self, message: _Message) -> dict[str, Any]:
        work, is_done = message.body["work"], message.state == "DONE"
        return {
            "id": message.id,
            "state": message.state,
            "exit": work["exit"] if is_done else None,
            "says": work["says"] if is_done else message.cancelled or "",
            "tags": message.body["tags"],
            "queued_ms": 1_700_000_000_000,
            "links": {"page": f"{self.url}/ui/{message.id}"},
        }

    async def _get(self, request: Request) -> JSONResponse:
        return JSONResponse({"ok": True, "message": self._shown(self._known(request))})

    async def _cancel(self, request: Request) -> JSONResponse:
        message = self._known(request)
        why = (await _body(request, {"why": str}))["why"]
        if message.state in ("DONE", "CANCELLED"):
            raise Refusal("over", "the message is over")
        message.cancelled = why
        return JSONResponse({"ok": True})

    async def _rows(self, request: Request) -> JSONResponse:
        message = self._known(request)
        if message.state != "DONE":
            raise Refusal("invalid", "not done yet")
        rows = message.body["work"]["rows"]
        asked = request.query_params
        start = int(asked.get("cursor", "r0")[1:]) + int(asked.get("offset", "0"))
        end = start + PAGE
        cursor = f"r{end}" if end < len(rows) else None
        path = f"{request.url.path}?{urlencode({'cursor': cursor})}" if cursor else None
        answer = {"ok": True, "rows": rows[start:end], "cursor": cursor, "next": path}
        address = f'<{self.url}{path}>; rel="next"'
        return JSONResponse(answer, headers={"Link": address} if path else None)


def _refused(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refusal)
    return JSONResponse({"ok": False, "error": {"kind": error.kind, "text": error.text}})


async def _body(request: Request, fields: dict[str, type]) -> dict[str, Any]:
    if request.headers.get("content-type") != "application/json":
        raise Refusal("invalid", "a body must be application/json")
    try:
        body = json.loads(await request.body())
    except ValueError:
        raise Refusal("invalid", "the body is not JSON") from None
    return _checked(body, fields)


def _checked(data: Any, fields: dict[str, type]) -> dict[str, Any]:
    given = cast(dict[str, Any], data) if isinstance(data, dict) else {}
    if given.keys() != fields.keys():
        raise Refusal("invalid", f"expected exactly the fields {', '.join(fields)}")
    for name, kind in fields.items():
        if type(given[name]) not in ((int, float) if kind is float else (kind,)):
            raise Refusal("invalid", f"{name} must be {kind.__name__}")
    return given


if __name__ == "__main__":
    serve(MessageQueue())
