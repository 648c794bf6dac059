"""Takes a result back: the job stays in the ledger as ended on request, and who calls again gets a new attempt."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

import anyio

from prefect_webapi.contract.errors import LedgerError
from prefect_webapi.contract.keys import JobKey
from prefect_webapi.contract.phase import Phase, PhaseInfo
from prefect_webapi.ledger.records import JobState, Move, MoveResult, Record

if TYPE_CHECKING:
    from prefect_webapi.engine.runtime import Runtime
    from prefect_webapi.engine.services import Services

__all__ = ["take_back"]

STEP_SECONDS = 0.02
SETTLING_SECONDS = 5.0
"""How long a record may take to be closed after its end was told; an owner that died meanwhile never does."""


async def take_back(runtime: Runtime, *, keys: Collection[JobKey], reason: str) -> None:
    """Hand out the results of these jobs no more. Those that are not over, or failed, are left as they are.

    Raises:
        LedgerError: the ledger can't be used.
    """
    services, troubles = runtime.services, list[LedgerError]()
    patience = services.clock.monotonic() + SETTLING_SECONDS

    async def one(key: JobKey) -> None:
        try:
            await _take_back(services, key, reason, patience)
        except LedgerError as error:
            troubles.append(error)

    async with anyio.create_task_group() as group:  # the ledger reads and writes many in one go
        for key in set(keys):
            group.start_soon(one, key)
    if troubles:
        raise troubles[0]


async def _take_back(services: Services, key: JobKey, reason: str, patience: float) -> None:
    record = await services.store.get(key)
    while record and _is_settling(record) and services.clock.monotonic() < patience:
        await services.clock.sleep(STEP_SECONDS)  # its owner delivered it, and closes it now
        record = await services.store.get(key)
    if record is None or not _succeeded(record):
        return
    now, info = services.clock.now(), record.details.phase
    ended = PhaseInfo.aborted(reason, info=info.info) if info else PhaseInfo.aborted(reason)
    details = replace(
        record.details,
        phase=ended,
        outputs=None,
        stopped_by_us=True,
        last_error=reason,
        steps=record.details.steps.then(Phase.ABORTED.name, now, reason),
    )
    move = Move(old=record, state=record.state, at=now, details=details)
    if await services.store.move(move) is MoveResult.LOST:  # a second call took it over
        again = await services.store.get(key)
        if again is not None:
            await services.store.move(replace(move, old=again, state=again.state))


def _is_settling(record: Record) -> bool:
    return record.state in (JobState.OVER, JobState.DELIVERED) and bool(record.runtime)


def _succeeded(record: Record) -> bool:
    phase = record.details.phase
    return record.state.is_over and phase is not None and phase.phase is Phase.SUCCESS
