"""Whatever a server answers: no second create, no task that hangs, always a readable end."""

from __future__ import annotations

import asyncio
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import Phase as Step
from hypothesis import strategies as st

from prefect_webapi import PluginEntry, RemoteClient
from prefect_webapi.contract.errors import WebApiError
from prefect_webapi.engine.host import Host
from prefect_webapi_jobserver import JobServer, ReportJob
from tests.support.engine import at, request
from tests.support.plugins import NeitherPlugin, SinglePlugin, entry

ENDS_WITHIN = 60.0
ANSWER: dict[str, Any] = {"name": "x", "state": "running", "message": "", "link": "http://x/y"}
WORDS = st.sampled_from(["queued", "running", "succeeded", "failed", "cancelled", "", "Nonsense"])

leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), WORDS
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from([*ANSWER, "error"]), inner)
    ),
    max_leaves=8,
)


def changed(fields: dict[str, Any]) -> dict[str, Any]:
    return {**ANSWER, **fields}


wrong_shapes = st.dictionaries(
    st.sampled_from([*ANSWER, "result", "fingerprint"]), values, max_size=3
).map(changed)
well_formed = st.one_of(wrong_shapes, values).map(json.dumps)
bodies = st.one_of(
    st.binary(max_size=50),
    well_formed.map(str.encode),
    st.tuples(well_formed, st.integers(0, 40)).map(lambda cut: cut[0][: cut[1]].encode()),
    st.sampled_from(
        [
            b"[" * 10_000,
            b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
            b"9" * 5_000,
            b"1e999",
            b'{"name": "x", "state": NaN}',
            b'{"name": "x", "state": "\\ud800"}',
            '{"name": "x", "state": "läuft"}'.encode("latin-1"),
            b"\xef\xbb\xbf{}",
            b"<html>Bad gateway</html>",
            b"\x1f\x8b not gzip",
        ]
    ),
)
headers = st.dictionaries(
    st.sampled_from(["Content-Type", "Retry-After", "Content-Encoding", "Location", "Date"]),
    st.sampled_from(
        ["application/json", "text/html; charset=nonsense", "gzip", "1", "-1", "1e9", "nan", "soon"]
    ),
    max_size=3,
)
lost = st.sampled_from(
    [httpx.ReadError, httpx.ConnectError, httpx.ReadTimeout, httpx.RemoteProtocolError]
)
statuses = st.one_of(
    st.sampled_from([200, 200, 201, 202, 204, 404, 409, 429, 503]), st.integers(200, 599)
)
answers = st.one_of(st.tuples(statuses, headers, bodies), lost)


class Service:
    """Answers each job's requests from its script, then as it should; knows which creates it may have carried out."""

    def __init__(self, scripts: dict[int, list[Any]]) -> None:
        self.fuzzed = 0
        self.scripts = scripts
        self.made: Counter[int] = Counter()
        self.keys: defaultdict[int, set[str]] = defaultdict(set)
        self._days: dict[str, int] = {}

    def handle(self, request: httpx.Request) -> httpx.Response:
        name = unquote(request.url.path.removeprefix("/jobs").removeprefix("/"))
        creates = request.method in ("PUT", "POST")
        if creates:
            sent = json.loads(request.content)
            day = sent["spec"]["day"]
            self._days[name or f"job-{day}"] = day
            self.keys[day].add(sent.get("key", name))
        else:
            day = self._days.get(name, -1)
        answer: Any = next(iter(self.scripts.get(day, ())), None)
        if answer is None:
            state = "cancelled" if request.method == "DELETE" else "succeeded"
            told = {**ANSWER, "name": name or f"job-{day}", "state": state}
            answer = (200, {}, json.dumps(told).encode())
        else:
            self.scripts[day].pop(0)
            self.fuzzed += 1
        if creates and not surely_refused(answer):
            self.made[day] += 1
        if isinstance(answer, type):
            raise answer("told so", request=request)
        status, headers, body = answer
        return httpx.Response(status, headers=headers, content=body)


def surely_refused(answer: Any) -> bool:
    """Whether a create that was answered so can't have made a job: SPEC 2.5."""
    if isinstance(answer, type):
        return answer is httpx.ConnectError
    status, headers, _ = answer
    return (400 <= status < 500 and status != 408) or (
        status == 503 and any(name.lower() == "retry-after" for name in headers)
    )


class OneByOne(NeitherPlugin):
    max_batch: int = 1


def fuzzed(base: type[Any], service: Service) -> PluginEntry[JobServer]:
    def make(connection: JobServer) -> Any:
        plugin = base(connection)
        plugin._api = RemoteClient(
            "https://jobs.example.com",
            token=connection.token,
            transport=httpx.MockTransport(service.handle),
        )
        return plugin

    return entry(cast(Any, make), base.__name__)


def scripts_of(examples: int) -> list[list[Any]]:
    """Answers in the order in which one job's requests get them; all drawn before any engine's thread runs."""
    drawn: list[list[Any]] = []

    @settings(
        max_examples=examples,
        database=None,
        derandomize=True,
        phases=[Step.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(st.lists(answers, min_size=1, max_size=6))
    def draw(script: list[Any]) -> None:
        drawn.append(script)

    draw()
    return drawn


async def end_of(host: Host, task_type: str, day: int) -> str:
    """What people are told at the end of a job."""
    ticket = host.admit(request(ReportJob(day=day), task_type=task_type, task_run=f"job {day}"))
    try:
        outcome = await asyncio.wait_for(ticket.outcome(), ENDS_WITHIN)
    except WebApiError as error:
        return str(error)
    assert outcome.info.phase.is_terminal
    return outcome.info.reason or outcome.info.phase.name


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("examples", "least"), [(60, 60), pytest.param(4_500, 5_000, marks=pytest.mark.chaos)]
)
@pytest.mark.parametrize("base", [SinglePlugin, OneByOne])
async def test_no_answer_of_a_server_leads_astray(
    tmp_path: Path, base: type[Any], examples: int, least: int
) -> None:
    """CASE-254, CASE-279, REQ-33, REQ-83: statuses, headers, bodies, lost connections; for each call.

    With `-m chaos` 10,000 such answers in all.
    """
    scripts = scripts_of(examples)
    service = Service(dict(enumerate(map(list, scripts))))
    config = {"caching": {"maxSystemFailures": 2, "size": 1000}}
    quick: dict[str, Any] = {
        "maxRetryAfter": "1s",
        "maxCreateAttempts": 3,
        "cancelGrace": "2s",
        "initialInterval": "100ms",
    }
    plugin = fuzzed(base, service)
    with at(
        tmp_path, "https://jobs.example.com", config, entries=[plugin], speed=100, **quick
    ) as host:
        for first in range(0, len(scripts), 500):
            days = range(first, min(first + 500, len(scripts)))
            ends = await asyncio.gather(*(end_of(host, plugin.id, day) for day in days))
            for day, told in zip(days, ends, strict=True):
                assert told.strip(), scripts[day]
                assert len(told) < 10_000, scripts[day]
                assert len(service.keys[day]) == 1, scripts[day]
                assert base is not OneByOne or service.made[day] <= 1, scripts[day]
    assert service.fuzzed >= least
