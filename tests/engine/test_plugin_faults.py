"""An author's code may do anything anywhere: it harms its own job, which ends readably, and nobody else's."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest

from prefect_webapi import (
    OutcomeUnknown,
    Phase,
    PhaseInfo,
    PluginEntry,
    TaskExecutionContextReader,
)
from prefect_webapi.contract.errors import WebApiError
from prefect_webapi.engine.host import Host
from prefect_webapi.metrics import Metrics
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import JobServer, JobServerPlugin, ReportJob
from prefect_webapi_jobserver.models import JobHandle
from tests.support.engine import at, request, run
from tests.support.plugins import (
    KEYS,
    DoPlugin,
    NeitherPlugin,
    OutputsPlugin,
    SearchPlugin,
    SinglePlugin,
    entry,
)
from tests.support.waiting import eventually

SETTINGS: dict[str, Any] = {
    "createTimeout": "400ms",
    "getTimeout": "400ms",
    "deleteTimeout": "400ms",
    "maxCreateAttempts": 2,
    "cancelGrace": "500ms",
}
CONFIG: dict[str, Any] = {
    "caching": {"maxSystemFailures": 0},
    "resourceQuotas": {"default": 1000},
}


class Catastrophe(BaseException):
    """Not even an `Exception`."""


def _raises(error: type[BaseException]) -> Callable[[], Coroutine[Any, Any, Any]]:
    async def act() -> Any:
        raise error("boom")

    return act


async def _nonsense() -> Any:
    return object()


async def _never() -> Any:
    await asyncio.Event().wait()


MISCHIEF = {
    "error": _raises(KeyError),
    "interrupt": _raises(KeyboardInterrupt),
    "exit": _raises(SystemExit),
    "cancelled": _raises(asyncio.CancelledError),
    "catastrophe": _raises(Catastrophe),
    "stop": _raises(StopIteration),
    "nonsense": _nonsense,
    "never": _never,
}


class CalledInVain(SearchPlugin):
    """What came of its create is never known to it."""

    async def create(self, ctx: TaskExecutionContextReader) -> JobHandle:
        await super().create(ctx)
        raise OutcomeUnknown("no answer")


def mischievous(base: type[Any], method: str, kind: str) -> PluginEntry[JobServer]:
    """A plugin whose `method` does its work and then misbehaves."""

    async def misbehave(self: Any, argument: Any) -> Any:
        await getattr(base, method)(self, argument)
        return await MISCHIEF[kind]()

    broken: type[Any] = type("Broken", (base,), {method: misbehave})
    return entry(broken, f"{method}-{kind}")


async def end_of(host: Host, task_type: str, spec: ReportJob, **call: Any) -> tuple[str, str]:
    """How a call ended: its phase, or the class of the error; and what people are told."""
    try:
        outcome = await run(host, spec, task_type, **call)
    except WebApiError as error:
        return type(error).__name__, str(error)
    info = outcome.info
    return info.phase.name, f"{info.err.message if info.err else ''} {info.reason}"


FOR_METHOD: dict[str, tuple[type[Any], str]] = {
    "resource_requirements": (JobServerPlugin, "never"),
    "create": (NeitherPlugin, "never"),
    "find": (CalledInVain, "never"),
    "get": (SinglePlugin, "never"),
    "outputs": (OutputsPlugin, "succeed"),
    "do": (DoPlugin, "succeed"),
}


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=() if method in ("create", "get") else pytest.mark.chaos)
        for method in sorted(FOR_METHOD)
    ],
)
async def test_whatever_a_method_does_its_job_ends_readably_and_is_not_made_twice(
    job_server: EmbeddedJobServer, tmp_path: Path, method: str
) -> None:
    """REQ-83: it raises what ends a process or a task, returns nonsense, or never; others' jobs go on meanwhile."""
    base, outcome = FOR_METHOD[method]
    kinds = [kind for kind in MISCHIEF if (method, kind) not in HARMLESS]
    broken = [mischievous(base, method, kind) for kind in kinds]
    with at(tmp_path, job_server, CONFIG, entries=[KEYS, *broken], **SETTINGS) as host:
        ends = await asyncio.gather(
            *(
                end_of(host, plugin.id, ReportJob(outcome=cast(Any, outcome), seconds=0, day=nth))
                for nth, plugin in enumerate(broken)
            ),
        )
        healthy = await run(host, ReportJob(seconds=0, day=-1))
    assert healthy.info.phase is Phase.SUCCESS
    for plugin, (end, told) in zip(broken, ends, strict=True):
        assert end != "SUCCESS", plugin.id
        assert f"{method} of plugin {plugin.id!r}" in told, (end, told)
        if plugin.id.endswith(("error", "interrupt", "exit", "cancelled", "catastrophe")):
            assert "boom" in told
    stats = job_server.stats()
    assert stats.duplicates == {}
    assert stats.created <= len(broken) + 1


HARMLESS = {("outputs", "nonsense"), ("get", "nonsense"), ("do", "never")}
"""They have ends of their own: no JSON form, a snapshot that can't be judged, a time-out of minutes."""


def mischievous_status(kind: str) -> PluginEntry[JobServer]:
    class Broken(SinglePlugin):
        def status(self, ctx: Any) -> PhaseInfo:
            act = MISCHIEF[kind]()
            if kind == "never":
                return cast(Any, act)  # an author who awaits where nobody should
            try:
                act.send(None)
            except StopIteration as done:
                return done.value
            raise AssertionError("unreachable")

    return entry(Broken, f"status-{kind}")


async def test_whatever_status_does_counts_as_a_failed_read(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-099, REQ-83."""
    broken = [mischievous_status(kind) for kind in MISCHIEF]
    with at(tmp_path, job_server, CONFIG, entries=[KEYS, *broken], **SETTINGS) as host:
        ends = await asyncio.gather(
            *(
                end_of(host, plugin.id, ReportJob(outcome="never", day=nth))
                for nth, plugin in enumerate(broken)
            ),
        )
        healthy = await run(host, ReportJob(seconds=0, day=-1))
        await eventually(lambda: job_server.stats().live == 0, within=10)
    assert healthy.info.phase is Phase.SUCCESS
    for plugin, (end, told) in zip(broken, ends, strict=True):
        assert end == "RETRYABLE_FAILURE"
        assert f"status of plugin {plugin.id!r}" in told
    assert job_server.stats().created == len(broken) + 1


async def test_whatever_a_batch_read_does_counts_as_a_failed_read_of_each_job(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """REQ-20, REQ-83."""
    broken = [mischievous(JobServerPlugin, "get_many", kind) for kind in MISCHIEF]
    with at(tmp_path, job_server, CONFIG, entries=broken, **SETTINGS) as host:
        ends = await asyncio.gather(
            *(
                end_of(host, plugin.id, ReportJob(seconds=1.5, day=day))
                for plugin in broken
                for day in range(3)
            )
        )
    for nth, plugin in enumerate(broken):
        told = [text for end, text in ends[3 * nth : 3 * nth + 3] if end == "RETRYABLE_FAILURE"]
        assert len(told) >= 2  # one that is left alone is read alone
        assert all(f"get_many of plugin {plugin.id!r}" in text for text in told)
    assert job_server.stats().created == len(ends)


async def test_whatever_delete_does_it_is_repeated_and_told_once(
    job_server: EmbeddedJobServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """REQ-46: the first failure at once, further ones at most once a minute; the metric counts all."""
    kinds = [kind for kind in MISCHIEF if kind != "nonsense"]
    broken = [mischievous(NoDelete, "delete", kind) for kind in kinds]
    metrics = Metrics()

    def failed(plugin: str) -> float:
        calls = metrics.value("calls_total", plugin=plugin, op="delete")
        return calls - metrics.value("calls_total", plugin=plugin, op="delete", outcome="ok")

    before = {plugin.id: failed(plugin.id) for plugin in broken}
    with (
        caplog.at_level(logging.WARNING, "prefect_webapi.engine.cancel"),
        at(tmp_path, job_server, CONFIG, entries=broken, metrics=metrics, **SETTINGS) as host,
    ):
        tickets = [
            host.admit(request(ReportJob(outcome="never", day=nth), task_type=plugin.id))
            for nth, plugin in enumerate(broken)
        ]
        await eventually(lambda: job_server.stats().live == len(broken), within=10)
        for ticket in tickets:
            ticket.cancel("enough")
        outcomes = [await ticket.outcome() for ticket in tickets]
        for plugin in broken:
            await eventually(lambda p=plugin.id: failed(p) - before[p] >= 3, within=10)
        for job in job_server.jobs():
            job_server.end(job.name, "cancelled")
        tracked = partial(metrics.value, "tracked_jobs")
        await eventually(lambda: not any(tracked(plugin=p.id) for p in broken), within=10)
    for outcome in outcomes:
        assert outcome.info.phase is Phase.ABORTED
        assert "has not confirmed the end yet" in outcome.info.reason
    lines = [record.getMessage() for record in caplog.records]
    for plugin in broken:
        [line] = [line for line in lines if f"delete of plugin {plugin.id!r}" in line]
        assert line.startswith("delete of job")


class NoDelete(SinglePlugin):
    async def delete(self, ctx: Any) -> None:
        return None


def unloadable(step: str, kind: str) -> PluginEntry[JobServer]:
    class Broken(SinglePlugin):
        if step == "get_config":
            get_config = cast(Any, lambda self: MISCHIEF[kind]())  # pyright: ignore[reportUnknownLambdaType]

    def load(setup: Any) -> Any:
        return MISCHIEF[kind]() if step == "plugin_loader" else Broken(setup.connection)

    return PluginEntry(
        id=f"{step}-{kind}",
        supported_task_types=[f"{step}-{kind}"],
        connection=JobServer,
        spec=ReportJob,
        plugin_loader=load,
    )


@pytest.mark.parametrize("step", ["plugin_loader", "get_config"])
async def test_a_plugin_that_can_not_be_loaded_fails_its_tasks_only(
    job_server: EmbeddedJobServer, tmp_path: Path, step: str
) -> None:
    """REQ-52: and nothing is sent."""
    broken = [unloadable(step, kind) for kind in MISCHIEF if kind != "nonsense"]
    with at(tmp_path, job_server, CONFIG, entries=[KEYS, *broken], **SETTINGS) as host:
        ends = [await end_of(host, plugin.id, ReportJob()) for plugin in broken]
        assert job_server.log() == []
        healthy = await run(host, ReportJob(seconds=0))
    for plugin, (end, told) in zip(broken, ends, strict=True):
        assert end == "RemoteSystemError"
        assert f"plugin {plugin.id!r} could not be loaded for connection 'default': {step}" in told
    assert healthy.info.phase is Phase.SUCCESS


async def test_a_plugin_that_fails_to_close_keeps_nobody_from_ending(
    job_server: EmbeddedJobServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """REQ-52."""
    kinds = ["error", "interrupt", "exit", "cancelled", "catastrophe"]
    broken = [unclosable(kind) for kind in kinds]
    with at(tmp_path, job_server, CONFIG, entries=broken, **SETTINGS) as host:
        for plugin in broken:
            outcome = await run(host, ReportJob(seconds=0), plugin.id)
            assert outcome.info.phase is Phase.SUCCESS
    for plugin in broken:
        assert f"plugin {plugin.id} failed to close" in caplog.text
    assert "prefect-webapi" not in {thread.name for thread in threading.enumerate()}


def unclosable(kind: str) -> PluginEntry[JobServer]:
    class Broken(SinglePlugin):
        async def aclose(self) -> None:
            await super().aclose()
            await MISCHIEF[kind]()

    return entry(Broken, f"aclose-{kind}")


class Late(NeitherPlugin):
    """Its create is over after its deadline, whatever anybody does."""

    seconds: ClassVar[float] = 1.0

    def create(self, ctx: TaskExecutionContextReader) -> Any:
        made = asyncio.run(_posted(self, ctx))
        time.sleep(self.seconds)
        return made


async def _posted(plugin: Late, ctx: TaskExecutionContextReader) -> JobHandle:
    fresh = NeitherPlugin(plugin._connection)  # pyright: ignore[reportPrivateUsage] - a client of this loop's own
    try:
        return await fresh.create(ctx)
    finally:
        await fresh.aclose()


class Stubborn(NeitherPlugin):
    """Its create answers although it was told to stop."""

    async def create(self, ctx: TaskExecutionContextReader) -> JobHandle:
        made = await super().create(ctx)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return made
        raise AssertionError("unreachable")


async def test_an_answer_after_the_deadline_makes_no_second_job(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """REQ-33, REQ-71: a thread's comes to nobody; a coroutine's that ignores its end is taken."""
    entries = [entry(Late, "late"), entry(Stubborn, "stubborn")]
    with at(tmp_path, job_server, entries=entries, **SETTINGS) as host:
        late = await run(host, ReportJob(seconds=0), "late")
        stubborn = await run(host, ReportJob(seconds=0, day=1), "stubborn")
    assert late.info.err is not None
    assert late.info.err.code == "CreateOutcomeUnknown"
    assert "no answer to create of plugin 'late' within 0.4 s" in late.info.reason
    assert stubborn.info.phase is Phase.SUCCESS
    assert job_server.stats().created == 2
    assert job_server.stats().duplicates == {}


async def test_a_search_that_fails_is_no_proof_that_there_is_nothing(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-043, REQ-31: create is not sent again before a search has answered."""
    job_server.behave("search")
    job_server.fault("create", drop=True, after_acceptance=True)
    job_server.fault("find", status=500, times=4)
    with at(tmp_path, job_server, visibilityDelay="50ms") as host:
        outcome = await run(host, ReportJob(seconds=0), "search")
    assert outcome.info.phase is Phase.SUCCESS
    assert job_server.stats().created == 1
    assert len(job_server.log("find")) == 5
