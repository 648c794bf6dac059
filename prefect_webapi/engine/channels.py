"""What the jobs of one plugin's connection share: poller, bound on tracked jobs, quotas; kept up to date."""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import anyio
import anyio.abc

from prefect_webapi.contract.errors import WebApiError
from prefect_webapi.contract.plugin import AsyncPlugin
from prefect_webapi.engine.calls import Calls
from prefect_webapi.engine.contexts import ReadView
from prefect_webapi.engine.job import Job
from prefect_webapi.engine.services import Services
from prefect_webapi.ledger.records import JobState, Pace
from prefect_webapi.ledger.store import Reader, Store
from prefect_webapi.metrics import Add
from prefect_webapi.poller import Observation, Poller, ReadingPolicy
from prefect_webapi.quotas import Repair
from prefect_webapi.registry import Loaded

__all__ = ["Capacity", "Channel", "Channels", "LedgerCount", "held_in", "limit_name"]

logger = logging.getLogger(__name__)


class Capacity:
    """Bounds the jobs that one plugin's connection tracks; first come, first served."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken = 0
        self._queue: deque[anyio.Event] = deque()

    @property
    def size(self) -> int:
        return self._size

    @property
    def is_full(self) -> bool:
        return self._taken >= self._size or bool(self._queue)

    def resize(self, size: int) -> None:
        """Change the bound; jobs above a lower one stay."""
        self._size = size
        self._wake()

    def take_now(self) -> bool:
        """Whether there was room."""
        if self.is_full:
            return False
        self._taken += 1
        return True

    async def take(self) -> None:
        if self.take_now():
            return
        turn = anyio.Event()
        self._queue.append(turn)
        try:
            await turn.wait()
        except BaseException:
            if turn.is_set():
                self.give()
            else:
                self._queue.remove(turn)
            raise

    def give(self) -> None:
        self._taken -= 1
        self._wake()

    def _wake(self) -> None:
        while self._queue and self._taken < self._size:
            self._taken += 1
            self._queue.popleft().set()


@dataclass(slots=True, eq=False)
class Channel:
    """One plugin's connection.

    Attributes:
        lag / interval: the plugin's histograms of reads.
        quotas: ``dict[namespace, places]`` as last registered.
        limits: ``dict[limit's name, places]`` as last set: quotas and constraints.
    """

    loaded: Loaded
    poller: Poller
    capacity: Capacity
    lag: Add
    interval: Add
    quotas: dict[str, int] = field(default_factory=dict[str, int])
    limits: dict[str, int] = field(default_factory=dict[str, int])
    _read_again: int = 0
    _since: float = 0.0
    _late: float = 0.0
    _pace: tuple[float, float] | None = None

    def note_read(self, observation: Observation) -> None:
        """Count how late a read was, and how long after the one before it; what create told counts as one."""
        self.lag(observation.late)
        if observation.watched.gap > 0:
            self.interval(observation.since)
            self._read_again += 1
            self._since += observation.since
            self._late += observation.late

    def pace(self) -> Pace | None:
        """How its jobs were read since this was asked last; None: it has none, or none was read twice."""
        if reads := self._read_again:
            self._pace = self._since / reads, self._late / reads
            self._read_again, self._since, self._late = 0, 0.0, 0.0
        jobs = len(self.poller)
        if self._pace is None or not jobs:
            return None
        return Pace(self.loaded.entry.id, self.loaded.connection.name, jobs, *self._pace)


class _Reading:
    """Reads for a poller, through the gate."""

    def __init__(self, calls: Calls, loaded: Loaded) -> None:
        self._calls = calls
        self._loaded = loaded

    async def one(self, context: Job) -> Any:
        return await self._calls.get(self._loaded, ReadView(context.handle, context))

    async def many(self, contexts: Sequence[Job]) -> Sequence[Any | Exception | None]:
        views = [ReadView(each.handle, each) for each in contexts]
        return await self._calls.get_many(self._loaded, views)


class Channels:
    """All channels of a runtime. Pollers run in the runtime's task group.

    Args:
        deliver: takes the pollers' observations.
    """

    def __init__(
        self,
        services: Services,
        calls: Calls,
        tasks: anyio.abc.TaskGroup,
        deliver: Callable[[Observation], Awaitable[None]],
    ) -> None:
        self._services = services
        self._calls = calls
        self._tasks = tasks
        self._deliver = deliver
        self._channels: dict[tuple[str, str], Channel] = {}
        self._locks: dict[tuple[str, str], anyio.Lock] = {}

    def __iter__(self) -> Iterator[Channel]:
        return iter(list(self._channels.values()))

    def of(self, loaded: Loaded) -> Channel:
        """The channel of a plugin that was opened before."""
        return self._channels[_key(loaded)]

    async def open(self, loaded: Loaded) -> Channel:
        """The channel of this plugin and connection, brought up to date with `loaded`.

        Nobody gets it before its quotas are in force: a job that came in between would count against none.
        """
        key = _key(loaded)
        async with self._locks.setdefault(key, anyio.Lock()):
            loaded = self._services.plugins.current(loaded)  # it may have waited
            channel = self._channels.get(key)
            if channel is None:
                poller = Poller(
                    _reading_policy(loaded),
                    _Reading(self._calls, loaded),
                    self._deliver,
                    self._services.clock,
                )
                metrics, plugin = self._services.metrics, loaded.entry.id
                channel = Channel(
                    loaded,
                    poller,
                    Capacity(loaded.config.caching.size),
                    metrics.histogram("poll_lag_seconds", plugin=plugin),
                    metrics.histogram("poll_interval_seconds", plugin=plugin),
                )
                await self._set_quotas(channel, loaded)
                self._channels[key] = channel
                metrics.count("evictions_total", 0, plugin=plugin)
                self._tasks.start_soon(poller.run)
            elif channel.loaded is not loaded:
                await self._update(channel, loaded)
            return channel

    async def look_at_blocks(self) -> None:
        """Let edited blocks take effect; live jobs go on."""
        for channel in list(self._channels.values()):
            if channel.loaded.connection.inline:
                continue
            try:
                await self.open(await self._services.plugins.refresh(channel.loaded))
            except (WebApiError, OSError) as error:
                logger.warning(
                    "the block of plugin %s can't be read again: %s", channel.loaded.entry.id, error
                )

    @property
    def look_every(self) -> float | None:
        """Seconds between two looks at the blocks; None: there is nothing to look at."""
        return min((c.poller.policy.longest for c in self._channels.values()), default=None)

    async def _update(self, channel: Channel, loaded: Loaded) -> None:
        channel.poller.policy = _reading_policy(loaded)
        channel.capacity.resize(loaded.config.caching.size)
        self._calls.gate(loaded).configure(
            loaded.config.read_rate_limiter, loaded.config.write_rate_limiter
        )
        await self._set_quotas(channel, loaded)
        channel.loaded = loaded

    async def _set_quotas(self, channel: Channel, loaded: Loaded) -> None:
        quotas = dict(loaded.config.resource_quotas)
        await self._set_limits(channel, {limit_name(loaded, ns): n for ns, n in quotas.items()})
        channel.quotas = quotas

    async def constrain(self, channel: Channel, limits: Mapping[str, int]) -> None:
        """Have constraints in force before a job asks for their places. Of different values the latest counts."""
        if limits.items() <= channel.limits.items():
            return
        async with self._locks[_key(channel.loaded)]:
            await self._set_limits(channel, limits)

    async def _set_limits(self, channel: Channel, limits: Mapping[str, int]) -> None:
        new: list[str] = []
        for name, limit in limits.items():
            if channel.limits.get(name) != limit:
                await self._services.store.set_quota(name, limit)
                await self._services.quotas.configure(name, limit)
                if name not in channel.limits:
                    new.append(name)
                channel.limits[name] = limit
        if new and self._services.owns_limits:
            self._tasks.start_soon(self._repair_new, new)

    async def _repair_new(self, names: Sequence[str]) -> None:
        """Look for leaked slots at the first use of limits, and again when some seem to have leaked."""
        found = await self.repair(names)
        if found.waiting:
            await self._services.clock.sleep(self._services.quotas.look_again_after)
            await self.repair(list(found.waiting))

    async def repair(self, names: Sequence[str]) -> Repair:
        """Look once for what dead holders of these limits have leaked; what was there before is given back."""
        try:
            return await self._services.quotas.repair(names, LedgerCount(self._services.store))
        except WebApiError as error:
            logger.info("leaked slots were not looked for: %s", error)
            return Repair({}, {})


class LedgerCount:
    """`quotas.Count` of a ledger."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def note_surplus(self, name: str, slots: int, at: datetime, since: datetime) -> int:
        return await self._store.note_surplus(name, slots, at, since)

    async def held(self, name: str) -> int:
        return await held_in(self._store, name)


async def held_in(ledger: Reader, name: str) -> int:
    """Places of jobs that may live, and those that may be lent to a job which this ledger has no room for.

    A job that it has room for keeps its slots for the moment only that they take to be written down. So a leak
    shows although jobs wait, and because of it.
    """
    waiting = await ledger.select(states=[JobState.SLOT_REQUESTED])
    rows = {row.name: row for row in await ledger.quotas()}
    lent: dict[tuple[str, tuple[str, ...]], int] = {}
    for record in waiting:  # the first of each queue may have slots
        fits = all(
            (row := rows.get(limit)) is not None and row.live + record.weight <= row.limit
            for limit in record.quotas
        )
        if name in record.quotas and not fits:
            queue = record.runtime, record.quotas
            lent[queue] = max(lent.get(queue, 0), record.weight)
    row = rows.get(name)
    return (row.live if row is not None else 0) + sum(lent.values())


def _key(loaded: Loaded) -> tuple[str, str]:
    return loaded.entry.id, loaded.connection.name


def limit_name(
    loaded: Loaded, namespace: str, *, project: str | None = None, pool: str | None = None
) -> str:
    """The Prefect limit of a namespace, or of a scope inside it; different ones have different names.

    Prefect takes no ``/ % & < >`` in a name: they are written as ``~2F`` and so on, as is whatever could be taken
    for one of our own separators. Namespaces may contain `:`.
    """
    name = f"webapi:{loaded.entry.id}:{loaded.connection.name}:{_escaped(namespace, '/%&<>~=')}"
    for scope, value in (("project", project), ("pool", pool)):
        if value is not None:
            name += f":{scope}={_escaped(value, '/%&<>~=:')}"
    return name


def _escaped(text: str, special: str) -> str:
    return re.sub(f"[{special}]", lambda found: f"~{ord(found[0]):02X}", text)


def _reading_policy(loaded: Loaded) -> ReadingPolicy:
    caching = loaded.config.caching
    plugin = loaded.plugin
    return ReadingPolicy(
        initial=loaded.settings.initial_interval.total_seconds(),
        longest=caching.resync_interval.total_seconds(),
        workers=caching.workers,
        max_batch=plugin.max_batch if isinstance(plugin, AsyncPlugin) else 1,
    )
