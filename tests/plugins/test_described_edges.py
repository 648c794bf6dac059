"""Corners of what is described, not programmed, that no server of ours has: answers without JSON, absent inputs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import grpc
import httpx
import pytest
from pydantic import HttpUrl, SecretStr, ValidationError

from prefect_webapi import (
    AlreadyExists,
    Outgoing,
    Phase,
    RemoteClient,
    RemoteSystemError,
    Throttled,
)
from prefect_webapi.auth import ClientCredentials
from prefect_webapi.contract.task import TaskExecutionMetadata
from prefect_webapi_flyte.connector import _error_of  # pyright: ignore[reportPrivateUsage]
from prefect_webapi_flyte.models import fits
from prefect_webapi_http import HttpJob, HttpJobApi
from prefect_webapi_http.models import JobHandle
from prefect_webapi_http.plugin import HttpJobPlugin

URL = "http://localhost:1"


def plugin_on(answer: Callable[[httpx.Request], httpx.Response], **changes: Any) -> HttpJobPlugin:
    api = {
        "auth": "none",
        "create": {
            "path": "/jobs",
            "handle": {"id": {"header": "Location", "pattern": "/([^/]+)$"}},
        },
        "get": {"path": "/jobs/{{ .handle.id }}"},
        "delete": {"path": "/jobs/{{ .handle.id }}"},
        "status": {"pointer": "/state", "map": {"done": "success"}},
        **changes,
    }
    plugin = HttpJobPlugin(HttpJobApi(base_url=HttpUrl(URL), api=cast(Any, api)))
    plugin._client = RemoteClient(  # pyright: ignore[reportPrivateUsage]
        URL, transport=httpx.MockTransport(answer)
    )
    return plugin


def context(job: HttpJob | None = None, **more: Any) -> Any:
    told = TaskExecutionMetadata(generated_name="jabc", fingerprint="f" * 64)

    def spec(_: type[HttpJob]) -> HttpJob:
        return job or HttpJob()

    return SimpleNamespace(spec=spec, task_execution_metadata=told, **more)


async def test_a_job_that_a_header_names_needs_no_json() -> None:
    """SPEC 6.7, `create.handle`: else the job that was made is lost, or made again."""
    made = httpx.Response(201, text="Created", headers={"Location": f"{URL}/jobs/7"})
    plugin = plugin_on(lambda _: made)
    assert (await plugin.create(context())).resource_meta == JobHandle(fields={"id": "7"})
    await plugin.aclose()


async def test_a_job_that_the_answer_names_needs_json() -> None:
    plugin = plugin_on(
        lambda _: httpx.Response(201, text="Created"),
        create={"path": "/jobs", "handle": {"id": "/id"}},
    )
    with pytest.raises(RemoteSystemError, match="is not JSON"):
        await plugin.create(context())
    await plugin.aclose()


async def test_a_link_over_an_input_that_the_job_lacks_is_left_out() -> None:
    """It is an ornament: who can't be judged counts as lost, and is ended while it runs."""
    words = {"pointer": "/state", "map": {"busy": "running", "done": "success"}}
    links = {"page": URL + "/{{ .inputs.team }}", "job": URL + "/{{ .handle.id }}"}
    plugin = plugin_on(lambda _: httpx.Response(200), status={**words, "links": links})
    handle = JobHandle(fields={"id": "7"})
    info = plugin.status(context(resource={"state": "busy"}, resource_meta=handle))
    assert info.phase is Phase.RUNNING
    assert [link.uri for link in info.info.logs] == [f"{URL}/7"]
    await plugin.aclose()


@pytest.mark.parametrize(
    "inputs", [{"a": SecretStr("hidden")}, {"a": [{"b": SecretStr("hidden")}]}]
)
def test_a_secret_among_the_inputs_is_refused(inputs: dict[str, Any]) -> None:
    """It would be sent as asterisks."""
    with pytest.raises(ValidationError, match="holds a secret") as caught:
        HttpJob(inputs=inputs)
    assert "hidden" not in str(caught.value)


async def test_the_query_of_a_token_endpoint_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 6749, section 3.2."""
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(200, json={"access_token": "t"})

    transport = httpx.MockTransport(answer)

    def made(*_: object) -> httpx.AsyncBaseTransport:
        return transport

    monkeypatch.setattr("prefect_webapi.http.connection", made)
    fetch = ClientCredentials(f"{URL}/token?tenant=a%2Fb&v=2", "me", SecretStr("hidden"))
    await fetch()
    await fetch.aclose()
    assert asked == [f"{URL}/token?tenant=a%2Fb&v=2"]


COLLECTIONS: list[tuple[Any, str, bool]] = [
    ([[]], "list[list[integer]]", True),
    ([[1], []], "list[list[integer]]", True),
    ({"a": []}, "map[list[string]]", True),
    ({"a": [1]}, "map[list[string]]", False),
    ([], "map[integer]", False),
    ([1, "a"], "list[integer]", False),
    ({}, "map[integer]", True),
    (True, "integer", False),
]


@pytest.mark.parametrize(("value", "declared", "does"), COLLECTIONS)
def test_an_empty_collection_is_of_each_type_wherever_it_lies(
    value: Any, declared: str, does: bool
) -> None:
    """A job that succeeded would count as failed."""
    assert fits(value, declared) is does


@pytest.mark.parametrize(
    ("handle", "known"),
    [("{{ .inputs.name }}", None), ("{{ .perRetryUniqueKey }}", JobHandle(fields={"id": "jabc"}))],
)
async def test_a_job_met_under_a_name_that_is_not_its_key_is_not_taken_for_ours(
    handle: str, known: JobHandle | None
) -> None:
    """REQ-34: it may be anybody's, and would be deleted with ours."""
    plugin = plugin_on(
        lambda _: httpx.Response(409),
        create={"path": "/jobs/{{ .inputs.name }}", "handle": {"id": handle}},
    )
    with pytest.raises(AlreadyExists) as caught:
        await plugin.create(context(HttpJob(inputs={"name": "nightly"})))
    assert caught.value.handle == known
    await plugin.aclose()


async def test_a_header_is_sent_once_however_its_name_is_written() -> None:
    """The later word counts, and credentials over all."""
    seen: list[list[tuple[str, str]]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.multi_items())
        return httpx.Response(200, json={})

    async def auth(_: Outgoing) -> dict[str, str]:
        return {"Authorization": "Bearer fresh"}

    client = RemoteClient(
        URL, headers={"x-team": "a"}, auth=auth, transport=httpx.MockTransport(answer)
    )
    given = {"X-Team": "b", "content-type": "application/vnd.x+json", "authorization": "none"}
    await client.post("/jobs", json={}, headers=given)
    await client.aclose()
    ours = ("x-team", "content-type", "authorization")
    assert sorted(item for item in seen[0] if item[0] in ours) == [
        ("authorization", "Bearer fresh"),
        ("content-type", "application/vnd.x+json"),
        ("x-team", "b"),
    ]


def test_a_connector_that_throttles_with_unreadable_details_throttles() -> None:
    """REQ-83: else a create that was refused counts as one of unknown outcome."""
    error = SimpleNamespace(
        code=lambda: grpc.StatusCode.RESOURCE_EXHAUSTED,
        details=lambda: "too many",
        trailing_metadata=lambda: (("grpc-status-details-bin", b"\xff"),),
    )
    assert isinstance(_error_of(error), Throttled)
