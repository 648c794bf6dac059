"""The plugin for described services: three of them by the suite, and what descriptions may and may not say."""

from __future__ import annotations

import base64
import json
import re
from abc import abstractmethod
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from prefect.blocks.core import Block
from pydantic import HttpUrl, SecretStr, ValidationError

from prefect_webapi import (
    AlreadyExists,
    ConfigurationError,
    EngineSettings,
    ErrorKind,
    Guarantee,
    InvalidConfiguration,
    NotFound,
    Phase,
    PluginConfig,
    RemoteError,
    RemoteSystemError,
    RemoteUserError,
    Throttled,
)
from prefect_webapi.contract.faults import validate
from prefect_webapi.contract.plugin import overrides
from prefect_webapi.engine.contexts import DeleteView, GetView, StatusView
from prefect_webapi.engine.host import Host
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_http import HttpJob, HttpJobApi, JobApi, entry, models
from prefect_webapi_http.models import KEY, JobHandle
from prefect_webapi_http.plugin import HttpJobPlugin
from tests.plugins.jobserver import JobServerService
from tests.plugins.suite import CANARY, MESSAGE, BlockSuite, Outcome, OverHttp, Row, Service
from tests.servers.base import Fault, Reply, Server
from tests.servers.message_queue import MessageQueue
from tests.servers.task_farm import TEAM, TaskFarm
from tests.support.engine import QUICK, engine
from tests.support.witness import records

REPOSITORY = Path(__file__).parents[2]
APIS = Path(__file__).parent / "http_apis"
DOCUMENT = REPOSITORY / "docs/plugins/http.md"


def described(name: str, **changes: Any) -> dict[str, Any]:
    """A description of a service of these tests; `changes` replace what its keys (`a__b`: nested) lead to."""
    api: dict[str, Any] = yaml.safe_load((APIS / f"{name}.yaml").read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = api
        for parent in parents:
            place = place[parent]
        place[last] = value
    return api


class TestHttpJobApiBlock(BlockSuite):
    @pytest.fixture
    def block(self) -> type[Block]:
        return HttpJobApi


# --- three services by the suite -------------------------------------------------------------


class DescribedSuite(OverHttp):
    """The suite for a service that a file describes."""

    entry = entry
    plugin_class = HttpJobPlugin
    promise: ClassVar[Guarantee]

    @property
    def guarantee(self) -> Guarantee:
        return self.promise

    @abstractmethod
    def api(self, service: Any) -> tuple[str, Any]:
        """Its root address and its description."""

    def connection(
        self, service: Any, engine: PluginConfig, settings: EngineSettings, api: Any = None
    ) -> HttpJobApi:
        url, own = self.api(service)
        return HttpJobApi(
            base_url=HttpUrl(url),
            api=api or own,
            secret=SecretStr(CANARY),
            engine=engine,
            settings=settings,
        )

    @asynccontextmanager
    async def plugin_for(self, service: Any, api: Any) -> AsyncGenerator[HttpJobPlugin]:
        """A plugin for a description that differs from the suite's."""
        plugin = HttpJobPlugin(self.connection(service, PluginConfig(), EngineSettings(), api))
        yield plugin
        await plugin.aclose()

    @contextmanager
    def host_for(self, folder: Path, service: Any, api: Any) -> Generator[Host]:
        block = self.connection(service, PluginConfig(), EngineSettings.load(QUICK), api)
        with engine(folder, [entry], {"default": block}) as host:
            yield host

    def test_its_description_makes_the_promise(self, service: Service) -> None:
        block = self.connection(service, PluginConfig(), EngineSettings())
        assert block.api.guarantee == self.promise


def rows(where: str, words: Mapping[str, tuple[Phase, ErrorKind | None]]) -> Sequence[Row]:
    """A row per word, in a snapshot that has it where the description says."""
    return [(snapshot(where, word), phase, kind) for word, (phase, kind) in words.items()]


def snapshot(where: str, word: str) -> Any:
    return {"history": [[word]]} if where == "history" else {where: word}


class TestJobServer(DescribedSuite):
    """Exactly once by search: the server makes a job for each request, and finds them by key."""

    promise = "search"
    rows = rows(
        "state",
        {
            "queued": (Phase.QUEUED, None),
            "initializing": (Phase.INITIALIZING, None),
            "running": (Phase.RUNNING, None),
            "succeeded": (Phase.SUCCESS, None),
            "failed": (Phase.RETRYABLE_FAILURE, "user"),
            "cancelled": (Phase.ABORTED, None),
        },
    )
    unknown = snapshot("state", "paused")

    @pytest.fixture(scope="class")
    @classmethod
    def service(cls, job_server_process: EmbeddedJobServer) -> JobServerService:
        return JobServerService(job_server_process)

    def api(self, service: JobServerService) -> tuple[str, Any]:
        service.server.behave("search", token=CANARY)
        return service.url, APIS / "job_server.yaml"

    def job(self, outcome: Outcome = "succeed", *, result: str = "done") -> HttpJob:
        match outcome:
            case "fail":
                return HttpJob(inputs={"seconds": 0.1, "outcome": "fail", "message": MESSAGE})
            case "never":
                return HttpJob(inputs={"outcome": "never"})
            case "queued":
                return HttpJob(inputs={"queued_seconds": 600})
            case "succeed":
                return HttpJob(inputs={"seconds": 0.1, "result": result})

    def throttled(self, hint: float | None) -> Reply:
        return Reply(429, {"message": "less"}, {} if hint is None else {"Retry-After": f"{hint:g}"})

    def unauthorized(self) -> Reply:
        return Reply(401, {"message": "the token is no longer valid"})

    def unknown_handle(self) -> JobHandle:
        return JobHandle(fields={"id": "nobody"})

    def handle_of(self, name: str) -> JobHandle:
        return JobHandle(fields={"id": name})

    # --- what is particular to it ------------------------------------------------------------

    async def test_create_sends_inputs_fingerprint_and_labels_as_data(
        self, service: JobServerService, plugin: HttpJobPlugin
    ) -> None:
        """CASE-262, CASE-263, REQ-67: a value that looks like a template or holds quotes arrives as it is."""
        hostile = {"text": 'a "quote" {{ .inputs.seconds }} \'; drop', "big": 9_007_199_254_740_993}
        made = await plugin.create(self.view(HttpJob(inputs={"result": hostile, "seconds": 0})))
        assert made.fingerprint == "f" * 64
        (job,) = service.server.jobs()
        assert (job.result, job.fingerprint, job.key) == (hostile, "f" * 64, "jkey" + "0" * 22)
        assert job.labels["task_run_id"] == "t"
        assert job.link in str(
            plugin.status(StatusView(self.view(self.job()), made.resource_meta, made.resource))
        )

    async def test_a_search_takes_only_the_job_with_our_key(
        self, service: JobServerService, plugin: HttpJobPlugin
    ) -> None:
        """REQ-34: and says whose it is; a list without ours is nothing."""
        view = self.view(self.job("never"))
        assert await plugin.find(view) is None
        made = await plugin.create(view)
        found = await plugin.find(view)
        assert found is not None
        assert (found.resource_meta, found.fingerprint) == (made.resource_meta, "f" * 64)

    async def test_a_job_of_a_batch_may_be_an_error(
        self, service: JobServerService, plugin: HttpJobPlugin
    ) -> None:
        """REQ-37: by the same rules as a whole answer."""
        made = [await plugin.create(self.view(self.job("never"))) for _ in range(2)]
        names = [str(each.resource_meta.fields["id"]) for each in made]
        service.server.fault("batch", name=names[0], status=500)
        with_comma = JobHandle(fields={"id": f"{names[1]},{names[1]}"})
        handles = [each.resource_meta for each in made] + [with_comma]
        broken, read, unasked = await plugin.get_many([GetView(handle) for handle in handles])
        assert isinstance(broken, RemoteSystemError)
        assert read["name"] == names[1]
        assert unasked is None
        assert await plugin.get_many([GetView(with_comma)]) == [None]
        (call,) = service.server.log("batch")
        assert call.query == f"names={names[0]},{names[1]}"

    async def test_a_service_without_key_and_search_gets_one_create(
        self, service: JobServerService, tmp_path: Path
    ) -> None:
        """REQ-33: the instance's promise counts, not that of its class."""
        api = described("job_server", find=None, create__idempotency="none")
        assert JobApi.model_validate(api).guarantee == "at-most-once"
        service.spoil(Fault("create", None, carried_out=True))
        with self.host_for(tmp_path, service, api) as host:
            outcome = await self.outcome(host, self.job())
        assert outcome.info.err is not None
        assert outcome.info.err.code == "CreateOutcomeUnknown"
        assert (service.made(), len(service.times("create")), service.times("find")) == (1, 1, [])

    async def test_a_job_is_told_its_places_in_the_result_storage(
        self, service: JobServerService
    ) -> None:
        """REQ-70, REQ-66: as addresses."""
        spec = {"seconds": 0, "result": "{{ .outputPrefix }}"}
        api = described("job_server", create__body={"spec": spec})
        async with self.plugin_for(service, api) as plugin:
            await plugin.create(view := self.view(HttpJob()))
        (job,) = service.server.jobs()
        assert job.result == await view.data_store.uri(view.output_writer.output_prefix)

    async def test_a_job_counts_against_its_quota(self, plugin: HttpJobPlugin) -> None:
        """REQ-73."""
        wanted = await plugin.resource_requirements(self.view(HttpJob(quota="gpu")))
        assert wanted.namespace == "gpu"


class TestMessageQueue(DescribedSuite):
    """Exactly once by key: a header has it. Errors are answers with HTTP 200."""

    promise = "key"
    rows = (
        *rows(
            "state",
            {
                "WAITING": (Phase.QUEUED, None),
                "BUSY": (Phase.RUNNING, None),
                "CANCELLED": (Phase.ABORTED, None),
                "DONE": (Phase.RETRYABLE_FAILURE, "user"),  # without an exit of 0
            },
        ),
        ({"state": "DONE", "exit": 0}, Phase.SUCCESS, None),
        ({"state": "DONE", "exit": False}, Phase.RETRYABLE_FAILURE, "user"),
        ({"state": "DONE", "exit": 3, "says": "no"}, Phase.RETRYABLE_FAILURE, "user"),
    )
    unknown = snapshot("state", "LOST")

    @pytest.fixture(scope="class")
    @classmethod
    def service(cls) -> Iterator[MessageQueue]:
        with MessageQueue(api_key=CANARY) as server:
            yield server

    def api(self, service: Server) -> tuple[str, Any]:
        return f"{service.url}/v1", (APIS / "message_queue.yaml").read_text()

    def job(self, outcome: Outcome = "succeed", *, result: str = "done") -> HttpJob:
        return HttpJob(
            inputs={
                "waits": 600 if outcome == "queued" else 0,
                "takes": 600 if outcome == "never" else 0.1,
                "exit": 1 if outcome == "fail" else 0,
                "says": MESSAGE if outcome == "fail" else "",
                "rows": [result],
            }
        )

    def throttled(self, hint: float | None) -> Reply:
        wait = {} if hint is None else {"retry_ms": hint * 1000}
        return Reply(200, {"ok": False, "error": {"kind": "busy", "text": "less", **wait}})

    def unauthorized(self) -> Reply:
        return Reply(200, {"ok": False, "error": {"kind": "denied", "text": "old key"}})

    def unknown_handle(self) -> JobHandle:
        return JobHandle(fields={"number": 9_007_199_254_740_999_999})

    def handle_of(self, name: str) -> JobHandle:
        return JobHandle(fields={"number": int(name) if name.isdigit() else name})

    # --- what is particular to it ------------------------------------------------------------

    async def test_an_id_of_19_digits_stays_exact(
        self, service: MessageQueue, tmp_path: Path
    ) -> None:
        """CASE-256: from the answer over the ledger to the next request."""
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, self.job(result="x"))
        assert outcome.value == ["x"]
        (record,) = await records(tmp_path)
        assert record.handle == '{"fields":{"number":9007199254740993001}}'
        assert service.calls("get")[0].path == "/v1/messages/9007199254740993001"

    async def test_an_input_that_is_missing_is_the_users_error(
        self, service: MessageQueue, tmp_path: Path
    ) -> None:
        """CASE-261: before anything is sent."""
        api = described("message_queue", create__body__work={"waits": "{{ .inputs.wait }}"})
        with self.host_for(tmp_path, service, api) as host:
            outcome = await self.outcome(host, self.job())
        assert outcome.info.phase is Phase.PERMANENT_FAILURE
        assert outcome.info.kind == "user"
        assert "no 'wait' among" in outcome.info.reason
        assert service.seen == []

    async def test_an_error_with_http_200_is_an_error(
        self, service: MessageQueue, plugin: HttpJobPlugin
    ) -> None:
        """REQ-03: each kind by its rule, in the service's words."""
        with pytest.raises(RemoteUserError, match="takes must be float") as wrong:
            await plugin.create(self.view(HttpJob(inputs={**self.job().inputs, "takes": "long"})))
        assert not wrong.value.job_may_exist
        with pytest.raises(NotFound, match="no message"):
            await plugin.get(GetView(self.unknown_handle()))
        await plugin.create(self.view(self.job()))
        with pytest.raises(AlreadyExists, match="another message"):
            await plugin.create(self.view(self.job("never")))
        assert service.made() == 1

    async def test_delete_hands_the_reason_on(
        self, service: MessageQueue, plugin: HttpJobPlugin
    ) -> None:
        """REQ-44."""
        made = await plugin.create(self.view(self.job("never")))
        await plugin.delete(DeleteView(made.resource_meta, "deadline of 10s exceeded"))
        job = await plugin.get(GetView(made.resource_meta))
        told = plugin.status(StatusView(self.view(self.job()), made.resource_meta, job))
        assert (told.phase, told.reason) == (Phase.ABORTED, "deadline of 10s exceeded")

    async def test_links_and_times_are_told(
        self, service: MessageQueue, plugin: HttpJobPlugin
    ) -> None:
        made = await plugin.create(self.view(self.job("never")))
        told = plugin.status(StatusView(self.view(self.job()), made.resource_meta, made.resource))
        assert {log.name: log.uri for log in told.info.logs} == {
            "Message": f"{service.url}/ui/9007199254740993001",
            "Rows": "https://rows.example.com/?of=9007199254740993001",
        }
        assert told.info.occurred_at == datetime.fromtimestamp(1_700_000_000, UTC)

    @pytest.mark.parametrize(
        "paging",
        [{"next": "/next"}, {"next": "/cursor", "param": "cursor"}, {"offset": "offset"}],
        ids=str,
    )
    async def test_a_result_in_pages_is_joined(
        self, service: MessageQueue, paging: dict[str, Any]
    ) -> None:
        api = described("message_queue", outputs__paging=paging)
        rows = [{"row": nth} for nth in range(5)]
        async with self.plugin_for(service, api) as plugin:
            assert await self.result(plugin, rows) == rows

    async def result(self, plugin: HttpJobPlugin, rows: list[Any], limit: int = -1) -> Any:
        """What `outputs` finds of a job that is over at once."""
        spec = HttpJob(inputs={**self.job().inputs, "takes": 0, "rows": rows})
        view = replace(self.view(spec), max_dataset_size_bytes=limit)
        made = await plugin.create(view)
        return await plugin.outputs(StatusView(view, made.resource_meta, made.resource))

    async def test_pages_are_counted_while_they_come(
        self, service: MessageQueue, plugin: HttpJobPlugin
    ) -> None:
        """REQ-69: the rest is not fetched."""
        with pytest.raises(RemoteUserError) as caught:
            await self.result(plugin, ["x" * 100] * 20, limit=300)
        assert caught.value.code == "OutputSizeExceeded"
        assert len(service.times("outputs")) == 2

    @pytest.mark.parametrize(
        ("following", "code"),
        [
            ("https://elsewhere.example.com/rows", "ForeignPage"),
            ("//elsewhere.example.com/v1/rows", "ForeignPage"),
            ("/other/rows", "ForeignPage"),
            ("/v1/messages/1/rows", "PagesInACircle"),
        ],
    )
    async def test_a_next_page_elsewhere_or_in_a_circle_is_refused(
        self, service: MessageQueue, plugin: HttpJobPlugin, following: str, code: str
    ) -> None:
        """CASE-255: credentials go to no other place."""
        page = {"ok": True, "rows": [1], "next": following}
        service.spoil(Fault("outputs", Reply(200, page), times=100))
        with pytest.raises(RemoteUserError) as caught:
            await self.result(plugin, [])
        assert caught.value.code == code

    @pytest.mark.parametrize("status", [301, 302, 307, 308])
    async def test_the_target_of_a_redirect_hears_nothing(
        self, service: MessageQueue, plugin: HttpJobPlugin, status: int
    ) -> None:
        """CASE-255."""
        away = Reply(status, b"", {"Location": f"{service.url}/v1/elsewhere"})
        service.spoil(Fault("create", away))
        with pytest.raises(RemoteUserError, match="redirects"):
            await plugin.create(self.view(self.job()))
        assert len(service.seen) == 1

    @pytest.mark.parametrize(
        "body", [b"<html>Hello</html>", b"", b'{"ok": true, "mess', b'{"ok": true}', b"\xe4"]
    )
    async def test_an_answer_without_sense_is_the_services_fault(
        self, service: MessageQueue, plugin: HttpJobPlugin, body: bytes
    ) -> None:
        """CASE-254: although it comes with HTTP 200, and the job may have been made."""
        service.spoil(Fault(None, Reply(200, body), times=2))
        with pytest.raises(RemoteSystemError) as made:
            await plugin.create(self.view(self.job()))
        assert made.value.job_may_exist
        with pytest.raises(RemoteSystemError):
            await plugin.get(GetView(self.unknown_handle()))

    @pytest.mark.parametrize("body", [[], {"message": {"id": True}}, {"message": {"id": 1.5}}])
    async def test_an_answer_that_names_no_job_makes_no_second_one(
        self, service: MessageQueue, tmp_path: Path, body: Any
    ) -> None:
        """CASE-254."""
        service.spoil(Fault("create", Reply(200, body), carried_out=True))
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, self.job())
        assert outcome.info.phase is Phase.SUCCESS, outcome.info
        assert (service.made(), len(service.times("create"))) == (1, 2)

    @pytest.mark.parametrize(
        ("wait", "told", "expected"),
        [
            ({"pointer": "/for"}, {"for": 1.5}, 1.5),
            ({"pointer": "/for", "unit": "ms"}, {"for": "250"}, 0.25),
            ({"pointer": "/until", "unit": "date"}, {"until": "2001-01-01T00:00:00Z"}, 0),
            ({"pointer": "/until", "unit": "date"}, {"until": "soon"}, None),
            ({"pointer": "/for"}, {}, None),
            ({"header": "X-Wait"}, {}, 7),
        ],
    )
    async def test_the_wait_is_found_where_the_description_says(
        self, service: MessageQueue, wait: Any, told: dict[str, Any], expected: float | None
    ) -> None:
        """REQ-15."""
        rule = {"status": [420], "wait": wait, "pattern": "calm"}
        service.spoil(Fault("get", Reply(420, {"say": "calm", **told}, {"X-Wait": "7"})))
        async with self.plugin_for(service, described("message_queue", throttle=[rule])) as plugin:
            with pytest.raises(Throttled, match="calm") as caught:
                await plugin.get(GetView(self.unknown_handle()))
        hint = caught.value.retry_after
        assert (None if hint is None else hint.total_seconds()) == expected

    async def test_a_rule_about_what_is_not_there_does_not_fit(self, service: MessageQueue) -> None:
        rule = {"pointer": "/error", "pattern": ".", "means": "user"}
        async with self.plugin_for(service, described("message_queue", errors=[rule])) as plugin:
            await plugin.create(self.view(self.job()))

    async def test_a_rule_may_know_that_nothing_was_made(self, service: MessageQueue) -> None:
        """REQ-83."""
        rule = {"status": [503], "means": "system", "code": "Closed", "jobMayExist": False}
        service.spoil(Fault("create", Reply(503, {})))
        async with self.plugin_for(service, described("message_queue", errors=[rule])) as plugin:
            with pytest.raises(RemoteSystemError) as caught:
                await plugin.create(self.view(self.job()))
        assert (caught.value.code, caught.value.job_may_exist) == ("Closed", False)


class TestTaskFarm(DescribedSuite):
    """Exactly once by key: the name is ours, the id is the service's. Tokens by OAuth 2."""

    promise = "key"
    has_tokens = True
    rows = rows(
        "history",
        {
            "SOWN": (Phase.QUEUED, None),
            "GROWING": (Phase.RUNNING, None),
            "RIPE": (Phase.SUCCESS, None),
            "BROKEN": (Phase.PERMANENT_FAILURE, "system"),
            "FELLED": (Phase.ABORTED, None),
        },
    )
    unknown = snapshot("history", "STRUCK")

    @pytest.fixture(scope="class")
    @classmethod
    def service(cls) -> Iterator[TaskFarm]:
        with TaskFarm(secret=CANARY) as server:
            yield server

    def api(self, service: Server) -> tuple[str, Any]:
        return service.url, described("task_farm", auth__tokenUrl=f"{service.url}/oauth/token")

    def job(self, outcome: Outcome = "succeed", *, result: str = "done") -> HttpJob:
        return HttpJob(
            inputs={
                "sown": 600 if outcome == "queued" else 0,
                "growing": 600 if outcome == "never" else 0.1,
                "breaks": MESSAGE if outcome == "fail" else "",
                "yields": [result],
            }
        )

    def throttled(self, hint: float | None) -> Reply:
        headers = {} if hint is None else {"X-Wait": f"{hint:g}"}
        return Reply(400, {"code": "SLOW", "text": "less"}, headers)

    def unauthorized(self) -> Reply:
        return Reply(401, {"code": "LOCKED", "text": "the token is not good"})

    def unknown_handle(self) -> JobHandle:
        return JobHandle(fields={"id": "team x/nobody"})

    def handle_of(self, name: str) -> JobHandle:
        return JobHandle(fields={"id": name})

    # --- what is particular to it ------------------------------------------------------------

    async def test_an_id_from_location_is_decoded_and_encoded_again(
        self, service: TaskFarm, plugin: HttpJobPlugin
    ) -> None:
        """CASE-257: blanks, `/`, `?`, `#` and `%` stay inside their segment, and the right task ends."""
        made = await plugin.create(self.view(self.job("never")))
        key = "jkey" + "0" * 22
        assert made.resource_meta.fields == {"id": f"{TEAM} {key}"}
        job = await plugin.get(GetView(made.resource_meta))
        assert job["ids"]["name"] == key
        (read,) = await plugin.get_many([GetView(made.resource_meta)])
        assert read["ids"] == job["ids"]
        await plugin.delete(DeleteView(made.resource_meta, "enough"))
        assert service.live() == 0

    async def test_a_search_goes_through_the_pages(
        self, service: TaskFarm, plugin: HttpJobPlugin
    ) -> None:
        """REQ-34: what the service gives beside our job is not taken for it."""
        view = self.view(self.job("never"))
        made = await plugin.create(view)
        for nth in range(4):
            await plugin._client.put(f"/farm/tasks/j{nth}", json=service.calls("create")[0].json)  # pyright: ignore[reportPrivateUsage] - other people's tasks
        found = await plugin.find(view)
        assert found is not None
        assert found.resource_meta == made.resource_meta
        assert len(service.calls("find")) == 3

    async def test_a_name_that_is_taken_leads_to_the_job_that_has_it(
        self, service: TaskFarm, tmp_path: Path
    ) -> None:
        """REQ-34: the answer to the first create was lost, the second one is a 409 without an id."""
        service.spoil(Fault("create", None, carried_out=True))
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, self.job(result="wheat"))
        assert outcome.value == ["wheat"]
        assert [call.status for call in service.calls("create")] == [None, 409]

    async def test_lines_are_joined_by_the_link_header(
        self, service: TaskFarm, tmp_path: Path
    ) -> None:
        yields = ["a", "b", "c"]
        with self.host(tmp_path, service) as host:
            job = HttpJob(inputs={**self.job().inputs, "yields": yields})
            outcome = await self.outcome(host, job)
        assert outcome.value == yields, outcome.info
        assert len(service.calls("outputs")) == 3

    async def test_progress_is_told(self, plugin: HttpJobPlugin) -> None:
        made = await plugin.create(self.view(self.job("never")))
        job = await plugin.get(GetView(made.resource_meta))
        told = plugin.status(StatusView(self.view(self.job()), made.resource_meta, job))
        assert told.info.custom_info == {"progress": [2, 3]}

    async def test_a_handle_of_templates_answers_a_name_that_is_taken(
        self, service: TaskFarm
    ) -> None:
        """REQ-34: without any search."""
        api = self.api(service)[1]
        api["create"]["handle"] = {"id": f"{TEAM} {KEY}"}
        api["find"] = None
        async with self.plugin_for(service, api) as plugin:
            view = self.view(self.job("never"))
            made = await plugin.create(view)
            with pytest.raises(AlreadyExists) as caught:
                await plugin.create(view)
        assert caught.value.handle == made.resource_meta


# --- descriptions ----------------------------------------------------------------------------


def faults_of(api: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        JobApi.model_validate(api)
    return "\n".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in caught.value.errors())


UNWORKABLE: list[tuple[dict[str, Any], str]] = [
    ({"status__map": {"a": "queued"}}, "status.map: .*never end"),
    ({"status__map": {"a": "sucess"}}, "status.map.a.phase: .*'success'"),
    ({"status__default": "success"}, "status.default: "),
    ({"status__pointer": "state"}, "status.pointer: .*RFC 6901"),
    ({"get__path": "jobs"}, "get.path: .*begins with /"),
    ({"get__path": "/jobs?x=1"}, "get.path: .*`query`"),
    ({"get__path": "/jobs/{{ .handle.name }}"}, "get: {{ .handle.name }} means nothing here"),
    ({"get__path": "/jobs/{{ .inputs.name }}"}, "get: {{ .inputs.name }} means nothing here"),
    ({"get__path": "/jobs/{{ .handle.id }"}, "get.path: .*is no template"),
    ({"create__body": {"a": "{{ .input.x }}"}}, "create: {{ .input.x }} means nothing here"),
    ({"create__body": {"{{ .inputs.x }}": 1}}, "create.body: .*can't be a template"),
    ({"create__handle": {}}, "create.handle: .*at least 1"),
    ({"create__handle": {"name": "/name"}}, "get.batch: needs a field `id`"),
    ({"create__handle": {"id": {"header": "X", "pattern": "x"}}}, "one group"),
    ({"create__handle": {"id": {"header": "X"}}}, "find.handle: is missing"),
    ({"find__handle": {"nr": "/nr"}}, "find.handle: needs the fields of create's: id"),
    ({"create__idempotency": {"body": "/a/b"}}, "create: .*no such place for the key"),
    ({"create__idempotency": {"body": "/a", "query": "b"}}, "exactly one of header, body"),
    ({"create__idempotency": "path"}, "create.path: has no job key"),
    ({"create__idempotency": "none"}, "find: looks for a key that create does not send"),
    (
        {"create__idempotency": "none", "create__honoursKey": True},
        "create.honoursKey: .*no key is sent",
    ),
    ({"outputs__paging": {"linkHeader": True}}, "outputs.paging: needs a request"),
    ({"find__paging": {}}, "find.paging: .*exactly one of next, linkHeader, offset"),
    ({"find__paging": {"offset": "a", "param": "b"}}, "find.paging: .*param belongs to next"),
    ({"errors": [{"means": "user"}]}, "errors.0: .*fits every answer"),
    ({"errors": [{"means": "user", "pattern": "("}]}, "errors.0.pattern: "),
    ({"errors": [{"means": "user", "status": [400], "pointer": "/a"}]}, "needs a pattern"),
    (
        {"errors": [{"means": "auth", "status": [419], "jobMayExist": True}]},
        "errors.0: .*it means `system`",
    ),
    ({"throttle": [{"status": [420], "wait": {}}]}, "throttle.0.wait: .*exactly one of"),
    ({"auth": "sigv4"}, "auth: .*'sigv4'.*'oauth2ClientCredentials'"),
    ({"auth": "mtls"}, "auth: .*'mtls'"),
    ({"get__batch__size": 1}, "get.batch.size: .*greater than or equal to 2"),
    ({"headers": {"Authorization": "Bearer x"}}, "headers: .*`auth`"),
    ({"statuses": {}}, "statuses: Extra inputs"),
    ({"visibilityDelay": "soon"}, "visibilityDelay: "),
]


@pytest.mark.parametrize(
    ("changes", "told"),
    UNWORKABLE,
    ids=[f"{nth}-{told[:16]}" for nth, (_, told) in enumerate(UNWORKABLE)],
)
def test_a_description_that_can_not_work_is_refused(changes: dict[str, Any], told: str) -> None:
    """REQ-09: each fault at its place, in words that say what is wanted."""
    assert re.search(told, faults_of(described("job_server", **changes)))


def test_all_faults_of_a_description_are_told_at_once() -> None:
    api = described(
        "job_server",
        status__pointer="state",
        get__path="jobs",
        create__honourKey=True,
        auth="sigv4",
    )
    told = faults_of(api)
    assert [word in told for word in ("status.pointer", "get.path", "honourKey", "sigv4")] == [
        True
    ] * 4
    contradictions = faults_of(
        described("job_server", create__idempotency="none", delete__path="/{{ .id }}")
    )
    assert len(contradictions.splitlines()) == 2


def test_the_description_in_the_documentation_works() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert JobApi.model_validate(text).guarantee == "key"


def test_the_documentation_names_every_key() -> None:
    """And no model has a key that it does not name."""
    told = DOCUMENT.read_text()
    missing = [
        f"{model.__name__}.{field.alias}"
        for model in (JobApi, *vars(models).values())
        if isinstance(model, type) and issubclass(model, models.Part)
        for field in model.model_fields.values()
        if field.alias and not re.search(rf"\b{field.alias}\b", told)
    ]
    assert missing == []


def test_faults_are_told_to_people_without_noise() -> None:
    """REQ-09: one line per fault, and no value where the fault lies between values."""
    api = described(
        "job_server", create__handle={"id": "name"}, create__idempotency="nowhere", get__path="jobs"
    )
    with pytest.raises(InvalidConfiguration) as caught:
        validate(JobApi, api)
    assert [fault.path for fault in caught.value.faults] == [
        "create.idempotency.text",
        "create.handle.id.text",
        "get.path",
    ]
    with pytest.raises(InvalidConfiguration) as caught:
        validate(JobApi, described("job_server", create__idempotency="none"))
    assert [fault.given for fault in caught.value.faults] == [""]


def test_a_word_that_is_written_twice_is_refused() -> None:
    text = (APIS / "job_server.yaml").read_text().replace("failed:", "queued:")
    assert "'queued' is written twice" in faults_of(text)


def test_a_description_may_be_text_a_file_or_fields() -> None:
    path = APIS / "task_farm.yaml"
    text = path.read_text().replace("TOKEN_URL", "https://x/token")
    fields = described("task_farm", auth__tokenUrl="https://x/token")
    assert JobApi.model_validate(text) == JobApi.model_validate(fields)
    assert JobApi.model_validate(APIS / "job_server.yaml").auth.type == "bearer"


@pytest.mark.parametrize("name", ["job_server", "message_queue", "task_farm"])
def test_a_description_survives_being_saved(name: str) -> None:
    """A block document holds it as JSON."""
    api = described(name)
    if name == "task_farm":
        api["auth"]["tokenUrl"] = "https://x/token"
    block = HttpJobApi(base_url=HttpUrl("https://x"), api=api, secret=SecretStr("s"))  # pyright: ignore[reportArgumentType] - fields as they come from a file
    for by_alias in (True, False):
        saved = block.api.model_dump_json(by_alias=by_alias)
        assert JobApi.model_validate(json.loads(saved)) == block.api


@pytest.mark.parametrize(
    ("find", "honours", "batch", "promise", "lacks"),
    [
        (True, False, True, "search", {"outputs"}),
        (False, True, True, "key", {"outputs", "find"}),
        (True, True, False, "key", {"outputs", "get_many"}),
        (False, False, False, "at-most-once", {"outputs", "get_many", "find"}),
    ],
)
def test_the_description_makes_the_promise(
    find: bool, honours: bool, batch: bool, promise: str, lacks: set[str]
) -> None:
    """REQ-33: what it does not offer, the engine does not ask for."""
    changes: dict[str, Any] = {} if find else {"find": None}
    changes |= {} if batch else {"get__batch": None}
    api = described("job_server", create__honoursKey=honours, visibilityDelay="3s", **changes)
    plugin = HttpJobPlugin(connection_to("https://x", api))
    assert (plugin.guarantee, set(plugin.lacks)) == (promise, lacks)
    assert (plugin.max_batch, plugin.visibility_delay) == (50 if batch else 1, timedelta(seconds=3))
    assert overrides(plugin, "find") == find


# --- connections -----------------------------------------------------------------------------


def connection_to(url: str, api: Any, secret: str = CANARY, **more: Any) -> HttpJobApi:
    return HttpJobApi(base_url=HttpUrl(url), api=api, secret=SecretStr(secret), **more)


@pytest.mark.parametrize("auth", ["bearer", {"type": "basic", "user": "u"}], ids=str)
def test_credentials_in_the_clear_are_refused_when_the_plugin_is_loaded(auth: Any) -> None:
    """CASE-258: unless the block allows it."""
    api = described("job_server", auth=auth)
    with pytest.raises(ConfigurationError, match="allow_insecure"):
        HttpJobPlugin(connection_to("http://jobs.example.com", api))
    allowed = EngineSettings(allow_insecure=True)
    HttpJobPlugin(connection_to("http://jobs.example.com", api, settings=allowed))
    HttpJobPlugin(
        connection_to("http://jobs.example.com", described("job_server", auth="none"), "")
    )


@pytest.mark.parametrize(
    ("auth", "name", "value"),
    [
        ("bearer", "authorization", f"Bearer {CANARY}"),
        (
            {"type": "basic", "user": "ann"},
            "authorization",
            f"Basic {base64.b64encode(f'ann:{CANARY}'.encode()).decode()}",
        ),
        ({"type": "header", "name": "X-Key"}, "x-key", CANARY),
    ],
    ids=str,
)
async def test_the_secret_goes_where_the_description_says(auth: Any, name: str, value: str) -> None:
    with MessageQueue() as server:
        api = described("message_queue", auth=auth, headers={"X-Team": "blue"})
        plugin = HttpJobPlugin(connection_to(server.url, api))
        with pytest.raises(RemoteError):
            await plugin.get(GetView(JobHandle(fields={"number": 1})))
        await plugin.aclose()
    (call,) = server.seen
    assert (call.headers[name], call.headers["x-team"]) == (value, "blue")


@pytest.mark.parametrize(("auth", "secret"), [("none", "s"), ("bearer", "")])
def test_a_secret_without_use_and_a_use_without_secret_are_refused(auth: str, secret: str) -> None:
    with pytest.raises(ValidationError, match=f"api.auth is {auth}"):
        connection_to("https://x", described("job_server", auth=auth), secret)


def test_the_entry_serves_one_task_type() -> None:
    """REQ-49."""
    assert (entry.id, entry.supported_task_types) == ("http", ["http-job"])
    assert entry.spec is HttpJob
