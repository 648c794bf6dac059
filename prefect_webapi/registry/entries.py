"""Which plugin serves a task: the entries of a process. Runs nothing of a plugin but its import."""

from __future__ import annotations

import copy
import importlib.metadata
import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, cast

from prefect_webapi.contract.errors import (
    AmbiguousPlugin,
    ConfigurationError,
    DuplicatePlugin,
    PluginDisabled,
    UnknownTaskType,
)
from prefect_webapi.contract.faults import Fault, InvalidConfiguration
from prefect_webapi.contract.plugin import PluginEntry
from prefect_webapi.contract.task import JobSpec

__all__ = ["ENTRY_POINT_GROUP", "AnyEntry", "Registry", "default_registry", "register"]

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "prefect_webapi.plugins"

AnyEntry = PluginEntry[Any]


def _no_entry_points() -> Iterable[importlib.metadata.EntryPoint]:
    return ()


def _installed_entry_points() -> Iterable[importlib.metadata.EntryPoint]:
    return importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)


class Registry:
    """The plugin entries of one process. Safe to use from any thread.

    Args:
        entry_points: where further entries are announced; looked up once, at the first need. One
            that can't be loaded is left out with a warning, and named where its task is asked for.

    Source: SPEC REQ-48 to REQ-51.
    """

    def __init__(
        self,
        entry_points: Callable[[], Iterable[importlib.metadata.EntryPoint]] = _no_entry_points,
    ) -> None:
        self._entry_points = entry_points
        self._entries: dict[str, AnyEntry] = {}
        self._broken: dict[str, ConfigurationError] = {}
        self._announced = False
        self._announcing = threading.local()
        self._lock = threading.Lock()

    def register(self, entry: AnyEntry) -> None:
        """Add an entry. The very same object a second time changes nothing.

        Raises:
            ConfigurationError: the entry is malformed; every fault is named.
            DuplicatePlugin: its id or one of its defaults is taken.
        """
        if not isinstance(cast(object, entry), PluginEntry):
            raise ConfigurationError(f"{type(entry).__name__} is no PluginEntry; register one.")
        faults = list(_faults_of(entry))
        if faults:
            raise InvalidConfiguration(f"plugin entry {entry.id!r}", faults)
        with self._lock:
            others = self._entries.values()
            if any(other is entry for other in others):
                return
            for other in others:
                _refuse_double_claim(entry, other)
            self._entries[entry.id] = entry

    @property
    def entries(self) -> Mapping[str, AnyEntry]:
        """Every entry by id, announced ones included."""
        self._load_announced()
        with self._lock:
            return dict(self._entries)

    @property
    def broken(self) -> Mapping[str, ConfigurationError]:
        """Entry points that could not be loaded: name to reason."""
        self._load_announced()
        with self._lock:
            return dict(self._broken)

    def resolve(
        self, task_type: str, plugin: str | None = None, *, disabled: Collection[str] = ()
    ) -> AnyEntry:
        """The entry that serves a task.

        The named plugin, else the only enabled one for the type, else the type's default, else the
        default of all. A default that is disabled is never replaced in silence.

        Raises:
            UnknownTaskType: nobody serves it.
            AmbiguousPlugin: several do and none is its default.
            PluginDisabled: the one that serves it is switched off.
            ConfigurationError: no plugin has that id, or it doesn't serve the type.
        """
        entries = self.entries
        entry = (
            self._named(entries, plugin, task_type)
            if plugin is not None
            else self._for_type(entries, task_type, disabled)
        )
        if entry.id in disabled:
            raise PluginDisabled(entry.id)
        return entry

    def _named(self, entries: Mapping[str, AnyEntry], plugin: str, task_type: str) -> AnyEntry:
        entry = entries.get(plugin)
        if entry is None:
            if plugin in self.broken:
                raise copy.copy(self.broken[plugin])
            known = ", ".join(sorted(entries)) or "none"
            raise self._with_broken(
                ConfigurationError(
                    f"no plugin has the id {plugin!r} (known: {known}). Install the package that "
                    "brings it, or correct the name."
                )
            )
        if task_type not in entry.supported_task_types and not entry.is_default:
            raise ConfigurationError(
                f"plugin {plugin!r} does not serve task type {task_type!r} (it serves: "
                f"{', '.join(entry.supported_task_types)}). Name another plugin or task type."
            )
        return entry

    def _for_type(
        self, entries: Mapping[str, AnyEntry], task_type: str, disabled: Collection[str]
    ) -> AnyEntry:
        serving = [each for each in entries.values() if task_type in each.supported_task_types]
        default = [each for each in serving if task_type in each.default_for_task_types]
        enabled = [each for each in serving if each.id not in disabled]
        if default:
            return default[0]
        if len(enabled) == 1 or (serving and not enabled):
            return (enabled or serving)[0]
        if enabled:
            raise AmbiguousPlugin(task_type, [each.id for each in enabled])
        if task_type in self.broken:
            raise copy.copy(self.broken[task_type])
        for each in entries.values():
            if each.is_default:
                return each
        known = {known for each in entries.values() for known in each.supported_task_types}
        raise self._with_broken(UnknownTaskType(task_type, known))

    def _with_broken(self, error: ConfigurationError) -> ConfigurationError:
        for reason in self.broken.values():
            error.add_note(f"It may be one of those that could not be loaded: {reason}")
        return error

    def _load_announced(self) -> None:
        # Importing happens outside the lock: the module may register entries itself, or be on its
        # way in by another thread. Done twice at once it does no harm. A module that asks for entries
        # while it is imported gets those that are there.
        if self._announced or getattr(self._announcing, "now", False):
            return
        self._announcing.now = True
        try:
            self._announce()
        finally:
            self._announcing.now = False
        self._announced = True

    def _announce(self) -> None:
        for point in self._entry_points():
            error = self._load(point)
            if error is None:
                continue
            with self._lock:
                known = self._broken.setdefault(point.name, error)
            if known is error:
                logger.warning("%s", error)

    def _load(self, point: importlib.metadata.EntryPoint) -> ConfigurationError | None:
        """Load one entry point; the answer is what went wrong."""
        package = f" of {point.dist.name} {point.dist.version}" if point.dist else ""
        told = f"plugin entry point `{point.name} = {point.value}`{package}"
        try:
            entry = point.load()
        except Exception as error:  # noqa: BLE001  any module may fail in any way
            broken = ConfigurationError(
                f"{told} could not be imported: {type(error).__name__}: {error}. Repair or "
                "uninstall that package."
            )
            broken.__cause__ = error
            return broken
        if not isinstance(entry, PluginEntry):
            return ConfigurationError(
                f"{told} names {type(entry).__name__}, not a PluginEntry. It must name the entry."
            )
        try:
            self.register(cast(AnyEntry, entry))
        except ConfigurationError as error:
            return ConfigurationError(f"{told} was refused: {error}")
        return None


def _faults_of(entry: AnyEntry) -> Iterable[Fault]:
    # Not every author runs a type checker: look at everything as if nothing were known of it.
    plugin_id, loader, spec, connection = cast(
        tuple[Any, Any, Any, Any],
        (entry.id, entry.plugin_loader, entry.spec, entry.connection),
    )
    if not isinstance(plugin_id, str) or not plugin_id.strip():
        yield Fault("id", "is empty", remedy="Give the plugin a unique name.")
    yield from _faults_of_names("supported_task_types", entry.supported_task_types, 1)
    yield from _faults_of_names("default_for_task_types", entry.default_for_task_types, 0)
    if not callable(loader):
        yield Fault(
            "plugin_loader",
            "is not callable",
            repr(loader),
            remedy="Give a function that takes the set-up context and returns the plugin.",
        )
    if not (isinstance(spec, type) and issubclass(spec, JobSpec)):
        yield Fault("spec", "is not a JobSpec class", repr(cast(Any, spec)))
    if not isinstance(connection, type):
        yield Fault("connection", "is not a class", repr(connection))
    supported, defaults = entry.supported_task_types, entry.default_for_task_types
    if (
        _is_listing(supported)
        and _is_listing(defaults)
        and (alien := set(defaults) - set(supported))
    ):
        yield Fault(
            "default_for_task_types",
            f"names what the plugin does not support: {', '.join(sorted(map(repr, alien)))}",
            remedy="Add it to supported_task_types, or remove it here.",
        )


def _faults_of_names(path: str, names: Any, least: int) -> Iterable[Fault]:
    if not _is_listing(names):
        yield Fault(path, "is not a list of task types", repr(names))
        return
    listed = list(cast(Iterable[Any], names))
    if len(listed) < least:
        yield Fault(path, "is empty", remedy="Name at least one task type.")
    if any(not isinstance(each, str) or not each.strip() for each in listed):
        yield Fault(path, "holds an empty task type", repr(listed))
    twice = [each for each, count in Counter(map(repr, listed)).items() if count > 1]
    if twice:
        yield Fault(path, f"names {', '.join(twice)} twice", remedy="Keep one of them.")


def _is_listing(names: Any) -> bool:
    return isinstance(names, list | tuple | set | frozenset)


def _refuse_double_claim(entry: AnyEntry, other: AnyEntry) -> None:
    if entry.id == other.id:
        raise DuplicatePlugin(
            f"plugin id {entry.id!r} is taken: one entry with it loads {_whose(other)}, the "
            f"refused one {_whose(entry)}. Give one of them another id."
        )
    if entry.is_default and other.is_default:
        raise DuplicatePlugin(
            f"plugins {other.id!r} and {entry.id!r} both claim to be the default of all; at most "
            "one may. Set is_default=False in one of them."
        )
    both = sorted(set(entry.default_for_task_types) & set(other.default_for_task_types))
    if both:
        raise DuplicatePlugin(
            f"plugins {other.id!r} and {entry.id!r} both claim to be the default for "
            f"{', '.join(map(repr, both))}. Remove it from default_for_task_types of one of them."
        )


def _whose(entry: AnyEntry) -> str:
    loader = entry.plugin_loader
    return f"{getattr(loader, '__module__', '?')}.{getattr(loader, '__qualname__', '?')}"


default_registry = Registry(_installed_entry_points)
"""The process's own: installed plugins, and what `register` adds."""


def register(entry: AnyEntry) -> None:
    """Add an entry to the process's registry; installed packages announce theirs by entry point."""
    default_registry.register(entry)
