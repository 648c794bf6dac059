"""Jobs of other processes and earlier runs: follow a living owner, take over from a dead one, hand results out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from prefect_webapi.contract.phase import Phase, PhaseInfo
from prefect_webapi.contract.task import JobSpec
from prefect_webapi.engine import machine
from prefect_webapi.engine.call import Call
from prefect_webapi.engine.job import Ending, slot_of
from prefect_webapi.engine.liveness import is_alive, is_gone
from prefect_webapi.engine.machine import Event
from prefect_webapi.engine.outputs import faults_of, recall
from prefect_webapi.engine.request import Caller, JobRequest, Outcome, outermost_run
from prefect_webapi.engine.services import Services
from prefect_webapi.ledger.records import JobState, Move, MoveResult, Record, RuntimeRow
from prefect_webapi.registry import Loaded

__all__ = [
    "Others",
    "close",
    "free",
    "outcome_of",
    "release",
    "request_of",
    "settle",
    "spec_of",
    "take_over",
]

logger = logging.getLogger(__name__)

FOLLOW_SECONDS = 0.5
SEEN_SECONDS = 0.2
"""How long what was seen of another process counts: a restart asks the same about thousands of jobs."""


class Others:
    """The other processes on this ledger.

    Attributes:
        gone: ids of those that have ended for good; and "", which is written where a job was let go.
    """

    def __init__(self, services: Services, me: RuntimeRow) -> None:
        self._services = services
        self._me = me
        self._seen: dict[str, tuple[float, bool]] = {}
        self._looking = asyncio.Lock()
        self.gone = {""}

    async def look(self) -> None:
        """See who is gone: the jobs that they left are taken over as they are asked for."""
        rows = await self._services.store.runtimes()
        self.gone.update(row.id for row in rows if is_gone(row, me=self._me))

    async def drive(self, record: Record) -> bool:
        """Whether another living process drives this job."""
        return record.runtime != self._me.id and await self._lives(record.runtime)

    async def _lives(self, runtime: str) -> bool:
        async with self._looking:
            seen_at, lives = self._seen.get(runtime, (-SEEN_SECONDS, False))
            if time.monotonic() - seen_at >= SEEN_SECONDS:
                row = {row.id: row for row in await self._services.store.runtimes()}.get(runtime)
                lives = is_alive(row, me=self._me, now=self._services.clock.now())
                seen_at = time.monotonic()
                self._seen = {
                    other: seen
                    for other, seen in self._seen.items()
                    if seen_at - seen[0] < SEEN_SECONDS
                }
                self._seen[runtime] = seen_at, lives
                if row is not None and is_gone(row, me=self._me):
                    self.gone.add(runtime)
            return lives

    async def follow(
        self, record: Record, call: Call, ending: Callable[[], Ending | None]
    ) -> Outcome | None:
        """Wait while the other process drives the job.

        None: it has ended, or its process has: look again. An outcome: this call no longer wants the job. Its owner is
        asked to end it, unless it drives it for another run, which may want it still.
        """
        logger.info("job %s is driven by another process; following it", record.key)
        while call.is_waiting:
            wanted = ending()
            if wanted is not None:
                is_own = outermost_run(record) == outermost_run(call.request.caller)
                if is_own or not await self.drive(record):
                    await self._services.store.ask_cancel([record.key], wanted.reason)
                return Outcome(
                    job_key=record.key,
                    fingerprint=record.fingerprint,
                    info=wanted.final(),
                    stopped_by_us=True,
                )
            await self._services.clock.sleep(FOLLOW_SECONDS)
            now = await self._services.store.get(record.key)
            if now is None or now.state.is_over or not await self.drive(now):
                return None
            record = now
        return call.result()

    async def ended(self, record: Record, spec: JobSpec[Any], loaded: Loaded) -> Outcome | None:
        """What the job that was followed came to; None: it is not over, or the sweeper ended it."""
        now = await self._services.store.get(record.key)
        if now is None or not now.state.is_over or now.details.orphaned:
            return None
        return await self.hand_out(now, spec, loaded)

    async def hand_out(self, record: Record, spec: JobSpec[Any], loaded: Loaded) -> Outcome:
        """The result that the ledger keeps of a job that is over: no remote call is made."""
        if record.state is not JobState.CLOSED and not await self.drive(record):
            await close(self._services, record)
        return await outcome_of(self._services, record, spec, loaded)


async def take_over(
    services: Services, record: Record, caller: Caller | None = None
) -> Record | None:
    """Become the owner of a dead process's job (or of one that this process had let go); None: look again.

    Args:
        caller: whose runs own the job from now on; None: nobody's new.
    """
    runs = None if caller is None else (caller.flow_run, caller.root_run, caller.task_run)
    move = Move.taking(record, services.runtime_id, runs)
    if await services.store.move(move) is not MoveResult.OK:
        return None
    taken = await services.store.get(record.key)
    if taken is None or (taken.fence, taken.runtime) != (record.fence + 1, services.runtime_id):
        return None  # another call was quicker in between
    return taken


async def release(services: Services, record: Record) -> None:
    """Say that no process drives this job any more. Nothing happens if another has taken it by now."""
    await services.store.move(Move.taking(record, ""))


async def settle(
    services: Services, record: Record, event: Event, info: PhaseInfo, *, closes: bool = True
) -> bool:
    """Close the record of a job that no process drives and that is known, or given up, as over.

    Args:
        closes: nobody will come back for its end; False: the end waits in the record for a caller.

    Returns:
        False: another process was first.
    """
    taken = await take_over(services, record)
    if taken is None:
        return False
    if not taken.state.is_over:
        state = machine.next_state(taken.state, event)
        move = Move(
            old=taken,
            state=state,
            at=services.clock.now(),
            details=replace(
                taken.details, phase=info, last_error=info.reason, orphaned=closes, spec=None
            ),
            count=machine.place_change(taken.state, state),
        )
        if await services.store.move(move) is not MoveResult.OK:
            return False
        taken = replace(taken, state=state)
    if closes:
        return await _close_taken(services, taken)
    free(services, taken)
    return True


def spec_of(record: Record, loaded: Loaded) -> JobSpec[Any] | None:
    """What create sent; None: it was not kept, or this version of the plugin can't read it."""
    if record.details.spec is None:
        return None
    try:
        return loaded.entry.spec.model_validate_json(record.details.spec)
    except Exception as error:  # noqa: BLE001 - an author's validators may raise anything
        logger.info("the spec of job %s can't be read: %s", record.key, type(error).__name__)
        return None


def request_of(record: Record, loaded: Loaded) -> JobRequest:
    """The call that made a record, as far as the record tells: the task's arguments are not in it."""
    details = record.details
    return JobRequest(
        task_type=record.task_type,
        spec=spec_of(record, loaded) or JobSpec[Any](),  # enough for what needs only the key
        task_key=details.task_key,
        task_name=details.task_name,
        caller=Caller(
            run_key=record.root_run,
            execution="",
            task_run=record.task_run,
            flow_run=record.flow_run,
            root_run=record.root_run,
            deployment=details.deployment,
            namespace=details.namespace,
            labels=details.labels,
            max_attempts=record.attempt,
        ),
        attempt=record.attempt,
        reporter=_Silent(),
        connection=record.connection,
        plugin=record.plugin,
    )


class _Silent:
    """Nobody watches a job whose task run has ended."""

    def phase(self, record: Record, info: PhaseInfo, *, waiting_for_quota: bool) -> None:
        pass

    def cancelling(self, record: Record, reason: str) -> None:
        pass


async def outcome_of(
    services: Services, record: Record, spec: JobSpec[Any], loaded: Loaded
) -> Outcome:
    """What the record of a job that is over tells a call with this spec."""
    info = record.details.phase or PhaseInfo.system_failure("Unknown", "the record has no phase")
    value = None
    if info.phase is Phase.SUCCESS:
        try:
            value = await recall(services, spec, record.details.outputs)
        except LookupError:
            info = PhaseInfo.system_failure(
                "ResultExpired",
                f"job {record.key} succeeded, but its stored result is gone; run it again with reuse_results=False",
            )
        except ValidationError as error:
            info = PhaseInfo.failure(
                "OutputsInvalid",
                f"job {record.key} succeeded, but its stored result is not what the spec promises now "
                f"({faults_of(error)}); run it again with reuse_results=False",
            )
    return Outcome(
        job_key=record.key,
        fingerprint=record.fingerprint,
        info=info,
        value=value,
        stopped_by_us=record.details.stopped_by_us,
        settings=loaded.settings,
    )


async def close(services: Services, record: Record) -> None:
    """Finish what a dead process left undone on a job that is over."""
    taken = await take_over(services, record)
    if taken is not None:
        await _close_taken(services, taken)


async def _close_taken(services: Services, taken: Record) -> bool:
    """Give back the place of a job that is over, and close its record; False: another process was first."""
    free(services, taken)
    state = machine.next_state(taken.state, Event.SETTLED)
    move = Move(old=taken, state=state, at=services.clock.now())
    return await services.store.move(move) is MoveResult.OK


def free(services: Services, record: Record) -> None:
    """Give back the place that a job had, if its lease is still there."""
    lease = record.details.lease
    if record.quotas and lease is not None:
        services.quotas.release(record.quotas, slot_of(lease), weight=record.weight)
