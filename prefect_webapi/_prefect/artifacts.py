"""What Prefect's artifacts show of jobs: a card per job, and one progress per flow run that has many.

An artifact is a call of Prefect's API, a write on its single writer: so the first jobs of a flow run get cards, and
those that fail; all others only count. One process spends a budget, one artifact changes every few seconds at most, and
whatever can't be written is left out. Nothing here is on the way of a job.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from uuid import UUID

import anyio
import anyio.to_thread
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate

from prefect_webapi._prefect.cards import Story, card
from prefect_webapi.bell import Bell

__all__ = ["Artifacts", "Card", "Progress"]

logger = logging.getLogger(__name__)

CARDS = 20
"""So many jobs of a flow run get a card as they begin; as many more as they fail."""
FIRST_SECONDS = 1.0
"""Age of a job at its first card: a short one has written its end by then, and one call is enough."""
CHANGE_SECONDS = 10.0
"""Least time between two writes of an artifact; the end comes at once, and a new link unless the jobs are many."""
WRITES_PER_SECOND = 2.0
BURST = 20
WRITE_SECONDS = 10.0
LAST_SECONDS = 2.0
"""What a closing process spends on artifacts that have news."""
RUNS_KEPT = 200


class Artifact(ABC):
    """One artifact of Prefect, changed in place.

    Attributes:
        has_time: it waits while the server is busy with what many task runs tell of themselves.
    """

    has_time = False

    def __init__(self) -> None:
        self._id: UUID | None = None
        self._born = time.monotonic()
        self._written: float | None = None
        self.is_urgent = False

    @abstractmethod
    def content(self) -> ArtifactCreate:
        """What it shows now."""

    def due_in(self) -> float:
        """Seconds until it may be written."""
        if self.is_urgent:
            return 0.0
        if self._written is None:
            return self._born + self.first_seconds - time.monotonic()
        return self._written + CHANGE_SECONDS - time.monotonic()

    @property
    def first_seconds(self) -> float:
        """Its age when it is written first."""
        return FIRST_SECONDS

    async def write(self, client: PrefectClient) -> None:
        self.is_urgent = False
        self._written = time.monotonic()
        data = self.content().model_dump(mode="json", exclude_unset=True)
        # Not by the client's own methods: they send an event each, and fail at that while an interpreter ends.
        if self._id is None:
            made = await client.request("POST", "/artifacts/", json=data)
            self._id = UUID(made.json()["id"])
            return
        change = {name: data[name] for name in ("data", "description")}
        await client.request("PATCH", "/artifacts/{id}", json=change, path_params={"id": self._id})


class Card(Artifact):
    """A job's own artifact. Of many jobs it has time: their progress is shown first, while they start."""

    has_time = True

    def __init__(
        self, story: Story, progress: Progress, *, flow_run: UUID | None, task_run: UUID
    ) -> None:
        super().__init__()
        self._story = story
        self._progress = progress
        self._flow_run, self._task_run = flow_run, task_run

    @property
    def first_seconds(self) -> float:
        return CHANGE_SECONDS if self._progress.is_many else FIRST_SECONDS

    def content(self) -> ArtifactCreate:
        key, about, text = card(self._story)
        return ArtifactCreate(
            type="markdown",
            key=key,
            description=about,
            data=text,
            flow_run_id=self._flow_run,
            task_run_id=self._task_run,
        )


class Progress(Artifact):
    """How far the jobs of a flow run are; outside a flow, those of a task run. Told from any thread."""

    def __init__(self, *, flow_run: UUID | None, task_run: UUID) -> None:
        super().__init__()
        self._flow_run, self._task_run = flow_run, None if flow_run else task_run
        self._lock = threading.Lock()
        self._phases: dict[str, str] = {}
        self._numbers: Counter[str] = Counter()
        self._count = self._over = self._failed = self._cards = self._failed_cards = 0
        self._forsaken = 0
        self.is_many = False

    @property
    def is_idle(self) -> bool:
        return self._over + self._forsaken >= self._count

    def expect(self, count: int = 1) -> None:
        """So many jobs more; from some number on they are many."""
        with self._lock:
            self._count += count
            self.is_many = self.is_many or self._count > CARDS

    def wants_card(self, *, failed: bool = False) -> bool:
        """Whether another job may have a card of its own."""
        with self._lock:
            self._cards += not failed
            self._failed_cards += failed
            return (self._failed_cards if failed else self._cards) <= CARDS

    def note(self, key: str, name: str | None) -> None:
        """A job is in another phase; None: in none any more, its next attempt has another key."""
        with self._lock:
            self._note(key, name)

    def over(self, key: str, *, failed: bool) -> None:
        with self._lock:
            self._note(key, None)
            self._over += 1
            self._failed += failed

    def forsake(self, count: int) -> None:
        """Of so many jobs no end will be told: their calls were refused, or left."""
        with self._lock:
            self._forsaken += count

    def told(self) -> str:
        """In words."""
        with self._lock:
            failed = f", {self._failed} of them failed" if self._failed else ""
            live = [f"{number} {name}" for name, number in self._numbers.items() if number]
            return "; ".join([f"{self._over} of {self._count} jobs are over{failed}", *live])

    def content(self) -> ArtifactCreate:
        told = self.told()
        percent = self._over * 100 // max(1, self._count)
        return ArtifactCreate(
            type="progress",
            key=f"jobs-{self._flow_run or self._task_run}",
            description=told,
            data=float(percent),
            flow_run_id=self._flow_run,
            task_run_id=self._task_run,
        )

    def _note(self, key: str, name: str | None) -> None:
        before = self._phases.pop(key, None)
        if before is not None:
            self._numbers[before] -= 1
        if name is not None:
            self._phases[key] = name
            self._numbers[name] += 1


class Artifacts:
    """Those of one process. `run` writes them; the rest may be called from any thread.

    Args:
        busy_for: seconds for which the server is busy with other things.
    """

    def __init__(
        self,
        *,
        busy_for: Callable[[], float] = lambda: 0.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.busy_for = busy_for
        self._now = monotonic
        self._tokens = float(BURST)
        self._at = monotonic()
        self._lock = threading.Lock()
        self._waiting: dict[Artifact, None] = {}
        self._runs: dict[UUID, Progress] = {}
        self._client: PrefectClient | None = None
        self._bell = Bell()

    def progress(self, *, flow_run: UUID | None, task_run: UUID) -> Progress:
        """That of the flow run."""
        place = flow_run or task_run
        with self._lock:
            found = self._runs.get(place)
            if found is None:
                self._forget_old()
                found = self._runs[place] = Progress(flow_run=flow_run, task_run=task_run)
            return found

    def offer(self, artifact: Artifact, *, urgent: bool = False) -> None:
        """It has news."""
        with self._lock:
            is_known = artifact in self._waiting and artifact.is_urgent >= urgent
            artifact.is_urgent = artifact.is_urgent or urgent
            self._waiting[artifact] = None
        if not is_known:
            self._bell.ring()

    async def run(self) -> None:
        """Write what has news. Ends by cancellation, and then writes what it may at once."""
        try:
            with self._bell.heard():
                while True:
                    self._bell.look()
                    ready, pause = self._next()
                    if ready is None:
                        await self._bell.wait(pause)
                    else:
                        await self._write(ready)
        finally:
            with anyio.CancelScope(shield=True):
                with anyio.move_on_after(LAST_SECONDS):
                    await self._write_last()
                client, self._client = self._client, None
                if client is not None:
                    with suppress(Exception):
                        await client.__aexit__(None, None, None)

    def _next(self) -> tuple[Artifact | None, float | None]:
        """What may be written now, or the seconds until there may be something."""
        with self._lock:
            busy = self.busy_for()
            due = [
                (max(each.due_in(), busy if each.has_time else 0.0), each) for each in self._waiting
            ]
            if not due:
                return None, None
            ready = next((each for seconds, each in due if seconds <= 0), None)
            if ready is None:
                return None, max(0.02, min(seconds for seconds, _ in due))
            now = self._now()
            self._tokens = min(BURST, self._tokens + (now - self._at) * WRITES_PER_SECOND)
            self._at = now
            if self._tokens < 1:
                return None, (1 - self._tokens) / WRITES_PER_SECOND
            self._tokens -= 1
            del self._waiting[ready]
            return ready, 0.0

    async def _write_last(self) -> None:
        """Those that would come next, within what is left of the budget."""
        while self._waiting and self._tokens >= 1:
            with self._lock:
                artifact = next(iter(self._waiting))
                del self._waiting[artifact]
                self._tokens -= 1
            await self._write(artifact)

    async def _write(self, artifact: Artifact) -> None:
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                if self._client is None:
                    # In a thread: without PREFECT_API_URL this starts a server and waits for it.
                    client = await anyio.to_thread.run_sync(get_client)
                    self._client = await client.__aenter__()
                await artifact.write(self._client)
        except Exception as error:  # noqa: BLE001 - what is not shown must never harm a job
            logger.debug("an artifact is not shown: %s", error)

    def _forget_old(self) -> None:
        if len(self._runs) < RUNS_KEPT:
            return
        for place in [place for place, run in self._runs.items() if run.is_idle][: RUNS_KEPT // 2]:
            del self._runs[place]
