"""The client against a real server over a socket; `httpx.MockTransport` only for what no server here does."""

from __future__ import annotations

import asyncio
import base64
import gzip
import logging
import pickle
import socket
import traceback
import tracemalloc
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
from pydantic import SecretStr

from prefect_webapi.contract.errors import (
    AlreadyExists,
    AuthError,
    BadTaskSpecification,
    ConfigurationError,
    NotFound,
    OutcomeUnknown,
    RemoteError,
    RemoteSystemError,
    RemoteUserError,
    SecretNotFound,
    Throttled,
)
from prefect_webapi.http import (
    Answer,
    Outgoing,
    RemoteClient,
    classify,
    error_of_status,
    path,
    retry_after,
)
from prefect_webapi.testing import EmbeddedJobServer
from tests.support.jobserver import TOKEN
from tests.support.waiting import eventually

FIND = {"key": "nobody's"}
MILLISECONDS_300 = timedelta(milliseconds=300)


@pytest.fixture
async def client(job_server: EmbeddedJobServer) -> AsyncIterator[RemoteClient]:
    client = RemoteClient(job_server.url, token=SecretStr(TOKEN), max_answer_bytes=1_000_000)
    yield client
    await client.aclose()


@asynccontextmanager
async def answering(status: int, text: str, **arguments: Any) -> AsyncGenerator[RemoteClient]:
    """A client of a service that says the same to everybody."""
    service = httpx.MockTransport(lambda request: httpx.Response(status, text=text))
    client = RemoteClient("https://jobs.example.com", transport=service, **arguments)
    try:
        yield client
    finally:
        await client.aclose()


async def failure(call: Any) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        await call
    return caught.value


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# --- what is sent ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a/b", "a?b=c", "a#b", "100%", "%2F", "a b", "ä/漢", "..x", "a;b"]
)
async def test_an_id_of_any_characters_reaches_the_right_job(
    job_server: EmbeddedJobServer, client: RemoteClient, name: str
) -> None:
    """CASE-257."""
    await client.put(path("jobs", name), json={"spec": {"seconds": 60}})
    assert (await client.get(path("jobs", name)))["name"] == name
    await client.delete(path("jobs", name), params={"reason": "a & b = c + d", "absent": None})
    assert [job.name for job in job_server.jobs()] == [name]
    assert job_server.log("delete")[0].name == name
    assert job_server.log("delete")[0].query == "reason=a & b = c + d"


@pytest.mark.parametrize("segment", ["", ".", ".."])
def test_a_segment_that_would_change_the_path_is_refused(segment: str) -> None:
    """CASE-257: dots are resolved by clients and proxies, encoded or not."""
    with pytest.raises(RemoteUserError, match="can't be part of a path"):
        path("jobs", segment)


async def test_cookies_of_the_service_are_sent_back() -> None:
    """Balancers that keep a client at one server do it so."""
    sent: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request.headers.get("cookie"))
        return httpx.Response(200, json={}, headers={"set-cookie": "server=7; Path=/"})

    client = RemoteClient("https://jobs.example.com", transport=httpx.MockTransport(answer))
    await client.get("/a")
    await client.get("/b")
    assert sent == [None, "server=7"]


async def test_a_packed_answer_is_unpacked() -> None:
    packed = httpx.ByteStream(gzip.compress(b'{"state": "running"}'))

    def answer(request: httpx.Request) -> httpx.Response:
        assert "gzip" in request.headers["accept-encoding"]
        return httpx.Response(200, headers={"content-encoding": "gzip"}, stream=packed)

    client = RemoteClient("https://jobs.example.com", transport=httpx.MockTransport(answer))
    assert await client.get("/jobs/x") == {"state": "running"}


@asynccontextmanager
async def forwarding() -> AsyncGenerator[tuple[str, list[str]]]:
    """A proxy that answers by itself: its address, and the first line of each request."""
    asked: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).decode().splitlines()[0])
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", asked


@pytest.mark.parametrize("scheme", ["", "http://"])
async def test_the_environments_proxy_is_used(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    async with forwarding() as (address, asked):
        monkeypatch.setenv("http_proxy", scheme + address)
        monkeypatch.setenv("no_proxy", "127.0.0.1,inside.example.com")
        for host in ("jobs.example.com", "outside.example.com"):
            client = RemoteClient(f"http://{host}")
            await client.get("/jobs")
            await client.aclose()
            assert asked.pop() == f"GET http://{host}/jobs HTTP/1.1"


async def test_no_proxy_is_used_where_the_environment_says_so(
    monkeypatch: pytest.MonkeyPatch, job_server: EmbeddedJobServer
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    client = RemoteClient(job_server.url, token=SecretStr(TOKEN))
    await client.put("/jobs/x", json={"spec": {"seconds": 60}})
    assert [job.name for job in job_server.jobs()] == ["x"]
    await client.aclose()


def test_a_proxy_that_can_not_work_is_refused_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "ftp://user:hunter2@proxy.example.com")
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(ConfigurationError, match="HTTPS_PROXY=") as caught:
        RemoteClient("https://jobs.example.com")
    assert "hunter2" not in str(caught.value)


async def test_whole_numbers_stay_exact(
    job_server: EmbeddedJobServer, client: RemoteClient
) -> None:
    """CASE-256: 19 digits are more than a float holds."""
    number = 9_007_199_254_740_993_123
    job_server.fault("get", status=200, body={"id": number})
    assert (await client.get("/jobs/x"))["id"] == number
    await client.put("/jobs/y", json={"spec": {"result": number}})
    assert job_server.log("create")[0].body["spec"]["result"] == number


async def test_a_query_in_the_path_is_kept(
    job_server: EmbeddedJobServer, client: RemoteClient
) -> None:
    """Services give the next page as an address."""
    await client.get("/jobs?names=a%26b")
    await client.get("/jobs?names=a", params={"more": "c"})
    assert [entry.query for entry in job_server.log("batch")] == ["names=a&b", "names=a&more=c"]


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ('<https://x/?p=2,3>; rel="next", <https://x/?p=9>; rel="last"', "https://x/?p=2,3"),
        ('<https://x/?p=1>; rel="prev"', None),
        ("", None),
    ],
)
def test_the_next_page_is_read_from_the_link_header(link: str, expected: str | None) -> None:
    assert Answer(200, {"link": link}, b"").next_page == expected


@pytest.mark.parametrize("data", [{1, 2}, float("nan"), "\ud800"])
async def test_what_has_no_json_form_is_refused_before_any_request(
    job_server: EmbeddedJobServer, client: RemoteClient, data: Any
) -> None:
    """SPEC 2.5: known before any request."""
    error = await failure(client.put("/jobs/x", json={"spec": {"result": data}}))
    assert isinstance(error, BadTaskSpecification)
    assert not error.job_may_exist
    assert not job_server.log()


async def test_each_request_carries_a_fresh_token(job_server: EmbeddedJobServer) -> None:
    """REQ-63: what the hook returns is used once."""
    tokens = iter(["first", "second"])

    async def fresh(_: Outgoing) -> Mapping[str, str]:
        return {"Authorization": f"Bearer {next(tokens)}"}

    client = RemoteClient(job_server.url, auth=fresh)
    for token in ("first", "second"):
        job_server.behave(token=token)
        assert await client.put("/jobs/x", json={})
    await client.aclose()


async def test_a_token_source_that_fails_proves_that_nothing_was_sent(
    job_server: EmbeddedJobServer,
) -> None:
    """REQ-83: even where the token source's own outcome is unknown."""

    async def slow(_: Outgoing) -> Mapping[str, str]:
        raise TimeoutError

    client = RemoteClient(job_server.url, auth=slow)
    error = await failure(client.put("/jobs/x", json={}))
    assert isinstance(error, RemoteSystemError)
    assert not error.job_may_exist
    assert not job_server.log()
    await client.aclose()


# --- what comes back -------------------------------------------------------------------------


def test_a_judge_finds_what_is_there_and_fails_at_nothing() -> None:
    """CASE-254: an answer may hold anything where a code is looked for."""
    answer = Answer(400, {}, b'{"errors": [{"code": 7}], "text": "t"}')
    assert answer.at("errors", 0, "code") == 7
    assert answer.at() == {"errors": [{"code": 7}], "text": "t"}
    for steps in [("none",), ("errors", 1), ("errors", "code"), ("text", "code"), ("errors", 0, 0)]:
        assert answer.at(*steps) is None
    for body in (b"<html>", b"", b"\xe4", b'{"errors": [', b"[" * 100_000):
        assert Answer(502, {}, body).at("errors") is None


@pytest.mark.parametrize("status", [404, 410])
def test_a_404_of_another_server_tells_nothing_of_a_job(status: int) -> None:
    """REQ-58: a proxy's page is no job that vanished."""
    page = Answer(status, {}, b"<html>Not Found</html>")
    assert isinstance(error_of_status(page, "GET"), NotFound)
    error = error_of_status(page, "GET", is_the_services=False)
    assert type(error) is RemoteSystemError
    assert (error.code, error.job_may_exist) == (f"HTTP{status}", False)


@pytest.mark.parametrize(
    ("garbage", "shown"),
    [
        ("html", "<html><body>Bad gateway"),
        ("empty", "not JSON: ''"),
        ("truncated", "half a job"),
        ("charset", "l\ufffduft"),
        ("huge", "larger than 1000000 bytes: '\"xxxx"),
    ],
)
@pytest.mark.parametrize("op", ["get", "create"])
async def test_an_unreadable_answer_is_a_system_failure_that_shows_its_beginning(
    job_server: EmbeddedJobServer, client: RemoteClient, op: Any, garbage: Any, shown: str
) -> None:
    """CASE-254, REQ-83: an unreadable success says nothing about whether the job was made."""
    job_server.fault(op, garbage=garbage)
    call = client.get("/jobs/x") if op == "get" else client.put("/jobs/x", json={})
    error = await failure(call)
    assert isinstance(error, RemoteSystemError)
    assert error.job_may_exist
    assert shown in error.message
    assert len(error.message) < 300


async def test_an_answer_too_large_is_not_read_to_its_end(
    job_server: EmbeddedJobServer, client: RemoteClient
) -> None:
    """CASE-254: of 100 MB little more than the limit of 1 MB is ever held."""
    job_server.fault("get", garbage="huge")
    tracemalloc.start()
    try:
        await failure(client.get("/jobs/x"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000


async def test_the_status_of_an_answer_too_large_is_in_the_log(
    job_server: EmbeddedJobServer, client: RemoteClient, caplog: pytest.LogCaptureFixture
) -> None:
    job_server.fault("get", garbage="huge")
    with caplog.at_level(logging.DEBUG, logger="prefect_webapi.http"):
        await failure(client.get("/jobs/x"))
    assert "/jobs/x -> 200 in" in caplog.text


async def test_a_confirmation_without_a_body_is_none(
    job_server: EmbeddedJobServer, client: RemoteClient
) -> None:
    """REQ-43: many services confirm a delete by status alone."""
    job_server.fault("delete", status=200, garbage="empty")
    assert await client.delete("/jobs/x") is None
    job_server.fault("delete", status=204, garbage="empty")
    assert await client.delete("/jobs/x") is None


def test_a_byte_order_mark_does_no_harm() -> None:
    """CASE-254: a readable answer is read."""
    assert Answer(200, {}, '\ufeff{"a": 1}'.encode()).json() == {"a": 1}


def test_json_nested_without_end_is_unreadable() -> None:
    """CASE-254."""
    with pytest.raises(RemoteSystemError, match="is not JSON"):
        Answer(200, {}, b"[" * 200_000).json()


STATUSES: list[tuple[int, dict[str, str], type[RemoteError], str, bool]] = [
    (400, {}, RemoteUserError, "HTTP400", False),
    (401, {}, AuthError, "Unauthorized", False),
    (403, {}, AuthError, "Forbidden", False),
    (404, {}, NotFound, "NotFound", False),
    (405, {}, RemoteUserError, "HTTP405", False),
    (408, {}, RemoteSystemError, "HTTP408", True),
    (410, {}, NotFound, "NotFound", False),
    (413, {}, RemoteUserError, "HTTP413", False),
    (422, {}, RemoteUserError, "HTTP422", False),
    (425, {}, RemoteSystemError, "HTTP425", False),
    (429, {}, Throttled, "HTTP429", False),
    (429, {"Retry-After": "7"}, Throttled, "HTTP429", False),
    (500, {}, RemoteSystemError, "HTTP500", True),
    (502, {}, RemoteSystemError, "HTTP502", True),
    (503, {}, RemoteSystemError, "HTTP503", True),
    (503, {"Retry-After": "7"}, Throttled, "HTTP503", False),
    (504, {}, RemoteSystemError, "HTTP504", True),
]


@pytest.mark.parametrize(("status", "headers", "kind", "code", "may_exist"), STATUSES)
async def test_a_status_says_whose_fault_it_is_and_whether_a_job_may_exist(
    job_server: EmbeddedJobServer,
    client: RemoteClient,
    status: int,
    headers: dict[str, str],
    kind: type[RemoteError],
    code: str,
    may_exist: bool,
) -> None:
    """REQ-83."""
    job_server.fault("create", status=status, headers=headers, body={"message": "so it is"})
    error = await failure(client.put("/jobs/x", json={}))
    assert type(error) is kind
    assert (error.code, error.job_may_exist) == (code, may_exist)
    assert "so it is" in error.message
    if isinstance(error, Throttled):
        assert error.retry_after == (timedelta(seconds=7) if headers else None)


async def test_a_plugin_judges_answers_by_its_services_own_words() -> None:
    """SPEC 2.5: where a service gives HTTP codes other meanings, the plugin classifies."""

    def judge(answer: Answer, method: str) -> RemoteError | None:
        return Throttled("less") if answer.status == 403 else None

    async with answering(403, "{}", judge=judge) as client:
        assert isinstance(await failure(client.get("/jobs/a")), Throttled)
    async with answering(500, "[1]", judge=judge) as client:
        assert await client.get("/jobs/a") == [1]


async def test_409_means_that_the_job_exists_only_where_a_job_is_made(
    job_server: EmbeddedJobServer, client: RemoteClient
) -> None:
    """REQ-34, REQ-43."""
    job_server.fault(status=409, times=4)
    assert type(await failure(client.put("/jobs/x", json={}))) is AlreadyExists
    assert type(await failure(client.post("/jobs", json={}))) is AlreadyExists
    assert type(await failure(client.delete("/jobs/x"))) is RemoteUserError
    assert type(await failure(client.get("/jobs/x"))) is RemoteUserError


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"message": "no table t"}, "no table t"),
        ({"detail": "no table t"}, "no table t"),
        ({"error": {"code": 3, "message": "no table t"}}, "no table t"),
        ({"other": 1}, '{"other": 1}'),
        ("x" * 300_000, "x" * 200),
        ({"message": "y" * 300_000}, '{"message": "yyy'),
    ],
)
async def test_the_services_own_words_are_in_the_message(
    job_server: EmbeddedJobServer, client: RemoteClient, body: Any, told: str
) -> None:
    """SPEC 2.5: and a body without end does not hide the status."""
    job_server.fault("create", status=400, body=body)
    error = await failure(client.put("/jobs/x", json={}))
    assert type(error) is RemoteUserError
    assert told in error.message
    assert len(error.message) < 900


NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("header", "wait"),
    [
        ("7", timedelta(seconds=7)),
        (" 0.5 ", timedelta(seconds=0.5)),
        ("0", timedelta(0)),
        ("86400", timedelta(days=1)),
        ("9" * 40, timedelta.max),
        ("Tue, 24 Nov 2026 12:00:30 GMT", timedelta(seconds=30)),
        ("Tue, 24 Nov 2026 13:00:30 +0100", timedelta(seconds=1830 - 1800)),
        ("Tue, 24 Nov 2026 11:00:00 GMT", timedelta(0)),
        ("Sun, 06 Nov 1994 08:49:37 GMT", timedelta(0)),
        ("soon", None),
        ("", None),
        ("-5", None),
        ("nan", None),
        ("inf", None),
        ("1_0", None),
        ("Tue, 99 Nov 2026 11:00:00 GMT", None),
    ],
)
def test_retry_after_is_read_as_seconds_or_a_date(header: str, wait: timedelta | None) -> None:
    """REQ-41: the past is no wait, garbage is as if absent; the engine caps."""
    assert retry_after({"Retry-After": header}, now=NOW) == wait


def test_a_date_to_retry_after_counts_from_the_servers_clock() -> None:
    """REQ-41: clocks differ."""
    headers = {
        "date": "Tue, 24 Nov 2020 12:00:00 GMT",
        "retry-after": "Tue, 24 Nov 2020 12:00:30 GMT",
    }
    assert retry_after(headers, now=NOW) == timedelta(seconds=30)


def test_no_retry_after_is_none() -> None:
    """REQ-41."""
    assert retry_after({}) is None


# --- what a lost connection proves -----------------------------------------------------------


async def test_a_refused_connection_sent_nothing() -> None:
    """REQ-83."""
    client = RemoteClient(f"http://127.0.0.1:{free_port()}", token=SecretStr(TOKEN))
    error = await failure(client.put("/jobs/x", json={}))
    assert type(error) is RemoteSystemError
    assert not error.job_may_exist
    await client.aclose()


async def test_a_failed_tls_handshake_sent_nothing(job_server: EmbeddedJobServer) -> None:
    """REQ-83: the port speaks plain HTTP."""
    client = RemoteClient(job_server.url.replace("http:", "https:"), token=SecretStr(TOKEN))
    error = await failure(client.put("/jobs/x", json={}))
    assert type(error) is RemoteSystemError
    assert not error.job_may_exist
    assert not job_server.log()
    await client.aclose()


async def test_a_request_that_got_no_connection_sent_nothing(
    job_server: EmbeddedJobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """REQ-83: the pool is exhausted."""
    monkeypatch.setattr("prefect_webapi.http.POOL_SECONDS", 0.1)
    client = RemoteClient(job_server.url, token=SecretStr(TOKEN), max_connections=1)
    await client.put("/jobs/x", json={})
    job_server.fault("get", delay=1)
    reading = asyncio.ensure_future(client.get("/jobs/x"))
    await eventually(lambda: job_server.log("get"), within=5)
    error = await failure(client.put("/jobs/y", json={}))
    assert (error.code, error.job_may_exist) == ("PoolTimeout", False)
    assert (await reading)["name"] == "x"
    assert len(job_server.log("create")) == 1
    await client.aclose()


async def test_a_request_waits_for_no_slow_one_while_others_end(
    job_server: EmbeddedJobServer,
) -> None:
    """Whichever of all connections is free first is the one that it gets."""
    client = RemoteClient(job_server.url, token=SecretStr(TOKEN))

    async def begun(count: int, delay: float) -> list[asyncio.Task[Any]]:
        before = len(job_server.log("find"))
        job_server.fault("find", delay=delay, times=count)
        finds = [asyncio.ensure_future(client.get("/jobs", params=FIND)) for _ in range(count)]
        await eventually(lambda: len(job_server.log("find")) == before + count, within=20)
        return finds

    slow = await begun(8, delay=30)  # as many as one pool has
    quick = await begun(88, delay=1)
    try:
        await asyncio.wait_for(client.get("/jobs", params=FIND), 10)
        assert not any(each.done() for each in slow)
    finally:
        for each in (*slow, *quick):
            each.cancel()
        await asyncio.gather(*slow, *quick, return_exceptions=True)
        await client.aclose()


async def test_the_connections_of_a_burst_are_closed_once_they_are_idle(
    job_server: EmbeddedJobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefect_webapi.transport.KEEPALIVE_SECONDS", 0.3)
    client = RemoteClient(job_server.url, token=SecretStr(TOKEN))
    port = urlsplit(job_server.url).port
    me = psutil.Process()

    def open_ones() -> int:
        return sum(bool(c.raddr) and c.raddr.port == port for c in me.net_connections())

    async def are_few() -> bool:
        await client.get("/jobs", params=FIND)
        return open_ones() <= before + 1

    before = open_ones()
    job_server.fault("find", delay=0.5, times=96)
    await asyncio.gather(*(client.get("/jobs", params=FIND) for _ in range(96)))
    assert open_ones() > before + 8
    await eventually(are_few, within=20)
    await client.aclose()


@pytest.mark.parametrize("accepted", [True, False])
async def test_a_connection_lost_after_the_request_proves_nothing(
    job_server: EmbeddedJobServer, client: RemoteClient, accepted: bool
) -> None:
    """REQ-83: made or not, it looks the same from here."""
    job_server.fault("create", drop=True, after_acceptance=accepted)
    error = await failure(client.put("/jobs/x", json={}))
    assert type(error) is OutcomeUnknown
    assert error.job_may_exist
    assert job_server.stats().created == accepted


async def test_an_answer_that_does_not_come_proves_nothing(job_server: EmbeddedJobServer) -> None:
    """REQ-83."""
    client = RemoteClient(job_server.url, token=SecretStr(TOKEN), request_timeout=MILLISECONDS_300)
    job_server.fault("create", delay=5, after_acceptance=True)
    error = await failure(client.put("/jobs/x", json={}))
    assert type(error) is OutcomeUnknown
    assert (error.code, error.job_may_exist) == ("Timeout", True)
    assert job_server.stats().created == 1
    await client.aclose()


async def test_a_closed_client_sends_nothing(job_server: EmbeddedJobServer) -> None:
    """REQ-52: an old instance of a plugin opens no new connection."""
    client = RemoteClient(job_server.url, token=SecretStr(TOKEN))
    await client.put("/jobs/x", json={})
    await client.aclose()
    await client.aclose()
    error = await failure(client.put("/jobs/y", json={}))
    assert not error.job_may_exist
    assert len(job_server.log()) == 1


# --- secrets ---------------------------------------------------------------------------------


async def test_a_secret_that_the_service_echoes_is_masked(
    job_server: EmbeddedJobServer, client: RemoteClient
) -> None:
    """REQ-62."""
    job_server.fault("create", status=500, echo_authorization=True)
    error = await failure(client.put("/jobs/x", json={}))
    assert "***" in error.message
    everything = "".join(traceback.format_exception(error)) + repr(error) + repr(vars(error))
    assert TOKEN not in everything
    assert TOKEN.encode() not in pickle.dumps(error)


SECRET = 's3cr"t/+&value'


@pytest.mark.parametrize(
    "echo",
    [
        SECRET,
        f"Bearer {SECRET}",
        "s3cr%22t%2F%2B%26value",
        's3cr\\"t/+&value',
        "s3cr&quot;t/+&amp;value",
        "x" * 193 + SECRET,
    ],
)
@pytest.mark.parametrize("status", [200, 500])
async def test_a_secret_is_masked_in_every_shape_and_at_the_cut(echo: str, status: int) -> None:
    """REQ-62: as it is, in a URL, in JSON, in HTML, and across the 200th character."""
    async with answering(status, echo, token=SecretStr(SECRET)) as client:
        error = await failure(client.get("/"))
    for part in ("s3cr", "value"):
        assert part not in str(error)
    assert "*" in str(error)


async def test_every_header_that_is_a_secret_is_masked() -> None:
    """REQ-62: given as such, named like one, made by the hook, or for one request."""

    async def hook(_: Outgoing) -> Mapping[str, str]:
        return {"X-Session": "from-the-hook"}

    basic = base64.b64encode(b"user:pass-word").decode()
    everything = f"given-as-such named-like-one from-the-hook for-one-request pass-word {basic}"
    async with answering(
        500,
        everything,
        headers={
            "X-Mine": SecretStr("given-as-such"),
            "X-Api-Key": "named-like-one",
            "Authorization": f"Basic {basic}",
        },
        auth=hook,
    ) as client:
        error = await failure(client.get("/", headers={"X-One": SecretStr("for-one-request")}))
    assert str(error) == "HTTP 500: *** *** *** *** *** ***"


async def test_an_answer_masks_the_errors_that_a_plugin_makes_of_it() -> None:
    """REQ-62: `request` leaves the judgement to the author."""
    async with answering(500, SECRET, token=SecretStr(SECRET)) as client:
        answer = await client.request("GET", "/")
    assert SECRET not in str(error_of_status(answer, "GET"))
    assert SECRET not in repr(answer)
    with pytest.raises(RemoteSystemError) as caught:
        answer.json()
    assert SECRET not in str(caught.value)


async def test_a_secret_in_the_query_is_masked_and_kept_out_of_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """CASE-225, REQ-62: httpx logs each address; some services want a key there."""
    query = {"api_key": "key-canary", "page": SecretStr("page-canary"), "nth": 1}
    with caplog.at_level(logging.DEBUG):
        async with answering(500, "no key-canary, no page-canary") as client:
            error = await failure(client.get("/jobs", params=query))
        async with httpx.AsyncClient(
            transport=httpx.MockTransport(lambda request: httpx.Response(200))
        ) as foreign:  # Prefect's, say
            await foreign.get("http://ann:api-canary@x.example.com/api?token=query-canary")
            await foreign.get("http://user-canary@x.example.com/api")
    assert str(error) == "HTTP 500: no ***, no ***"
    assert "http://x.example.com/api?token=***" in caplog.text
    assert "key-canary" not in caplog.text
    assert "api-canary" not in caplog.text
    assert "query-canary" not in caplog.text
    assert "user-canary" not in caplog.text


def test_no_secret_is_in_the_repr() -> None:
    """REQ-62."""
    client = RemoteClient("https://jobs.example.com/api/", token=SecretStr(SECRET))
    assert repr(client) == "RemoteClient('https://jobs.example.com/api')"


@pytest.mark.parametrize("token", ["canary\n", "can\r\nary", "canäry", " canary"])
def test_a_token_that_no_header_can_hold_is_refused_unseen(token: str) -> None:
    """REQ-62: the usual cause is a secret read with its line end."""
    with pytest.raises(ConfigurationError, match="header Authorization can't be sent") as caught:
        RemoteClient("https://jobs.example.com", headers={"Authorization": SecretStr(token)})
    assert token.strip() not in str(caught.value)


# --- where it may be sent --------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "PUT"])
@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_a_redirect_is_not_followed(
    job_server: EmbeddedJobServer, client: RemoteClient, method: Any, status: int
) -> None:
    """CASE-255: the other host would get the credentials."""
    visits: list[str] = []

    async def visited(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        visits.append("a connection")
        writer.close()

    other = await asyncio.start_server(visited, "127.0.0.1", 0)
    async with other:
        location = f"http://127.0.0.1:{other.sockets[0].getsockname()[1]}/jobs/x"
        job_server.fault(status=status, headers={"Location": location})
        call = client.get("/jobs/x") if method == "GET" else client.put("/jobs/x", json={})
        error = await failure(call)
        await asyncio.sleep(0.05)
    assert isinstance(error, RemoteUserError)
    assert "redirects are not followed" in error.message
    assert not visits
    assert len(job_server.log()) == 1


@pytest.mark.parametrize(
    "url", ["http://jobs.example.com", "http://10.0.0.7/", "http://127.0.0.1.example.com"]
)
async def test_credentials_in_the_clear_are_refused(url: str) -> None:
    """CASE-258."""

    async def hook(_: Outgoing) -> Mapping[str, str]:
        return {}

    for arguments in (
        {"token": SecretStr("t")},
        {"headers": {"X-Mine": SecretStr("t")}},
        {"headers": {"Authorization": "t"}},
        {"auth": hook},
    ):
        with pytest.raises(ConfigurationError, match="in the clear"):
            RemoteClient(url, **arguments)  # pyright: ignore[reportArgumentType] - one of several
        RemoteClient(url, allow_insecure=True, **arguments)  # pyright: ignore[reportArgumentType] - one of several
    RemoteClient(url)


@pytest.mark.parametrize(
    "url",
    ["http://localhost:1", "http://127.8.8.8", "http://[::1]:80/x", "https://jobs.example.com"],
)
def test_credentials_may_go_to_this_machine_or_through_tls(url: str) -> None:
    """CASE-258."""
    RemoteClient(url, token=SecretStr("t"))


@pytest.mark.parametrize("url", ["", "jobs.example.com", "ftp://jobs.example.com", "http://[::1"])
def test_an_address_that_can_not_work_is_refused(url: str) -> None:
    """REQ-83: before anything remote, whatever the credentials."""
    with pytest.raises(ConfigurationError, match="no address of a web service"):
        RemoteClient(url)


@pytest.mark.parametrize("url", ["https://user:canary@jobs.example.com", "https://x/?key=canary"])
def test_an_address_holds_no_credentials(url: str) -> None:
    """REQ-62: addresses are shown in messages."""
    with pytest.raises(ConfigurationError, match="user, a query or a fragment") as caught:
        RemoteClient(url)
    assert "canary" not in str(caught.value)


# --- an author's own client ------------------------------------------------------------------

REQUEST = httpx.Request("POST", "https://jobs.example.com/jobs")


@pytest.mark.parametrize(
    ("error", "kind", "code", "may_exist"),
    [
        (httpx.ConnectError("x"), RemoteSystemError, "ConnectError", False),
        (httpx.ConnectTimeout("x"), RemoteSystemError, "ConnectTimeout", False),
        (httpx.PoolTimeout("x"), RemoteSystemError, "PoolTimeout", False),
        (httpx.ProxyError("x"), RemoteSystemError, "ProxyError", False),
        (httpx.ReadTimeout("x"), OutcomeUnknown, "Timeout", True),
        (httpx.WriteError("x"), OutcomeUnknown, "ConnectionLost", True),
        (httpx.RemoteProtocolError("x"), OutcomeUnknown, "ConnectionLost", True),
        (httpx.DecodingError("x"), RemoteSystemError, "DecodingError", True),
        (httpx.UnsupportedProtocol("x"), RemoteUserError, "UnsupportedProtocol", False),
        (httpx.LocalProtocolError("x"), RemoteUserError, "LocalProtocolError", False),
        (httpx.InvalidURL("x"), RemoteUserError, "InvalidURL", False),
        (TimeoutError("x"), OutcomeUnknown, "Timeout", True),
        (ConnectionRefusedError("x"), RemoteSystemError, "ConnectionRefusedError", False),
        (ConnectionResetError("x"), OutcomeUnknown, "ConnectionLost", True),
        (socket.gaierror(-2, "x"), RemoteSystemError, "gaierror", False),
        (OSError("x"), RemoteSystemError, "OSError", True),
        (KeyError("x"), RemoteSystemError, "KeyError", True),
        (SecretNotFound("k", ["here"]), BadTaskSpecification, "SecretNotFound", False),
        (Throttled("x"), Throttled, "Throttled", False),
        (
            httpx.HTTPStatusError("x", request=REQUEST, response=httpx.Response(409)),
            AlreadyExists,
            "AlreadyExists",
            True,
        ),
        (
            httpx.HTTPStatusError("x", request=REQUEST, response=httpx.Response(503)),
            RemoteSystemError,
            "HTTP503",
            True,
        ),
    ],
)
def test_what_an_authors_own_client_raises_is_classified(
    error: Exception, kind: type[RemoteError], code: str, may_exist: bool
) -> None:
    """REQ-83."""
    found = classify(error)
    assert type(found) is kind
    assert (found.code, found.job_may_exist) == (code, may_exist)


def test_a_status_error_without_its_body_is_classified() -> None:
    """REQ-83: the author streamed the answer."""
    response = httpx.Response(400, stream=httpx.ByteStream(b"x"))
    error = httpx.HTTPStatusError("x", request=REQUEST, response=response)
    assert classify(error).code == "HTTP400"


def test_what_an_authors_own_client_was_told_is_masked() -> None:
    """REQ-62: the service echoes the header, or httpx the address."""
    request = httpx.Request("GET", "https://x.example.com", headers={"Authorization": "Bearer abc"})
    response = httpx.Response(401, text="no access with Bearer abc", request=request)
    told = classify(httpx.HTTPStatusError("x", request=request, response=response))
    assert told.message == "HTTP 401: no access with ***"
    address = "https://ann:canary@x.example.com/?token=canary"
    assert "canary" not in classify(httpx.InvalidURL(f"what is {address}")).message


def test_a_clients_own_text_about_headers_is_not_repeated() -> None:
    """REQ-62: h11 shows the value that it refuses."""
    assert "canary" not in str(classify(httpx.LocalProtocolError("Illegal header value b'canary'")))
