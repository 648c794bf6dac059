"""The engine without Prefect, as the package's own tests use it: any ledger of theirs, the job server as connection."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from pydantic import HttpUrl, SecretStr

from prefect_webapi import EngineSettings, PluginConfig
from prefect_webapi.clock import Clock
from prefect_webapi.contract.contexts import DataStore
from prefect_webapi.contract.errors import SecretNotFound
from prefect_webapi.contract.plugin import PluginEntry
from prefect_webapi.contract.task import JobSpec
from prefect_webapi.engine.host import Host
from prefect_webapi.engine.request import Outcome, Runs
from prefect_webapi.ledger.sql import SqlStore
from prefect_webapi.metrics import Metrics
from prefect_webapi.quotas import Slots
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi.testing.engine import (
    QUICK,
    FolderOutputs,
    GivenConnections,
    GivenRuns,
    LocalSlots,
    Told,
    request,
)
from prefect_webapi.testing.engine import engine as engine_of
from prefect_webapi_jobserver import JobServer
from tests.support.jobserver import TOKEN
from tests.support.ledger import ledger_of
from tests.support.plugins import ALL

__all__ = [
    "QUICK",
    "FolderOutputs",
    "GivenConnections",
    "GivenRuns",
    "LocalSlots",
    "NoSecrets",
    "Told",
    "at",
    "block",
    "engine",
    "request",
    "run",
]


class NoSecrets:
    async def get(self, key: str, connection: Any) -> str:
        raise SecretNotFound(key, ["nowhere"])


@contextmanager
def engine(
    folder: Any,
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
    sweeps: bool = True,
) -> Generator[Host]:
    """A host over the ledger that a test's folder names; closed in order at the end."""
    with engine_of(
        folder,
        entries,
        blocks,
        speed=speed,
        epoch=epoch,
        store=store,
        outputs=outputs,
        metrics=metrics,
        slots=slots,
        runs=runs,
        secrets=NoSecrets(),
        ledger=ledger_of(folder),
        sweeps=sweeps,
    ) as host:
        yield host


def block(
    server: EmbeddedJobServer | str, config: dict[str, Any] | None = None, **settings: Any
) -> JobServer:
    """A connection to the job server that reads often and repeats soon."""
    return JobServer(
        base_url=HttpUrl(server if isinstance(server, str) else server.url),
        token=SecretStr(TOKEN),
        engine=PluginConfig.load(
            {
                "readRateLimiter": {"qps": 1000, "burst": 1000},
                "writeRateLimiter": {"qps": 1000, "burst": 1000},
                **(config or {}),
            }
        ),
        settings=EngineSettings.load({**QUICK, **settings}),
    )


def at(
    folder: Path,
    server: EmbeddedJobServer | str,
    config: dict[str, Any] | None = None,
    *,
    entries: Sequence[PluginEntry[Any]] = ALL,
    speed: float = 1.0,
    epoch: float | None = None,
    store: type[SqlStore] = SqlStore,
    outputs: DataStore | None = None,
    metrics: Metrics | None = None,
    slots: Callable[[Clock], Slots] = LocalSlots,
    runs: Runs | None = None,
    sweeps: bool = True,
    **settings: Any,
) -> AbstractContextManager[Host]:
    """An engine whose connection `default` is this server, with settings of its own."""
    return engine(
        folder,
        entries,
        {"default": block(server, config, **settings)},
        speed=speed,
        epoch=epoch,
        store=store,
        outputs=outputs,
        metrics=metrics,
        slots=slots,
        runs=runs,
        sweeps=sweeps,
    )


async def run(host: Host, spec: JobSpec[Any], task_type: str = "keys", **call: Any) -> Outcome:
    """One call, from its admission to its outcome."""
    return await host.admit(request(spec, task_type=task_type, **call)).outcome()
