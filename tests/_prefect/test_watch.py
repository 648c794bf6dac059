"""Cancellation that Prefect does not tell a task: signals, the runner's word, a flow that broke off."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import FrameType
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import flow, task
from prefect.client.schemas.objects import StateType
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import TerminationSignal
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner

from prefect_webapi._prefect import causes
from prefect_webapi._prefect.causes import Cause, cause_of, control_intent, may_time_out
from prefect_webapi._prefect.watch import Watch, cancel_event_of
from prefect_webapi.testing import EmbeddedJobServer
from tests.support.jobserver import TOKEN
from tests.support.prefect import PrefectServer, Scripts, prefect_leaks
from tests.support.waiting import eventually, eventually_blocking


@dataclass
class Call:
    """Stands for a ticket: remembers what it was told."""

    told: list[str] = field(default_factory=lambda: list[str]())

    def cancel(self, reason: str) -> None:
        self.told.append(reason)

    def pause(self, *, leaves: bool) -> None:
        self.told.append("paused")

    def detach(self) -> None:
        self.told.append("detached")


# --- private names --------------------------------------------------------------------------------------


def test_a_thread_pool_runner_keeps_an_event_per_task_run(prefect_api: PrefectServer) -> None:
    """The private name `ThreadPoolTaskRunner._cancel_events`."""
    assert "_cancel_events" in vars(ThreadPoolTaskRunner())

    @task
    def pooled() -> bool:
        context = TaskRunContext.get()
        assert context is not None
        event = cancel_event_of(context.task_run.id)
        return isinstance(event, threading.Event) and not event.is_set()

    @flow
    def run() -> list[bool]:
        called: Any = pooled
        return [called(), called.submit().result()]

    assert run() == [False, True]
    assert cancel_event_of(uuid4()) is None


def test_prefects_control_listener_tells_an_intent() -> None:
    """The private name `prefect._internal.control_listener.get_intent`."""
    from prefect._internal import attempt_control, control_listener

    assert control_intent() is None
    assert control_listener.get_intent is causes.get_intent
    assert {"cancel", "reschedule", "relinquish"} >= set(attempt_control.INTENT_FOR_BYTE.values())


def test_prefect_still_knows_its_sigterm_handler_after_we_listen() -> None:
    """The private `prefect.utilities.engine._prefect_sigterm_handler`: without it a runner's cancel is a crash."""
    from prefect.utilities.engine import (
        can_ack_control_intent,
        capture_sigterm,
        is_prefect_sigterm_handler_installed,
    )

    sent_again: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: sent_again.append(number))
    watch = Watch()
    try:
        for _ in range(2):
            with pytest.raises(TerminationSignal), capture_sigterm():  # noqa: PT012 - its handler is there inside
                watch.listen()
                assert is_prefect_sigterm_handler_installed()
                assert can_ack_control_intent()
                signal.raise_signal(signal.SIGTERM)
            assert watch.signal_since(0) is signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
    assert sent_again == [signal.SIGTERM] * 2


def test_a_flow_context_has_a_request_for_suspension() -> None:
    """The undocumented `FlowRunContext.flow_run_suspension_request`."""
    assert "flow_run_suspension_request" in FlowRunContext.model_fields
    assert not causes.is_suspending()


# --- causes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("intent", ["reschedule", "relinquish"])
def test_a_flow_run_that_goes_on_elsewhere_leaves_its_jobs(
    intent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D11."""
    monkeypatch.setattr(causes, "control_intent", lambda: intent)
    assert cause_of(TerminationSignal(signal.SIGTERM)).leaves_job


def test_an_interrupt_says_why() -> None:
    """CASE-122."""
    assert cause_of(KeyboardInterrupt()) == Cause("the process was interrupted (SIGINT)")
    assert "SIGTERM" in cause_of(TerminationSignal(signal.SIGTERM)).reason
    assert cause_of(asyncio.CancelledError()) == Cause("the task was cancelled")
    heard = cause_of(asyncio.CancelledError(), heard=signal.SIGTERM)
    assert heard == Cause("the process was asked to end (SIGTERM)")


def test_only_a_scope_that_is_over_counts_as_a_timeout(prefect_api: PrefectServer) -> None:
    later = datetime.now(UTC) + timedelta(minutes=1)

    @task(timeout_seconds=5)
    async def body() -> tuple[Cause, Cause]:
        somebody = cause_of(asyncio.CancelledError(), now=later)
        from prefect._internal.concurrency.cancellation import CancelledError

        return somebody, cause_of(CancelledError(), now=later)

    somebody, scope = asyncio.run(body())
    assert not somebody.is_task_timeout
    assert scope == Cause("the task's timeout_seconds=5 passed", is_task_timeout=True)


@prefect_leaks
def test_a_flows_timeout_is_named_outside_its_scope_too(prefect_api: PrefectServer) -> None:
    """CASE-122: the tasks of `gather` and `ensure_future` aren't in the scope that ends them."""
    later = datetime.now(UTC) + timedelta(minutes=1)

    @flow(timeout_seconds=30)
    async def around() -> list[str]:
        async def beside() -> list[str]:
            told = cause_of(asyncio.CancelledError(), told=lambda _: "the flow run was cancelled")
            causes = [cause_of(asyncio.CancelledError(), now=at) for at in (None, later)]
            return [cause.reason for cause in (told, *causes)]

        return await asyncio.ensure_future(beside())

    assert asyncio.run(around()) == [
        "the flow run was cancelled",
        "the task was cancelled",
        "the flow's timeout_seconds=30 passed",
    ]


@pytest.mark.parametrize(
    ("of_the_task", "of_the_flow", "listens"),
    [(None, None, False), (5, None, True), (None, 30, True)],
)
def test_a_thread_that_waits_listens_often_only_where_a_timeout_may_come(
    prefect_api: PrefectServer, of_the_task: int | None, of_the_flow: int | None, listens: bool
) -> None:
    @task(timeout_seconds=of_the_task)
    def body() -> bool:
        return may_time_out()

    @flow(timeout_seconds=of_the_flow)
    def around() -> bool:
        return body()

    assert around() == listens


# --- the watch ------------------------------------------------------------------------------------------------------


async def test_a_task_that_leaves_its_job_is_detached_whatever_is_heard() -> None:
    """D11: `on_exit="leave"`."""
    before = signal.signal(signal.SIGTERM, _unheard)
    watch, call = Watch(), Call()
    runner = asyncio.ensure_future(watch.run(_no_api(), 60, 60))
    try:
        await asyncio.sleep(0)
        watch.add(call, ["11111111-1111-1111-1111-111111111111"], uuid4(), leaves_job=True)  # pyright: ignore[reportArgumentType] # a stand-in
        signal.raise_signal(signal.SIGTERM)
        await eventually(lambda: call.told, within=5)
    finally:
        runner.cancel()
        await asyncio.gather(runner, return_exceptions=True)
        signal.signal(signal.SIGTERM, before)
    assert call.told == ["detached"]


async def test_a_signal_ends_the_calls_of_flows_and_reaches_the_former_handler() -> None:
    """CASE-111."""
    seen: list[int] = []

    def former(number: int, frame: FrameType | None) -> None:
        seen.append(number)

    before = signal.signal(signal.SIGTERM, former)
    watch, call, outside = Watch(), Call(), Call()
    runner = asyncio.ensure_future(watch.run(_no_api(), 60, 900))
    try:
        await asyncio.sleep(0)
        forget: Any = watch.add(call, ["11111111-1111-1111-1111-111111111111"], uuid4())  # pyright: ignore[reportArgumentType] # a stand-in
        watch.add(outside, [""], uuid4())  # pyright: ignore[reportArgumentType] # a stand-in
        signal.raise_signal(signal.SIGTERM)
        await eventually(lambda: call.told, within=5)
        await asyncio.sleep(0.5)
    finally:
        runner.cancel()
        await asyncio.gather(runner, return_exceptions=True)
        signal.signal(signal.SIGTERM, before)
    assert call.told == ["the process was asked to end (SIGTERM)"]
    assert outside.told == []
    assert seen == [signal.SIGTERM]
    forget()


async def test_jobs_of_a_flow_run_that_was_deleted_end_although_its_process_lives() -> None:
    """CASE-127: not at once, as an API may forget for a moment."""
    watch, call = Watch(), Call()
    runner = asyncio.ensure_future(watch.run(_no_api(), 0.05, 0.5))
    try:
        await asyncio.sleep(0)
        watch.add(call, ["11111111-1111-1111-1111-111111111111"], uuid4())  # pyright: ignore[reportArgumentType] # a stand-in
        began = time.monotonic()
        await eventually(lambda: call.told, within=5)
        assert time.monotonic() - began >= 0.5
    finally:
        runner.cancel()
        await asyncio.gather(runner, return_exceptions=True)
    assert call.told == ["the flow run was deleted"]
    assert watch.reason_told_to(UUID(int=0x11111111111111111111111111111111)) == call.told[0]
    assert watch.reason_told_to(uuid4()) is None


async def test_flow_runs_that_are_over_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task worker's process sees ever more of them. The newest reasons are kept: tasks ask for them as they end."""
    monkeypatch.setattr("prefect_webapi._prefect.watch.KEPT_REASONS", 3)
    watch, runs = Watch(), [uuid4() for _ in range(6)]
    runner = asyncio.ensure_future(watch.run(_no_api(), 0.01, 0.05))
    try:
        for run in runs:
            call = Call()
            forget = watch.add(call, [str(run)], uuid4())  # pyright: ignore[reportArgumentType] # a stand-in
            await eventually(lambda told=call.told: told, within=5)
            forget()
    finally:
        runner.cancel()
        await asyncio.gather(runner, return_exceptions=True)
    told = [run for run in runs if watch.reason_told_to(run) is not None]
    assert told == runs[-3:]
    assert set(watch._missing) == {str(runs[-1])}  # pyright: ignore[reportPrivateUsage]


async def test_only_the_first_call_wakes_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks at all calls each time, and does so soon anyway: with each call it would grow with their square."""
    looks = list[int]()

    def look(_: Watch, watched: list[Any]) -> None:
        looks.append(len(watched))

    monkeypatch.setattr(Watch, "_look", look)
    watch = Watch()
    runner = asyncio.ensure_future(watch.run(_no_api(), 60, 60))
    try:
        await eventually(lambda: looks == [0], within=5)
        for _ in range(200):
            watch.add(Call(), [str(uuid4())], uuid4())  # pyright: ignore[reportArgumentType] # a stand-in
            await asyncio.sleep(0)
        assert len(looks) < 20
        await eventually(lambda: looks[-1] == 200, within=5)
    finally:
        runner.cancel()
        await asyncio.gather(runner, return_exceptions=True)


def _unheard(number: int, frame: FrameType | None) -> None:
    pass


def _no_api() -> Any:
    class NoApi:
        async def once(self, *_: Any) -> list[Any]:
            return []

    return NoApi()


def test_handlers_are_chained_once_and_only_in_the_main_thread() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def own(number: int, frame: FrameType | None) -> None:
        return

    former = signal.signal(signal.SIGTERM, own)
    try:
        watch = Watch()
        thread = threading.Thread(target=watch.listen)
        thread.start()
        thread.join()
        assert signal.getsignal(signal.SIGTERM) is own
        watch.listen()
        chained = signal.getsignal(signal.SIGTERM)
        assert chained is not own
        watch.listen()
        assert signal.getsignal(signal.SIGTERM) is chained
    finally:
        signal.signal(signal.SIGTERM, former)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("ends_as", "told"),
    [
        (None, ["the flow run ended"]),  # broken off: no state was set
        (Failed(), ["the flow run ended"]),
        (Completed(), []),  # in order, without waiting for its futures
        ("AwaitingRetry", []),
    ],
)
async def test_the_runners_event_counts_only_for_a_flow_that_did_not_end_in_order(
    prefect_api: PrefectServer, ends_as: Any, told: list[str]
) -> None:
    """CASE-124, CASE-126."""
    watch, call = Watch(), Call()

    def as_a_flow_ends() -> None:
        @flow
        def ending() -> None:
            context = FlowRunContext.get()
            assert context is not None
            assert context.flow_run is not None
            run = uuid4()
            events: Any = vars(context.task_runner)["_cancel_events"]
            events[run] = threading.Event()
            watch.add(call, [str(context.flow_run.id)], run)  # pyright: ignore[reportArgumentType] # a stand-in
            before = context.flow_run.state
            if ends_as == "AwaitingRetry":
                context.flow_run.state = Failed(name="x")
                context.flow_run.state.type = StateType.SCHEDULED
            elif ends_as is not None:
                context.flow_run.state = ends_as
            events[run].set()
            watch._look(list(watch._watched.values()))  # pyright: ignore[reportPrivateUsage] # one step of `run`
            context.flow_run.state = before

        ending()

    await asyncio.to_thread(as_a_flow_ends)
    assert call.told == told


# --- whole processes --------------------------------------------------------------------------------------------------

SCRIPT = """
    import asyncio
    from datetime import timedelta
    from prefect import flow
    from pydantic import HttpUrl, SecretStr
    from prefect_webapi import EngineSettings, sync_task_for, task_for
    from prefect_webapi_jobserver import JobServer, ReportJob

    connection = JobServer(
        base_url=HttpUrl("{url}"),
        token=SecretStr("{token}"),
        settings=EngineSettings(initial_interval=timedelta(milliseconds=100)),
    )
    run = task_for("job-server", ReportJob, name="run", connection=connection)
    run_sync = sync_task_for("job-server", ReportJob, name="run", connection=connection)

    @flow
    def submitted():
        futures = [each.submit(outcome="never") for each in (run, run_sync)]
        [future.result() for future in futures]

    @flow
    async def awaited():
        await asyncio.gather(run(outcome="never"), run(outcome="never"))

    @flow
    def called():
        run_sync(outcome="never")

    if __name__ == "__main__":
        {call}
"""
JOBS = {"submitted": 2, "awaited": 2, "called": 1}


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("form", "how"),
    [
        ("awaited", signal.SIGINT),
        # The default row of test_exit_paths.py has this signal and this form, with jobs in more stages.
        pytest.param("submitted", signal.SIGTERM, marks=pytest.mark.chaos),
        pytest.param("submitted", signal.SIGINT, marks=pytest.mark.chaos),
        pytest.param("awaited", signal.SIGTERM, marks=pytest.mark.chaos),
        pytest.param("called", signal.SIGTERM, marks=pytest.mark.chaos),
        pytest.param("called", signal.SIGINT, marks=pytest.mark.chaos),
    ],
)
def test_a_signal_deletes_the_jobs_and_the_process_ends(
    scripts: Scripts, job_server: EmbeddedJobServer, form: str, how: signal.Signals
) -> None:
    """CASE-111."""
    call = "asyncio.run(awaited())" if form == "awaited" else f"{form}()"
    child = scripts.start(SCRIPT.format(url=job_server.url, token=TOKEN, call=call))
    eventually_blocking(lambda: job_server.stats().live == JOBS[form], within=120)
    child.send(how)
    code, told = child.end(within=60)
    assert code != 0, told
    assert job_server.stats().live == 0
    assert len(job_server.log("delete")) == JOBS[form]
    assert how.name in str(job_server.log("delete")[0])
