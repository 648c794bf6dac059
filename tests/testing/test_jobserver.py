"""The job server as plugins see it, over HTTP, and as tests see it, through its controls.

Nothing here proves a case of the engine: a docstring names the cases that lean on what is shown.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from pydantic import SecretStr

from prefect_webapi.contract.errors import (
    AlreadyExists,
    AuthError,
    NotFound,
    RemoteError,
    RemoteSystemError,
    RemoteUserError,
    Throttled,
)
from prefect_webapi.http import RemoteClient, path
from prefect_webapi.testing import EmbeddedJobServer
from tests.support.jobserver import TOKEN
from tests.support.waiting import eventually, eventually_blocking


class Api:
    """The service's calls, as short as a test wants them."""

    def __init__(self, client: RemoteClient) -> None:
        self.client = client

    async def put(self, name: str, fingerprint: str = "", **spec: Any) -> dict[str, Any]:
        body = {"spec": spec, "fingerprint": fingerprint}
        return await self.client.put(path("jobs", name), json=body)

    async def post(self, key: str, **spec: Any) -> dict[str, Any]:
        return await self.client.post("/jobs", json={"spec": spec, "key": key})

    async def get(self, name: str) -> dict[str, Any]:
        return await self.client.get(path("jobs", name))

    async def state(self, name: str) -> str:
        return (await self.get(name))["state"]

    async def batch(self, *names: str) -> list[dict[str, Any]]:
        return await self.client.get("/jobs", params={"names": ",".join(names)})

    async def find(self, key: str) -> list[dict[str, Any]]:
        return await self.client.get("/jobs", params={"key": key})

    async def delete(self, name: str, reason: str = "test") -> dict[str, Any]:
        return await self.client.delete(path("jobs", name), params={"reason": reason})

    async def becomes(self, name: str, state: str, within: float = 5) -> None:
        async def is_so() -> bool:
            return await self.state(name) == state

        await eventually(is_so, within=within)


@pytest.fixture
async def api(job_server: EmbeddedJobServer) -> AsyncIterator[Api]:
    client = RemoteClient(job_server.url, token=SecretStr(TOKEN))
    yield Api(client)
    await client.aclose()


async def refusal(call: Any) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        await call
    return caught.value


# --- jobs ------------------------------------------------------------------------------------


async def test_a_job_goes_through_its_states(api: Api) -> None:
    """Needed by case 069: time alone moves it."""
    made = await api.put(
        "x", queued_seconds=0.2, initializing_seconds=0.2, seconds=0.2, result={"rows": 3}
    )
    assert made["state"] == "queued"
    assert made["result"] is None
    for state in ("initializing", "running", "succeeded"):
        await api.becomes("x", state)
    assert (await api.get("x"))["result"] == {"rows": 3}


async def test_putting_a_job_twice_makes_one(job_server: EmbeddedJobServer, api: Api) -> None:
    """Needed by case 042."""
    first = await api.put("x", "f" * 64, seconds=60)
    again = await api.put("x", "f" * 64, seconds=60)
    assert first == again
    assert [entry.status for entry in job_server.log("create")] == [201, 200]
    assert job_server.stats().created == 1


async def test_a_known_name_with_another_fingerprint_is_refused_and_the_stored_one_told(
    api: Api,
) -> None:
    """Needed by case 056."""
    await api.put("x", "a" * 64)
    answer = await api.client.request("PUT", "/jobs/x", json={"fingerprint": "b" * 64})
    assert answer.status == 409
    assert answer.json()["fingerprint"] == "a" * 64


async def test_a_known_name_can_be_refused_every_time(
    job_server: EmbeddedJobServer, api: Api
) -> None:
    """Needed by case 055."""
    job_server.behave(repeat="conflict")
    await api.put("x", "a" * 64)
    assert isinstance(await refusal(api.put("x", "a" * 64)), AlreadyExists)


async def test_a_posted_job_is_a_new_one_each_time_and_is_found_by_its_key(
    job_server: EmbeddedJobServer, api: Api
) -> None:
    """Needed by case 043: the server chooses the name and drops no duplicate, but counts it."""
    job_server.behave("search")
    names = {(await api.post("k", seconds=60))["name"] for _ in range(2)}
    assert {job["name"] for job in await api.find("k")} == names
    assert await api.find("other") == []
    assert job_server.stats().duplicates == {"k": 2}


async def test_a_service_that_can_neither_says_so(job_server: EmbeddedJobServer, api: Api) -> None:
    """Needed by case 044."""
    job_server.behave("neither")
    assert isinstance(await refusal(api.find("k")), RemoteUserError)


async def test_fail_first_fails_the_first_of_equal_jobs(api: Api) -> None:
    """Needed by case 063."""
    await api.put("a", seconds=0, outcome="fail-first", message="out of luck")
    await api.put("b", seconds=0, outcome="fail-first", message="out of luck")
    await api.put("c", seconds=0, outcome="fail-first", message="another job")
    assert [await api.state(name) for name in "abc"] == ["failed", "succeeded", "failed"]
    assert (await api.get("a"))["message"] == "out of luck"


async def test_a_vanishing_job_is_unknown_at_its_end(
    job_server: EmbeddedJobServer, api: Api
) -> None:
    """Needed by case 087."""
    await api.put("x", seconds=0.3, outcome="vanish")
    assert await api.state("x") == "running"

    async def is_gone() -> bool:
        return await api.batch("x") == []

    await eventually(is_gone, within=5)
    assert isinstance(await refusal(api.get("x")), NotFound)
    assert job_server.stats().live == 0


async def test_a_new_job_can_be_hidden_for_a_while(api: Api) -> None:
    """Needed by case 065: reads say 404, the job is there."""
    await api.put("x", seconds=60, hidden_for=0.3)
    assert isinstance(await refusal(api.get("x")), NotFound)
    assert await api.batch("x") == []

    async def is_seen() -> bool:
        return len(await api.batch("x")) == 1

    await eventually(is_seen, within=5)
    assert await api.state("x") == "running"


async def test_a_cancelled_job_may_take_its_time_to_die(
    job_server: EmbeddedJobServer, api: Api
) -> None:
    """Needed by cases 116 and 122."""
    await api.put("x", outcome="never", dies_in=0.4)
    await api.delete("x", "cancelled by user")
    assert await api.state("x") == "running"
    assert job_server.stats().live == 1
    await api.becomes("x", "cancelled")
    assert (await api.get("x"))["message"] == "cancelled by user"
    assert job_server.stats().live == 0


async def test_a_job_may_finish_while_its_delete_is_on_the_way(api: Api) -> None:
    """Needed by case 117."""
    await api.put("x", seconds=0.4, dies_in=60)
    await api.delete("x")
    await api.becomes("x", "succeeded")


async def test_a_job_that_is_over_or_unknown_can_not_be_cancelled(api: Api) -> None:
    """Needed by case 113."""
    await api.put("x", seconds=0)
    assert (await refusal(api.delete("x"))).code == "HTTP409"
    assert isinstance(await refusal(api.delete("y")), NotFound)


async def test_a_third_party_can_end_a_job_and_the_server_can_forget_one(
    job_server: EmbeddedJobServer, api: Api
) -> None:
    """Needed by case 087."""
    for name in ("x", "y"):
        await api.put(name, outcome="never")
    job_server.end("x", "cancelled", "stopped by an operator")
    job_server.end("y", "forgotten")
    assert (await api.get("x"))["message"] == "stopped by an operator"
    assert isinstance(await refusal(api.get("y")), NotFound)
    assert job_server.stats().live == 0


async def test_a_jobs_page_can_be_opened_without_a_token(api: Api) -> None:
    """Needed by case 257: the link works for a name of any characters, and shows it as text."""
    job = await api.put("a/b <i>", seconds=60)
    page = await asyncio.to_thread(lambda: urlopen(job["link"], timeout=5).read().decode())
    assert "a/b &lt;i&gt;" in page
    assert TOKEN not in page


# --- faults ----------------------------------------------------------------------------------


async def test_a_fault_strikes_as_often_as_told_and_where_told(
    job_server: EmbeddedJobServer, api: Api
) -> None:
    """Needed by case 073: after `skip`, `times` requests of one op about one job."""
    for name in ("x", "y"):
        await api.put(name, seconds=60)
    job_server.fault("get", name="x", skip=1, times=2, status=500)
    assert await api.state("x") == "running"
    for _ in range(2):
        assert await api.state("y") == "running"
        assert isinstance(await refusal(api.get("x")), RemoteSystemError)
    assert await api.state("x") == "running"


async def test_chance_is_drawn_from_a_seed(job_server: EmbeddedJobServer, api: Api) -> None:
    """Needed by case 073: a storm can be had again."""
    storms: list[list[int | None]] = []
    for _ in range(2):
        job_server.reset()
        await api.put("x", seconds=60)
        job_server.fault("get", times=None, probability=0.5, seed=7, status=500)
        for _ in range(20):
            await api.client.request("GET", "/jobs/x")
        storms.append([entry.status for entry in job_server.log("get")])
    assert storms[0] == storms[1]
    assert set(storms[0]) == {200, 500}


@pytest.mark.parametrize("accepted", [True, False])
async def test_a_connection_is_dropped_before_or_after_the_job_is_made(
    job_server: EmbeddedJobServer, api: Api, accepted: bool
) -> None:
    """Needed by cases 042 and 044."""
    job_server.fault("create", drop=True, after_acceptance=accepted)
    assert isinstance(await refusal(api.put("x")), RemoteSystemError)
    assert len(job_server.jobs()) == accepted
    assert job_server.log("create")[0].status is None


@pytest.mark.parametrize("accepted", [True, False])
async def test_a_delay_is_before_the_job_is_made_or_before_its_answer(
    job_server: EmbeddedJobServer, api: Api, accepted: bool
) -> None:
    """Needed by cases 064 and 119."""
    job_server.fault("create", delay=0.5, after_acceptance=accepted)
    making = asyncio.ensure_future(api.put("x", seconds=60))
    await eventually(lambda: job_server.log("create"), within=5)
    assert len(job_server.jobs()) == accepted
    assert (await making)["name"] == "x"
    assert job_server.log("create")[0].seconds >= 0.5


async def test_an_answer_can_be_changed_in_part(job_server: EmbeddedJobServer, api: Api) -> None:
    """Needed by case 090: an older state than the one before."""
    await api.put("x", seconds=60)
    job_server.fault("get", patch={"state": "queued"})
    first, second = await api.get("x"), await api.get("x")
    assert (first["state"], second["state"]) == ("queued", "running")
    assert {**first, "state": "running"} == second


async def test_a_batch_can_lack_one_job_and_fail_for_another(
    job_server: EmbeddedJobServer, api: Api
) -> None:
    """Needed by case 082."""
    for name in ("a", "b", "c", "d"):
        await api.put(name, seconds=60)
    job_server.fault("batch", name="a", drop=True)
    job_server.fault("batch", name="b", status=500)
    job_server.fault("batch", name="c", patch={"state": "unheard-of"})
    b, c, d = await api.batch("a", "b", "c", "d")
    assert b == {"name": "b", "error": "told to answer 500"}
    assert (c["name"], c["state"]) == ("c", "unheard-of")
    assert (d["name"], d["state"]) == ("d", "running")
    assert len(await api.batch("a", "b", "c", "d")) == 4


async def test_requests_inside_a_retry_after_are_counted_by_kind(
    job_server: EmbeddedJobServer, api: Api
) -> None:
    """Needed by case 151: writes may go on while reads must wait."""
    await api.put("x", seconds=60)
    job_server.fault("get", status=429, retry_after="0.5")
    assert isinstance(await refusal(api.get("x")), Throttled)
    await api.put("y")
    assert job_server.stats().inside_retry_after == 0
    await api.get("x")
    assert job_server.stats().inside_retry_after == 1
    await asyncio.sleep(0.5)
    await api.get("x")
    assert job_server.stats().inside_retry_after == 1


async def test_a_rotated_token_shuts_the_old_one_out(
    job_server: EmbeddedJobServer, api: Api
) -> None:
    """Needed by case 227: in the log stands whether there was a token, never the token."""
    await api.put("x")
    job_server.behave(token="new")
    assert isinstance(await refusal(api.get("x")), AuthError)
    entry = job_server.log("get")[0]
    assert (entry.status, entry.authorized) == (401, True)
    assert TOKEN not in entry.model_dump_json()


# --- the witness -----------------------------------------------------------------------------


async def test_the_server_counts_what_was_really_made(
    job_server: EmbeddedJobServer, api: Api
) -> None:
    """Needed by case 041: in all, at one time, and per quota."""
    for nth in range(3):
        await api.put(f"gpu-{nth}", seconds=0.3, quota="gpu")
    await eventually(lambda: job_server.stats().live == 0, within=5)
    await api.put("gpu-3", seconds=60, quota="gpu")
    await api.put("cpu", seconds=60)
    stats = job_server.stats()
    assert (stats.created, stats.live, stats.peak_live) == (5, 2, 3)
    assert stats.peak_by_quota == {"gpu": 3, "default": 1}
    assert stats.requests == {"create": 5}


async def test_the_server_counts_requests_that_are_open_together(
    job_server: EmbeddedJobServer, api: Api
) -> None:
    """Needed by case 071."""
    await api.put("x", seconds=60)
    job_server.fault("get", times=3, delay=0.3)
    await asyncio.gather(*(api.get("x") for _ in range(3)))
    await api.get("x")
    assert job_server.stats().peak_open == {"create": 1, "get": 3}


async def test_the_log_tells_what_came_and_when(job_server: EmbeddedJobServer, api: Api) -> None:
    """Needed by case 041: on the clock that this process has too."""
    before = time.monotonic()
    await api.put("x", result="\u2028 \U0001f986")
    await api.get("x")
    create, get = job_server.log()
    assert before <= create.mono <= get.mono <= time.monotonic()
    assert (create.op, create.name, create.status) == ("create", "x", 201)
    assert create.body["spec"]["result"] == "\u2028 \U0001f986"
    assert job_server.log(since=1) == [get]


async def test_reset_forgets_everything_and_lets_nothing_through_from_before(
    job_server: EmbeddedJobServer, api: Api
) -> None:
    """A test does not see what the one before left on its way."""
    job_server.behave("neither", token="other")
    job_server.fault("create", delay=0.2, times=None)
    late = asyncio.ensure_future(refusal(api.put("x")))
    await eventually(lambda: job_server.log("create"), within=5)
    job_server.reset()
    assert isinstance(await late, RemoteSystemError)
    assert (job_server.jobs(), job_server.log()) == ([], [])
    await api.put("y", seconds=60)
    assert len(await api.find("y")) == 1


# --- the process -----------------------------------------------------------------------------


@pytest.fixture
def hasty_server() -> Iterator[EmbeddedJobServer]:
    with EmbeddedJobServer(token=None, speed=100) as server:
        yield server


async def test_jobs_may_live_faster_than_real(hasty_server: EmbeddedJobServer) -> None:
    """Needed by case 069: half a minute in a third of a second; and no token is wanted."""
    client = RemoteClient(hasty_server.url)
    api = Api(client)
    await api.put("x", seconds=30)
    await api.becomes("x", "succeeded")
    await client.aclose()


def test_a_fault_that_makes_no_sense_is_refused(job_server: EmbeddedJobServer) -> None:
    """A test with a slip in it fails at the slip."""
    with pytest.raises(ValueError, match="probability"):
        job_server.fault("get", probability=2)
    with pytest.raises(RuntimeError, match="there is no job 'x'"):
        job_server.end("x", "failed")


def test_a_server_that_can_not_start_says_why(job_server: EmbeddedJobServer) -> None:
    """The port is taken."""
    port = urlsplit(job_server.url).port or 0
    with pytest.raises(RuntimeError, match="did not start"), EmbeddedJobServer(port=port):
        pass


def test_the_server_ends_when_its_parent_is_killed() -> None:
    """A killed test run leaves no server behind."""
    program = (
        "import time\n"
        "from prefect_webapi.testing import EmbeddedJobServer\n"
        "with EmbeddedJobServer() as server:\n"
        "    print(server.url, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        address = urlsplit(str(parent.stdout.readline()).strip())
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait(10)

    def refuses() -> bool:
        with socket.socket() as caller:
            return caller.connect_ex((address.hostname or "", address.port or 0)) != 0

    eventually_blocking(refuses, within=10)
