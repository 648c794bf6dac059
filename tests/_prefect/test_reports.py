"""What a task run shows of its job: order, budget, silence where nothing changed, links."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, cast
from uuid import UUID

import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterTaskRunId
from prefect.context import TaskRunContext

from prefect_webapi._prefect.cards import links_of
from prefect_webapi._prefect.reports import Display, ManyReporter, TaskRunReporter
from prefect_webapi.contract.keys import Base, Fingerprint, JobKey
from prefect_webapi.contract.phase import ExternalResource, PhaseInfo, TaskInfo, TaskLog
from prefect_webapi.engine.request import Outcome
from prefect_webapi.ledger.records import JobState, Record
from tests.support.prefect import PrefectServer
from tests.support.waiting import eventually

NOW = datetime(2026, 11, 24, tzinfo=UTC)
RECORD = Record(
    key=JobKey("jreports"),
    base=Base("b"),
    ordinal=0,
    attempt=1,
    state=JobState.CREATED,
    fence=1,
    runtime="r",
    plugin="p",
    task_type="t",
    connection="c",
    fingerprint=Fingerprint("f"),
    created_at=NOW,
    updated_at=NOW,
)


def in_a_task(act: Callable[[], Any]) -> Any:
    """Run `act` in a task of a flow."""

    @task
    def body() -> Any:
        return act()

    @flow
    def run() -> Any:
        return body()

    return run()


def test_a_call_without_an_end_keeps_no_flow_run_in_memory(prefect_api: PrefectServer) -> None:
    """It was refused, or left to the next process; of many, some had ended."""
    display = Display(1000)

    def act() -> None:
        TaskRunReporter(display).close()
        many = ManyReporter(display, 3)
        outcome = Outcome(
            job_key=JobKey("j"), fingerprint=Fingerprint("f"), info=PhaseInfo.success()
        )
        many.over(outcome)
        many.close()

    in_a_task(act)
    [progress] = display.artifacts._runs.values()  # pyright: ignore[reportPrivateUsage] # memory is what this is about
    assert progress.is_idle
    assert progress.told() == "1 of 4 jobs are over"


def tell(reporter: TaskRunReporter, infos: Iterable[PhaseInfo]) -> None:
    for info in infos:
        reporter.phase(RECORD, info, waiting_for_quota=False)


async def states_in_order(task_run: UUID, count: int) -> list[str]:
    """Names of a task run's states, once there are `count` of them and the last one is final."""

    async def read() -> list[str]:
        async with get_client() as client:
            states = await client.read_task_run_states(task_run)
        states.sort(key=lambda state: state.timestamp)
        done = len(states) >= count and states[-1].is_final()
        return [state.name or "" for state in states] if done else []

    return await eventually(read, within=30, every=0.2)


# --- against a server ---------------------------------------------------------------------------


async def test_phases_appear_in_order_and_raise_no_run_count(prefect_api: PrefectServer) -> None:
    """CASE-099."""

    def act() -> UUID:
        context = TaskRunContext.get()
        assert context is not None
        reporter = TaskRunReporter(Display(100))
        reporter.phase(
            RECORD, PhaseInfo.waiting_for_resources("2 of 2 taken"), waiting_for_quota=True
        )
        tell(reporter, [PhaseInfo.queued(), PhaseInfo.initializing("node"), PhaseInfo.running()])
        reporter.cancelling(RECORD, "because")
        reporter.close()
        assert context.task_run.run_count == 1
        return context.task_run.id

    run = await asyncio.to_thread(in_a_task, act)
    assert await states_in_order(run, 8) == [
        "Pending",
        "Running",
        "AwaitingConcurrencySlot",
        "RemoteQueued",
        "RemoteInitializing",
        "Running",
        "Cancelling",
        "Completed",
    ]
    async with get_client() as client:
        stored = await client.read_task_run(run)
    assert stored.run_count == 1


async def test_equal_reports_are_one_and_a_closed_reporter_is_silent(
    prefect_api: PrefectServer,
) -> None:
    """CASE-098."""

    def act() -> UUID:
        context = TaskRunContext.get()
        assert context is not None
        reporter = TaskRunReporter(Display(1000))
        tell(reporter, [PhaseInfo.running("busy")] * 100)
        reporter.close()
        tell(reporter, [PhaseInfo.queued("late")])
        assert context.task_run.state_name == "Running"
        return context.task_run.id

    run = await asyncio.to_thread(in_a_task, act)
    assert await states_in_order(run, 4) == ["Pending", "Running", "Running", "Completed"]


async def test_the_first_links_are_an_artifact_of_the_task_run_and_change_in_place(
    prefect_api: PrefectServer,
) -> None:
    """CASE-097, CASE-102."""
    display = Display(100)
    loop = asyncio.get_running_loop()
    page = TaskLog(name="Page", uri="http://service/job?a=1&b=2")
    more = TaskLog(name="Logs", uri="http://service/logs")

    def queued_then_running() -> UUID:
        context = TaskRunContext.get()
        assert context is not None
        run = context.task_run.id
        reporter = TaskRunReporter(display)
        tell(reporter, [PhaseInfo.queued(info=TaskInfo(logs=(page,)))])
        asyncio.run_coroutine_threadsafe(shows(run, "Page"), loop).result(30)
        tell(reporter, [PhaseInfo.running(info=TaskInfo(logs=(page, more)))])
        asyncio.run_coroutine_threadsafe(shows(run, "Logs"), loop).result(30)
        reporter.close()
        return run

    async def artifacts(run: UUID) -> list[Any]:
        wanted = ArtifactFilter(task_run_id=ArtifactFilterTaskRunId(any_=[run]))
        async with get_client() as client:
            return list(await client.read_artifacts(artifact_filter=wanted))

    async def shows(run: UUID, text: str) -> None:
        async def found() -> bool:
            return any(text in str(each.data) for each in await artifacts(run))

        await eventually(found, within=20, every=0.1)

    runner = asyncio.ensure_future(display.run())
    try:
        run = await asyncio.to_thread(in_a_task, queued_then_running)
    finally:
        runner.cancel()
        await asyncio.gather(runner, return_exceptions=True)
    (artifact,) = await artifacts(run)
    assert artifact.key == "job-jreports"
    assert artifact.data.endswith(
        "\n\n[Page](<http://service/job?a=1&b=2>)\n\n[Logs](<http://service/logs>)"
    )


# --- the budget ------------------------------------------------------------------------------------


class Shows:
    """Stands for a reporter: says when it is due, remembers when it was sent."""

    def __init__(self, due: float = 0.0) -> None:
        self.due = due
        self.sent = 0

    def due_in(self) -> float:
        return self.due

    def send(self) -> None:
        self.sent += 1


def test_the_budget_lets_no_more_than_its_rate_pass_and_forgets_nobody() -> None:
    """REQ-78."""
    now = 0.0
    display = Display(10, monotonic=lambda: now)
    reporters: list[Any] = [Shows() for _ in range(50)]
    for reporter in reporters:
        display.want(reporter)
    assert sum(each.sent for each in reporters) == 10
    for second in range(1, 5):
        now = float(second)
        while (pause := display.tick()) is not None and pause < 0.05:
            pass
        assert sum(each.sent for each in reporters) == 10 + 10 * second
    assert display.tick() is None
    assert all(each.sent == 1 for each in reporters)


def test_while_task_runs_start_by_the_hundred_their_own_events_go_first() -> None:
    """The server stores some 77 a second; ours are sent when it comes to them, and a few starts hold nobody up."""
    now = 0.0
    display = Display(10, monotonic=lambda: now)
    alone: Any = Shows()
    display.others(2)
    display.want(alone)
    assert alone.sent == 1
    display.others(770)
    assert not display.spare()
    assert display.artifacts.busy_for() == pytest.approx(9.0, abs=0.1)
    reporters: list[Any] = [Shows() for _ in range(10)]
    for reporter in reporters:
        display.want(reporter)
    for second in (5.0, 9.0):
        now = second
        while (pause := display.tick()) is not None and pause < 0.05:
            pass
        assert not any(each.sent for each in reporters)
    now = 9.1
    assert display.tick() is None
    assert all(each.sent == 1 for each in reporters)
    display.others(1_000_000)  # such a server is another one: nothing waits for hours
    display.want(late := cast(Any, Shows()))
    assert display.tick() == pytest.approx(29.0)
    now = 40.0
    assert display.tick() is None
    assert late.sent == 1


def test_a_reporter_that_waits_twice_is_sent_once() -> None:
    now = 0.0
    display = Display(1, monotonic=lambda: now)
    first: Any = Shows()
    second: Any = Shows()
    display.want(first)
    display.want(second)
    display.want(second)
    now = 10.0
    display.tick()
    assert (first.sent, second.sent) == (1, 1)


def test_one_that_is_not_due_holds_nobody_up() -> None:
    now = 0.0
    display = Display(10, monotonic=lambda: now)
    early: Any = Shows(due=5.0)
    ready: Any = Shows()
    display.later(early, 5.0)
    display.later(ready, 0.0)
    assert display.tick() == 5.0
    assert (early.sent, ready.sent) == (0, 1)
    now, early.due = 5.0, 0.0
    assert display.tick() is None
    assert early.sent == 1


def test_thousands_that_wait_are_not_looked_through_for_each_that_is_sent() -> None:
    now, looks = 0.0, 0

    class Counted(Shows):
        def due_in(self) -> float:
            nonlocal looks
            looks += 1
            return super().due_in()

    display = Display(1, monotonic=lambda: now)
    reporters: list[Any] = [Counted() for _ in range(2_000)]
    for reporter in reporters:
        display.want(reporter)
    for second in range(1, 101):
        now = float(second)
        display.tick()
    assert sum(each.sent for each in reporters) == 101
    assert looks <= 300


async def test_the_sender_is_woken_once_by_all_who_want_to_be_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And by nobody while it waits for its budget: each time is a system call."""
    loop, woken = asyncio.get_running_loop(), 0
    real = loop.call_soon_threadsafe

    def counted(*args: Any) -> Any:
        nonlocal woken
        woken += 1
        return real(*args)

    display = Display(100)
    sending = asyncio.create_task(display.run())
    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    reporters: list[Any] = [Shows() for _ in range(130)]
    for times in (1, 2):
        await asyncio.sleep(0)  # it has begun
        for reporter in reporters:
            display.want(reporter)
        assert woken <= times
        await eventually(lambda n=times: all(each.sent == n for each in reporters), within=10)
    sending.cancel()
    await asyncio.wait([sending])


def test_a_forgotten_reporter_is_not_sent() -> None:
    display = Display(10)
    gone: Any = Shows()
    display.later(gone, 0.0)
    display.forget(gone)
    assert display.tick() is None
    assert gone.sent == 0


# --- links -------------------------------------------------------------------------------------------


def test_a_waiting_job_shows_its_page_and_what_may_be_seen_early() -> None:
    """CASE-102."""
    page, early = TaskLog(name="p", uri="u"), TaskLog(name="e", uri="v", show_while_pending=True)
    logs = TaskInfo(logs=(page, early))
    assert links_of(PhaseInfo.queued(info=TaskInfo(logs=(page,)))) == "[p](<u>)"
    assert links_of(PhaseInfo.queued(info=logs)) == "[e](<v>)"
    assert links_of(PhaseInfo.running(info=logs)) == "[p](<u>)\n\n[e](<v>)"


def test_names_in_links_can_not_break_out_of_markdown() -> None:
    log = TaskLog(name="a](http://evil)[b", uri="http://ok")
    assert links_of(PhaseInfo.running(info=TaskInfo(logs=(log,)))) == (
        "[a\\]\\(http://evil\\)\\[b](<http://ok>)"
    )


def test_links_of_parts_follow_those_of_the_job() -> None:
    """CASE-103."""
    part = ExternalResource(external_id="x", index=1, logs=(TaskLog(name="l", uri="u"),))
    assert links_of(PhaseInfo.running(info=TaskInfo(external_resources=(part,)))) == "x: [l](<u>)"
