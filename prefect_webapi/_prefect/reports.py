"""What Prefect's users see of a job while it lives: states of its task run, log lines, one link.

States go out as events on the live task run: no orchestration call, no run count. The server stores some
77 of them a second and forgets its backlog when it restarts, so this process spends a budget, the newest
state of a task run wins, and nothing here is ever asked for the truth. How a job ends isn't told here: the
task's body returns it as a state.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.objects import State, StateDetails, StateType, TaskRun
from prefect.context import TaskRunContext
from prefect.events import Event
from prefect.logging.loggers import task_run_logger
from prefect.utilities.engine import emit_task_run_state_change_event

from prefect_webapi._prefect import states
from prefect_webapi._prefect.states import Shown
from prefect_webapi.contract.phase import Phase, PhaseInfo, TaskLog
from prefect_webapi.ledger.records import Record

__all__ = ["Display", "ManyReporter", "TaskRunReporter", "emit_state"]

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 10.0
"""Least time between two reports of one job under the same state name."""
LINK_SECONDS = 10.0
MOST_PARTS = 20


def emit_state(task_run: TaskRun, shown: Shown, *, follows: Event | None = None) -> Event | None:
    """Change the state of a live task run by an event, as Prefect's own engine does.

    `emit_task_run_state_change_event` is importable but undocumented: this is the only place that uses it.
    Call it in the context of the task run: the event's relation to its flow run is taken from there.
    """
    last = task_run.state
    new: State[Any] = State(
        type=shown.type,
        name=shown.name,
        message=shown.message or None,
        state_details=StateDetails(task_run_id=task_run.id, flow_run_id=task_run.flow_run_id),
    )
    if last is not None and new.timestamp <= last.timestamp:
        new.timestamp = last.timestamp + timedelta(microseconds=1)
    if last is not None and last.is_running():  # Prefect's engine counts the time that it sees
        task_run.total_run_time += new.timestamp - last.timestamp
    task_run.state, task_run.state_id = new, new.id
    task_run.state_type, task_run.state_name = new.type, new.name
    return emit_task_run_state_change_event(
        task_run=task_run, initial_state=last, validated_state=new, follows=follows
    )


class Display:
    """The budget of one process, and its links. `run` sends what had to wait.

    All but `run` may be called from any thread.
    """

    def __init__(
        self, events_per_second: float, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = events_per_second
        self._now = monotonic
        self._tokens = max(1.0, events_per_second)
        self._size = self._tokens
        self._at = monotonic()
        self._lock = threading.Lock()
        self._waiting: dict[TaskRunReporter, None] = {}
        self._links: dict[TaskRunReporter, None] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stirred: asyncio.Event | None = None

    def want(self, reporter: TaskRunReporter) -> None:
        """`reporter` has something to show: it is sent now if the budget allows, else by `run`."""
        if not self._take():
            with self._lock:
                self._waiting[reporter] = None
            self._stir()
            return
        reporter.send()

    def later(self, reporter: TaskRunReporter) -> None:
        """`reporter` has something to show that must wait for its own interval."""
        with self._lock:
            self._waiting[reporter] = None
        self._stir()

    def forget(self, reporter: TaskRunReporter) -> None:
        with self._lock:
            self._waiting.pop(reporter, None)

    def links(self, reporter: TaskRunReporter) -> None:
        """`reporter` has links to show in Prefect's UI."""
        with self._lock:
            self._links[reporter] = None
        self._stir()

    def _take(self) -> bool:
        with self._lock:
            now = self._now()
            self._tokens = min(self._size, self._tokens + (now - self._at) * self._rate)
            self._at = now
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True

    def _stir(self) -> None:
        loop, stirred = self._loop, self._stirred
        if loop is None or stirred is None:
            return
        try:
            loop.call_soon_threadsafe(stirred.set)
        except RuntimeError:  # that loop has closed: what waits was for display only
            self._loop = None

    async def run(self) -> None:
        """Send what waits, as the budget allows; write links. Ends by cancellation."""
        self._stirred = stirred = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        try:
            async with AsyncExitStack() as stack:
                client: PrefectClient | None = None
                while True:
                    stirred.clear()
                    pause = self.tick()
                    if self._links and client is None:
                        client = await stack.enter_async_context(get_client())
                    if client is not None:
                        await self._write_links(client)
                    if pause is None:
                        await stirred.wait()
                    else:
                        await asyncio.sleep(pause)
        finally:
            self._loop = self._stirred = None

    def tick(self) -> float | None:
        """Send what may be sent; seconds until more may be sent, None when nothing waits."""
        while True:
            with self._lock:
                due = [(reporter.due_in(), reporter) for reporter in self._waiting]
            if not due:
                return None
            ready = next((reporter for seconds, reporter in due if seconds <= 0), None)
            if ready is None:
                return max(0.02, min(seconds for seconds, _ in due))
            if not self._take():
                return max(0.02, 1 / self._rate)
            with self._lock:
                self._waiting.pop(ready, None)
            ready.send()

    async def _write_links(self, client: PrefectClient) -> None:
        while True:
            with self._lock:
                reporter = next(iter(self._links), None)
                if reporter is None:
                    return
                del self._links[reporter]
            try:
                async with asyncio.timeout(LINK_SECONDS):
                    await reporter.write_links(client)
            except Exception as error:  # noqa: BLE001 - a missing link must never harm a job
                logger.debug("no links are shown: %s", error)


class TaskRunReporter:
    """Tells about one job of one task run. Made in the task's own context; closed before it ends."""

    def __init__(self, display: Display, *, with_links: bool = True) -> None:
        context = TaskRunContext.get()
        if context is None:
            raise RuntimeError("a reporter is made inside a task run")
        self._display = display
        self._task_run = context.task_run
        self._logger = task_run_logger(task_run=context.task_run, task=context.task)
        self._context = contextvars.copy_context()
        self._lock = threading.Lock()
        self._with_links = with_links
        self._links = ""
        self._about = ""
        self._key = ""
        self._artifact: UUID | None = None
        self._closed = False
        self._shown: Shown | None = None
        self._next: Shown | None = None
        self._sent_at: float | None = None
        self._event: Event | None = None

    # --- engine.Reporter -------------------------------------------------------------------------

    def phase(self, record: Record, info: PhaseInfo, *, waiting_for_quota: bool) -> None:
        shown = states.shown(info, waiting_for_quota=waiting_for_quota)
        if shown is not None:
            self._offer(shown, record)
        self._offer_links(info, record)

    def cancelling(self, record: Record, reason: str) -> None:
        self._offer(states.cancelling(reason), record)

    # --- inside ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Show nothing any more: the task run is about to get its last state from Prefect's engine."""
        with self._lock:
            self._closed = True
            self._next = None
        self._display.forget(self)

    def due_in(self) -> float:
        """Seconds until what waits may be sent."""
        with self._lock:
            return self._due_in()

    def send(self) -> None:
        """Send what waits now."""
        with self._lock:
            shown, self._next = self._next, None
            state = self._task_run.state
            if self._closed or shown is None or (state is not None and state.is_final()):
                return
            try:
                self._event = self._context.run(
                    emit_state, self._task_run, shown, follows=self._event
                )
            except Exception as error:  # noqa: BLE001 - display must never harm a job
                logger.debug("task run %s can't be shown: %s", self._task_run.id, error)
            self._shown = shown
            self._sent_at = time.monotonic()

    async def write_links(self, client: PrefectClient) -> None:
        """Write the job's links beside its task run: one artifact per job, changed in place."""
        run = self._task_run
        if self._artifact is not None:
            await client.update_artifact(self._artifact, ArtifactUpdate(data=self._links))
            return
        made = await client.create_artifact(
            ArtifactCreate(
                type="markdown",
                key=self._key,
                description=self._about,
                data=self._links,
                task_run_id=run.id,
                flow_run_id=run.flow_run_id,
            )
        )
        self._artifact = made.id

    def _offer(self, shown: Shown, record: Record | None) -> None:
        with self._lock:
            newest = self._next or self._shown
            if self._closed or shown == newest:
                return
            is_new_name = newest is None or shown.name != newest.name
            self._next = shown
            waits = self._due_in() > 0
        if is_new_name and record is not None:
            self._say(shown, record)
        if waits:
            self._display.later(self)
        else:
            self._display.want(self)

    def _due_in(self) -> float:
        shown, after = self._shown, self._next
        if self._sent_at is None or shown is None or after is None or shown.name != after.name:
            return 0.0
        return self._sent_at + PROGRESS_SECONDS - time.monotonic()

    def _say(self, shown: Shown, record: Record) -> None:
        told = f": {shown.message}" if shown.message else ""
        self._context.run(
            self._logger.info,
            "Job %s is %s%s",
            record.key,
            shown.name,
            told,
            extra={"job_key": record.key, "plugin": record.plugin, "phase": shown.name},
        )

    def _offer_links(self, info: PhaseInfo, record: Record) -> None:
        text = links_of(info)
        with self._lock:
            if not text or text == self._links or self._closed or not self._with_links:
                return
            self._links = text
            self._key = f"job-{record.key}"
            self._about = f"Job {record.key} of {record.details.task_name or record.task_type}"
        self._display.links(self)


class ManyReporter(TaskRunReporter):
    """Tells about many jobs of one task run: how many are in which phase, and how far all of them are."""

    def __init__(self, display: Display, count: int) -> None:
        super().__init__(display, with_links=False)
        self._count = count
        self._phases: dict[str, str] = {}
        self._numbers: Counter[str] = Counter()
        self._over = self._failed = 0
        self._percent = -1

    def phase(self, record: Record, info: PhaseInfo, *, waiting_for_quota: bool) -> None:
        shown = states.shown(info, waiting_for_quota=waiting_for_quota)
        if shown is not None:
            self._note(record.key, shown.name)

    def cancelling(self, record: Record, reason: str) -> None:
        self._note(record.key, "Cancelling")

    def again(self, key: str) -> None:
        """An attempt has ended; the next one has a key of its own."""
        self._note(key, None)

    def over(self, key: str, *, failed: bool) -> None:
        """A job has ended, for good."""
        with self._lock:
            self._over += 1
            self._failed += failed
            percent = self._over * 100 // self._count
            is_news, self._percent = percent != self._percent, percent
        self._note(key, None)
        if is_news:
            self._display.links(self)

    async def write_links(self, client: PrefectClient) -> None:
        """Write how far they are: one progress artifact of the task run, changed in place."""
        with self._lock:
            data, told = float(self._percent), self._told()
        if self._artifact is not None:
            await client.update_artifact(
                self._artifact, ArtifactUpdate(data=data, description=told)
            )
            return
        run = self._task_run
        made = await client.create_artifact(
            ArtifactCreate(
                type="progress",
                key=f"jobs-{run.id}",
                description=told,
                data=data,
                task_run_id=run.id,
                flow_run_id=run.flow_run_id,
            )
        )
        self._artifact = made.id

    def _note(self, key: str, name: str | None) -> None:
        with self._lock:
            before = self._phases.pop(key, None)
            if before is not None:
                self._numbers[before] -= 1
            if name is not None:
                self._phases[key] = name
                self._numbers[name] += 1
            told = self._told()
        self._offer(Shown(StateType.RUNNING, "Running", told), None)

    def _told(self) -> str:
        failed = f", {self._failed} of them failed" if self._failed else ""
        live = [f"{number} {name}" for name, number in self._numbers.items() if number]
        return "; ".join([f"{self._over} of {self._count} jobs are over{failed}", *live])


def links_of(info: PhaseInfo) -> str:
    """The job's links as Markdown, one a line; those of its parts after its own."""
    logs = [_link(log) for log in _to_show(info)]
    for part in sorted(info.info.external_resources, key=lambda part: part.index)[:MOST_PARTS]:
        logs += [f"{_plain(part.external_id)}: {_link(log)}" for log in part.logs]
    return "\n\n".join(logs)


def _to_show(info: PhaseInfo) -> tuple[TaskLog, ...]:
    logs = info.info.logs
    if info.phase is Phase.RUNNING:
        return logs
    early = tuple(log for log in logs if log.show_while_pending)
    return early or logs[:1]  # a job that only waits has its page, not yet its logs


def _link(log: TaskLog) -> str:
    kept = f" (kept for {log.ttl})" if log.ttl else ""
    return f"[{_plain(log.name)}](<{log.uri}>){kept}"


def _plain(text: str) -> str:
    return "".join("\\" + c if c in "[]()<>*_`\\" else c for c in text)
