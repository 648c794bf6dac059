"""What an answer means: snapshots judged, news reported, failures counted, absence believed late."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

from prefect_webapi.contract.errors import NotFound, RemoteError, Throttled
from prefect_webapi.contract.phase import Phase, PhaseInfo
from prefect_webapi.contract.plugin import AsyncPlugin
from prefect_webapi.engine.calls import Calls
from prefect_webapi.engine.channels import Channels
from prefect_webapi.engine.contexts import StatusView
from prefect_webapi.engine.durations import Durations
from prefect_webapi.engine.faults import fault_point
from prefect_webapi.engine.job import Ending, Job
from prefect_webapi.engine.services import Services
from prefect_webapi.ledger.records import JobState
from prefect_webapi.poller import Observation

__all__ = ["Driver", "Observer"]

logger = logging.getLogger(__name__)

MISSING_AGAIN = timedelta(seconds=5)
"""Least time between two answers "not found" before they are believed."""


class Driver(Protocol):
    """Who acts on what was seen."""

    def over(self, job: Job, info: PhaseInfo, snapshot: Any = None) -> None:
        """The job has ended remotely."""
        ...

    def end(self, job: Job, ending: Ending) -> None:
        """The job shall end although it lives."""
        ...

    def delete(self, job: Job) -> None:
        """The job lives on although it was to be deleted: its service did not know it then."""
        ...

    def part(self, job: Job, info: PhaseInfo) -> None:
        """The attempt ends as `info`; the job lives on and the next attempt takes it up."""
        ...


class Observer:
    """Judges the observations of all pollers, in the order in which they come."""

    def __init__(
        self,
        services: Services,
        calls: Calls,
        channels: Channels,
        durations: Durations,
        driver: Driver,
    ) -> None:
        self._services = services
        self._calls = calls
        self._channels = channels
        self._durations = durations
        self._driver = driver

    def watch(
        self, job: Job, *, fresh: bool = False, is_known: bool = False, is_resumed: bool = False
    ) -> None:
        """Have the job read until it is over.

        Args:
            fresh: begin with short gaps again. is_known: create told how it stands.
            is_resumed: a process has left it, perhaps with a hundred thousand others.
        """
        poller = self._channels.of(job.loaded).poller
        if job.watched is not None:
            poller.forget(job.watched)
        job.watched = poller.watch(
            job,
            job,
            age=0.0 if fresh else self._age(job),
            expected=self._durations.expected(*_task_of(job)) if _is_wanted(job) else 0.0,
            ends=self._ends(job),
            is_known=is_known,
            is_one_of_many=is_resumed,
        )
        job.drop_view()

    def _ends(self, job: Job) -> Sequence[float]:
        return self._durations.ends(*_task_of(job)) if _is_wanted(job) else ()

    def _note_end(self, job: Job, read: Observation) -> None:
        """Its length as we saw it, not as the service says: its clock is another."""
        age = self._channels.of(job.loaded).poller.age(read.watched)
        self._durations.note(*_task_of(job), age - read.since, age)

    def _age(self, job: Job) -> float:
        """Seconds since it was made."""
        born = job.record.details.created_remotely_at or job.record.created_at
        return max(0.0, (self._services.clock.now() - born).total_seconds())

    def forget(self, job: Job) -> None:
        if job.watched is not None:
            self._channels.of(job.loaded).poller.forget(job.watched)
            job.watched = None

    async def take_in(self, job: Job, observation: Observation) -> None:
        """Do what follows from one read."""
        fault_point("KP-11")
        channel = self._channels.of(job.loaded)
        channel.note_read(observation)
        poller = channel.poller
        error = observation.error
        if isinstance(error, Throttled):
            self._report(
                job,
                (job.last or PhaseInfo.running()).model_copy(
                    update={"reason": f"the service throttles: {error.message}"}
                ),
            )
            poller.retry_at(observation.watched, poller.policy.initial)
            return
        if isinstance(error, NotFound):
            self._missing(job, observation)
            return
        if error is not None:
            self._read_failed(job, observation, error)
            return
        job.missing_since = None
        try:
            over = await self.judge(job, observation.resource, read=observation)
        except RemoteError as failure:  # whatever an author's status raises counts as a failed read
            self._read_failed(job, observation, failure)
            return
        if not over:
            poller.again(observation.watched, ends=self._ends(job))
            job.rest()

    async def judge_first(self, job: Job, snapshot: Any) -> bool:
        """As `judge` for what create told; an author's mistake leaves the verdict to the reads that follow."""
        try:
            return await self.judge(job, snapshot)
        except RemoteError as failure:
            logger.warning("a new job %s can't be judged: %s", job.record.key, failure.message)
            return False

    async def judge(self, job: Job, snapshot: Any, *, read: Observation | None = None) -> bool:
        """Ask `status` and report what changed; whether the job is over (its end is then under way).

        Args:
            read: what brought the snapshot; None: create did.
        """
        view = StatusView(job, job.handle, snapshot)
        info = await self._calls.status(job.loaded, view, told=job.last)
        if info.phase.is_terminal:
            fault_point("KP-13")
            if info.cleanup_on_failure and job.record.state is JobState.CREATED:
                fault_point("KP-27")
                self._driver.end(job, Ending(f"failed but still running: {info.reason}", info))
                return False
            if info.cleanup_on_failure and job.is_deleting and not job.delete_taken:
                return False  # delete is on its way
            if info.phase is Phase.SUCCESS and read is not None and job.ending is None:
                self._note_end(job, read)
            self.forget(job)
            self._driver.over(job, info, snapshot)
            return True
        if job.record.state is JobState.CANCELLING and not job.is_deleting:
            self._driver.delete(job)
        elif job.orphaned is not None and job.record.state is JobState.CREATED:
            self._driver.end(job, job.orphaned)
        if info.phase is not Phase.UNDEFINED and job.record.state is JobState.CREATED:
            self._report(job, info)
        return False

    def _report(self, job: Job, info: PhaseInfo) -> None:
        """Tell people of news; an older answer never takes a phase back."""
        last = job.last
        if last is not None and (info.same_content(last) or _rank(info) < _rank(last)):
            return
        if last is not None and last.phase is info.phase and info.version <= last.version:
            info = info.model_copy(update={"version": last.version + 1})
        fault_point("KP-12")
        job.told(info)
        job.note(info.phase.name, info.info.occurred_at or self._services.clock.now(), info.reason)
        self._services.metrics.count(
            "phase_transitions_total", plugin=job.record.plugin, phase=info.phase.name
        )
        job.report(info)

    def _missing(self, job: Job, observation: Observation) -> None:
        """The service knows no such job: believed after its visibility delay and a second answer."""
        poller = self._channels.of(job.loaded).poller
        plugin = job.loaded.plugin
        assert isinstance(plugin, AsyncPlugin)
        delay = plugin.visibility_delay
        visible_after = delay if delay is not None else job.loaded.settings.visibility_delay
        born = job.record.details.created_remotely_at or job.record.created_at
        age = self._services.clock.now() - born
        if age < visible_after:
            left = (visible_after - age).total_seconds()
            gap = max(poller.policy.initial, age.total_seconds() / 10)
            poller.retry_at(observation.watched, min(gap, left))
            return
        now = self._services.clock.monotonic()
        pause = max(MISSING_AGAIN.total_seconds(), poller.policy.longest / 4)
        if job.missing_since is None:
            job.missing_since = now
        if now - job.missing_since < pause:
            poller.retry_at(observation.watched, pause)
            return
        self.forget(job)
        if job.is_guess:
            return
        told = "the service no longer knows the job"
        if job.record.state is JobState.CANCELLING:
            self._driver.over(job, PhaseInfo.aborted(told))
        else:
            self._driver.over(job, PhaseInfo.system_retryable_failure("RemoteJobVanished", told))

    def _read_failed(self, job: Job, observation: Observation, error: Exception) -> None:
        poller = self._channels.of(job.loaded).poller
        failures = observation.watched.failures + 1
        code = error.code if isinstance(error, RemoteError) else type(error).__name__
        told = error.message if isinstance(error, RemoteError) else str(error)
        self._services.metrics.count("sync_errors_total", plugin=job.record.plugin)
        logger.debug("read %s of job %s failed: %s", failures, job.record.key, code)
        bound = job.loaded.config.caching.max_system_failures
        if job.record.state is JobState.CANCELLING or failures <= bound or job.is_swept:
            poller.again(observation.watched, failed=True)
            return
        lost = f"lost contact after {failures} failures"
        info = PhaseInfo.system_retryable_failure(code or "ContactLost", f"{lost}: {told}")
        fault_point("KP-28")
        if job.request.attempt < job.request.caller.max_attempts:
            self._driver.part(job, info)
        else:
            poller.again(observation.watched, failed=True)
            self._driver.end(job, Ending(lost, info))


def _is_wanted(job: Job) -> bool:
    """Nobody asked for its end: that of one that is deleted has nothing to do with how long its like take."""
    return job.record.state is JobState.CREATED and job.ending is None


def _task_of(job: Job) -> tuple[str, str]:
    return job.record.plugin, job.record.details.task_key


def _rank(info: PhaseInfo) -> int:
    """Order of the phases of a live job; a job never goes back in it. All that waits to start is equal."""
    waits = info.phase <= Phase.QUEUED or info.phase > Phase.RUNNING
    return Phase.QUEUED if waits else info.phase
