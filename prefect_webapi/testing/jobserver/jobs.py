"""The jobs: what was asked for, and where each stands now. Time decides; nothing runs."""

from __future__ import annotations

import heapq
import time
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Job", "JobSpecification", "JobState", "JobTable", "NewJob"]


class JobState(StrEnum):
    QUEUED = "queued"
    INITIALIZING = "initializing"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_over(self) -> bool:
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


class JobSpecification(BaseModel):
    """What a job shall do. Spans are in seconds.

    Attributes:
        outcome: ``fail-first``: the first job ever made from an equal specification fails, later ones succeed;
            ``vanish``: the server forgets the job at its end; ``never``: it runs until it is cancelled.
        dies_in: how long a cancelled job goes on; above `seconds`: it finishes first.
        hidden_for: how long a new job can't be read.
        quota: what the job counts against at the client; the server only keeps the count.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    seconds: float = Field(default=1.0, ge=0)
    queued_seconds: float = Field(default=0.0, ge=0)
    initializing_seconds: float = Field(default=0.0, ge=0)
    outcome: Literal["succeed", "fail", "fail-first", "vanish", "never"] = "succeed"
    message: str = ""
    result: Any = None
    quota: str = "default"
    dies_in: float = Field(default=0.0, ge=0)
    hidden_for: float = Field(default=0.0, ge=0)


class NewJob(BaseModel):
    """Body of a request that makes a job. `key` is for services where the server chooses the name."""

    model_config = ConfigDict(extra="forbid")

    spec: JobSpecification = JobSpecification()
    fingerprint: str = ""
    labels: dict[str, str] = Field(default_factory=dict)
    key: str = ""


@dataclass(slots=True)
class Job:
    """One job. Times are of the server's clock, in seconds."""

    name: str
    new: NewJob
    created: float
    fails: bool
    cancel_at: float | None = None
    reason: str = ""
    forgotten: bool = False
    set_to: tuple[JobState, float] | None = None

    @property
    def starts(self) -> float:
        spec = self.new.spec
        return self.created + spec.queued_seconds + spec.initializing_seconds

    @property
    def ends(self) -> float:
        """When the job is over if nobody does anything."""
        if self.set_to is not None:
            return self.set_to[1]
        spec = self.new.spec
        natural = float("inf") if spec.outcome == "never" else self.starts + spec.seconds
        if self.cancel_at is None:
            return natural
        return min(natural, self.cancel_at + spec.dies_in)

    def state(self, now: float) -> JobState:
        if self.set_to is not None:
            return self.set_to[0]
        spec = self.new.spec
        if now >= self.ends:
            if self.cancel_at is not None and self.ends == self.cancel_at + spec.dies_in:
                return JobState.CANCELLED
            return JobState.FAILED if self.fails else JobState.SUCCEEDED
        if now < self.created + spec.queued_seconds:
            return JobState.QUEUED
        return JobState.INITIALIZING if now < self.starts else JobState.RUNNING

    def is_known(self, now: float) -> bool:
        """Whether the server admits that there is such a job."""
        if self.forgotten or now < self.created + self.new.spec.hidden_for:
            return False
        return not (self.new.spec.outcome == "vanish" and now >= self.ends)

    def is_live(self, now: float) -> bool:
        return not self.forgotten and now < self.ends and not self.state(now).is_over


class JobTable:
    """All jobs ever made.

    Args:
        speed: how many seconds of the server's clock pass in a real one.
    """

    def __init__(self, speed: float = 1.0) -> None:
        self._speed = speed
        self._jobs: dict[str, Job] = {}
        self._failed_once: set[str] = set()
        self._ends: list[tuple[float, str]] = []
        self._live: set[str] = set()
        self.peak_live = 0
        self.live_by_quota: Counter[str] = Counter()
        self.peak_by_quota: Counter[str] = Counter()

    def now(self) -> float:
        return time.monotonic() * self._speed

    def __len__(self) -> int:
        return len(self._jobs)

    def all(self) -> list[Job]:
        return list(self._jobs.values())

    def add(self, name: str, new: NewJob) -> Job:
        now = self.now()
        fails = new.spec.outcome == "fail"
        if new.spec.outcome == "fail-first":
            same = new.spec.model_dump_json()
            fails = same not in self._failed_once
            self._failed_once.add(same)
        job = Job(name, new, now, fails)
        self._jobs[name] = job
        self._count(job, now)
        return job

    def get(self, name: str) -> Job | None:
        """The job if there is one that the server admits to."""
        job = self._jobs.get(name)
        return job if job is not None and job.is_known(self.now()) else None

    def named(self, name: str) -> Job | None:
        """The job, readable or not."""
        return self._jobs.get(name)

    def with_key(self, key: str) -> list[Job]:
        now = self.now()
        return [j for j in self._jobs.values() if j.new.key == key and j.is_known(now)]

    def cancel(self, job: Job, reason: str) -> None:
        """The first cancel counts; its reason stays."""
        if job.cancel_at is None:
            job.cancel_at = self.now()
            job.reason = reason
            heapq.heappush(self._ends, (job.ends, job.name))

    def live(self) -> int:
        self._drop_ended(self.now())
        return len(self._live)

    def _count(self, job: Job, now: float) -> None:
        self._drop_ended(now)
        quota = job.new.spec.quota
        self._live.add(job.name)
        self.live_by_quota[quota] += 1
        heapq.heappush(self._ends, (job.ends, job.name))
        self.peak_live = max(self.peak_live, len(self._live))
        self.peak_by_quota[quota] = max(self.peak_by_quota[quota], self.live_by_quota[quota])

    def _drop_ended(self, now: float) -> None:
        while self._ends and self._ends[0][0] <= now:
            _, name = heapq.heappop(self._ends)
            if not self._jobs[name].is_live(now):
                self._leave(name)

    def recount(self, job: Job) -> None:
        """A job was ended or forgotten by command."""
        if not job.is_live(self.now()):
            self._leave(job.name)

    def _leave(self, name: str) -> None:
        if name in self._live:
            self._live.discard(name)
            self.live_by_quota[self._jobs[name].new.spec.quota] -= 1
