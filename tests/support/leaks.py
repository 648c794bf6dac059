"""Looks for slots that nobody holds, without the two and a half minutes between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from prometheus_client import CollectorRegistry

from prefect_webapi.clock import Clock
from prefect_webapi.metrics import Metrics
from prefect_webapi.quotas import Count, Slots, repair

__all__ = ["GivenCount", "given_back"]


@dataclass
class GivenCount:
    """What a ledger knows of slots, from a mapping. Its memory is as the real one's (`tests/ledger`)."""

    jobs: dict[str, int] = field(default_factory=dict[str, int])
    seen: dict[str, tuple[int, datetime]] = field(default_factory=dict[str, tuple[int, datetime]])

    async def held(self, name: str) -> int:
        return self.jobs.get(name, 0)

    async def note_surplus(self, name: str, slots: int, at: datetime, since: datetime) -> int:
        known, first = self.seen.pop(name, (slots, at))
        if not slots:
            return 0
        if first <= since:
            return min(known, slots)
        self.seen[name] = min(known, slots), first
        return 0


class _Later(Clock):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._later = timedelta(seconds=seconds)

    def now(self) -> datetime:
        return super().now() + self._later

    async def sleep(self, seconds: float) -> None:
        return None


async def given_back(slots: Slots, name: str, count: Count) -> Mapping[str, int]:
    """What two looks give back that seem to be a lease and half a minute apart."""
    metrics = Metrics(CollectorRegistry())
    first = await repair(slots, [name], count, clock=_Later(0), metrics=metrics)
    assert not first.given
    return (await repair(slots, [name], count, clock=_Later(151), metrics=metrics)).given
