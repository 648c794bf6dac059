"""Services of the repository as the kit's authors describe theirs."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, Self

from pydantic import HttpUrl, SecretStr

from prefect_webapi import EngineSettings, JobSpec, Phase, PluginConfig
from prefect_webapi.testing import EmbeddedJobServer, Reply, Service
from prefect_webapi.testing.conformance.service import Fate
from prefect_webapi_jobserver import JobServer, ReportJob
from prefect_webapi_jobserver.models import JobHandle, JobView
from tests.plugins.suite import CANARY, MESSAGE, Outcome, PluginSuite

__all__ = ["JobServerService", "VendorService"]


class JobServerService(Service):
    """The embedded job server, a given one or its own; of its faults on command nothing is used."""

    states = (
        (JobView(name="x", state="queued"), Phase.QUEUED),
        (JobView(name="x", state="initializing"), Phase.INITIALIZING),
        (JobView(name="x", state="running"), Phase.RUNNING),
        (JobView(name="x", state="succeeded"), Phase.SUCCESS),
        (JobView(name="x", state="failed"), Phase.RETRYABLE_FAILURE),
        (JobView(name="x", state="cancelled"), Phase.ABORTED),
    )
    unknown_state = JobView(name="x", state="paused")
    unknown_handle = JobHandle(name="nobody")
    failure = MESSAGE

    def __init__(self, server: EmbeddedJobServer | None = None) -> None:
        self._given = server

    @contextmanager
    def start(self) -> Generator[str]:
        with nullcontext(self._given) if self._given else EmbeddedJobServer(token=CANARY) as server:
            self.server = server
            yield server.url

    def connection(self, url: str, engine: PluginConfig, settings: EngineSettings) -> JobServer:
        token = SecretStr(self.server.token or "")
        return JobServer(base_url=HttpUrl(url), token=token, engine=engine, settings=settings)

    def spec(self, fate: Fate) -> ReportJob:
        match fate:
            case "succeeds":
                return ReportJob(seconds=0.1, result="the figures")
            case "fails":
                return ReportJob(seconds=0.1, outcome="fail", message=self.failure)
            case "runs":
                return ReportJob(outcome="never")
            case "waits":
                return ReportJob(queued_seconds=600)

    def made(self) -> int:
        return self.server.stats().created

    def live(self) -> int:
        return self.server.stats().live


class Witness(Protocol):
    """A vendor's server, which counts its jobs itself."""

    url: str

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc_info: object) -> None: ...

    def made(self) -> int: ...

    def live(self) -> int: ...


class VendorService(Service):
    """A vendor's server of the plugins' tests, as its suite describes it; of its faults on command nothing is used."""

    def __init__(self, suite: PluginSuite, server: Witness, *, token_path: str = "") -> None:
        self._suite = suite
        self._server = server
        self.states = [(snapshot, phase) for snapshot, phase, _ in suite.rows]
        self.unknown_state = suite.unknown
        self.unknown_handle = suite.unknown_handle()
        self.failure = MESSAGE
        self.token_paths = [token_path] if token_path else []

    @contextmanager
    def start(self) -> Generator[str]:
        with self._server:
            yield self._server.url

    def connection(self, url: str, engine: PluginConfig, settings: EngineSettings) -> Any:
        return self._suite.connection(At(self._server, url), engine, settings)

    def spec(self, fate: Fate) -> JobSpec[Any]:
        outcomes: dict[Fate, Outcome] = {
            "succeeds": "succeed",
            "fails": "fail",
            "runs": "never",
            "waits": "queued",
        }
        return self._suite.job(outcomes[fate])

    def made(self) -> int:
        return self._server.made()

    def live(self) -> int:
        return self._server.live()

    def throttled(self, seconds: float | None) -> Reply:
        reply = self._suite.throttled(seconds)
        return Reply(reply.status, reply.content, reply.headers)

    def unauthorized(self) -> Reply:
        reply = self._suite.unauthorized()
        return Reply(reply.status, reply.content, reply.headers)


@dataclass(frozen=True)
class At:
    """A server at another address than its own."""

    server: Witness
    url: str

    def __getattr__(self, name: str) -> Any:
        return getattr(self.server, name)
