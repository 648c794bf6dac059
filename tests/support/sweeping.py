"""A pass of the sweeper after everybody has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from prefect_webapi.clock import Clock
from prefect_webapi.engine.reaper import SweepReport, sweep
from prefect_webapi.engine.request import Fate, RunState
from prefect_webapi.engine.runtime import Runtime
from prefect_webapi.ledger.sql import SqlStore
from prefect_webapi.testing import EmbeddedJobServer
from tests.support.engine import GivenRuns, at

__all__ = ["CRASHED", "LONG_AGO", "swept"]

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
CRASHED = Fate(RunState.FINAL, "Crashed", LONG_AGO)


async def swept(
    folder: Path,
    server: EmbeddedJobServer | str,
    fates: Mapping[str, Fate] | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    store: type[SqlStore] = SqlStore,
    speed: float = 20,
    **options: Any,
) -> SweepReport:
    """What one pass of a process of its own does with the ledger in `folder`; it knows `run-1` as crashed.

    Its clock runs `speed` times faster, so a pass waits 20 s / `speed` for the next job to be gone. When it begins,
    `orphan_after` (a second of that clock) is over.
    """
    runs = GivenRuns({"run-1": CRASHED} if fates is None else fates)
    given: dict[str, Any] = {"orphanAfter": "1s", **(settings or {})}
    with at(
        folder,
        server,
        dict(config or {}),
        runs=runs,
        store=store,
        sweeps=False,
        speed=speed,
        **given,
    ) as host:
        clock = await asyncio.wrap_future(host.perform(_clock))
        await clock.sleep(1.5)
        return await asyncio.wrap_future(host.perform(partial(sweep, **options)))


async def _clock(runtime: Runtime) -> Clock:
    return runtime.services.clock
