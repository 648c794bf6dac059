"""The service's HTTP interface, and the control interface that tests use."""

from __future__ import annotations

import html
import uuid
from collections import Counter
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import FastAPI, HTTPException, Query, Response
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict

from prefect_webapi.testing.jobserver.faults import Fault, FaultyService, LoggedRequest
from prefect_webapi.testing.jobserver.jobs import Job, JobState, JobTable, NewJob

__all__ = ["Behaviour", "JobView", "Stats", "job_service"]


class Behaviour(BaseModel):
    """How the service as a whole behaves.

    Attributes:
        mood: ``keys``: PUT with a known name answers with the job that has it; ``search``: POST makes a job each time,
            and jobs can be found by key; ``neither``: POST, and no search.
        repeat: what PUT with a known name and an equal fingerprint answers: the job, or 409.
        token: the bearer token that requests must carry; None: any.
    """

    model_config = ConfigDict(extra="forbid")

    mood: Literal["keys", "search", "neither"] = "keys"
    repeat: Literal["return", "conflict"] = "return"
    token: str | None = None


class JobView(BaseModel):
    """A job as clients see it."""

    name: str
    state: JobState
    message: str = ""
    result: Any = None
    fingerprint: str = ""
    labels: dict[str, str] = {}
    link: str = ""
    key: str = ""


class Stats(BaseModel):
    """Counted by the server: what was really made, whatever anybody believes.

    Attributes:
        created: jobs ever made; live: not over now; peak_live: most at one time, in all and per quota.
        jobs_by_key: jobs made per key (or name); duplicates: keys with more than one.
        requests: by op; peak_open: most requests of an op that were without an answer at one time.
        inside_retry_after: requests sent while a Retry-After for their kind ran.
    """

    created: int
    live: int
    peak_live: int
    peak_by_quota: dict[str, int]
    jobs_by_key: dict[str, int]
    duplicates: dict[str, int]
    requests: dict[str, int]
    peak_open: dict[str, int]
    inside_retry_after: int


class EndJob(BaseModel):
    """End a job by force, as a third party would, or make the server forget it."""

    name: str
    state: Literal["succeeded", "failed", "cancelled", "forgotten"]
    message: str = ""


class _State:
    def __init__(self, speed: float, behaviour: Behaviour) -> None:
        self.speed = speed
        self.first = behaviour
        self.behaviour = behaviour
        self.jobs = JobTable(speed)

    def reset(self) -> None:
        self.behaviour = self.first
        self.jobs = JobTable(self.speed)


def job_service(base_url: str, *, speed: float = 1.0, token: str | None = None) -> FaultyService:
    """The whole service as an ASGI application."""
    state = _State(speed, Behaviour(token=token))
    app = FastAPI(title="Job server", docs_url=None, redoc_url=None)
    service = FaultyService(app)
    service.token = token

    def view(job: Job) -> JobView:
        spec, now = job.new.spec, state.jobs.now()
        at = job.state(now)
        message = spec.message
        if at is JobState.FAILED and not message:
            message = "the job failed, as it was told to"
        if at is JobState.CANCELLED:
            message = job.reason
        return JobView(
            name=job.name,
            state=at,
            message=message,
            result=spec.result if at is JobState.SUCCEEDED else None,
            fingerprint=job.new.fingerprint,
            labels=job.new.labels,
            link=f"{base_url}/ui/jobs/{quote(job.name, safe='')}",
            key=job.new.key,
        )

    def known(name: str) -> Job:
        job = state.jobs.get(name)
        if job is None:
            raise HTTPException(404, f"there is no job {name!r}")
        return job

    @app.exception_handler(HTTPException)
    async def refuse(_: Any, error: HTTPException) -> JSONResponse:
        detail: Any = error.detail
        if not isinstance(detail, dict):
            detail = {"message": str(detail)}
        return JSONResponse(detail, error.status_code)

    @app.put("/jobs/{name:path}")
    async def put_job(name: str, new: NewJob, response: Response) -> JobView:
        """Make the job of this name, or answer with it. The name is the idempotency key."""
        old = state.jobs.named(name)
        if old is None:
            response.status_code = 201
            return view(state.jobs.add(name, new.model_copy(update={"key": name})))
        if old.new.fingerprint != new.fingerprint or state.behaviour.repeat == "conflict":
            told = {"message": f"job {name!r} exists", "fingerprint": old.new.fingerprint}
            raise HTTPException(409, told)
        return view(old)

    @app.post("/jobs", status_code=201)
    async def post_job(new: NewJob) -> JobView:
        """Make a job; the server chooses its name and makes one each time."""
        return view(state.jobs.add(f"job-{uuid.uuid4().hex[:12]}", new))

    @app.get("/jobs")
    async def list_jobs(
        names: Annotated[str | None, Query()] = None, key: Annotated[str | None, Query()] = None
    ) -> list[JobView]:
        """Several jobs by name (unknown ones are left out), or those made with a key."""
        if key is not None:
            if state.behaviour.mood == "neither":
                raise HTTPException(400, "this service can't search")
            return [view(job) for job in state.jobs.with_key(key)]
        found = (state.jobs.get(name) for name in (names or "").split(",") if name)
        return [view(job) for job in found if job is not None]

    @app.get("/jobs/{name:path}")
    async def get_job(name: str) -> JobView:
        return view(known(name))

    @app.delete("/jobs/{name:path}", status_code=202)
    async def cancel_job(name: str, reason: Annotated[str, Query()] = "") -> JobView:
        """Ask the job to end. It may take its time; 409: it is over already."""
        job = known(name)
        if job.state(state.jobs.now()).is_over:
            raise HTTPException(409, f"job {name!r} is over already")
        state.jobs.cancel(job, reason)
        return view(job)

    @app.get("/ui/jobs/{name:path}", response_class=HTMLResponse)
    async def show_job(name: str) -> str:
        job = view(known(name))
        rows = "".join(
            f"<tr><th align=left>{key}<td>{html.escape(str(value))}"
            for key, value in job.model_dump().items()
        )
        return f"<!doctype html><title>{html.escape(name)}</title><h1>Job</h1><table>{rows}</table>"

    # --- control -----------------------------------------------------------------------------

    @app.get("/control/health")
    async def health() -> str:
        return "ok"

    @app.post("/control/behaviour")
    async def behave(behaviour: Behaviour) -> Behaviour:
        state.behaviour = behaviour
        service.token = behaviour.token
        return behaviour

    @app.get("/control/behaviour")
    async def behaviour() -> Behaviour:
        return state.behaviour

    @app.post("/control/faults")
    async def add_fault(fault: Fault) -> int:
        service.faults.append(fault)
        return len(service.faults)

    @app.delete("/control/faults")
    async def clear_faults() -> int:
        service.faults.clear()
        return 0

    @app.get("/control/log")
    async def log(since: int = 0) -> list[LoggedRequest]:
        return service.log[since:]

    @app.get("/control/jobs")
    async def jobs() -> list[JobView]:
        return [view(job) for job in state.jobs.all()]

    @app.get("/control/stats")
    async def stats() -> Stats:
        by_key = Counter(job.new.key or job.name for job in state.jobs.all())
        peak_open: dict[str, int] = {}
        for entry in service.log:
            peak_open[entry.op] = max(peak_open.get(entry.op, 0), entry.open_at_arrival + 1)
        return Stats(
            created=len(state.jobs),
            live=state.jobs.live(),
            peak_live=state.jobs.peak_live,
            peak_by_quota=state.jobs.peak_by_quota,
            jobs_by_key=dict(by_key),
            duplicates={key: n for key, n in by_key.items() if n > 1},
            requests=dict(Counter(entry.op for entry in service.log)),
            peak_open=peak_open,
            inside_retry_after=sum(entry.inside_retry_after for entry in service.log),
        )

    @app.post("/control/end")
    async def end(command: EndJob) -> None:
        job = state.jobs.named(command.name)
        if job is None:
            raise HTTPException(404, f"there is no job {command.name!r}")
        if command.state == "forgotten":
            job.forgotten = True
        else:
            job.set_to = (JobState(command.state), state.jobs.now())
            job.reason = command.message
        state.jobs.recount(job)

    @app.post("/control/reset")
    async def reset() -> None:
        state.reset()
        service.reset()
        service.token = state.behaviour.token

    return service
