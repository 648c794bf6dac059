"""The skeleton plugin by itself: its block, its table of states, and its calls against a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prefect.blocks.core import Block
from pydantic import HttpUrl, SecretStr, ValidationError

from prefect_webapi import (
    AlreadyExists,
    ConfigurationError,
    CreateResult,
    EngineSettings,
    NotFound,
    Phase,
    PhaseInfo,
    RemoteSystemError,
)
from prefect_webapi.contract.keys import Fingerprint, JobKey
from prefect_webapi.engine.contexts import DeleteView, GetView, StatusView, TaskView, task_view
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi.testing.jobserver.jobs import JobState
from prefect_webapi_jobserver import JobServer, Report, ReportJob, entry
from prefect_webapi_jobserver.models import JobHandle, JobView
from prefect_webapi_jobserver.plugin import PHASES, JobServerPlugin
from tests.plugins.jobserver import JobServerService
from tests.plugins.suite import CANARY, MESSAGE, BlockSuite, Outcome, OverHttp
from tests.servers.base import Reply
from tests.support.engine import FolderOutputs, NoSecrets, request
from tests.support.jobserver import TOKEN

KEY, FINGERPRINT = JobKey("jkey"), Fingerprint("f" * 64)


class TestJobServerBlock(BlockSuite):
    @pytest.fixture
    def block(self) -> type[Block]:
        return JobServer


def server_at(url: str) -> JobServer:
    return JobServer(base_url=HttpUrl(url), token=SecretStr("canary"))


def test_the_token_is_not_shown() -> None:
    """REQ-62."""
    assert "canary" not in repr(server_at("https://jobs.example.com"))


def test_credentials_in_the_clear_are_refused_when_the_plugin_is_loaded() -> None:
    """CASE-258: unless the block allows it."""
    url = HttpUrl("http://jobs.example.com")
    with pytest.raises(ConfigurationError, match="allow_insecure"):
        JobServerPlugin(JobServer(base_url=url, token=SecretStr("canary")))
    allowed = EngineSettings(allow_insecure=True)
    JobServerPlugin(JobServer(base_url=url, token=SecretStr("canary"), settings=allowed))


@pytest.mark.parametrize("field", ["qps", "tokens", "baseUrl"])
def test_an_unknown_field_of_the_connection_is_refused(field: str) -> None:
    """REQ-52: a slip of the pen does nothing by accident."""
    with pytest.raises(ValidationError, match="Extra inputs"):
        JobServer(base_url=HttpUrl("https://x"), token=SecretStr("t"), **{field: 1})  # pyright: ignore[reportArgumentType] - that is the point


def test_the_entry_serves_one_task_type() -> None:
    """REQ-49."""
    assert (entry.id, entry.supported_task_types) == ("job-server", ["job-server"])
    assert entry.spec is ReportJob


# --- the table of states ---------------------------------------------------------------------


def status_of(plugin: JobServerPlugin, task: TaskView, **job: Any) -> PhaseInfo:
    view = StatusView(task, JobHandle(name="x"), JobView(name="x", **job))
    return plugin.status(view)


def task_of(spec: ReportJob) -> TaskView:
    return task_view(
        request(spec, task_run="t"),
        key=KEY,
        fingerprint=FINGERPRINT,
        attempt=1,
        secrets=NoSecrets(),
        store=FolderOutputs(Path("nowhere")),
        connection=None,
        max_dataset_size_bytes=-1,
    )


@pytest.fixture
async def plugin(job_server: EmbeddedJobServer) -> AsyncIterator[JobServerPlugin]:
    plugin = JobServerPlugin(JobServer(base_url=HttpUrl(job_server.url), token=SecretStr(TOKEN)))
    yield plugin
    await plugin.aclose()


def test_the_table_knows_every_state_of_the_server() -> None:
    """REQ-53: total over the documented states."""
    assert set(PHASES) == {state.value for state in JobState}


@pytest.mark.parametrize("state", ["paused", "", "SUCCEEDED"])
def test_a_state_that_is_not_documented_is_undefined(plugin: JobServerPlugin, state: str) -> None:
    """REQ-56: new words of a service end no job."""
    assert status_of(plugin, task_of(ReportJob()), state=state).phase is Phase.UNDEFINED


def test_a_success_puts_its_report_and_links_its_page(plugin: JobServerPlugin) -> None:
    """REQ-54: the dict is what `Report` takes."""
    task = task_of(ReportJob())
    told = status_of(plugin, task, state="succeeded", result=[1], link="http://x/ui/jobs/x")
    assert told.phase is Phase.SUCCESS
    assert told.info.logs[0].uri == "http://x/ui/jobs/x"
    assert Report.model_validate(task.output_writer.value).data == [1]


def test_a_failure_carries_the_servers_words(plugin: JobServerPlugin) -> None:
    """REQ-53: code and message of the job's own failure."""
    told = status_of(plugin, task_of(ReportJob()), state="failed", message="no figures")
    assert told.phase.is_failure
    assert told.err is not None
    assert (told.err.code, told.err.message) == ("JobFailed", "no figures")


# --- its calls -------------------------------------------------------------------------------


async def test_a_job_is_made_under_its_key_with_fingerprint_and_labels(
    job_server: EmbeddedJobServer, plugin: JobServerPlugin
) -> None:
    """CASE-223, REQ-25, REQ-67: the server takes no other token than the block's."""
    spec = ReportJob(day=3, quota="gpu", result="\u2028")
    told = await plugin.create(task_of(spec))
    assert isinstance(told, CreateResult)
    assert told.resource_meta == JobHandle(name=KEY)
    assert told.resource is not None
    assert told.resource.state == "running"
    (made,) = job_server.jobs()
    assert (made.name, made.fingerprint) == (KEY, FINGERPRINT)
    assert made.labels["task_run_id"] == "t"
    assert job_server.log("create")[0].body["spec"] == spec.model_dump(mode="json")
    assert (await plugin.get(GetView(JobHandle(name=KEY)))).state == "running"


async def test_a_spec_names_its_quota(plugin: JobServerPlugin) -> None:
    """REQ-73: which key of `resource_quotas` the job counts against."""
    wanted = await plugin.resource_requirements(task_of(ReportJob(quota="gpu")))
    assert wanted.namespace == "gpu"
    assert (await plugin.resource_requirements(task_of(ReportJob()))).namespace == "default"


async def test_find_tells_whose_job_it_met(
    job_server: EmbeddedJobServer, plugin: JobServerPlugin
) -> None:
    """REQ-34."""
    task = task_of(ReportJob(outcome="never"))
    assert await plugin.find(task) is None
    await plugin.create(task)
    job_server.behave(repeat="conflict")
    with pytest.raises(AlreadyExists):
        await plugin.create(task)
    found = await plugin.find(task)
    assert found is not None
    assert (found.resource_meta, found.fingerprint) == (JobHandle(name=KEY), FINGERPRINT)


async def test_a_batch_keeps_the_order_and_knows_what_is_missing(
    job_server: EmbeddedJobServer, plugin: JobServerPlugin
) -> None:
    """REQ-37."""
    await plugin.create(task_of(ReportJob(outcome="never")))
    for name in ("b", "c"):
        await plugin._api.put(f"/jobs/{name}", json={})  # pyright: ignore[reportPrivateUsage] - jobs of any name
    job_server.fault("batch", name="b", status=500)
    names = ["nobody", "c", "b", KEY]
    nobody, c, b, ours = await plugin.get_many([GetView(JobHandle(name=n)) for n in names])
    assert nobody is None
    assert isinstance(c, JobView)
    assert isinstance(b, RemoteSystemError)
    assert isinstance(ours, JobView)
    assert (c.name, ours.name) == ("c", KEY)
    assert len(job_server.log("batch")) == 1


async def test_delete_hands_the_reason_on_and_does_not_mind_a_job_that_is_over(
    job_server: EmbeddedJobServer, plugin: JobServerPlugin
) -> None:
    """REQ-43, REQ-44."""
    await plugin.create(task_of(ReportJob(outcome="never")))
    handle = JobHandle(name=KEY)
    await plugin.delete(DeleteView(handle, "deadline of 10s exceeded"))
    assert (await plugin.get(GetView(handle))).message == "deadline of 10s exceeded"
    await plugin.delete(DeleteView(handle, "again"))
    assert [entry.status for entry in job_server.log("delete")] == [202, 409]
    with pytest.raises(NotFound):
        await plugin.delete(DeleteView(JobHandle(name="nobody"), "x"))


# --- in the engine ---------------------------------------------------------------------------


class TestJobServer(OverHttp):
    entry = entry
    plugin_class = JobServerPlugin
    rows = (
        (JobView(name="x", state="queued"), Phase.QUEUED, None),
        (JobView(name="x", state="initializing"), Phase.INITIALIZING, None),
        (JobView(name="x", state="running"), Phase.RUNNING, None),
        (JobView(name="x", state="succeeded"), Phase.SUCCESS, None),
        (JobView(name="x", state="failed"), Phase.RETRYABLE_FAILURE, "user"),
        (JobView(name="x", state="cancelled"), Phase.ABORTED, None),
    )
    unknown = JobView(name="x", state="paused")

    @pytest.fixture(scope="class")
    @classmethod
    def service(cls, job_server_process: EmbeddedJobServer) -> JobServerService:
        job_server_process.behave(token=CANARY)
        return JobServerService(job_server_process)

    def connection(self, service: JobServerService, engine: Any, settings: EngineSettings) -> Any:
        service.server.behave(token=CANARY)
        return JobServer(
            base_url=HttpUrl(service.url),
            token=SecretStr(CANARY),
            engine=engine,
            settings=settings,
        )

    def job(self, outcome: Outcome = "succeed", *, result: str = "done") -> ReportJob:
        match outcome:
            case "fail":
                return ReportJob(seconds=0.1, outcome="fail", message=MESSAGE)
            case "never":
                return ReportJob(outcome="never")
            case "queued":
                return ReportJob(queued_seconds=600)
            case "succeed":
                return ReportJob(seconds=0.1, result=result)

    def throttled(self, hint: float | None) -> Reply:
        return Reply(429, {"message": "less"}, {} if hint is None else {"Retry-After": f"{hint:g}"})

    def unauthorized(self) -> Reply:
        return Reply(401, {"message": "the token is no longer valid"})

    def unknown_handle(self) -> JobHandle:
        return JobHandle(name="nobody")

    def handle_of(self, name: str) -> JobHandle:
        return JobHandle(name=name)
