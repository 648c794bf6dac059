"""Polls per second and CPU per poll, through the whole stack and without it.

Ten reads at once in all cases (the default of `caching.workers`), limits off, no pauses: the gaps of the policy are set
below what a block may say. Each case runs for some seconds in a process of its own against one service process.

- bare httpx: one client, kept; the jobs are made as the plugin makes them, and their answers parsed and validated as
  it does.
- bare RemoteClient: the same through our client, which the plugin uses: the engine's share is what is beyond it.
- fresh client per poll: as connectors do that make a client for each request.
- whole stack: ledger, gate, poller, plugin, judge; jobs read alone, or fifty at a time, two such reads at once.
- over aiohttp: the same over the transport of httpx-aiohttp, which `benchmarks.transport` shows to be unsafe.

Against `prefect-databricks` (its own flow that waits for a run, several of them gathered in one flow, its pause set to
0) on the test suite's Databricks server. That package insists on TLS and on API 2.1; a transport under its client sends
the same requests in the clear to 2.2, which spares it the TLS handshake that it makes for each poll.

Run: `uv run python -m benchmarks.polls [--quick] [--json] [--repetitions N]`
"""

# pyright: reportPrivateUsage=false, reportMissingTypeStubs=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import asyncio
import json
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, ClassVar

import httpx
from httpx_aiohttp import AiohttpTransport
from pydantic import HttpUrl, SecretStr

from benchmarks.inmemory import Silent, tracked, unlimited
from benchmarks.measure import (
    CPU,
    WALL,
    Chosen,
    Figures,
    Report,
    Table,
    Target,
    by_turns,
    in_child,
    main,
    using,
)
from benchmarks.remote import create_of
from benchmarks.servers import databricks_server, prefect_server
from benchmarks.service import Service
from prefect_webapi import JobSpec, PluginEntry, RemoteClient
from prefect_webapi.engine.host import Host
from prefect_webapi.engine.runtime import Runtime
from prefect_webapi_databricks import Databricks, DatabricksRun, SubmitRun
from prefect_webapi_databricks.plugin import DatabricksPlugin
from prefect_webapi_jobserver import JobServer, ReportJob
from prefect_webapi_jobserver.models import JobView
from prefect_webapi_jobserver.plugin import JobServerPlugin
from tests.servers.databricks import API, TOKEN
from tests.support.engine import engine, request
from tests.support.waiting import eventually_blocking

AT_ONCE, BATCHES_AT_ONCE = 10, 2
JOBS, DATABRICKS_RUNS = 500, 24
SECONDS, QUICK_SECONDS = 8.0, 1.0
WAITING_FLOWS, VENDOR_SECONDS, QUICK_VENDOR_SECONDS = 4, 16.0, 4.0
GAP_SECONDS, READY_SECONDS = 0.001, 60.0
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
BARE, OURS = "bare httpx", "whole stack"
POLLS, CPU_PER_POLL = "polls/s", "CPU per poll us"


# --- what is compared ------------------------------------------------------------------------


def bare(url: str, seconds: float, kind: str) -> Figures:
    """A loop that polls and validates, ten at once."""

    async def poll_all() -> Figures:
        limits = httpx.Limits(max_connections=100, max_keepalive_connections=100)
        remote = RemoteClient(url, token=SecretStr("bench"))
        headers = {"Authorization": "Bearer bench"}
        transport = AiohttpTransport(limits=limits) if "aiohttp" in kind else None
        client = httpx.AsyncClient(
            base_url=url, headers=headers, limits=limits, transport=transport, trust_env=False
        )

        async def kept(where: str) -> Any:
            return (await client.get(where)).json()

        async def fresh(where: str) -> Any:
            async with httpx.AsyncClient(base_url=url, headers=headers) as own:
                return (await own.get(where)).json()

        get = {"fresh": fresh, "remote": remote.get}.get(kind, kept)
        async with client:
            paths = list[str]()
            for n in range(JOBS):
                path, body = create_of(n, 1e6)
                await client.put(path, json=body)
                paths.append(path)
            figures = await _polled(get, paths, seconds)
            await remote.aclose()
        return figures

    return asyncio.run(poll_all())


async def _polled(
    get: Callable[[str], Awaitable[Any]], paths: list[str], seconds: float
) -> Figures:
    figures: Figures = {}
    following, polls = cycle(paths), 0
    end = time.perf_counter() + seconds

    async def loop() -> None:
        nonlocal polls
        while time.perf_counter() < end:
            assert JobView.model_validate(await get(next(following))).state == "running"
            polls += 1

    with using(figures):
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(loop())
    return _per_poll(figures, polls)


def stack(url: str, seconds: float, kind: str) -> Figures:
    """The engine over the job server's plugin."""

    class Alone(JobServerPlugin):
        max_batch = 50 if kind == "batch" else 1

        def __init__(self, connection: JobServer) -> None:
            super().__init__(connection)
            if kind == "aiohttp":
                self._api = RemoteClient(
                    str(connection.base_url), token=connection.token, transport=AiohttpTransport()
                )

    entry = PluginEntry(
        id="polled",
        supported_task_types=["polled"],
        connection=JobServer,
        spec=ReportJob,
        plugin_loader=lambda setup: Alone(setup.connection),
    )
    block = JobServer(
        base_url=HttpUrl(url),
        token=SecretStr("bench"),
        engine=unlimited(workers=BATCHES_AT_ONCE if kind == "batch" else AT_ONCE),
    )
    specs = [ReportJob(day=day, seconds=1e6) for day in range(JOBS)]
    return _watched(entry, block, specs, seconds, lambda: _told(f"{url}/control/stats")["read"])


def databricks(url: str, seconds: float, batch: bool) -> Figures:
    """The engine over the Databricks plugin; counted are the jobs in the answers."""
    read = 0

    class Counted(DatabricksPlugin):
        max_batch = DatabricksPlugin.max_batch if batch else 1

        def status(self, ctx: Any) -> Any:
            nonlocal read
            read += 1
            return super().status(ctx)

    entry = PluginEntry(
        id="polled",
        supported_task_types=["polled"],
        connection=Databricks,
        spec=DatabricksRun,
        plugin_loader=lambda setup: Counted(setup.connection),
    )
    block = Databricks(host=HttpUrl(url), token=SecretStr(TOKEN), engine=unlimited(workers=AT_ONCE))
    specs = [SubmitRun(tasks=[_notebook(3600, n)]) for n in range(DATABRICKS_RUNS)]
    return _watched(entry, block, specs, seconds, lambda: read)


def _notebook(seconds: float, number: int = 0) -> dict[str, Any]:
    parameters = {"seconds": str(seconds), "number": str(number)}
    task = {"notebook_path": "/Shared/bench", "base_parameters": parameters}
    return {"task_key": "main", "notebook_task": task}


def _watched(
    entry: PluginEntry[Any],
    block: Any,
    specs: Sequence[JobSpec[Any]],
    seconds: float,
    read: Callable[[], float],
) -> Figures:
    """Live jobs, read as fast as it goes."""
    figures: Figures = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        engine(Path(folder), [entry], {"default": block}) as host,
    ):
        _make(host, specs, read)
        before = read()
        with using(figures):
            time.sleep(seconds)
            polls = read() - before
    return _per_poll(figures, polls)


def _make(host: Host, specs: Sequence[JobSpec[Any]], read: Callable[[], float]) -> None:
    """All of them, each read at least once; the first one brings the channel whose gaps are cut."""
    silent, until = Silent(), partial(eventually_blocking, within=READY_SECONDS, every=0.1)

    def admit(numbers: Iterable[int]) -> None:
        for n in numbers:
            host.admit(request(specs[n], task_type="polled", task_run=str(n), reporter=silent))

    admit([0])
    until(lambda: tracked(host) == 1)
    host.perform(_hurry).result(READY_SECONDS)
    admit(range(1, len(specs)))
    until(lambda: tracked(host) == len(specs))
    first = read()
    until(lambda: read() >= first + 2 * len(specs))


async def _hurry(runtime: Runtime) -> None:
    """Gaps that no block may ask for, so that nothing but the work takes time."""
    for channel in runtime._channels:
        policy = channel.poller.policy
        channel.poller.policy = replace(policy, initial=GAP_SECONDS, longest=GAP_SECONDS)


def vendor(url: str, seconds: float) -> Figures:
    """prefect-databricks: its flow that waits for a run."""
    from prefect import flow
    from prefect_databricks import DatabricksCredentials
    from prefect_databricks.flows import jobs_runs_wait_for_completion

    credentials = DatabricksCredentials(
        databricks_instance="bench",
        token=SecretStr(TOKEN),
        client_kwargs={"transport": InTheClear(url)},
    )

    @flow
    async def wait_for_all() -> None:
        await asyncio.gather(
            *(
                jobs_runs_wait_for_completion(run, credentials, poll_frequency_seconds=0)
                for run in runs
            )
        )

    figures: Figures = {}
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=url, headers=headers, trust_env=False) as client:
        runs = [
            client.post(f"{API}/runs/submit", json={"tasks": [_notebook(seconds, n)]}).json()[
                "run_id"
            ]
            for n in range(WAITING_FLOWS)
        ]
    with using(figures):
        asyncio.run(wait_for_all())
    (wall, cpu), (last_wall, last_cpu) = InTheClear.polls[0], InTheClear.polls[-1]
    figures |= {
        WALL: last_wall - wall,
        CPU: last_cpu - cpu,
    }  # its flows' start and end are no polls
    return _per_poll(figures, len(InTheClear.polls) - 1)


class InTheClear(httpx.AsyncBaseTransport):
    """Sends what that package sends, without TLS and to API 2.2. Made anew as its client is; Prefect may pickle it."""

    polls: ClassVar[list[tuple[float, float]]] = []
    """When each was sent: wall and CPU seconds."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        InTheClear.polls.append((time.perf_counter(), time.process_time()))
        path = request.url.raw_path.replace(b"/api/2.1/jobs", API.encode())
        request.url = httpx.URL(self._url).copy_with(raw_path=path)
        return await httpx.AsyncHTTPTransport(verify=False).handle_async_request(request)


def _per_poll(figures: Figures, polls: float) -> Figures:
    return figures | {POLLS: polls / figures[WALL], CPU_PER_POLL: 1e6 * figures[CPU] / polls}


def _told(url: str) -> dict[str, float]:
    with _direct.open(url, timeout=20) as answer:
        return json.load(answer)


# --- the report ------------------------------------------------------------------------------


def run(chosen: Chosen) -> Report:
    seconds = QUICK_SECONDS if chosen.quick else SECONDS
    waits = QUICK_VENDOR_SECONDS if chosen.quick else VENDOR_SECONDS
    with Service() as service, databricks_server() as workspace, prefect_server():

        def on_service(work: Callable[..., Figures], kind: str) -> Callable[[], Figures]:
            def once() -> Figures:
                service.reset()
                return in_child(work, service.url, seconds, kind)

            return once

        def on_databricks(*arguments: Any) -> Callable[[], Figures]:
            return partial(in_child, *arguments)

        measured = by_turns(
            chosen.repetitions,
            {
                BARE: on_service(bare, ""),
                "bare RemoteClient": on_service(bare, "remote"),
                OURS: on_service(stack, ""),
                "fresh client per poll": on_service(bare, "fresh"),
                "whole stack, batches of 50": on_service(stack, "batch"),
                f"{BARE} over aiohttp": on_service(bare, "aiohttp"),
                f"{OURS} over aiohttp": on_service(stack, "aiohttp"),
            },
        )
        theirs = by_turns(
            chosen.repetitions,
            {
                "prefect-databricks": on_databricks(vendor, workspace, waits),
                "our plugin, single reads": on_databricks(databricks, workspace, seconds, False),
                "our plugin, batches of 24": on_databricks(databricks, workspace, seconds, True),
            },
        )

    def rate(name: str) -> float:
        return {**measured, **theirs}[name][POLLS].median

    def cpu(name: str) -> float:
        return {**measured, **theirs}[name][CPU_PER_POLL].median

    def rows(them: Any, baseline: str) -> list[dict[str, Any]]:
        return [
            {
                "way": name,
                POLLS: each[POLLS],
                CPU_PER_POLL: each[CPU_PER_POLL],
                "threads": each["threads"],
                f"x {baseline}": each[POLLS].median / rate(baseline),
                "x per CPU s": cpu(baseline) / each[CPU_PER_POLL].median,
            }
            for name, each in them.items()
        ]

    aiohttp = rate(f"{OURS} over aiohttp") / rate(f"{BARE} over aiohttp")
    vendors = rate("prefect-databricks")
    return Report(
        question="What does the whole stack cost per poll, beyond the request itself?",
        tables=[
            Table("one service, ten reads at once", rows(measured, BARE)),
            Table("Databricks, jobs read", rows(theirs, "prefect-databricks")),
        ],
        notes=[
            "a poll of a batch is a job in its answer",
            "per CPU s: what would be left of the ratio if nobody else used the machine",
        ],
        targets=[
            Target(
                "polls/s, of the bare httpx loop's", rate(OURS) / rate(BARE), 0.9, at_most=False
            ),
            Target("polls/s over aiohttp, of its bare loop's", aiohttp, 0.8, at_most=False),
            Target(
                "jobs read per second, times prefect-databricks, batches",
                rate("our plugin, batches of 24") / vendors,
                50,
                at_most=False,
            ),
            Target(
                "jobs read per second, times prefect-databricks, single reads",
                rate("our plugin, single reads") / vendors,
                10,
                at_most=False,
            ),
        ],
    )


if __name__ == "__main__":
    main(run, __doc__)
