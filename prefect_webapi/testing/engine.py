"""The engine without Prefect: real ledger, real calls, everything else as thin as it can be."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import quote

from prefect_webapi.clock import Clock
from prefect_webapi.contract.contexts import DataStore
from prefect_webapi.contract.errors import SecretNotFound
from prefect_webapi.contract.phase import PhaseInfo
from prefect_webapi.contract.plugin import PluginEntry
from prefect_webapi.contract.secrecy import secret_field
from prefect_webapi.contract.task import JobSpec
from prefect_webapi.engine.channels import LedgerCount
from prefect_webapi.engine.faults import fault_point
from prefect_webapi.engine.host import Host
from prefect_webapi.engine.liveness import this_process
from prefect_webapi.engine.request import (
    NO_OVERRIDES,
    NOTHING,
    Caller,
    Fate,
    JobRequest,
    Overrides,
    Reporter,
    Runs,
    RunState,
    Secrets,
)
from prefect_webapi.engine.runtime import Runtime
from prefect_webapi.engine.services import Services
from prefect_webapi.ledger.records import Record
from prefect_webapi.ledger.sql import SqlStore
from prefect_webapi.limiter import Gates
from prefect_webapi.metrics import Metrics
from prefect_webapi.quotas import Busy, Quotas, SlotLease, Slots
from prefect_webapi.registry import Connection, Plugins, Registry, digest

__all__ = [
    "QUICK",
    "FolderOutputs",
    "GivenConnections",
    "GivenRuns",
    "LocalSecrets",
    "LocalSlots",
    "Told",
    "engine",
    "ledger_in",
    "request",
]

QUICK = {
    "initialInterval": "50ms",
    "retryBase": "20ms",
    "retryCap": "100ms",
    "visibilityDelay": "300ms",
}
"""Settings that let a test take its time in tens of milliseconds."""


def ledger_in(folder: Path) -> str:
    """URL of the ledger of a folder."""
    return f"sqlite:///{quote(str(folder / 'webapi.db'))}"


class GivenConnections:
    """Connections by name from a mapping, which a test may change as people edit blocks."""

    def __init__(self, blocks: Mapping[str, Any]) -> None:
        self.blocks = blocks

    async def resolve(
        self, ref: Any, kind: type[Any], /, *, fresh: bool = False
    ) -> Connection[Any]:
        value = self.blocks[ref]
        return Connection(name=ref, revision=digest(value), value=value, inline=False)


class LocalSecrets:
    """Secrets from a field of the connection, else from the environment."""

    async def get(self, key: str, connection: Any) -> str:
        value = secret_field(connection, key) or os.environ.get(key)
        if value is None:
            kind = type(connection).__name__
            raise SecretNotFound(key, [f"field {key!r} of {kind}", f"environment variable {key!r}"])
        return value


class GivenRuns:
    """Fates of runs from a mapping, which a test may change; a run that it does not name is running."""

    home = "a Prefect"

    def __init__(self, fates: Mapping[str, Fate] | None = None) -> None:
        self.given = dict(fates or {})

    async def fates(self, flows: Collection[str], tasks: Collection[str], /) -> Mapping[str, Fate]:
        running = Fate(RunState.RUNNING, "Running")
        return {run: self.given.get(run, running) for run in (*flows, *tasks)}


class FolderOutputs:
    """Large results as files of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def write(self, name: str, data: bytes, /) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return str(path)

    async def read(self, uri: str, /) -> bytes | None:
        return _content(Path(uri))

    async def uri(self, name: str, /) -> str:
        return str(self.folder / name)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


class LocalSlots:
    """Slots of this process only."""

    def __init__(self, clock: Clock) -> None:
        self.limits: dict[str, int] = {}
        self.leases: dict[str, tuple[Sequence[str], int]] = {}
        self.lent = 0
        self._clock = clock

    async def ensure(self, name: str, limit: int) -> None:
        self.limits[name] = limit

    async def active(self, name: str) -> int:
        return sum(slots for names, slots in self.leases.values() if name in names)

    async def acquire(
        self, names: Sequence[str], slots: int, holder: str, seconds: float
    ) -> SlotLease | Busy:
        for name in names:
            if await self.active(name) + slots > self.limits[name]:
                return Busy(retry_after=1.0)
        self.lent += 1
        lease_id = f"lease-{self.lent}-{holder}"
        self.leases[lease_id] = (names, slots)
        fault_point("KP-03")
        return SlotLease(id=lease_id, until=self._clock.now() + timedelta(seconds=seconds))

    async def renew(self, lease_id: str, seconds: float) -> bool:
        return lease_id in self.leases

    async def release(self, lease_id: str) -> None:
        self.leases.pop(lease_id, None)

    async def give_back(self, name: str, slots: int) -> None:
        return None


@dataclass
class Told:
    """A reporter that remembers what it was told.

    Attributes:
        phases: name and reason of each; infos: the same, whole; times: of the monotonic clock.
    """

    phases: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    cancelled: list[str] = field(default_factory=list[str])
    infos: list[PhaseInfo] = field(default_factory=list[PhaseInfo])
    times: list[float] = field(default_factory=list[float])

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.phases]

    @property
    def changes(self) -> list[str]:
        """Names without repeats: news within a phase is left out."""
        return [name for name, _ in groupby(self.names)]

    def phase(self, record: Record, info: PhaseInfo, *, waiting_for_quota: bool) -> None:
        self.phases.append((info.phase.name, info.reason))
        self.infos.append(info)
        self.times.append(time.monotonic())

    def cancelling(self, record: Record, reason: str) -> None:
        self.cancelled.append(reason)


@contextmanager
def engine(
    folder: Path,
    entries: Sequence[PluginEntry[Any]],
    blocks: Mapping[str, Any],
    *,
    speed: float = 1.0,
    epoch: float | None = None,
    store: type[SqlStore] = SqlStore,
    outputs: DataStore | None = None,
    metrics: Metrics | None = None,
    slots: Callable[[Clock], Slots] = LocalSlots,
    runs: Runs | None = None,
    secrets: Secrets | None = None,
    ledger: str | None = None,
    sweeps: bool = True,
) -> Generator[Host]:
    """A host over a ledger in `folder`, or at the URL `ledger`; closed in order at the end."""
    connections = GivenConnections(blocks)

    def make() -> Runtime:
        clock = Clock(speed, epoch=epoch)
        registry = Registry()
        for entry in entries:
            registry.register(entry)
        counts = metrics or Metrics()
        me = this_process(clock.now())
        kept = store(ledger or ledger_in(folder), clock=clock)
        services = Services(
            runtime_id=me.id,
            clock=clock,
            store=kept,
            plugins=Plugins(registry, connections, metrics=counts, clock=clock),
            gates=Gates(clock, counts),
            quotas=Quotas(slots(clock), clock=clock, metrics=counts, ledger=LedgerCount(kept)),
            secrets=secrets or LocalSecrets(),
            outputs=outputs or FolderOutputs(folder / "outputs"),
            metrics=counts,
            runs=runs or GivenRuns(),
        )
        return Runtime(services, me)

    host = Host(make, sweeps=sweeps)
    try:
        yield host
    finally:
        host.close()


def request(
    spec: JobSpec[Any],
    *,
    task: str = "task",
    task_type: str = "job-server",
    run: str = "run-1",
    execution: str = "execution-1",
    task_run: str | None = None,
    nth: int = 0,
    attempt: int = 1,
    max_attempts: int = 1,
    connection: str = "default",
    idempotency_key: str | None = None,
    options: Overrides | None = None,
    levels: Mapping[str, str] | None = None,
    reporter: Reporter | None = None,
    run_key: str | None = None,
    labels: Mapping[str, str] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> JobRequest:
    """A call as the Prefect side would make it."""
    return JobRequest(
        task_type=task_type,
        spec=spec,
        task_key=task,
        task_name=task,
        caller=Caller(
            run_key=run_key or run,
            execution=execution,
            task_run=task_run or f"{execution}/{task}/{id(spec)}",
            levels=levels or NOTHING,
            flow_run=run,
            root_run=run,
            max_attempts=max_attempts,
            idempotency_key=idempotency_key,
            labels=labels or NOTHING,
        ),
        reporter=reporter or Told(),
        connection=connection,
        nth=nth,
        attempt=attempt,
        options=options or NO_OVERRIDES,
        inputs=inputs or NOTHING,
    )
