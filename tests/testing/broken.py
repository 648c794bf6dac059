"""Plugins for the job server that each do one thing wrong, and the check that must tell."""

from __future__ import annotations

import http.client
import logging
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from prefect_webapi import (
    AuthError,
    CreateResult,
    DeleteContext,
    GetContext,
    NotFound,
    PhaseInfo,
    PluginEntry,
    RemoteSystemError,
    RemoteUserError,
    StatusContext,
    TaskExecutionContextReader,
    Throttled,
    path,
)
from prefect_webapi_jobserver import JobServer, ReportJob
from prefect_webapi_jobserver.models import JobHandle, JobView
from prefect_webapi_jobserver.plugin import JobServerPlugin

__all__ = ["BROKEN", "Broken"]

logger = logging.getLogger(__name__)


class _Plugin(JobServerPlugin):
    async def another(self, ctx: TaskExecutionContextReader) -> JobHandle:
        """A job that the service makes anew each time."""
        made = await self._api.post("/jobs", json={"spec": ctx.spec(ReportJob).model_dump()})
        return JobHandle(name=made["name"])

    @property
    def address(self) -> str:
        return str(self._connection.base_url)


def failed(ctx: GetContext[JobHandle], why: str) -> JobView:
    return JobView(name=ctx.resource_meta.name, state="failed", message=why)


class CreatesTwice(_Plugin):
    async def create(
        self, ctx: TaskExecutionContextReader
    ) -> JobHandle | CreateResult[JobHandle, JobView]:
        await self.another(ctx)
        return await super().create(ctx)


class SendsNoKey(_Plugin):
    async def create(self, ctx: TaskExecutionContextReader) -> JobHandle:
        return await self.another(ctx)

    lacks = ("find",)


class RepeatsByItself(_Plugin):
    async def create(
        self, ctx: TaskExecutionContextReader
    ) -> JobHandle | CreateResult[JobHandle, JobView]:
        try:
            return await super().create(ctx)
        except RemoteSystemError as error:
            if not error.job_may_exist:
                raise
            return await self.another(ctx)


class FindsAny(_Plugin):
    async def find(
        self, ctx: TaskExecutionContextReader
    ) -> CreateResult[JobHandle, JobView] | None:
        return await super().find(ctx) or CreateResult(JobHandle(name="j"))


class AsksInStatus(_Plugin):
    def status(self, ctx: StatusContext[JobHandle, JobView]) -> PhaseInfo:
        with suppress(OSError):
            urllib.request.urlopen(self.address, timeout=1).close()
        return super().status(ctx)


class AsksOnAnOpenConnection(_Plugin):
    """The socket is connected already when `status` comes."""

    _line: http.client.HTTPConnection | None = None

    async def get(self, ctx: GetContext[JobHandle]) -> JobView:
        if self._line is None:
            self._line = http.client.HTTPConnection(urlsplit(self.address).netloc, timeout=5)
            self._line.connect()
        return await super().get(ctx)

    def status(self, ctx: StatusContext[JobHandle, JobView]) -> PhaseInfo:
        if self._line is not None:
            self._line.request("GET", "/jobs/x")
            self._line.getresponse().read()
        return super().status(ctx)

    async def aclose(self) -> None:
        if self._line is not None:
            self._line.close()
        await super().aclose()


class SwallowsNewStates(_Plugin):
    def status(self, ctx: StatusContext[JobHandle, JobView]) -> PhaseInfo:
        info = super().status(ctx)
        return info if ctx.resource.state != "paused" else PhaseInfo.running("whatever it means")


class MisreadsAState(_Plugin):
    def status(self, ctx: StatusContext[JobHandle, JobView]) -> PhaseInfo:
        info = super().status(ctx)
        return info if ctx.resource.state != "initializing" else PhaseInfo.running()


class KeepsTheReason(_Plugin):
    def status(self, ctx: StatusContext[JobHandle, JobView]) -> PhaseInfo:
        if ctx.resource.state == "failed":
            return PhaseInfo.retryable_failure("JobFailed", "something went wrong")
        return super().status(ctx)


class PutsTheTokenInTheHandle(_Plugin):
    async def create(self, ctx: TaskExecutionContextReader) -> JobHandle:
        await super().create(ctx)
        name = ctx.task_execution_metadata.generated_name
        return JobHandle(name=f"{name}?{self._connection.token.get_secret_value()}")


class LogsTheToken(_Plugin):
    async def get(self, ctx: GetContext[JobHandle]) -> JobView:
        logger.debug("asking with %s", self._connection.token.get_secret_value())
        return await super().get(ctx)


class EndsNothing(_Plugin):
    async def delete(self, ctx: DeleteContext[JobHandle]) -> None:
        return


class MindsAJobThatIsOver(_Plugin):
    async def delete(self, ctx: DeleteContext[JobHandle]) -> None:
        await self._api.delete(path("jobs", ctx.resource_meta.name))


class HidesThatAJobIsGone(_Plugin):
    async def get(self, ctx: GetContext[JobHandle]) -> JobView:
        try:
            return await super().get(ctx)
        except NotFound:
            return JobView(name=ctx.resource_meta.name, state="running")


class TakesNonsenseForAFailure(_Plugin):
    async def get(self, ctx: GetContext[JobHandle]) -> JobView:
        try:
            return await super().get(ctx)
        except RemoteSystemError as error:
            return failed(ctx, error.message)


class KeepsTheHint(_Plugin):
    async def create(
        self, ctx: TaskExecutionContextReader
    ) -> JobHandle | CreateResult[JobHandle, JobView]:
        try:
            return await super().create(ctx)
        except Throttled:
            raise RemoteSystemError("busy", job_may_exist=False) from None


class GivesUpOnThrottledReads(_Plugin):
    async def get(self, ctx: GetContext[JobHandle]) -> JobView:
        try:
            return await super().get(ctx)
        except Throttled as error:
            return failed(ctx, error.message)


class RenewsNothing(_Plugin):
    async def get(self, ctx: GetContext[JobHandle]) -> JobView:
        try:
            return await super().get(ctx)
        except AuthError as error:
            return failed(ctx, error.message)


class TakesAnyAnswerForAnError(_Plugin):
    async def create(
        self, ctx: TaskExecutionContextReader
    ) -> JobHandle | CreateResult[JobHandle, JobView]:
        try:
            return await super().create(ctx)
        except AuthError as error:
            raise RemoteSystemError(error.message, job_may_exist=False) from None


class GoesInTheClear(_Plugin):
    def __init__(self, connection: JobServer) -> None:
        super().__init__(
            connection.model_copy(
                update={"settings": connection.settings.model_copy(update={"allow_insecure": True})}
            )
        )


class FollowsRedirects(_Plugin):
    async def create(
        self, ctx: TaskExecutionContextReader
    ) -> JobHandle | CreateResult[JobHandle, JobView]:
        try:
            return await super().create(ctx)
        except RemoteUserError as error:
            if error.code != "HTTP307":
                raise
            raise RemoteSystemError("it moved", job_may_exist=False) from None


class MixesABatchUp(_Plugin):
    async def get_many(
        self, ctxs: Sequence[GetContext[JobHandle]]
    ) -> Sequence[JobView | RemoteSystemError | None]:
        found = await super().get_many(ctxs)
        return [each for each in found if each is not None]


class ThinksThatAJobMayExist(_Plugin):
    async def create(
        self, ctx: TaskExecutionContextReader
    ) -> JobHandle | CreateResult[JobHandle, JobView]:
        try:
            return await super().create(ctx)
        except RemoteSystemError as error:
            raise RemoteSystemError(error.message) from None


@dataclass(frozen=True)
class Broken:
    """Attributes: check: that must fail, alone; words: of what it tells."""

    plugin: type[JobServerPlugin]
    check: str
    words: str

    @property
    def entry(self) -> PluginEntry[Any]:
        return PluginEntry(
            id="job-server",
            supported_task_types=["job-server"],
            connection=JobServer,
            spec=ReportJob,
            plugin_loader=lambda setup: self.plugin(setup.connection),
        )


BROKEN = (
    Broken(PutsTheTokenInTheHandle, "handle", "put a secret of the connection into the handle"),
    Broken(AsksInStatus, "status-offline", "used the network in `status`: socket."),
    Broken(AsksOnAnOpenConnection, "status-offline", "used the network in `status`: status: GET"),
    Broken(MisreadsAState, "states", "told RUNNING"),
    Broken(SwallowsNewStates, "unknown-state", "return `PhaseInfo.undefined`"),
    Broken(CreatesTwice, "one-create", "made 2 jobs"),
    Broken(KeepsTheReason, "failure", "told 'something went wrong'"),
    Broken(SendsNoKey, "repeated-create", "send `ctx.task_execution_metadata.generated_name`"),
    Broken(FindsAny, "find", "found JobHandle(name='j') for the key"),
    Broken(RepeatsByItself, "lost-answer", "made 2 jobs"),
    Broken(ThinksThatAJobMayExist, "refused-connection", "job_may_exist=False"),
    Broken(EndsNothing, "cancel-running", "came to no end"),
    Broken(MindsAJobThatIsOver, "delete-twice", "raised RemoteUserError from `delete`"),
    Broken(HidesThatAJobIsGone, "unknown-job", "raise `NotFound`"),
    Broken(KeepsTheHint, "throttle-create", "asked to wait 1 s"),
    Broken(GivesUpOnThrottledReads, "throttle-read", "raise `Throttled`"),
    Broken(TakesNonsenseForAFailure, "nonsense-read", "raise `RemoteSystemError`"),
    Broken(RenewsNothing, "auth-refresh", "raise `AuthError`"),
    Broken(TakesAnyAnswerForAnError, "auth-refused", "it is tried once more"),
    Broken(FollowsRedirects, "redirect", "do not follow redirects"),
    Broken(GoesInTheClear, "cleartext", "ready to send its credentials"),
    Broken(LogsTheToken, "secrets", "let the secret into a log line"),
    Broken(MixesABatchUp, "batch", "one answer per job, in the order"),
)
