"""What Prefect's users see of a job while it lives: states of its task run, events, log lines, artifacts.

States go out as events on the live task run: no orchestration call, no run count. The server stores some
77 of them a second and forgets its backlog when it restarts, so this process spends a budget, the newest
state of a task run wins, and nothing here is ever asked for the truth. How a task run ends isn't told here: the
task's body returns it as a state.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
from prefect.client.schemas.objects import State, StateDetails, StateType, TaskRun
from prefect.context import TaskRunContext
from prefect.events import Event
from prefect.logging.loggers import task_run_logger
from prefect.utilities.engine import emit_task_run_state_change_event

from prefect_webapi._prefect import states
from prefect_webapi._prefect.artifacts import Artifacts, Card
from prefect_webapi._prefect.cards import Story, links_of
from prefect_webapi._prefect.events import PHASES, emit_job_event, end_of
from prefect_webapi._prefect.identity import attempt_of
from prefect_webapi._prefect.states import Shown
from prefect_webapi.bell import Bell
from prefect_webapi.contract.phase import Phase, PhaseInfo
from prefect_webapi.engine.request import Outcome
from prefect_webapi.ledger.records import Record

__all__ = ["Display", "ManyReporter", "TaskRunReporter", "emit_state"]

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 10.0
"""Least time between two reports of one job under the same state name."""


STORED_PER_SECOND, STORED_AHEAD_SECONDS, LONGEST_SECONDS = 77, 1.0, 30.0
"""Events that Prefect's server stores; for how many seconds' worth of the task runs' own we still add ours; and how
long we wait for them at most: other servers are quicker."""
EVENTS_OF_A_START, EVENTS_OF_AN_END = 2, 2
"""Pending and Running; the last state, and ours of the job."""


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
    """The budget of one process. `run` sends what had to wait.

    While task runs start or end by the hundred, nothing is spent, nor on the cards of jobs: the server stores their own
    events first, and would show ours when they are old.

    All but `run` may be called from any thread.
    """

    def __init__(
        self, events_per_second: float, *, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = events_per_second
        self._now = monotonic
        self._tokens = max(1.0, events_per_second)
        self._size = self._tokens
        self._at = self._stored_at = monotonic()
        self._lock = threading.Lock()
        self._ready: dict[TaskRunReporter, None] = {}
        self._later: list[tuple[float, int, TaskRunReporter]] = []
        self._resting = set[TaskRunReporter]()
        self._order = 0
        self.artifacts = Artifacts(busy_for=self._busy_for)
        self._bell = Bell()

    def want(self, reporter: TaskRunReporter) -> None:
        """`reporter` has something to show: it is sent now if the budget allows, else by `run`."""
        if not self._take():
            with self._lock:
                self._ready[reporter] = None
            self._bell.ring()
            return
        reporter.send()

    def later(self, reporter: TaskRunReporter, seconds: float) -> None:
        """`reporter` has something to show that must wait for its own interval."""
        with self._lock:
            self._put_off(reporter, seconds)
        self._bell.ring()

    def _put_off(self, reporter: TaskRunReporter, seconds: float) -> None:
        if reporter not in self._resting:
            self._order += 1
            self._resting.add(reporter)
            heapq.heappush(self._later, (self._now() + seconds, self._order, reporter))

    def forget(self, reporter: TaskRunReporter) -> None:
        """It shows nothing any more."""
        with self._lock:
            self._ready.pop(reporter, None)
            self._resting.discard(reporter)

    def others(self, events: int) -> None:
        """So many events go to the server whatever the budget says."""
        with self._lock:
            now = self._now()
            stored_at = max(self._stored_at, now) + events / STORED_PER_SECOND
            self._stored_at = min(stored_at, now + LONGEST_SECONDS)

    def spare(self) -> bool:
        """Whether the budget has room for one event more, which is spent then."""
        return self._take()

    def _busy_for(self) -> float:
        """Seconds until the server has stored what task runs that start or end by the hundred tell of themselves."""
        return max(0.0, self._stored_at - self._now() - STORED_AHEAD_SECONDS)

    def _take(self) -> bool:
        with self._lock:
            now = self._now()
            self._tokens = min(self._size, self._tokens + (now - self._at) * self._rate)
            self._at = now
            if self._tokens < 1 or self._busy_for():
                return False
            self._tokens -= 1
            return True

    async def run(self) -> None:
        """Send what waits, as the budget allows; write artifacts. Ends by cancellation."""
        async with anyio.create_task_group() as group:
            group.start_soon(self.artifacts.run)
            await self._send()

    async def _send(self) -> None:
        with self._bell.heard():
            while True:
                self._bell.look()
                pause = self.tick()
                if pause is None:
                    await self._bell.wait()
                else:
                    await asyncio.sleep(pause)

    def tick(self) -> float | None:
        """Send what may be sent; seconds until more may be sent, None when nothing waits."""
        while True:
            with self._lock:
                now = self._now()
                while self._later and self._later[0][0] <= now:
                    _, _, rested = heapq.heappop(self._later)
                    if rested in self._resting:
                        self._resting.remove(rested)
                        self._ready[rested] = None
                first = next(iter(self._ready), None)
                if first is None:
                    return max(0.02, self._later[0][0] - now) if self._later else None
            due = first.due_in()
            if due == 0 and not self._take():
                return max(0.02, 1 / self._rate, self._busy_for())
            with self._lock:
                self._ready.pop(first, None)
                if due:
                    self._put_off(first, due)
            if due == 0:
                first.send()


class TaskRunReporter:
    """Tells about one job of one task run. Made in the task's own context; closed before it ends."""

    def __init__(self, display: Display, *, deployment: str = "", count: int = 1) -> None:
        context = TaskRunContext.get()
        if context is None:
            raise RuntimeError("a reporter is made inside a task run")
        self._display = display
        self._task_run = context.task_run
        self._task = context.task.name
        self._max_attempts = context.task.retries + 1
        self._deployment = deployment
        self._logger = task_run_logger(task_run=context.task_run, task=context.task)
        self._context = contextvars.copy_context()
        display.others(EVENTS_OF_A_START)
        self._lock = threading.Lock()
        self._progress = display.artifacts.progress(
            flow_run=self._task_run.flow_run_id, task_run=self._task_run.id
        )
        self._progress.expect(count)
        self._left = count
        self._story: Story | None = None
        self._card: Card | None = None
        self._closed = False
        self._shown: Shown | None = None
        self._next: Shown | None = None
        self._evented: str | None = None
        self._sent_at: float | None = None
        self._event: Event | None = None

    # --- engine.Reporter -------------------------------------------------------------------------

    def phase(self, record: Record, info: PhaseInfo, *, waiting_for_quota: bool) -> None:
        shown = states.shown(info, waiting_for_quota=waiting_for_quota)
        if shown is not None:
            name = info.phase.name
            self._tell(record.key, name, info.reason, record=record, info=info, shown=shown)
            self._offer(shown, record)

    def cancelling(self, record: Record, reason: str) -> None:
        shown = states.cancelling(reason)
        self._tell(record.key, "CANCELLING", reason, record=record, shown=shown)
        self._offer(shown, record)

    # --- the task's body ---------------------------------------------------------------------------

    def ended(self, outcome: Outcome) -> None:
        """The job is over: its card and an event say so; the state is the body's."""
        info = outcome.info
        failed = info.phase is not Phase.SUCCESS
        if not outcome.job_key:
            self._count(outcome.job_key, failed=failed)
            return
        story = self._tell(outcome.job_key, info.phase.name, info.reason, info=info, failed=failed)
        self._count(outcome.job_key, failed=failed)
        what = end_of(info, stopped_by_us=outcome.stopped_by_us)
        if story is not None:
            self._emit(what, story, info.reason)

    def close(self) -> None:
        """Show nothing any more: the task run is about to get its last state from Prefect's engine."""
        with self._lock:
            self._closed = True
            self._next = None
            story = self._story
            left, self._left = self._left, 0
        self._progress.forsake(left)
        self._display.forget(self)
        self._display.others(EVENTS_OF_AN_END)
        if story is not None:
            self._progress.note(story.key, None)

    # --- inside ------------------------------------------------------------------------------------

    def _count(self, key: str, *, failed: bool) -> None:
        with self._lock:
            self._left = max(0, self._left - 1)
        self._progress.over(key, failed=failed)

    def due_in(self) -> float | None:
        """Seconds until what waits may be sent; None: nothing does, or not any more."""
        with self._lock:
            return None if self._next is None else self._due_in()

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
            is_new, self._evented = self._evented != shown.name, shown.name
            story = self._story
        if is_new and story is not None:
            self._emit(PHASES[shown.name], story, shown.message)

    def _emit(self, what: str, story: Story, reason: str) -> None:
        try:
            self._context.copy().run(
                emit_job_event,
                what,
                story,
                self._task_run,
                reason=reason,
                deployment=self._deployment,
            )
        except Exception as error:  # noqa: BLE001 - as above
            logger.debug("no event tells of job %s: %s", story.key, error)

    def _tell(
        self,
        key: str,
        name: str,
        reason: str,
        *,
        record: Record | None = None,
        info: PhaseInfo | None = None,
        shown: Shown | None = None,
        failed: bool = False,
    ) -> Story | None:
        """Add to the job's story, and to its card if it has one; the story."""
        try:
            return self._tell_on(key, name, reason, record, info, shown, failed)
        except Exception as error:  # noqa: BLE001 - display must never harm a job
            logger.debug("job %s can't be shown: %s", key, error)
            return None

    def _tell_on(
        self,
        key: str,
        name: str,
        reason: str,
        record: Record | None,
        info: PhaseInfo | None,
        shown: Shown | None,
        failed: bool,
    ) -> Story:
        with self._lock:
            story = self._story
            is_first = story is None
            if story is None:
                story = self._story = Story(
                    key, self._task, attempt_of(self._task_run), self._max_attempts
                )
                if record is not None:
                    story.steps.extend(record.details.steps[:-1])  # of earlier runs
            had = links_of(story.info) if story.info else ""
            story.record, story.info = record or story.record, info or story.info
            at = (info.info.occurred_at if info else None) or datetime.now(UTC)
            is_news = story.note(name, at, reason)
            has_links = story.info is not None and links_of(story.info) != had
            if self._card is None and (
                (is_first and self._progress.wants_card())
                or (failed and self._progress.wants_card(failed=True))
            ):
                run = self._task_run
                self._card = Card(story, self._progress, flow_run=run.flow_run_id, task_run=run.id)
            card = self._card
        if shown is not None:
            self._progress.note(key, shown.name)
        artifacts, is_over = self._display.artifacts, shown is None
        if card is not None and (is_news or has_links):
            is_link_urgent = has_links and not is_first and not self._progress.is_many
            artifacts.offer(card, urgent=is_over or is_link_urgent)
        if self._progress.is_many:
            artifacts.offer(self._progress)
        return story

    def _offer(self, shown: Shown, record: Record | None) -> None:
        with self._lock:
            newest = self._next or self._shown
            if self._closed or shown == newest:
                return
            is_new_name = newest is None or shown.name != newest.name
            self._next = shown
            seconds = self._due_in()
        if is_new_name and record is not None:
            self._say(shown, record)
        if seconds > 0:
            self._display.later(self, seconds)
        else:
            self._display.want(self)

    def _due_in(self) -> float:
        shown, after = self._shown, self._next
        if self._sent_at is None or shown is None or after is None or shown.name != after.name:
            return 0.0
        return max(0.0, self._sent_at + PROGRESS_SECONDS - time.monotonic())

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


class ManyReporter(TaskRunReporter):
    """Tells about many jobs of one task run: how many are in which phase, and how far all of them are."""

    def __init__(self, display: Display, count: int) -> None:
        super().__init__(display, count=count)
        self._progress.is_many = True

    def phase(self, record: Record, info: PhaseInfo, *, waiting_for_quota: bool) -> None:
        shown = states.shown(info, waiting_for_quota=waiting_for_quota)
        if shown is not None:
            self._note(record.key, shown.name)

    def cancelling(self, record: Record, reason: str) -> None:
        self._note(record.key, "Cancelling")

    def ended(self, outcome: Outcome) -> None:
        """Each was told by `over`."""

    def again(self, key: str) -> None:
        """An attempt has ended; the next one has a key of its own."""
        self._note(key, None)

    def over(self, outcome: Outcome) -> None:
        """A job has ended, for good."""
        failed = outcome.info.phase is not Phase.SUCCESS
        self._count(outcome.job_key, failed=failed)
        if failed and outcome.job_key and self._progress.wants_card(failed=True):
            self._show_failed(outcome)
        self._note(outcome.job_key, None)

    def _show_failed(self, outcome: Outcome) -> None:
        """Of failed ones some have a card, and an event while the budget has room."""
        info = outcome.info
        story = Story(outcome.job_key, self._task, info=info)
        story.note(info.phase.name, info.info.occurred_at or datetime.now(UTC), info.reason)
        run = self._task_run
        card = Card(story, self._progress, flow_run=run.flow_run_id, task_run=run.id)
        self._display.artifacts.offer(card, urgent=True)
        if self._display.spare():
            self._emit(end_of(info, stopped_by_us=outcome.stopped_by_us), story, info.reason)

    def _note(self, key: str, name: str | None) -> None:
        self._progress.note(key, name)
        self._display.artifacts.offer(self._progress)
        self._offer(Shown(StateType.RUNNING, "Running", self._progress.told()), None)
