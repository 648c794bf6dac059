"""A stand-in that answers as Acme does, and what the kit must know of it.

CHANGE: the stand-in, until it answers as a transcript of the real service shows; or use a test instance of that.
"""

import itertools
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from pydantic import HttpUrl, SecretStr

from prefect_webapi import EngineSettings, Phase, PluginConfig
from prefect_webapi.testing import Service, serve_app
from prefect_webapi_acme.blocks import Acme
from prefect_webapi_acme.models import AcmeHandle, AcmeJob, AcmeView

TOKEN = "a-token-for-tests-only"
WORDS = "command not found"


class Jobs:
    """The service's jobs. A command is what becomes of it: `fail`, `run` (for ever), `queue`, or a text to return."""

    def __init__(self) -> None:
        self.by_id: dict[str, dict[str, Any]] = {}
        self.by_key: dict[str, str] = {}
        self.ids = itertools.count(1)

    def make(self, key: str, command: str) -> dict[str, Any]:
        if key not in self.by_key:
            self.by_key[key] = str(next(self.ids))
            self.by_id[self.by_key[key]] = {"command": command, "since": time.monotonic()}
        return self.shown(self.by_key[key])

    def shown(self, job_id: str) -> dict[str, Any]:
        if job_id not in self.by_id:
            raise HTTPException(404, "no such job")
        job = self.by_id[job_id]
        status, message, output = "running", "", ""
        if "cancelled" in job:
            status = "cancelled"
        elif job["command"] == "queue":
            status = "queued"
        elif job["command"] != "run" and time.monotonic() - job["since"] > 0.2:
            fails = job["command"] == "fail"
            status, message, output = ("failed", WORDS, "") if fails else ("done", "", "hello")
        return {"id": job_id, "status": status, "message": message, "output": output}

    def cancel(self, job_id: str) -> dict[str, Any]:
        if self.shown(job_id)["status"] in ("done", "failed", "cancelled"):
            raise HTTPException(409, "the job is over")
        self.by_id[job_id]["cancelled"] = True
        return self.shown(job_id)


def service(jobs: Jobs) -> FastAPI:
    app = FastAPI()

    def admit(request: Request) -> None:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            raise HTTPException(401, "who are you?")

    @app.post("/v1/jobs", status_code=201)
    async def create(request: Request) -> dict[str, Any]:
        admit(request)
        return jobs.make(request.headers["idempotency-key"], (await request.json())["command"])

    @app.get("/v1/jobs/{job_id}")
    async def read(request: Request, job_id: str) -> dict[str, Any]:
        admit(request)
        return jobs.shown(job_id)

    @app.delete("/v1/jobs/{job_id}")
    async def cancel(request: Request, job_id: str) -> dict[str, Any]:
        admit(request)
        return jobs.cancel(job_id)

    return app


class AcmeService(Service):
    """What the kit asks for; see the docstring of `Service`."""

    states = (  # CHANGE: every state of the API reference, as `get` returns it
        (AcmeView(status="queued"), Phase.QUEUED),
        (AcmeView(status="running"), Phase.RUNNING),
        (AcmeView(status="done"), Phase.SUCCESS),
        (AcmeView(status="failed"), Phase.RETRYABLE_FAILURE),
        (AcmeView(status="cancelled"), Phase.ABORTED),
    )
    unknown_state = AcmeView(status="hibernated")  # CHANGE: with a state that there is not
    unknown_handle = AcmeHandle(id="404404")  # CHANGE: of a job that never was
    failure = WORDS

    def __init__(self) -> None:
        self.jobs = Jobs()

    @contextmanager
    def start(self) -> Generator[str]:
        with serve_app(service(self.jobs)) as url:
            yield url

    def connection(self, url: str, engine: PluginConfig, settings: EngineSettings) -> Acme:
        return Acme(base_url=HttpUrl(url), token=SecretStr(TOKEN), engine=engine, settings=settings)

    def spec(self, fate: str) -> AcmeJob:  # CHANGE: four jobs, by what becomes of them
        commands = {"succeeds": "hello", "fails": "fail", "runs": "run", "waits": "queue"}
        return AcmeJob(command=commands[fate])

    def made(self) -> int:
        return len(self.jobs.by_id)

    def live(self) -> int:
        over = ("done", "failed", "cancelled")
        return sum(self.jobs.shown(job)["status"] not in over for job in self.jobs.by_id)
