"""`sweep`: end what dead processes and ended flows have left at remote services. For flows, scripts and operators."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import anyio.to_thread

from prefect_webapi._prefect import service
from prefect_webapi.contract.keys import JobKey
from prefect_webapi.engine import reaper
from prefect_webapi.engine.reaper import Action, SweepReport, Swept
from prefect_webapi.settings import WebApiSettings

if TYPE_CHECKING:
    from prefect_webapi.engine.runtime import Runtime
    from prefect_webapi.ledger.records import Record

__all__ = ["Action", "SweepReport", "Swept", "cancel_jobs", "resolve_job", "sweep"]

T = TypeVar("T")


async def sweep(*, dry_run: bool = False, connection: str | None = None) -> SweepReport:
    """Look once at every job in the ledger that is not over, and finish what nobody else will.

    Jobs whose flow run has ended, was cancelled or is gone from Prefect are deleted at their service (those that
    ended well by themselves are not, and their results are kept); deletes that a dead process owed are made; places
    in quotas are given back; old records are removed. Safe to run anywhere, at any time, beside flows and other
    sweepers. Jobs that take longer to die than some twenty seconds are left to the next pass.

    Args:
        dry_run: only say what would be done.
        connection: name of a block document, for jobs whose connection was a block that nobody saved.

    Raises:
        ConfigurationError: the settings are wrong.
        LedgerError: the ledger can't be used.
        PrefectUnavailable: how the flow runs stand can't be found out, so nothing was done.
    """
    return await _perform(partial(reaper.sweep, dry_run=dry_run, connection=connection))


async def cancel_jobs(keys: Collection[JobKey], reason: str) -> Sequence[Record]:
    """End jobs, whichever process drives them; how their records are afterwards. Raises as `sweep`."""
    return await _perform(partial(reaper.cancel, keys=keys, reason=reason))


async def resolve_job(key: JobKey, *, handle: str | None) -> Record:
    """Settle by hand a job that no process can find out about: see `engine.reaper.resolve`. Raises as that."""
    return await _perform(partial(reaper.resolve, key=key, handle=handle))


async def _perform(work: Callable[[Runtime], Awaitable[T]]) -> T:
    engine = service.started() or await anyio.to_thread.run_sync(
        partial(service.start, WebApiSettings.load, sweeps=False)
    )
    return await asyncio.wrap_future(engine.host.perform(work))
