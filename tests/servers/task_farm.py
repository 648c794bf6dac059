"""A farm of tasks with an API that is odd throughout, behind OAuth 2 client credentials.

API: `PUT /farm/tasks/{name}` makes a task under a name that the client chose (409: there is one) and answers with
nothing but `Location`, whose last part is the task's id: the name within a team, percent-encoded. `GET …/{id}` answers
with a list of one, the states nested in lists, newest first. `GET /farm/tasks?ids=a,b` reads many, `?name=` finds, in
pages. `DELETE …/{id}` ends a task, `GET …/{id}/lines` is its result. Too many requests are a 400 of code `SLOW`.
"""

from __future__ import annotations

import base64
import json
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, quote, unquote

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from tests.servers.base import Seen, Server, serve

__all__ = ["TEAM", "TaskFarm"]

TEAM = "team a/b?#%"
TOKEN_SECONDS = 600
PAGE = 2


@dataclass
class _Task:
    name: str
    order: dict[str, Any]
    born: float
    stopped: float | None = None
    reason: str = ""

    @property
    def id(self) -> str:
        return f"{TEAM} {self.name}"

    def states(self) -> list[str]:
        """From the first to the present one."""
        times, now = self.order["times"], time.monotonic()
        last = "BROKEN" if self.order["breaks"] else "RIPE"
        plan = [("SOWN", 0.0), ("GROWING", times[0]), (last, times[0] + times[1])]
        over = self.stopped if self.stopped is not None else now
        states = [state for state, at in plan if self.born + at <= over]
        return [*states, "FELLED"] if self.stopped is not None else states

    @property
    def is_over(self) -> bool:
        return self.states()[-1] in ("RIPE", "BROKEN", "FELLED")


class _Refusal(Exception):
    def __init__(self, status: int, code: str, text: str) -> None:
        self.status = status
        self.body = {"code": code, "text": text}


class TaskFarm(Server):
    """Attributes: secret: of the client `farmer`, for a token."""

    def __init__(self, *, port: int = 0, secret: str = "local") -> None:
        super().__init__(port=port)
        self.secret = secret
        self._tasks: dict[str, _Task] = {}
        self._tokens: dict[str, float] = {}
        self._made = 0
        routes = [
            Route("/oauth/token", self._token, methods=["POST"]),
            Route("/farm/tasks", self._list, methods=["GET"]),
            Route("/farm/tasks/{rest:path}", self._task, methods=["PUT", "GET", "DELETE"]),
        ]
        self._app = Starlette(routes=routes, exception_handlers={_Refusal: _refused})

    @property
    def app(self) -> ASGIApp:
        return self._app

    def op_of(self, request: Seen) -> str:
        if request.path == "/oauth/token":
            return "token"
        if request.path == "/farm/tasks":
            return "find" if request.query.startswith("name=") else "get_many"
        if request.path.endswith("/lines"):
            return "outputs"
        return {"PUT": "create", "GET": "get", "DELETE": "delete"}[request.method]

    def made(self) -> int:
        return self._made

    def live(self) -> int:
        return sum(not each.is_over for each in self._tasks.values())

    def reset(self) -> None:
        super().reset()
        self.forget()
        self._tokens.clear()
        self._made = 0

    def forget(self) -> None:
        self._tasks.clear()

    # --- the API -----------------------------------------------------------------------------

    async def _token(self, request: Request) -> Response:
        pair = base64.b64encode(f"farmer:{self.secret}".encode()).decode()
        if request.headers.get("authorization") != f"Basic {pair}":
            return JSONResponse({"error": "invalid_client"}, 401)
        form = parse_qs((await request.body()).decode())
        if form != {"grant_type": ["client_credentials"], "scope": ["tasks"]}:
            return JSONResponse({"error": "invalid_request"}, 400)
        token = f"{self.secret}-{len(self._tokens)}"
        self._tokens[token] = time.monotonic() + TOKEN_SECONDS
        return JSONResponse({"access_token": token, "expires_in": TOKEN_SECONDS})

    def _admit(self, request: Request) -> None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._tokens.get(token, 0.0) < time.monotonic():
            raise _Refusal(401, "LOCKED", "the token is not good")

    async def _task(self, request: Request) -> Response:
        self._admit(request)
        path = request.scope["raw_path"].decode().split("?")[0]
        parts = [unquote(part) for part in path.removeprefix("/farm/tasks/").split("/")]
        match request.method, parts:
            case "PUT", [name]:
                return await self._put(request, name)
            case "GET", [id_]:
                return JSONResponse([_shown(self._known(id_))])
            case "GET", [id_, "lines"]:
                return self._lines(request, self._known(id_))
            case "DELETE", [id_]:
                return self._stop(request, self._known(id_))
            case _:
                raise _Refusal(404, "NOWHERE", "no such path")

    def _known(self, id_: str) -> _Task:
        task = self._tasks.get(id_)
        if task is None:
            raise _Refusal(404, "NONE", f"no task {id_!r}")
        return task

    async def _put(self, request: Request, name: str) -> Response:
        order = _order(request, await request.body())
        task = _Task(name, order, time.monotonic())
        if task.id in self._tasks:
            raise _Refusal(409, "THERE", f"there is a task {name!r}")
        self._tasks[task.id] = task
        self._made += 1
        return Response(
            status_code=202, headers={"Location": f"/farm/tasks/{quote(task.id, safe='')}"}
        )

    async def _list(self, request: Request) -> Response:
        self._admit(request)
        asked = request.query_params
        if "ids" in asked:
            found = [self._tasks.get(each) for each in asked["ids"].split(",")]
            return JSONResponse({"tasks": [_shown(task) for task in found if task]})
        # A search by prefix, newest first, as such services have it: what it gives must be looked at.
        tasks = [t for t in reversed(self._tasks.values()) if t.name[:1] == asked["name"][:1]]
        start = int(asked.get("start", "0"))
        more = {"start": start + PAGE} if start + PAGE < len(tasks) else None
        shown = [_shown(task) for task in tasks[start : start + PAGE]]
        return JSONResponse({"tasks": shown, "more": more})

    def _stop(self, request: Request, task: _Task) -> Response:
        if task.is_over:
            raise _Refusal(410, "OVER", "the task is over")
        task.stopped = time.monotonic()
        task.reason = request.query_params.get("because", "")
        return Response(status_code=202)

    def _lines(self, request: Request, task: _Task) -> Response:
        if task.states()[-1] != "RIPE":
            raise _Refusal(400, "UNRIPE", "there is no harvest")
        lines = task.order["yields"]
        start = int(request.query_params.get("from", "0"))
        if start + 1 >= len(lines):
            return JSONResponse(lines[start:])
        address = f"{request.url.path.rsplit('/', 1)[1]}?from={start + 1}"
        return JSONResponse(lines[start : start + 1], headers={"Link": f'<{address}>; rel="next"'})


def _shown(task: _Task) -> dict[str, Any]:
    text = task.order["breaks"] if task.states()[-1] == "BROKEN" else task.reason
    return {
        "ids": {"name": task.name, "full": task.id},
        "history": [[state, "then"] for state in reversed(task.states())],
        "notes": [text] if text else [],
        "grown": [len(task.states()), 3],
        "labels": task.order["labels"],
    }


def _order(request: Request, body: bytes) -> dict[str, Any]:
    if request.headers.get("content-type") != "application/json":
        raise _Refusal(415, "FORM", "JSON is wanted")
    try:
        order = json.loads(body)
    except ValueError:
        order = None
    match order:
        case {
            "times": [int() | float(), int() | float()],
            "breaks": str(),
            "yields": list(),
            "labels": dict(),
            **more,
        } if not more:
            return order
        case _:
            raise _Refusal(422, "ORDER", "times, breaks, yields and labels are wanted, and no more")


def _refused(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, _Refusal)
    return JSONResponse(error.body, error.status)


if __name__ == "__main__":
    serve(TaskFarm())
