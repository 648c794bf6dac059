"""What goes into the engine and what comes out, and what the engine needs from above (Protocols)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import Enum
from typing import Any, Literal, Protocol

from prefect_webapi.contract.config import EngineSettings
from prefect_webapi.contract.keys import Fingerprint, JobKey
from prefect_webapi.contract.phase import PhaseInfo
from prefect_webapi.contract.task import JobSpec
from prefect_webapi.contract.values import value_class
from prefect_webapi.ledger.records import Record
from prefect_webapi.tracing import Context, here

__all__ = [
    "NOTHING",
    "NO_OVERRIDES",
    "Caller",
    "Fate",
    "JobRequest",
    "Outcome",
    "Overrides",
    "Reporter",
    "RunState",
    "Runs",
    "Secrets",
    "outermost_run",
]


NOTHING: Mapping[str, Any] = {}
"""One for all: a process keeps a call for each of its live jobs."""


def _nothing() -> Mapping[str, Any]:
    return NOTHING


@value_class
class Caller:
    """Who asks for a job.

    Attributes:
        run_key: the root flow run's id, or what the user set.
        execution: id of the Running state of the root flow run; outside a flow a nonce.
        levels: every other enclosing run: its id to the id of its Running state.
        task_run: id of the task run that calls.
        max_attempts: retries + 1.
    """

    run_key: str
    execution: str
    task_run: str
    levels: Mapping[str, str] = field(default_factory=_nothing)
    idempotency_key: str | None = None
    flow_run: str = ""
    root_run: str = ""
    deployment: str = ""
    namespace: str = ""
    labels: Mapping[str, str] = field(default_factory=_nothing)
    max_attempts: int = 1


def outermost_run(owner: Caller | Record) -> str:
    """Id of the run around everything; outside a flow that of the task run."""
    return owner.root_run or owner.flow_run or owner.task_run


@value_class
class Overrides:
    """Options of the call that win over the block's settings; None: the block decides."""

    deadline: timedelta | None = None
    reuse_results: bool | None = None
    on_unknown_create: Literal["fail", "retry"] | None = None
    on_exit: Literal["cancel", "leave"] = "cancel"


NO_OVERRIDES = Overrides()
"""What most calls have."""


@value_class
class JobRequest:
    """One call of a task, resolved: no futures, no blocks' names left to guess.

    Attributes:
        caller: the same object for all jobs of a task run.
        nth: index of equal specs inside the task run.
        attempt: Prefect's run count of the task run, from 1; or the job's own, where it is retried by itself.
        plugin: plugin id where the user named one.
        connection: a block document's name, or a block.
        inputs: the arguments of the task's call.
        reporter: tells Prefect what happens to this job.
        trace: where the call was made, for the spans of what follows from it on other threads.
    """

    task_type: str
    spec: JobSpec[Any]
    task_key: str
    task_name: str
    caller: Caller
    reporter: Reporter
    connection: Any = "default"
    plugin: str | None = None
    nth: int = 0
    attempt: int = 1
    inputs: Mapping[str, Any] = field(default_factory=_nothing)
    options: Overrides = NO_OVERRIDES
    trace: Context = field(default_factory=here, repr=False, compare=False)


@value_class
class Outcome:
    """How a job ended.

    Attributes:
        job_key: empty where a cancelled call waits no longer to know its job.
        info: the terminal phase (or contact lost: a retryable system failure while the job lives on).
        value: the result, validated against the spec's `O`; only with success.
        stopped_by_us: an ABORTED job was ended at our request.
        settings: the connection's, for the mapping to states.
        is_of_another_run: its result was in the ledger already, kept for another run.
    """

    job_key: JobKey
    fingerprint: Fingerprint
    info: PhaseInfo
    value: Any = None
    stopped_by_us: bool = False
    settings: EngineSettings = field(default_factory=EngineSettings)
    is_of_another_run: bool = False


class Reporter(Protocol):
    """Tells people about one job. Cheap, called on the runtime's loop, never raises, never waits."""

    def phase(self, record: Record, info: PhaseInfo, *, waiting_for_quota: bool) -> None:
        """The phase or what is known with it has changed; not called for terminal phases."""
        ...

    def cancelling(self, record: Record, reason: str) -> None:
        """A delete is on its way."""
        ...


class RunState(Enum):
    """What the state of an owner's run means for its jobs."""

    RUNNING = "running"  # or about to run: its process may be dead without anybody knowing
    RESTING = "resting"  # scheduled: it will go on without help
    PAUSED = "paused"  # or suspended: it will go on when people say so
    CANCELLED = "cancelled"  # or being cancelled
    FINAL = "final"
    MISSING = "missing"  # deleted


@dataclass(frozen=True, slots=True)
class Fate:
    """How a run stands.

    Attributes:
        name: of its state, for people.
        since: when it came into that state; None where that can't be known.
    """

    state: RunState
    name: str = ""
    since: datetime | None = None


class Runs(Protocol):
    """Knows the runs that own jobs."""

    @property
    def home(self) -> str:
        """Which Prefect it asks: another one does not know ours, and that means nothing."""
        ...

    async def fates(self, flows: Collection[str], tasks: Collection[str], /) -> Mapping[str, Fate]:
        """How these flow runs and task runs stand, by id.

        Raises:
            WebApiError: that can't be found out now.
        """
        ...


class Secrets(Protocol):
    """Looks secrets up at call time."""

    async def get(self, key: str, connection: Any) -> str:
        """The present value.

        Raises:
            SecretNotFound: names the key and the places searched.
        """
        ...
