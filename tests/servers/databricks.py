"""A Databricks workspace: the Jobs API 2.2 and the token endpoint, as far as runs need them.

Built from the vendor's published API (databricks-sdk's `service/jobs.py`, `errors/` and `oauth.py`, the vendor's own
test server, the reference of the Jobs API). A notebook does what its parameters say: `seconds`, `exit`, `raise`.
"""

from __future__ import annotations

import base64
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast
from urllib.parse import parse_qs

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from tests.servers.base import Seen, Server, serve

__all__ = ["JOB_ID", "TOKEN", "DatabricksServer"]

T = TypeVar("T", bound=BaseModel)

API = "/api/2.2/jobs"
TOKEN = "dapi-local"
JOB_ID = 9_007_199_254_740_993
"""Of the job that is there from the beginning; one more than a float can tell apart."""
FIRST_RUN_ID = 2**62 + 1
TASKS_PER_ANSWER = 100
PENDING_SECONDS = 0.1
DYING_SECONDS = 0.2
TOKEN_SECONDS = 3600
FAILED = "Workload failed, see run output for details"


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class NotebookTask(_Wire):
    notebook_path: str
    base_parameters: dict[str, str] = Field(default_factory=dict)
    source: Literal["WORKSPACE", "GIT"] | None = None
    warehouse_id: str | None = None


class ConditionTask(_Wire):
    op: str
    left: str
    right: str


class Dependency(_Wire):
    task_key: str
    outcome: str | None = None


class SubmitTask(_Wire):
    task_key: str = Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9_-]+$")
    notebook_task: NotebookTask | None = None
    condition_task: ConditionTask | None = None
    depends_on: list[Dependency] = Field(default_factory=list[Dependency])
    run_if: Literal["ALL_SUCCESS", "ALL_DONE"] = "ALL_SUCCESS"
    existing_cluster_id: str | None = None
    new_cluster: dict[str, Any] | None = None
    environment_key: str | None = None
    max_retries: int = 0
    timeout_seconds: int = 0


class Queue(_Wire):
    enabled: bool


class SubmitRequest(_Wire):
    tasks: list[SubmitTask] = Field(min_length=1)
    run_name: str = "Untitled"
    idempotency_token: str | None = None
    tags: dict[str, str] = Field(default_factory=dict, max_length=25)
    timeout_seconds: int = 0
    queue: Queue | None = None
    environments: list[dict[str, Any]] = Field(default_factory=list[dict[str, Any]])
    git_source: dict[str, Any] | None = None
    performance_target: Literal["STANDARD", "PERFORMANCE_OPTIMIZED"] | None = None


class RunNowRequest(_Wire):
    job_id: int
    idempotency_token: str | None = None
    job_parameters: dict[str, str] = Field(default_factory=dict)
    only: list[str] = Field(default_factory=list)
    queue: Queue | None = None
    performance_target: Literal["STANDARD", "PERFORMANCE_OPTIMIZED"] | None = None


class CancelRequest(_Wire):
    run_id: int


@dataclass
class Job:
    """A saved job: its tasks, and its parameters with their defaults."""

    name: str
    tasks: list[SubmitTask]
    parameters: dict[str, str] = field(default_factory=dict[str, str])


@dataclass
class TaskRun:
    """One task of a run. `starts`: when what it waits for is over."""

    run_id: int
    spec: SubmitTask
    parameters: Mapping[str, str]
    starts: float
    skipped: bool

    @property
    def ends(self) -> float:
        return self.starts if self.skipped else self.starts + self._number("seconds", 0.1)

    @property
    def fails(self) -> bool:
        return self.skipped or "raise" in self.parameters

    def _number(self, name: str, default: float) -> float:
        return float(self.parameters.get(name, default))


@dataclass
class Run:
    run_id: int
    job_id: int
    name: str
    kind: Literal["JOB_RUN", "SUBMIT_RUN"]
    made_at: float
    started: float
    tasks: list[TaskRun]
    request: Mapping[str, Any]
    parameters: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    cancelled_at: float = float("inf")

    @property
    def ends(self) -> float:
        own = max(task.ends for task in self.tasks)
        return min(own, max(self.cancelled_at, self.made_at) + DYING_SECONDS)

    @property
    def is_cancelled(self) -> bool:
        return self.cancelled_at < max(task.ends for task in self.tasks)


class Refusal(Exception):
    """An answer in the vendor's form of an error."""

    def __init__(self, status: int, code: str | int, message: str) -> None:
        self.answer = JSONResponse({"error_code": code, "message": message}, status)


def invalid(message: str) -> Refusal:
    return Refusal(400, "INVALID_PARAMETER_VALUE", message)


def no_such_run(run_id: object) -> Refusal:
    return invalid(f"Run {run_id} does not exist.")


class DatabricksServer(Server):
    """Attributes:
    tokens: personal access tokens that are good. secrets: of service principals, by client id.
    jobs: saved jobs by id.
    """

    def __init__(self, *, port: int = 0, token: str = TOKEN) -> None:
        super().__init__(port=port)
        self.tokens = {token}
        self.secrets: dict[str, str] = {}
        self._ids = itertools.count(FIRST_RUN_ID)
        self._issued: dict[str, float] = {}
        self._runs: dict[int, Run] = {}
        self._by_token: dict[str, int] = {}
        self._deleted: set[str] = set()
        self._made = 0
        self.jobs: dict[int, Job] = {}
        self.reset()

    # --- the witness -------------------------------------------------------------------------

    def reset(self) -> None:
        super().reset()
        self._issued.clear()
        self._runs.clear()
        self._by_token.clear()
        self._deleted.clear()
        self._made = 0
        report = {"notebook_path": "/Shared/report", "base_parameters": {"exit": '{"rows": 42}'}}
        tasks = [
            {"task_key": "load", "notebook_task": {"notebook_path": "/Shared/load"}},
            {
                "task_key": "report",
                "notebook_task": report,
                "depends_on": [{"task_key": "load"}],
            },
        ]
        job = Job("nightly", [SubmitTask.model_validate(task) for task in tasks], {"day": "today"})
        self.jobs = {JOB_ID: job}

    def made(self) -> int:
        return self._made

    def live(self) -> int:
        return sum(1 for run in self._runs.values() if time.monotonic() < run.ends)

    def forget(self) -> None:
        """Runs are removed after 60 days, or by a person; their tokens stay taken."""
        self._runs.clear()

    def requests(self) -> list[Mapping[str, Any]]:
        """What each run was made from."""
        return [run.request for run in self._runs.values()]

    def op_of(self, request: Seen) -> str:
        return {
            f"POST {API}/run-now": "create",
            f"POST {API}/runs/submit": "create",
            f"GET {API}/runs/get": "get",
            f"GET {API}/runs/list": "get_many",
            f"POST {API}/runs/cancel": "delete",
            f"GET {API}/runs/get-output": "outputs",
            "POST /oidc/v1/token": "token",
        }.get(f"{request.method} {request.path}", "unknown")

    @property
    def app(self) -> ASGIApp:
        post, get = ["POST"], ["GET"]
        return Starlette(
            routes=[
                Route(f"{API}/run-now", self._answers(self._run_now), methods=post),
                Route(f"{API}/runs/submit", self._answers(self._submit), methods=post),
                Route(f"{API}/runs/get", self._answers(self._get), methods=get),
                Route(f"{API}/runs/list", self._answers(self._list), methods=get),
                Route(f"{API}/runs/cancel", self._answers(self._cancel), methods=post),
                Route(f"{API}/runs/get-output", self._answers(self._get_output), methods=get),
                Route("/oidc/v1/token", self._issue, methods=post),
                Route("/{rest:path}", self._nowhere, methods=["GET", "POST", "PUT", "DELETE"]),
            ]
        )

    async def _nowhere(self, request: Request) -> JSONResponse:
        told = f"No API found for '{request.method} {request.url.path}'"
        return Refusal(404, "ENDPOINT_NOT_FOUND", told).answer

    # --- who asks ----------------------------------------------------------------------------

    async def _issue(self, request: Request) -> JSONResponse:
        """OAuth 2.0 client credentials."""
        kind = request.headers.get("content-type", "")
        form = {k: v[0] for k, v in parse_qs((await request.body()).decode()).items()}
        scheme, _, pair = request.headers.get("authorization", "").partition(" ")
        client, _, secret = (
            base64.b64decode(pair).decode().partition(":")
            if scheme == "Basic"
            else (form.get("client_id", ""), "", form.get("client_secret", ""))
        )
        if kind != "application/x-www-form-urlencoded":
            return _oauth_error(400, "invalid_request", "the body must be a form")
        if form.get("grant_type") != "client_credentials":
            return _oauth_error(400, "unsupported_grant_type", "use client_credentials")
        if not secret or self.secrets.get(client) != secret:
            return _oauth_error(401, "invalid_client", "Client authentication failed")
        if form.get("scope") != "all-apis":
            return _oauth_error(400, "invalid_scope", "the scope must be all-apis")
        token = f"eyJ.{secret}.{len(self._issued)}"
        self._issued[token] = time.monotonic() + TOKEN_SECONDS
        answer = {"access_token": token, "token_type": "Bearer", "scope": "all-apis"}
        return JSONResponse({**answer, "expires_in": TOKEN_SECONDS})

    def _check_token(self, request: Request) -> None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme != "Bearer":
            told = "Credential was not sent or was of an unsupported type for this API."
            raise Refusal(401, 401, told)
        if token not in self.tokens and self._issued.get(token, 0.0) < time.monotonic():
            raise Refusal(403, 403, "Invalid access token.")

    def _answers(self, method: Callable[[Any], dict[str, Any]]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> JSONResponse:
            try:
                self._check_token(request)
                if request.method == "POST":
                    return JSONResponse(method(_body(request, await request.body())))
                return JSONResponse(method(dict(request.query_params)))
            except Refusal as refusal:
                return refusal.answer

        return endpoint

    # --- making runs -------------------------------------------------------------------------

    def _submit(self, body: dict[str, Any]) -> dict[str, Any]:
        asked = _parsed(SubmitRequest, body)
        if len(asked.run_name.encode()) > 4096:
            raise invalid("run_name must be at most 4096 bytes in UTF-8 encoding.")
        run_id = self._known(asked.idempotency_token) or self._make(
            asked.tasks, {}, body, job_id=next(self._ids), name=asked.run_name, kind="SUBMIT_RUN"
        )
        return {"run_id": run_id}

    def _run_now(self, body: dict[str, Any]) -> dict[str, Any]:
        asked = _parsed(RunNowRequest, body)
        run_id = self._known(asked.idempotency_token)
        if run_id is None:
            job = self.jobs.get(asked.job_id)
            if job is None:
                raise invalid(f"Job {asked.job_id} does not exist.")
            tasks = [t for t in job.tasks if not asked.only or t.task_key in asked.only]
            values = job.parameters | asked.job_parameters
            run_id = self._make(
                tasks, values, body, job_id=asked.job_id, name=job.name, kind="JOB_RUN"
            )
            defaults = {k: {"default": v} for k, v in job.parameters.items()}
            self._runs[run_id].parameters = [
                {"name": name, **defaults.get(name, {}), "value": value}
                for name, value in values.items()
            ]
        return {"run_id": run_id, "number_in_job": run_id}

    def _known(self, token: str | None) -> int | None:
        if token is None:
            return None
        if len(token) > 64:
            raise invalid("The idempotency token must have at most 64 characters.")
        run_id = self._by_token.get(token)
        if run_id is not None and run_id not in self._runs:
            raise invalid(f"The run with idempotency token {token} has been deleted.")
        return run_id

    def _make(
        self,
        tasks: Sequence[SubmitTask],
        parameters: Mapping[str, str],
        body: dict[str, Any],
        *,
        job_id: int,
        name: str,
        kind: Literal["JOB_RUN", "SUBMIT_RUN"],
    ) -> int:
        now = time.monotonic()
        _check_tasks(tasks)
        queued = max(float(_given(t, parameters).get("queued", 0)) for t in tasks)
        started = now + queued
        made: dict[str, TaskRun] = {}
        for task in tasks:  # a task stands after those that it waits for
            before = [made[each.task_key] for each in task.depends_on if each.task_key in made]
            made[task.task_key] = TaskRun(
                run_id=next(self._ids),
                spec=task,
                parameters=_given(task, parameters),
                starts=max((t.ends for t in before), default=started + PENDING_SECONDS),
                skipped=task.run_if == "ALL_SUCCESS" and any(t.fails for t in before),
            )
        run_id = next(self._ids)
        runs = list(made.values())
        self._runs[run_id] = Run(run_id, job_id, name, kind, now, started, runs, body)
        if body.get("idempotency_token"):
            self._by_token[body["idempotency_token"]] = run_id
        self._made += 1
        return run_id

    # --- reading and ending them -------------------------------------------------------------

    def _get(self, query: dict[str, str]) -> dict[str, Any]:
        run = self._run_of(query, {"page_token", "include_history", "include_resolved_values"})
        first = _offset(query.get("page_token"))
        told = self._told(run)
        last = first + TASKS_PER_ANSWER
        told["tasks"] = [self._task_told(run, task) for task in run.tasks[first:last]]
        if last < len(run.tasks):
            told["next_page_token"] = _page_token(last)
        return told

    def _list(self, query: dict[str, str]) -> dict[str, Any]:
        known = {"active_only", "completed_only", "limit", "page_token", "job_id", "run_type"}
        _check_query(query, known | {"expand_tasks", "start_time_from", "start_time_to"})
        active, completed = query.get("active_only"), query.get("completed_only")
        if active == completed == "true":
            raise invalid("active_only and completed_only can't both be true.")
        limit = _whole(query.get("limit", "20"), "limit")
        if not 0 <= limit < 25:
            raise invalid("limit must be greater than 0 and less than 25.")
        limit = limit or 24
        now = time.monotonic()
        found = [
            run
            for run in self._runs.values()
            if not (active == "true" and now >= run.ends)
            and not (completed == "true" and now < run.ends)
            and query.get("job_id", str(run.job_id)) == str(run.job_id)
        ]
        found.sort(key=lambda run: run.ends if now >= run.ends else run.started, reverse=True)
        first = _offset(query.get("page_token"))
        answer: dict[str, Any] = {}
        if page := found[first : first + limit]:
            answer["runs"] = [self._told(run) for run in page]
        if len(found) > first + limit:
            answer |= {"has_more": True, "next_page_token": _page_token(first + limit)}
        return answer

    def _cancel(self, body: dict[str, Any]) -> dict[str, Any]:
        """Does nothing to a run that is over."""
        run = self._runs.get(_parsed(CancelRequest, body).run_id)
        if run is None:
            raise no_such_run(body["run_id"])
        run.cancelled_at = min(run.cancelled_at, time.monotonic())
        return {}

    def _get_output(self, query: dict[str, str]) -> dict[str, Any]:
        _check_query(query, {"run_id"})
        run_id = _whole(query.get("run_id", ""), "run_id")
        for run in self._runs.values():
            if run.run_id == run_id:
                raise invalid(
                    "Retrieving the output of runs with multiple tasks is not supported. Please retrieve the output of "
                    "each individual task run instead."
                )
            for task in run.tasks:
                if task.run_id == run_id:
                    return {"metadata": self._task_told(run, task), **_output(task)}
        raise no_such_run(run_id)

    def _run_of(self, query: dict[str, str], known: set[str]) -> Run:
        _check_query(query, known | {"run_id"})
        run_id = _whole(query.get("run_id", ""), "run_id")
        if run_id not in self._runs:
            raise no_such_run(run_id)
        return self._runs[run_id]

    def _told(self, run: Run) -> dict[str, Any]:
        failed = next((task for task in run.tasks if task.fails and not task.skipped), None)
        why = f"Task {failed.spec.task_key} failed with message: {FAILED}." if failed else ""
        return {
            "job_id": run.job_id,
            "run_id": run.run_id,
            "number_in_job": run.run_id,
            "original_attempt_run_id": run.run_id,
            "run_name": run.name,
            "run_type": run.kind,
            "run_page_url": f"{self.url}/?o=1#job/{run.job_id}/run/{run.run_id}",
            "job_parameters": run.parameters,
            **_states(run, run.started, run.ends, why, is_task=False),
        }

    def _task_told(self, run: Run, task: TaskRun) -> dict[str, Any]:
        ends = min(task.ends, run.ends)
        why = FAILED if "raise" in task.parameters else ""
        return {
            "run_id": task.run_id,
            "task_key": task.spec.task_key,
            "attempt_number": 0,
            "run_page_url": f"{self.url}/?o=1#job/{run.job_id}/run/{task.run_id}",
            **_states(run, task.starts, ends, why, is_task=True, skipped=task.skipped),
        }


def _states(
    run: Run, starts: float, ends: float, why: str, *, is_task: bool, skipped: bool = False
) -> dict[str, Any]:
    """`status` of API 2.2 and the deprecated `state` beside it."""
    now = time.monotonic()

    def both(state: str, **queued: Any) -> dict[str, Any]:
        reason = {"queue_reason": queued["message"]} if queued else {}
        details = {"queue_details": queued} if queued else {}
        return {
            "state": {"life_cycle_state": state, "state_message": "", **reason},
            "status": {"state": state, **details},
        }

    def ended(life: str, result: str, code: str, kind: str, message: str) -> dict[str, Any]:
        details = {"code": code, "type": kind, "message": message}
        state = {"life_cycle_state": life, "result_state": result, "state_message": message}
        return {"state": state, "status": {"state": "TERMINATED", "termination_details": details}}

    if now >= ends:
        if run.is_cancelled:
            return ended("TERMINATED", "CANCELED", "USER_CANCELED", "SUCCESS", "Run cancelled.")
        if skipped:
            told = "An upstream task failed."
            return ended("SKIPPED", "UPSTREAM_FAILED", "SKIPPED", "CLIENT_ERROR", told)
        if why:
            life = "TERMINATED" if is_task else "INTERNAL_ERROR"
            return ended(life, "FAILED", "RUN_EXECUTION_ERROR", "CLIENT_ERROR", why)
        return ended("TERMINATED", "SUCCESS", "SUCCESS", "SUCCESS", "")
    if now >= run.cancelled_at:
        return both("TERMINATING")
    if now < run.started:
        return both(
            "QUEUED",
            code="ACTIVE_RUNS_LIMIT_REACHED",
            message="The workspace has reached its limit of active runs.",
        )
    if is_task:
        return both("RUNNING" if now >= starts else "BLOCKED")
    return both("RUNNING" if now >= run.started + PENDING_SECONDS else "PENDING")


def _output(task: TaskRun) -> dict[str, Any]:
    if task.spec.condition_task is not None:
        raise invalid("Retrieving the output of a run of this task type is not supported.")
    if task.skipped:
        return {"error": "The run was skipped because of an upstream failure."}
    if "raise" in task.parameters:
        return {"error": task.parameters["raise"], "error_trace": "Traceback"}
    if "exit" in task.parameters:
        return {"notebook_output": {"result": task.parameters["exit"], "truncated": False}}
    return {"notebook_output": {}}


def _given(task: SubmitTask, job_parameters: Mapping[str, str]) -> Mapping[str, str]:
    """A job's parameters are pushed down to its notebooks."""
    own = task.notebook_task.base_parameters if task.notebook_task else {}
    return {**own, **job_parameters}


def _check_tasks(tasks: Sequence[SubmitTask]) -> None:
    keys = [task.task_key for task in tasks]
    if len(set(keys)) < len(keys):
        raise invalid("Duplicate task keys found.")
    for task in tasks:
        if (task.notebook_task is None) == (task.condition_task is None):
            raise invalid(f"Task {task.task_key} must have exactly one kind of task.")
        if missing := [d.task_key for d in task.depends_on if d.task_key not in keys]:
            raise invalid(f"Task {task.task_key} depends on unknown tasks {missing}.")


def _body(request: Request, content: bytes) -> dict[str, Any]:
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise Refusal(400, "MALFORMED_REQUEST", "The content type must be application/json.")
    try:
        data = json.loads(content)
    except ValueError:
        raise Refusal(400, "MALFORMED_REQUEST", "Invalid JSON given in the body.") from None
    if not isinstance(data, dict):
        raise Refusal(400, "MALFORMED_REQUEST", "Could not parse request object.")
    return cast(dict[str, Any], data)


def _parsed(model: type[T], body: dict[str, Any]) -> T:
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        told = f"Could not parse request object: {where}: {first['msg']}"
        raise Refusal(400, "MALFORMED_REQUEST", told) from None


def _check_query(query: Mapping[str, str], known: set[str]) -> None:
    if unknown := sorted(query.keys() - known):
        raise invalid(f"Unknown parameters {unknown}.")


def _whole(text: str, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise invalid(f"{name} must be a number.") from None


def _page_token(offset: int) -> str:
    return base64.urlsafe_b64encode(f"at {offset}".encode()).decode()


def _offset(token: str | None) -> int:
    if token is None:
        return 0
    try:
        return int(base64.urlsafe_b64decode(token).decode().removeprefix("at "))
    except ValueError:
        raise invalid("Invalid page token.") from None


def _oauth_error(status: int, error: str, told: str) -> JSONResponse:
    return JSONResponse({"error": error, "error_description": told}, status)


if __name__ == "__main__":
    serve(DatabricksServer())
