"""What the ledger remembers of a job, and the words for asking it. Values only: no SQL, no I/O."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, StrEnum
from typing import Annotated, Any, overload

from pydantic import BeforeValidator, GetCoreSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema, PydanticSerializationError, to_json
from pydantic_core.core_schema import no_info_after_validator_function

from prefect_webapi.contract.keys import Base, Fingerprint, JobKey
from prefect_webapi.contract.phase import PhaseInfo
from prefect_webapi.contract.values import value_class

__all__ = [
    "FORMAT",
    "Details",
    "Draft",
    "Drawn",
    "JobState",
    "Lease",
    "Move",
    "MoveResult",
    "OpenJob",
    "Outputs",
    "Pace",
    "QuotaRow",
    "Record",
    "RuntimeRow",
    "Step",
    "Steps",
]

FORMAT = 1
"""Version of `Details`. A record with a higher one is refused readably, an older one is read."""


class JobState(StrEnum):
    """Where the ledger's knowledge of a job stands.

    Source: SPEC 3.1. ST-6 LIVE is kept in memory only: losing it costs at most one repeated report.
    """

    INTENT = "INTENT"  # written before anything else; nothing remote
    SLOT_REQUESTED = "SLOT_REQUESTED"  # waits for its quota; nothing remote
    SLOT_HELD = "SLOT_HELD"  # has its place; nothing remote
    CREATING = "CREATING"  # create may have reached the service
    CREATED = "CREATED"  # handle known, job alive
    CANCELLING = "CANCELLING"  # delete is a duty until the job is gone
    SUSPECT = "SUSPECT"  # create's outcome unknown and can't be found out
    OVER = "OVER"  # gone remotely, result kept here
    DELIVERED = "DELIVERED"  # handed to Prefect, slot not given back yet
    CLOSED = "CLOSED"  # nothing left to do

    @property
    def is_over(self) -> bool:
        return self in (JobState.OVER, JobState.DELIVERED, JobState.CLOSED)

    @property
    def job_may_exist(self) -> bool:
        return self in (
            JobState.CREATING,
            JobState.CREATED,
            JobState.CANCELLING,
            JobState.SUSPECT,
        )


# Plain data classes, not models: a process keeps one for each of its live jobs. What a newer minor version has
# added to a stored document is ignored.


def _as_text(value: Any) -> Any:
    return value if isinstance(value, str | None) else json.dumps(value)


JsonText = Annotated[str, BeforeValidator(_as_text)]
"""Parsed only where it is needed; one that was stored as an object is read too."""


@value_class
class Lease:
    """Slots lent by Prefect. `until` is when they lapse unless renewed; `part`: by a lease for several jobs."""

    id: str
    until: datetime
    part: bool = False


@value_class
class Outputs:
    """A result: the value itself (JSON data), or where the result storage keeps it."""

    value: Any = None
    pointer: str | None = None


@value_class
class Step:
    """A phase as people saw it: its name (SPEC 2.4), when it began, why."""

    name: str
    at: datetime
    reason: str = ""


KEPT_STEPS = 25
"""So many of a job's first steps are kept, and so many of its last."""


class Steps(Sequence[Step]):
    """A job's history for people, oldest first: a service may go to and fro between two phases for days.

    One flat tuple: a process keeps the steps of each of its live jobs.
    """

    __slots__ = ("_flat",)

    def __init__(self, steps: Iterable[Step] = ()) -> None:
        flat: list[Any] = []
        for step in steps:
            flat += (step.name, step.at, step.reason)
        self._flat: tuple[Any, ...] = tuple(flat)

    def then(self, name: str, at: datetime, reason: str = "") -> Steps:
        """With one more. A phase that repeats is not a new step, and of a long history the middle is left out."""
        if self._flat and self._flat[-3] == name:
            return self
        longer, kept = Steps(), 3 * KEPT_STEPS
        flat = (*self._flat, name, at, reason)
        longer._flat = (*flat[:kept], *flat[-kept:]) if len(flat) > 2 * kept else flat
        return longer

    def __len__(self) -> int:
        return len(self._flat) // 3

    @overload
    def __getitem__(self, index: int) -> Step: ...

    @overload
    def __getitem__(self, index: slice) -> Steps: ...

    def __getitem__(self, index: int | slice) -> Step | Steps:
        if isinstance(index, slice):
            return Steps([self[place] for place in range(*index.indices(len(self)))])
        name, at, reason = self._flat[3 * range(len(self))[index] :][:3]
        return Step(name=name, at=at, reason=reason)

    def as_data(self) -> list[dict[str, Any]]:
        """As they are stored."""
        flat = self._flat
        steps = zip(flat[::3], flat[1::3], flat[2::3], strict=True)
        return [{"name": name, "at": at, "reason": reason} for name, at, reason in steps]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Steps) and self._flat == other._flat

    def __hash__(self) -> int:
        return hash(self._flat)

    def __repr__(self) -> str:
        return f"Steps({list(self)})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(cls, handler(list[Step]))


NO_STEPS = Steps()


@value_class
class Details:
    """The part of a record that only its owner and people read; stored as one JSON document.

    Attributes:
        attempt / max_attempts: as Prefect counted them when the record was made.
        home: which Prefect knows the runs that own the job.
        tries: how often create was sent; delete_tries: how often delete.
        phase: the last one known; terminal once the job is over.
        steps: history for people, oldest first.
        stopped_by_us: an ABORTED job was ended by our delete.
        orphaned: that delete was the sweeper's: nobody was told, so who asks again gets a new attempt.
        spec: what create sends, as JSON text; so the job can be found and ended by a process that never saw the
            task. None once it is over, or where it is too large to keep.
    """

    format: int = FORMAT
    task_name: str = ""
    task_key: str = ""
    deployment: str = ""
    home: str = ""
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    namespace: str = ""
    resource_namespace: str | None = None
    on_exit: str = "cancel"
    tries: int = 0
    delete_tries: int = 0
    created_remotely_at: datetime | None = None
    phase: PhaseInfo | None = None
    outputs: Outputs | None = None
    lease: Lease | None = None
    last_error: str | None = None
    stopped_by_us: bool = False
    orphaned: bool = False
    spec: JsonText | None = None
    steps: Steps = NO_STEPS

    def to_json(self) -> str:
        # A result may be no number.
        return to_json(self, inf_nan_mode="constants", fallback=_plain).decode()

    @classmethod
    def from_json(cls, text: str) -> Details:
        """Read what `to_json` wrote, perhaps in another version.

        Raises:
            ValidationError: it is no such document.
        """
        return _DETAILS.validate_json(text)


def _plain(value: Any) -> Any:
    if isinstance(value, Steps):
        return value.as_data()
    raise PydanticSerializationError(f"Unable to serialize unknown type: {type(value)}")


_DETAILS = TypeAdapter(Details)


@value_class
class Record:
    """One job. Identity is (base, ordinal, attempt); `key` is their hash.

    Attributes:
        fence: rises with each change of owner; who writes with an older one has lost the job.
        runtime: id of the process that drives it.
        fingerprint: what create sends, hashed.
        quotas: names of the limits whose places it takes, sorted; empty: no quota. `weight`: how many of each.
        counted: whether the admission rows count it now: all of them, or none.
        handle: JSON text; None until create has answered.
        cancel_reason: set once somebody wants the job gone, by any process.
        flow_run / root_run / task_run: ids of the runs that own it; empty outside a flow.
    """

    key: JobKey
    base: Base
    ordinal: int
    attempt: int
    state: JobState
    fence: int
    runtime: str
    plugin: str
    task_type: str
    connection: str
    fingerprint: Fingerprint
    quotas: tuple[str, ...] = ()
    weight: int = 1
    counted: bool = False
    handle: str | None = None
    cancel_reason: str | None = None
    flow_run: str = ""
    root_run: str = ""
    task_run: str = ""
    deadline: datetime | None = None
    created_at: datetime
    updated_at: datetime
    details: Details = field(default_factory=Details)


@dataclass(frozen=True, slots=True)
class OpenJob:
    """What tells whether a record that is not closed is being looked after: there may be a hundred thousand."""

    key: JobKey
    runtime: str
    state: JobState
    has_handle: bool
    updated_at: datetime

    @classmethod
    def of(cls, record: Record) -> OpenJob:
        has_handle = record.handle is not None
        return cls(record.key, record.runtime, record.state, has_handle, record.updated_at)


@value_class
class Draft:
    """A call that wants a job: what to look for, and the record to make if there is none.

    Attributes:
        base, task_run, nth: the claim; `nth` counts equal specs inside one task run.
        execution, levels: which execution of which enclosing runs makes the call.
        is_retry: a Prefect retry of this task run: its former attempt was delivered.
        reuse_results: a delivered success may be handed out again.
        pinned: the user gave the idempotency key: ordinal 0, no claims.
        heir_of: ids of processes that have ended: a job that one of them drove is taken over with this, for the runs
            of the call.
        state: INTENT, SLOT_REQUESTED or CREATING (collapsed where nothing leaves in between).
        task_run: claims' key; empty outside a flow run is allowed only if `nth` is unique.
    """

    base: Base
    task_run: str
    nth: int
    execution: str
    levels: Mapping[str, str]
    is_retry: bool
    reuse_results: bool
    pinned: bool
    state: JobState
    runtime: str
    plugin: str
    task_type: str
    connection: str
    fingerprint: Fingerprint
    quotas: tuple[str, ...]
    weight: int
    flow_run: str
    root_run: str
    owner_task_run: str
    deadline: datetime | None
    at: datetime
    details: Details
    heir_of: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class Drawn:
    """The record a call got.

    Attributes:
        made: it is new, so nobody has acted for it yet.
        taken: it is a job that a process has left behind, and this one's from now on.
    """

    record: Record
    made: bool
    taken: bool = False


class MoveResult(Enum):
    OK = "ok"
    FULL = "full"  # one of the quotas has no room; nothing was changed
    LOST = "lost"  # state or fence is not what was expected; nothing was changed


@value_class
class Move:
    """A compare-and-set on (state, fence). What is None stays as it is.

    Attributes:
        old: the record as its writer knows it.
        state: the new state (may equal the old one).
        take_over: become the owner: the fence rises by one and `runtime` is set.
        runs: flow run, root run and task run of the call that takes it over.
        count: +1: take `weight` places of each quota's row, FULL if one has not so many free; -1: give
            them back; 0: leave the rows alone. Ignored for a record without quota.
    """

    old: Record
    state: JobState
    at: datetime
    take_over: bool = False
    runtime: str | None = None
    runs: tuple[str, str, str] | None = None
    handle: str | None = None
    cancel_reason: str | None = None
    details: Details | None = None
    count: int = 0

    @classmethod
    def taking(cls, old: Record, runtime: str, runs: tuple[str, str, str] | None = None) -> Move:
        """Another process drives the job from now on, for these runs; nothing else changes. "": none does."""
        return cls(
            old=old,
            state=old.state,
            at=old.updated_at,
            take_over=True,
            runtime=runtime,
            runs=runs,
        )


@dataclass(frozen=True, slots=True)
class QuotaRow:
    """Admission count of one limit: `live` places taken of `limit`."""

    name: str
    live: int
    limit: int


@dataclass(frozen=True, slots=True)
class Pace:
    """How often a process reads the live jobs of one connection.

    Attributes:
        every: seconds between two reads of a job; late: seconds after it was due. Means of the last moments.
    """

    plugin: str
    connection: str
    jobs: int
    every: float
    late: float


@dataclass(frozen=True, slots=True)
class RuntimeRow:
    """A process that drives jobs.

    Attributes:
        pid: 0 once it has ended in order; `last_beat` is when.
        born: seconds from the machine's start to its own, tells a reused pid apart.
    """

    id: str
    host: str
    pid: int
    born: float
    started: datetime
    last_beat: datetime
