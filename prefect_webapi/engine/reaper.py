"""The sweeper: finishes what dead processes and ended flows have left in the ledger.

One pass looks at every record that is not closed and that no living process drives, decides, and hands what must
be done to the runtime, where it goes the way of any other job. It may run anywhere, at any time, beside flows and
beside other sweepers: each job is taken by compare-and-set, and a pass that is killed is simply done again.

Source: SPEC 3.1 (who is alive, what is an orphan), 3.4 (column "abandoned").
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum

import anyio
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prefect_webapi.contract.config import EngineSettings
from prefect_webapi.contract.duration import format_duration
from prefect_webapi.contract.errors import ConfigurationError, WebApiError
from prefect_webapi.contract.keys import JobKey
from prefect_webapi.contract.phase import PhaseInfo
from prefect_webapi.engine.adapters import handle_adapter
from prefect_webapi.engine.calls import can_clear_up, can_find, is_sync
from prefect_webapi.engine.handover import free, release, settle, spec_of, take_over
from prefect_webapi.engine.job import Ending, Job
from prefect_webapi.engine.liveness import is_alive
from prefect_webapi.engine.machine import Event, next_state
from prefect_webapi.engine.request import Fate, RunState, outermost_run
from prefect_webapi.engine.runtime import Runtime
from prefect_webapi.ledger.records import (
    JobState,
    Move,
    MoveResult,
    OpenJob,
    Record,
    RuntimeRow,
)
from prefect_webapi.portions import in_portions
from prefect_webapi.registry import Loaded

__all__ = ["Action", "SweepReport", "Swept", "cancel", "resolve", "sweep"]

logger = logging.getLogger(__name__)

INLINE = "inline"
AT_ONCE = 500
COMING = timedelta(minutes=1)
"""For so long a record that this process has made may be without its job here."""
PATIENCE = timedelta(seconds=20)
"""How long a pass waits for the next job to be gone; what takes longer is the next pass's."""
CROWDED = timedelta(minutes=2)
"""How long it waits at most, in all, while calls come in by the thousand."""


class Action(StrEnum):
    """What a pass does with a record."""

    END = "end"  # the job shall be gone: read it, and delete it if it lives
    LOOK = "look"  # is it over by now? Otherwise it stays
    CLOSE = "close"  # nothing remote is left to do
    GIVE_UP = "give up"  # the horizon has passed
    REPORT = "report"  # only people can help


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True)


class Swept(_Value):
    """One record of a pass.

    Attributes:
        state: as it was found.
        reason: why something was done.
        came_to: what has become of it; empty after a dry run.
    """

    job_key: str
    task: str
    plugin: str
    connection: str
    state: JobState
    action: Action
    reason: str
    came_to: str = ""


class SweepReport(_Value):
    """What a pass has done, or would do.

    Attributes:
        looked_at: records that are not closed.
        driven: those of them that a living process looks after.
        slots: given back, by limit.
        pruned: closed records whose time of keeping was over.
        troubles: what could not be done, for people.
    """

    dry_run: bool = False
    looked_at: int = 0
    driven: int = 0
    jobs: tuple[Swept, ...] = ()
    slots: dict[str, int] = Field(default_factory=dict)
    pruned: int = 0
    troubles: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Decision:
    """What to do, and why.

    Attributes:
        closes: nobody will come back for the end.
        is_last: what this pass can't end is given up.
        only_if_over: while the job lives its record is not touched: it tells since when nobody looked after it.
    """

    action: Action
    reason: str
    closes: bool = True
    is_last: bool = False
    only_if_over: bool = False


@dataclass(frozen=True, slots=True)
class _Case:
    """What is known of one record.

    Attributes:
        is_at_home: the Prefect that told its fate is the one that it was made under.
        is_ours: this process lives and drives it no longer; a retry may.
        silent: since when no process has been heard of that drove it.
    """

    record: Record
    fate: Fate
    is_at_home: bool
    is_ours: bool
    silent: datetime
    loaded: Loaded | None


async def sweep(
    runtime: Runtime,
    *,
    dry_run: bool = False,
    only: Collection[JobKey] | None = None,
    connection: str | None = None,
    stay: bool = False,
) -> SweepReport:
    """One pass.

    Args:
        only: look at these jobs and at nothing else.
        connection: a block document's name, for jobs whose connection was a block that nobody saved.
        stay: wait for nothing: what was taken up is looked after for as long as this process lives. Jobs whose run goes
            on without their process are ended in the ledger if they are over: others wait for their places.

    Raises:
        LedgerError: the ledger can't be used.
        PrefectUnavailable: nobody knows how the flow runs stand, so no job was touched.
    """
    return await _Pass(runtime, connection).run(dry_run=dry_run, only=only, stay=stay)


async def cancel(runtime: Runtime, keys: Collection[JobKey], reason: str) -> Sequence[Record]:
    """End jobs because a person wants it, whichever process drives them; how their records are afterwards.

    A job that takes its time to die is still CANCELLING then: its owner, or the next pass, sees to the rest.
    """
    store, clock = runtime.services.store, runtime.services.clock
    await store.ask_cancel(keys, reason)
    await sweep(runtime, only=keys)
    until = clock.monotonic() + PATIENCE.total_seconds()
    while True:
        found = [record for key in keys if (record := await store.get(key)) is not None]
        if all(r.state.is_over for r in found) or clock.monotonic() >= until:
            return found
        await clock.sleep(0.2)


async def resolve(runtime: Runtime, key: JobKey, *, handle: str | None) -> Record:
    """Settle by hand what no process can find out.

    Args:
        handle: JSON of the job's handle: it exists, and the next run or pass takes it up; None: it does not exist at
            the service, or has ended.

    Raises:
        ConfigurationError: there is no such job, it is over or looked after, or the handle is not one of its plugin.
    """
    services = runtime.services
    record = await services.store.get(key)
    if record is None:
        raise ConfigurationError(
            f"the ledger has no job {key!r}; `prefect-webapi jobs list` shows those it has"
        )
    if record.state.is_over:
        raise ConfigurationError(f"job {key} is over ({record.state}): there is nothing to settle")
    rows = {row.id: row for row in await services.store.runtimes()}
    if is_alive(rows.get(record.runtime), me=runtime.me, now=services.clock.now()):
        raise ConfigurationError(
            f"job {key} is looked after by a living process; end it with `prefect-webapi jobs cancel {key}`"
        )
    if handle is None:
        info = PhaseInfo.aborted("settled by hand: the service has no such job, or it has ended")
        done = await settle(services, record, _event_of_the_end(record), info)
    else:
        done = await _give_handle(runtime, record, handle)
    if not done:
        raise ConfigurationError(f"job {key} was taken by another process meanwhile; look again")
    return await services.store.get(key) or record


async def _give_handle(runtime: Runtime, record: Record, handle: str) -> bool:
    services = runtime.services
    if record.state not in (JobState.CREATING, JobState.SUSPECT):
        raise ConfigurationError(f"job {record.key} is {record.state}: it needs no handle")
    loaded = await services.plugins.get(record.task_type, record.plugin, record.connection)
    if is_sync(loaded):
        raise ConfigurationError(
            f"jobs of plugin {record.plugin!r} have no handle: they are one call"
        )
    try:
        handle_adapter(loaded).validate_json(handle)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigurationError(
            f"this is no handle of plugin {record.plugin!r}: {told}. `jobs show` of another of its jobs shows one"
        ) from None
    taken = await take_over(services, record)
    if taken is None:
        return False
    move = Move(
        old=taken,
        state=next_state(taken.state, Event.HANDLE_KNOWN),
        at=services.clock.now(),
        handle=handle,
    )
    if await services.store.move(move) is not MoveResult.OK:
        return False
    await release(services, replace(taken, state=move.state))
    return True


def _event_of_the_end(record: Record) -> Event:
    """What the end of a job is called that nobody saw end."""
    if record.state in (JobState.CREATED, JobState.CANCELLING):
        return Event.ENDED
    return Event.NOTHING_MADE if record.state.job_may_exist else Event.GIVEN_UP


class _Pass:
    def __init__(self, runtime: Runtime, connection: str | None) -> None:
        self._runtime = runtime
        self._services = runtime.services
        self._connection = connection
        self._troubles: list[str] = []
        self._taken: list[Job] = []
        self._loaded: dict[tuple[str, str, str], Loaded | None] = {}
        self._fates: dict[str, Fate] = {}
        self._driven = self._undriven = 0

    async def run(
        self, *, dry_run: bool, only: Collection[JobKey] | None, stay: bool
    ) -> SweepReport:
        had_let_go = self._runtime.has_let_go
        try:
            return await self._run(dry_run, only, stay)
        except BaseException:
            self._runtime.has_let_go |= had_let_go  # not all of them were looked at
            raise

    async def _run(self, dry_run: bool, only: Collection[JobKey] | None, stay: bool) -> SweepReport:
        store = self._services.store
        until = self._services.clock.monotonic() + CROWDED.total_seconds() if stay else 0.0
        await self._let_calls_in(until)
        now = self._services.clock.now()
        if only is None:
            self._runtime.has_let_go = False
        found = [job for job in await store.open_jobs() if only is None or job.key in only]
        rows = {row.id: row for row in await store.runtimes()}  # after them: it names each owner
        me = self._runtime.me
        living = {row.id: is_alive(row, me=me, now=now) for row in rows.values()}
        plans: list[tuple[_Case, _Decision]] = []
        async for records in self._left_behind(found, living, now, until):
            if any(record.runtime == me.id for record in records):
                self._runtime.has_let_go = True
            for case in await self._cases(records, rows):
                decision = _decide(case, self._settings(case.loaded), now, stay)
                if decision is not None:
                    plans.append((case, decision))
                if case.record.state is JobState.OVER and not dry_run:
                    free(self._services, case.record)  # its result waits for a caller
        plans = await self._name_the_superseded(plans)
        report = SweepReport(
            dry_run=dry_run,
            looked_at=self._driven + self._undriven,
            driven=self._driven,
            jobs=tuple(_line(case.record, decision) for case, decision in plans),
        )
        if dry_run:
            return report.model_copy(update={"troubles": tuple(self._troubles)})
        await self._carry_out(plans)
        if not stay:
            await self._wait(plans)
            await self._give_up_the_last(plans)
        self._troubles += [
            f"job {job.record.key}: {type(job.failure).__name__}"
            for job in self._taken
            if job.failure is not None
        ]
        report = report.model_copy(
            update={"jobs": tuple([await self._told(j) for j in report.jobs])}
        )
        if only is None and not stay:
            report = report.model_copy(
                update={
                    "slots": dict(await self._runtime.repair_slots()),
                    "pruned": await store.prune(now - self._services.settings.ledger_retention),
                }
            )
        self._count(report)
        return report.model_copy(update={"troubles": tuple(self._troubles)})

    async def _left_behind(
        self, found: Sequence[OpenJob], living: Mapping[str, bool], now: datetime, until: float
    ) -> AsyncGenerator[Sequence[Record]]:
        """The records that no living process drives, some at a time; they are counted, and the others."""
        left: dict[JobKey, str] = {}
        async for job in in_portions(found, AT_ONCE):
            if self._is_driven(job, living, now):
                self._driven += 1
            else:
                left[job.key] = job.runtime
        keys = list(left)
        for start in range(0, len(keys), AT_ONCE):
            await self._let_calls_in(until)
            records: list[Record] = []
            for record in await self._services.store.records(keys[start : start + AT_ONCE]):
                is_ours_now = self._is_driven(OpenJob.of(record), living, now)
                if is_ours_now or record.runtime != left[record.key]:  # it was taken meanwhile
                    self._driven += 1
                elif record.state is not JobState.CLOSED:
                    records.append(record)
            self._undriven += len(records)
            yield records

    async def _let_calls_in(self, until: float) -> None:
        """Who calls for jobs by the thousand goes first, for a while: most are those that a process has left."""
        clock = self._services.clock
        while self._runtime.is_crowded and clock.monotonic() < until:
            await clock.sleep(0.1)

    def _is_driven(self, job: OpenJob, living: Mapping[str, bool], now: datetime) -> bool:
        if job.runtime != self._runtime.me.id:
            return living.get(job.runtime, False)
        if job.state.is_over or self._runtime.drives(job.key):
            return True
        return not job.has_handle and now - job.updated_at < COMING  # a call is about to

    # --- what is known -----------------------------------------------------------------------

    async def _cases(
        self, records: Sequence[Record], rows: Mapping[str, RuntimeRow]
    ) -> list[_Case]:
        flows = {flow for record in records if (flow := record.root_run or record.flow_run)}
        tasks = {r.task_run for r in records if not r.root_run and not r.flow_run and r.task_run}
        flows, tasks = flows - self._fates.keys(), tasks - self._fates.keys()
        if flows or tasks:
            self._fates.update(await self._services.runs.fates(flows, tasks))
        unknown = Fate(RunState.RUNNING)
        cases: list[_Case] = []
        async for record in in_portions(records, AT_ONCE):
            is_ours = record.runtime == self._runtime.me.id
            owner = None if is_ours else rows.get(record.runtime)
            silent = max(record.updated_at, owner.last_beat) if owner else record.updated_at
            run = outermost_run(record)
            loaded = await self._load(record)
            is_at_home = record.details.home == self._services.runs.home
            fate = self._fates.get(run, unknown)
            cases.append(_Case(record, fate, is_at_home, is_ours, silent, loaded))
        return cases

    async def _load(self, record: Record) -> Loaded | None:
        """The plugin that speaks for a record; None: it can't be had, which people are told once."""
        name = record.connection
        if name == INLINE:
            if self._connection is None:
                return None
            name = self._connection
        key = (record.task_type, record.plugin, name)
        if key not in self._loaded:
            try:
                self._loaded[key] = await self._services.plugins.get(
                    record.task_type, record.plugin, name
                )
            except (WebApiError, OSError) as error:
                self._loaded[key] = None
                self._troubles.append(f"jobs of connection {name!r}: {error}")
        return self._loaded[key]

    def _settings(self, loaded: Loaded | None) -> EngineSettings:
        return loaded.settings if loaded is not None else self._services.settings

    async def _name_the_superseded(
        self, plans: list[tuple[_Case, _Decision]]
    ) -> list[tuple[_Case, _Decision]]:
        """Tell orphans that a later run of their flow has left behind from those that nobody came back for."""
        orphans = [c.record for c, d in plans if d.action is Action.END and c.record.root_run]
        keys = {record.key for record in orphans}
        newest: dict[tuple[str, str], datetime] = {}
        for run in {record.root_run for record in orphans}:
            for other in await self._services.store.select(root_run=run):
                place = (run, other.details.task_key)
                newest[place] = max(newest.get(place, other.created_at), other.created_at)
        return [
            (case, _superseded(decision))
            if case.record.key in keys
            and not case.record.cancel_reason
            and newest.get((case.record.root_run, case.record.details.task_key), case.silent)
            > case.silent
            else (case, decision)
            for case, decision in plans
        ]

    # --- what is done ------------------------------------------------------------------------

    async def _carry_out(self, plans: Sequence[tuple[_Case, _Decision]]) -> None:
        limit = anyio.CapacityLimiter(AT_ONCE)

        async def one(case: _Case, decision: _Decision) -> None:
            async with limit:
                try:
                    await self._act(case, decision)
                except WebApiError as error:
                    self._troubles.append(f"job {case.record.key}: {error}")
                except Exception as error:  # one job hurts no other
                    logger.exception("job %s could not be swept", case.record.key)
                    self._troubles.append(f"job {case.record.key}: {type(error).__name__}")

        async with anyio.create_task_group() as group:
            for case, decision in plans:
                group.start_soon(one, case, decision)

    async def _act(self, case: _Case, decision: _Decision) -> None:
        record = case.record
        match decision.action:
            case Action.REPORT:
                return
            case Action.CLOSE | Action.GIVE_UP:
                info = PhaseInfo.aborted(decision.reason)
                if record.state.job_may_exist:
                    info = PhaseInfo.system_failure("GivenUp", decision.reason)
                    logger.error("job %s is given up: %s", record.key, decision.reason)
                event = _event_of_the_end(record)
                await settle(self._services, record, event, info, closes=decision.closes)
            case Action.END | Action.LOOK:
                assert case.loaded is not None
                if decision.only_if_over and not await self._runtime.seems_over(
                    record, case.loaded
                ):
                    return
                ends = decision.action is Action.END and record.cancel_reason is None
                orphaned = Ending(decision.reason) if ends else None
                job = await self._runtime.adopt(
                    record,
                    case.loaded,
                    orphaned,
                    closes=decision.closes,
                    is_guess=record.connection == INLINE,
                )
                if job is not None:
                    self._taken.append(job)
                    logger.info("job %s is taken up: %s", record.key, decision.reason)

    async def _wait(self, plans: Sequence[tuple[_Case, _Decision]]) -> None:
        """Until all are gone, or none has gone for a while; those that are left are let go."""
        clock = self._services.clock
        left = {case.record.key: decision.action for case, decision in plans}
        until = clock.monotonic() + PATIENCE.total_seconds()
        while left and clock.monotonic() < until:
            before = len(left)
            for key, action in list(left.items()):
                if action is Action.LOOK and self._runtime.has_seen(key):
                    await self._runtime.give_up(key)
                if not self._runtime.drives(key):
                    del left[key]
            if len(left) < before:
                until = clock.monotonic() + PATIENCE.total_seconds()
            await clock.sleep(0.1)
        for key in left:
            await self._runtime.give_up(key)

    async def _give_up_the_last(self, plans: Sequence[tuple[_Case, _Decision]]) -> None:
        """What was asked to end for as long as the horizon, and again just now, is waited for no longer."""
        for case, decision in plans:
            record = await self._services.store.get(case.record.key) if decision.is_last else None
            if record is None or record.state is not JobState.CANCELLING or record.runtime:
                continue
            told = f"{decision.reason}; the service never confirmed the end"
            logger.error("job %s is given up: %s", record.key, told)
            info = PhaseInfo.system_failure("GivenUp", told)
            await settle(self._services, record, Event.ENDED, info, closes=decision.closes)

    async def _told(self, line: Swept) -> Swept:
        now = await self._services.store.get(JobKey(line.job_key))
        if now is None:
            return line
        return line.model_copy(update={"came_to": _came_to(line, now)})

    def _count(self, report: SweepReport) -> None:
        for job in report.jobs:
            if job.action is Action.END:
                self._services.metrics.count("orphans_total", plugin=job.plugin)


def _decide(case: _Case, settings: EngineSettings, now: datetime, stay: bool) -> _Decision | None:
    """What is to be done with a record that no living process drives; None: nothing now.

    Args:
        stay: the pass is that of a process with jobs of its own.
    """
    record = case.record
    over = _why_over(case, settings, now)
    if record.state is JobState.DELIVERED:
        return _Decision(
            Action.CLOSE, "it was delivered; its process died before it closed the record"
        )
    if record.state is JobState.OVER:
        return _Decision(Action.CLOSE, over) if over else None
    if not record.state.job_may_exist:
        reason = record.cancel_reason or over or _past_deadline(record, now)
        told = f"{reason}; nothing was sent"
        return _Decision(Action.CLOSE, told, closes=over is not None) if reason else None
    wish = record.cancel_reason or over
    is_last = now - record.updated_at > settings.reaper_horizon
    if stuck := _stuck(case):
        if is_last and record.state in (JobState.CREATING, JobState.SUSPECT, JobState.CANCELLING):
            horizon = format_duration(settings.reaper_horizon)
            return _Decision(Action.GIVE_UP, f"{stuck}. That was not done for {horizon}")
        if not wish and record.state is not JobState.SUSPECT:
            return None
        return _Decision(Action.REPORT, f"{wish or 'in doubt'}; {stuck}")
    if over and record.details.on_exit == "leave" and record.cancel_reason is None:
        return _Decision(Action.LOOK, f"{over}; its task lets jobs go on (on_exit='leave')")
    if not wish and (late := _past_deadline(record, now)):
        return _Decision(Action.LOOK, late, closes=False)
    if not wish:
        if stay and record.state is JobState.CREATED and record.quotas:
            told = "its process is gone, its run goes on, and it is over: its place is free"
            return _Decision(Action.LOOK, told, closes=False, only_if_over=True)
        return None
    is_last = is_last and record.state is JobState.CANCELLING
    return _Decision(Action.END, wish, closes=over is not None, is_last=is_last)


def _why_over(case: _Case, settings: EngineSettings, now: datetime) -> str | None:
    """Why nobody will come for the job any more; None: somebody may."""
    fate = case.fate
    quiet = now - max(case.silent, fate.since or case.silent)
    match fate.state:
        case RunState.CANCELLED:
            return "the flow run was cancelled"
        case RunState.PAUSED if settings.cancel_on_pause:
            return "the flow run was paused"
        case RunState.FINAL if quiet >= settings.orphan_after:
            return f"orphan: its run has ended as {fate.name} and no process came back for it"
        case RunState.MISSING if case.is_at_home and quiet >= settings.orphan_after:
            return "orphan: its run is no longer known to Prefect"
        case RunState.RUNNING if quiet >= settings.abandon_after and not case.is_ours:
            silence = format_duration(settings.abandon_after)
            return (
                f"abandoned: its run counts as {fate.name}, but its process is gone for {silence}"
            )
        case _:
            return None


def _past_deadline(record: Record, now: datetime) -> str | None:
    return "its deadline has passed" if record.deadline and record.deadline <= now else None


def _stuck(case: _Case) -> str | None:
    """Why no process can act on the job; None: one can."""
    record, loaded = case.record, case.loaded
    if loaded is None and record.connection == INLINE:
        return "its connection was never saved: name a block that reaches the job's service (--connection)"
    if loaded is None:
        return f"its connection {record.connection!r} can't be used"
    if record.state not in (JobState.CREATING, JobState.SUSPECT) or is_sync(loaded):
        return None
    sends_again = record.details.on_exit != "leave" or record.cancel_reason is not None
    knows = can_find(loaded) or (sends_again and spec_of(record, loaded) is not None)
    if can_clear_up(loaded) and knows and record.connection != INLINE:
        return None
    return (
        f"create was sent and its outcome is unknown: look for job {record.key} at the service, then settle it "
        f"with `prefect-webapi jobs resolve {record.key}`"
    )


def _superseded(decision: _Decision) -> _Decision:
    return replace(decision, reason="superseded: a later run of its flow did not ask for it")


def _line(record: Record, decision: _Decision) -> Swept:
    return Swept(
        job_key=record.key,
        task=record.details.task_name,
        plugin=record.plugin,
        connection=record.connection,
        state=record.state,
        action=decision.action,
        reason=decision.reason,
    )


def _came_to(line: Swept, now: Record) -> str:
    phase = now.details.phase
    ended = f" as {phase.phase.name}" if phase is not None else ""
    match now.state:
        case JobState.CLOSED | JobState.OVER | JobState.DELIVERED:
            return f"over{ended}"
        case JobState.CANCELLING:
            return "asked to end; the service has not confirmed it yet"
        case _:
            return "unchanged" if now.state is line.state else f"now {now.state}"
