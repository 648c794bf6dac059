"""The living plugins: one per entry, connection and revision of it.

Loaders are called late and once; what they give is checked before anything remote can happen. When
a block changes, its instance is replaced, and the old one is closed by whoever notices that its last
call has ended. Nothing here makes a remote call itself.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

import anyio
from pydantic import BaseModel, ValidationError

from prefect_webapi.contract.config import (
    CachingConfig,
    EngineSettings,
    PluginConfig,
    RateLimiterConfig,
)
from prefect_webapi.contract.contexts import MetricsScope
from prefect_webapi.contract.errors import (
    ConfigurationError,
    EngineClosed,
    RemoteSystemError,
    WebApiError,
)
from prefect_webapi.contract.faults import explain, validate
from prefect_webapi.contract.handles import check_handle_type
from prefect_webapi.contract.plugin import AsyncPlugin, Plugin, SyncPlugin
from prefect_webapi.contract.secrecy import Mask, secrets_in
from prefect_webapi.registry.connections import Connection, Connections, digest
from prefect_webapi.registry.entries import AnyEntry, Registry

__all__ = ["Loaded", "Metrics", "Plugins", "Time", "is_cancelled"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
Key = tuple[str, ...]

_CLOSING_SECONDS = 10.0


class Metrics(Protocol):
    def scope(self, prefix: str, /) -> MetricsScope: ...


class Time(Protocol):
    """The part of the clock that is needed here."""

    def monotonic(self) -> float: ...

    def real(self, seconds: float, /) -> float: ...


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A living plugin and what controls it. Compared by identity.

    Attributes:
        config: what `get_config` said.
        settings: the block's, with the process's own where the block says nothing.
        endpoint: equal for connections of one address and credential: they share rate limits.
        mask: takes the connection's secrets out of texts and data.
    """

    entry: AnyEntry
    connection: Connection[Any]
    plugin: Plugin
    config: PluginConfig
    settings: EngineSettings
    endpoint: str
    mask: Mask


@dataclass(frozen=True, slots=True)
class _Setup:
    connection: Any
    metrics_scope: MetricsScope


@dataclass(slots=True)
class _Flight:
    """Work that one task does and others wait for."""

    done: anyio.Event = field(default_factory=anyio.Event)
    result: Any = None
    error: Exception | None = None


class Plugins:
    """Loads plugins when they are needed and replaces them when their block changes.

    Everything here runs on one event loop.

    Args:
        disabled: ids of plugins that may not run.
        overrides: values of `EngineSettings` that hold where a block says nothing.

    Source: SPEC REQ-52, REQ-81.
    """

    def __init__(
        self,
        registry: Registry,
        connections: Connections,
        *,
        metrics: Metrics,
        clock: Time,
        disabled: Collection[str] = (),
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        self._registry = registry
        self._connections = connections
        self._metrics = metrics
        self._clock = clock
        self._disabled = frozenset(disabled)
        self._overrides = dict(overrides or {})
        self._current: dict[Key, Loaded] = {}
        self._looked_at: dict[Key, float] = {}
        self._keys_by_ref: dict[Key, Key] = {}
        self._flights: dict[Key, _Flight] = {}
        self._calls: Counter[Loaded] = Counter()
        self._retired: set[Loaded] = set()
        self._trouble: dict[Key, str] = {}
        self._closed = False

    async def get(self, task_type: str, plugin: str | None, ref: Any) -> Loaded:
        """The plugin for a task, loaded if need be and checked: it may make requests.

        The block is looked at again when the last look is `resync_interval` ago.

        Raises:
            ConfigurationError: nothing serves the task, or the connection is wrong.
            WebApiError: the loader failed; the next call tries again.
            EngineClosed: the process is ending.
        """
        self._refuse_if_closed()
        entry = self._registry.resolve(task_type, plugin, disabled=self._disabled)
        if ref is not None and not isinstance(ref, str):
            return await self._load_ref(entry, ref)
        by_ref = (entry.id, "ref", ref or "")
        loaded = self._current.get(self._keys_by_ref.get(by_ref, ()))
        if loaded is None:
            loaded = await self._once(by_ref, lambda: self._load_ref(entry, ref))
            self._keys_by_ref[by_ref] = _key(loaded)
            return self.current(loaded)
        age = self._clock.monotonic() - self._looked_at[_key(loaded)]
        if age >= loaded.config.caching.resync_interval.total_seconds():
            return await self.refresh(loaded)
        return loaded

    async def refresh(self, loaded: Loaded, *, force: bool = False) -> Loaded:
        """Look at the block again; the answer is the instance to use from now on.

        Whoever holds an instance that was replaced in the meantime gets the newest one. A new value
        that can't be used leaves the old instance in place, with one warning.

        Args:
            force: load anew even if the block is unchanged, as after a refused credential.
        """
        self._refuse_if_closed()
        newest = self.current(loaded)
        if newest is not loaded:
            return newest
        key = _key(loaded)
        return await self._once((*key, "refresh", str(force)), lambda: self._look(loaded, force))

    def current(self, loaded: Loaded) -> Loaded:
        """The newest instance for the same entry and connection."""
        return self._current.get(_key(loaded), loaded)

    @asynccontextmanager
    async def use(self, loaded: Loaded) -> AsyncGenerator[Loaded, None]:
        """Make calls on the newest instance, which stays open until the block ends."""
        self._refuse_if_closed()
        loaded = self.current(loaded)
        self._calls[loaded] += 1
        try:
            yield loaded
        finally:
            self._calls[loaded] -= 1
            await self._close_if_idle(loaded)

    async def aclose(self) -> None:
        """Load nothing any more; close each instance, one with calls when the last of them ends."""
        self._closed = True
        living = list(self._current.values())
        self._current.clear()
        self._retired.update(living)
        async with anyio.create_task_group() as closing:
            for loaded in living:
                closing.start_soon(self._close_if_idle, loaded)

    # Looking and replacing ---------------------------------------------------------------------

    async def _load_ref(self, entry: AnyEntry, ref: Any) -> Loaded:
        connection = await self._resolve(entry, ref)
        key = _key_of(entry, connection)
        known = self._current.get(key)
        if known is None:
            return await self._install_once(entry, connection, None)
        if known.connection.revision == connection.revision:
            return known
        return await self._replace(known, connection)

    async def _look(self, loaded: Loaded, force: bool) -> Loaded:
        key = _key(loaded)
        connection = loaded.connection
        try:
            if not connection.inline:
                connection = await self._resolve(loaded.entry, connection.name, fresh=force)
        except Exception as error:  # noqa: BLE001  the adapter's errors are of any class
            self._warn_once(loaded, error)
            return self.current(loaded)
        finally:
            self._looked_at[key] = self._clock.monotonic()
        newest = self.current(loaded)
        if newest is not loaded:
            return newest
        if connection.revision == loaded.connection.revision and not force:
            self._trouble.pop(key, None)
            return loaded
        return await self._replace(loaded, connection)

    async def _replace(self, loaded: Loaded, connection: Connection[Any]) -> Loaded:
        try:
            return await self._install_once(loaded.entry, connection, loaded)
        except EngineClosed:
            raise
        except WebApiError as error:
            self._warn_once(loaded, error)
            return self.current(loaded)

    async def _install_once(
        self, entry: AnyEntry, connection: Connection[Any], before: Loaded | None
    ) -> Loaded:
        """Load an instance in the place of `before`, unless somebody has done so or is doing it."""
        key = _key_of(entry, connection)
        present = self._current.get(key)
        if present is not None and present is not before:
            return present
        return await self._once((*key, "install"), lambda: self._install(entry, connection))

    async def _install(self, entry: AnyEntry, connection: Connection[Any]) -> Loaded:
        key = _key_of(entry, connection)
        loaded = await self._load(entry, connection)
        if self._closed:
            self._retired.add(loaded)
            await self._close_if_idle(loaded)
            self._refuse_if_closed()
        before = self._current.get(key)
        self._current[key] = loaded
        self._looked_at[key] = self._clock.monotonic()
        self._trouble.pop(key, None)
        if before is not None:
            self._retired.add(before)
            logger.info(
                "plugin %s reloaded for connection %s",
                entry.id,
                connection.name,
                extra={"plugin": entry.id},
            )
            await self._close_if_idle(before)
        return loaded

    async def _resolve(self, entry: AnyEntry, ref: Any, *, fresh: bool = False) -> Connection[Any]:
        try:
            return await self._connections.resolve(ref, entry.connection, fresh=fresh)
        except ValidationError as found:
            error = explain(found, _model(entry.connection), subject=f"connection {ref!r}")
        raise error

    def _warn_once(self, loaded: Loaded, error: Exception) -> None:
        told = f"{type(error).__name__}: {loaded.mask(str(error))}"
        if self._trouble.get(_key(loaded)) != told:
            self._trouble[_key(loaded)] = told
            logger.warning(
                "connection %s of plugin %s can't be taken up as it is now; the value from before "
                "stays in use. %s",
                loaded.connection.name,
                loaded.entry.id,
                told,
                extra={"plugin": loaded.entry.id},
            )

    # Loading -----------------------------------------------------------------------------------

    async def _load(self, entry: AnyEntry, connection: Connection[Any]) -> Loaded:
        settings = self._settings(connection)
        setup = _Setup(connection.value, self._metrics.scope(entry.id))
        mask = Mask(secrets_in(connection.value))
        plugin: Plugin | None = None
        step = "plugin_loader"
        try:
            with anyio.fail_after(self._clock.real(settings.create_timeout.total_seconds())):
                plugin = _checked_plugin(entry, await _settled(entry.plugin_loader(setup)))
                step = "get_config"
                config = _checked_config(entry, await _settled(plugin.get_config()))
            check_handle_type(plugin, config, settings)
        except BaseException as error:
            if plugin is not None:
                await self._close(entry, plugin, mask)
            if is_cancelled(error) or (
                isinstance(error, WebApiError) and not mask.is_told_by(error)
            ):
                raise
            failure, tells_secrets = _loader_error(entry, connection, step, error, mask)
            raise failure from (None if tells_secrets else error)
        endpoint = digest(connection.value, exclude=("engine", "settings"))
        return Loaded(entry, connection, plugin, config, settings, endpoint, mask)

    def _settings(self, connection: Connection[Any]) -> EngineSettings:
        value: object = connection.value
        settings = getattr(value, "settings", None)
        if not isinstance(settings, EngineSettings):
            settings = EngineSettings()
        field = type(value).model_fields.get("settings") if isinstance(value, BaseModel) else None
        default = field.default if field and isinstance(field.default, EngineSettings) else None
        return settings.overlaid(self._overrides, default=default)

    # Closing -----------------------------------------------------------------------------------

    async def _close_if_idle(self, loaded: Loaded) -> None:
        if self._calls[loaded] == 0:
            del self._calls[loaded]
            if loaded in self._retired:
                self._retired.remove(loaded)
                await self._close(loaded.entry, loaded.plugin, loaded.mask)

    async def _close(self, entry: AnyEntry, plugin: Plugin, mask: Mask) -> None:
        about = {"plugin": entry.id}
        with anyio.move_on_after(_CLOSING_SECONDS, shield=True) as limit:
            try:
                await plugin.aclose()
            except BaseException as error:
                if is_cancelled(error):
                    raise
                told = f"{type(error).__name__}: {mask(str(error))}"
                logger.warning("plugin %s failed to close: %s", entry.id, told, extra=about)
        if limit.cancelled_caught:
            logger.warning("plugin %s took too long to close", entry.id, extra=about)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise EngineClosed("the process is ending: no plugin is loaded or used any more")

    async def _once(self, key: Key, work: Callable[[], Awaitable[T]]) -> T:
        """Do `work` once however many ask at a time; a failure goes to all of them.

        If the one who does it is cancelled, another of those who wait takes it over.
        """
        while (flight := self._flights.get(key)) is not None:
            await flight.done.wait()
            if flight.error is not None:
                raise _copied(flight.error)
            if flight.result is not None:
                return flight.result
        flight = self._flights[key] = _Flight()
        try:
            flight.result = result = await work()
        except Exception as error:
            flight.error = error
            raise
        else:
            return result
        finally:
            del self._flights[key]
            flight.done.set()


def _key_of(entry: AnyEntry, connection: Connection[Any]) -> Key:
    if connection.inline:
        return entry.id, "inline", connection.name, connection.revision
    return entry.id, "saved", connection.name


def _key(loaded: Loaded) -> Key:
    return _key_of(loaded.entry, loaded.connection)


def _model(kind: type[Any]) -> type[BaseModel] | None:
    return kind if issubclass(kind, BaseModel) else None


def _copied(error: Exception) -> Exception:
    # One exception object raised in many tasks would grow a traceback of them all.
    if not isinstance(error, WebApiError):
        return error
    twin = copy.copy(error)
    twin.__cause__ = error.__cause__
    return twin


async def _settled(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def _checked_plugin(entry: AnyEntry, plugin: Any) -> Plugin:
    if isinstance(plugin, AsyncPlugin | SyncPlugin):
        return cast(Plugin, plugin)
    raise ConfigurationError(
        f"the loader of plugin {entry.id!r} returned {type(plugin).__name__}. It must return an "
        "AsyncPlugin or a SyncPlugin."
    )


def _checked_config(entry: AnyEntry, config: Any) -> PluginConfig:
    if not isinstance(config, PluginConfig):
        raise ConfigurationError(
            f"get_config of plugin {entry.id!r} returned {type(config).__name__}. It must return a "
            "PluginConfig."
        )
    return validate(type(config), config, subject=f"get_config of plugin {entry.id!r}")


def is_cancelled(error: BaseException) -> bool:
    """Whether this is the running task's own end; an author's code may raise `CancelledError` too, and worse."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0
    return isinstance(error, GeneratorExit)


def _loader_error(
    entry: AnyEntry, connection: Connection[Any], step: str, error: BaseException, mask: Mask
) -> tuple[WebApiError, bool]:
    """Our error for a loader's own, and whether the original tells secrets."""
    if isinstance(error, ValidationError):
        known = (PluginConfig, EngineSettings, CachingConfig, RateLimiterConfig, entry.connection)
        model = next((_model(each) for each in known if each.__name__ == error.title), None)
        return explain(error, model, subject=f"plugin {entry.id!r} ({error.title})"), True
    words = "it took too long" if isinstance(error, TimeoutError) else str(error)
    failure = RemoteSystemError(
        f"plugin {entry.id!r} could not be loaded for connection {connection.name!r}: "
        f"{step}: {type(error).__name__}: {mask(words)}",
        code="PluginLoadFailed",
        job_may_exist=False,
    )
    return failure, mask.is_told_by(error)
