"""Slots from Prefect's global concurrency limits, by leases.

One client for the process, opened by the first call and owned by the loop that makes it. Errors of
Prefect and of its transport end here as `SlotsUnavailable`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, Self
from urllib.parse import urlsplit
from uuid import UUID

import anyio
import anyio.to_thread
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import (
    GlobalConcurrencyLimitCreate,
    GlobalConcurrencyLimitUpdate,
)
from prefect.client.schemas.objects import ConcurrencyLeaseHolder
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, PrefectHTTPStatusError
from pydantic import BaseModel, ValidationError

from prefect_webapi.clock import Clock
from prefect_webapi.engine.faults import fault_point
from prefect_webapi.quotas import Busy, SlotLease, SlotsUnavailable

__all__ = ["PrefectSlots"]

logger = logging.getLogger(__name__)

CALL_SECONDS = 10.0
"""Real seconds for one call with the repetitions that Prefect's client makes by itself."""

NOT_SENT = {"ConnectError", "ConnectTimeout", "PoolTimeout"}
TRIES = 3
BUSY_SECONDS = 1.0

COLLISION_SECONDS = 0.1
"""Pause before the next of the tries that Prefect's client makes by itself."""

LOOK_SECONDS = 60.0
"""How old our knowledge may be that a limit is switched on."""


class _Limit(BaseModel):
    name: str


class _Grant(BaseModel):
    lease_id: UUID
    limits: list[_Limit]


class PrefectSlots:
    """`Slots` on Prefect's API: an async context manager, so that its client is closed.

    Args:
        clock: tells until when a lease lasts; Prefect counts real time.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._limits: dict[str, int] = {}
        self._looked_at: dict[str, float] = {}
        self._client: PrefectClient | None = None
        self._opening = asyncio.Lock()
        self._making = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.__aexit__(None, None, None)

    async def ensure(self, name: str, limit: int) -> None:
        self._limits[name] = limit
        await self._make(name)

    async def acquire(
        self, names: Sequence[str], slots: int, holder: str, seconds: float
    ) -> SlotLease | Busy:
        for _ in range(TRIES):
            until = self._clock.now() + timedelta(seconds=seconds * self._clock.speed)
            try:
                async with self._api("take slots") as client:
                    response = await client.increment_concurrency_slots_with_lease(
                        names=list(names),
                        slots=slots,
                        mode="concurrency",
                        lease_duration=seconds,
                        holder=_holder(holder),
                    )
                    fault_point("KP-03")
                    grant = _Grant.model_validate_json(response.content)
            except _Refused as refused:
                if refused.status == 423 or (refused.status == 422 and refused.is_too_many):
                    return Busy(refused.retry_after)
                raise
            uncounted = set(names) - {limit.name for limit in grant.limits}
            uncounted = uncounted or await self._switched_off(names)
            if not uncounted:
                return SlotLease(str(grant.lease_id), until)
            # Prefect skips limits that don't exist or are off: this grant is on the others only, or on nothing.
            await self.release(str(grant.lease_id))
            for name in uncounted & self._limits.keys():
                if (done := await self._make(name)) is not None:
                    logger.warning(
                        "Prefect's concurrency limit %s had been %s with %d slots. To change a quota, edit "
                        "resource_quotas of the block.",
                        name,
                        done,
                        self._limits[name],
                    )
        return Busy(BUSY_SECONDS)

    async def renew(self, lease_id: str, seconds: float) -> bool:
        try:
            async with self._api("renew a lease") as client:
                await client.renew_concurrency_lease(UUID(lease_id), lease_duration=seconds)
        except _Refused as refused:
            if refused.status == 410:
                return False
            raise
        return True

    async def release(self, lease_id: str) -> None:
        async with self._api("release slots") as client:
            await client.release_concurrency_slots_with_lease(UUID(lease_id))

    async def give_back(self, name: str, slots: int) -> None:
        async with self._api("give leaked slots back") as client:
            # The occupancy only feeds Prefect's guess of how long others should wait.
            await client.release_concurrency_slots([name], slots, occupancy_seconds=1.0)

    async def active(self, name: str) -> int:
        async with self._api("read a concurrency limit") as client:
            try:
                limit = await client.read_global_concurrency_limit_by_name(name)
            except ObjectNotFound:
                return 0
        return int(limit.active_slots)

    async def _switched_off(self, names: Sequence[str]) -> set[str]:
        """Which of these limits count nothing now; a grant does not tell. Looked at once a minute."""
        off: set[str] = set()
        now = self._clock.monotonic()
        for name in names:
            if now - self._looked_at.get(name, now) < self._clock.speed * LOOK_SECONDS:
                continue
            try:
                async with self._api("read a concurrency limit") as client:
                    if not (await client.read_global_concurrency_limit_by_name(name)).active:
                        off.add(name)
            except SlotsUnavailable:
                continue  # the grant stands; the next one looks again
            self._looked_at[name] = now
        return off

    async def _make(self, name: str) -> str | None:
        """Bring a limit to its configured value. What was done if it counted nothing before."""
        async with self._making, self._api("set a concurrency limit") as client:
            limit = self._limits[name]
            self._looked_at[name] = self._clock.monotonic()
            while True:  # others may create or delete it in between
                try:
                    found = await client.read_global_concurrency_limit_by_name(name)
                    if found.limit != limit or not found.active:
                        await client.update_global_concurrency_limit(
                            name, GlobalConcurrencyLimitUpdate(limit=limit, active=True)
                        )
                except ObjectNotFound:
                    try:
                        await client.create_global_concurrency_limit(
                            GlobalConcurrencyLimitCreate(name=name, limit=limit)
                        )
                    except ObjectAlreadyExists:
                        continue
                    return "deleted; it was made again"
                return None if found.active else "off; it was switched on"

    @asynccontextmanager
    async def _api(self, what: str) -> AsyncGenerator[PrefectClient]:
        """The client for one call; whatever goes wrong comes out as `SlotsUnavailable`."""
        try:
            client = await self._opened()
            with anyio.fail_after(CALL_SECONDS):
                yield client
        except PrefectHTTPStatusError as error:
            raise _Refused(self._where(), what, error) from error
        except ValidationError as error:
            raise SlotsUnavailable(
                f"Prefect's API at {self._where()} answered in a way that was not understood: {what}"
            ) from error
        except Exception as error:  # what Prefect's client and its transport raise is not ours
            cause = type(error).__name__
            told = "no answer in time" if isinstance(error, TimeoutError) else cause
            raise SlotsUnavailable(
                f"Prefect's API at {self._where()} can't be used to {what}: {told}. Is the server up, and "
                "PREFECT_API_URL right?",
                maybe_done=cause not in NOT_SENT,
            ) from error

    async def _opened(self) -> PrefectClient:
        if self._client is None:
            async with self._opening:
                if self._client is None:
                    # In a thread: without PREFECT_API_URL this starts a server and waits for it.
                    client = await anyio.to_thread.run_sync(_new_client)
                    await client.__aenter__()
                    self._client = client
        return self._client

    def _where(self) -> str:
        """The API's address without credentials."""
        if self._client is None:
            return "the address in PREFECT_API_URL"
        url = urlsplit(str(self._client.api_url))
        return url._replace(netloc=url.netloc.rpartition("@")[2], query="").geturl()


class _Refused(SlotsUnavailable):
    """The server answered with an error status."""

    def __init__(self, where: str, what: str, error: PrefectHTTPStatusError) -> None:
        self.status = error.response.status_code
        self.is_too_many = "greater than the limit" in error.response.text
        try:
            self.retry_after = float(error.response.headers.get("Retry-After", BUSY_SECONDS))
        except ValueError:
            self.retry_after = BUSY_SECONDS
        super().__init__(
            f"Prefect's API at {where} answered {self.status} when asked to {what}",
            maybe_done=self.status >= 500,
        )


def _new_client() -> PrefectClient:
    return get_client(httpx_settings={"event_hooks": {"response": [_ask_again_soon]}})


async def _ask_again_soon(response: Any) -> None:
    """A server on SQLite answers 503 whenever two of its writes meet; left alone, its client then waits for seconds."""
    if response.status_code == 503:
        response.headers.setdefault("Retry-After", str(COLLISION_SECONDS))


def _holder(task_run: str) -> ConcurrencyLeaseHolder | None:
    try:
        return ConcurrencyLeaseHolder(type="task_run", id=UUID(task_run))
    except ValueError:
        return None
