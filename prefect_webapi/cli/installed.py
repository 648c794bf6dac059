"""The plugins that installed packages bring: which load, and what the others lack. Nothing of a service is asked."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from prefect_webapi.contract.plugin import PluginEntry
from prefect_webapi.registry import ENTRY_POINT_GROUP, Registry

__all__ = ["Installed", "installed_plugins"]

OURS = "prefect_webapi_"
"""Our plugins' packages; what follows names the extra with their libraries."""


@dataclass(frozen=True, slots=True)
class Installed:
    """One plugin that a package announces.

    Attributes:
        id: the entry's; the entry point's name where it can't be loaded.
        connection / spec: import paths of the classes; empty where it can't be loaded.
        problem: why it can't be used; empty: it can. is_broken: not for want of a library that an extra brings.
    """

    id: str
    task_types: tuple[str, ...]
    connection: str
    spec: str
    package: str
    version: str
    is_disabled: bool = False
    is_broken: bool = False
    problem: str = ""
    remedy: str = ""

    @property
    def is_usable(self) -> bool:
        return not self.problem and not self.is_disabled


def installed_plugins(registry: Registry, disabled: Collection[str] = ()) -> list[Installed]:
    """Every announced plugin, by id.

    Args:
        registry: one that loads the installed entry points.
        disabled: ids that the settings switch off.
    """
    broken = registry.broken  # loads them all
    found: list[Installed] = []
    for point in metadata.entry_points(group=ENTRY_POINT_GROUP):
        package, version = (point.dist.name, point.dist.version) if point.dist else ("", "")
        if (error := broken.get(point.name)) is not None:
            remedy = (
                f'pip install --force-reinstall "{package}", or uninstall it' if package else ""
            )
            found.append(
                Installed(
                    *(point.name, (), "", "", package, version),
                    is_broken=True,
                    problem=str(error),
                    remedy=remedy,
                )
            )
            continue
        entry: PluginEntry[Any] = point.load()
        problem, remedy = _lacking(point)
        found.append(
            Installed(
                entry.id,
                tuple(entry.supported_task_types),
                _path(entry.connection),
                _path(entry.spec),
                package,
                version,
                is_disabled=entry.id in disabled,
                problem=problem,
                remedy=remedy,
            )
        )
    return sorted(found, key=lambda each: each.id)


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _lacking(point: metadata.EntryPoint) -> tuple[str, str]:
    """Which libraries of a plugin are not there, and how to get them; both empty: none is missing."""
    if point.dist is None:
        return "", ""
    extra = _extra(point, point.dist)
    missing = list(_missing(point.dist, extra))
    if not missing:
        return "", ""
    what = f"{point.dist.name}[{extra}]" if extra else point.dist.name
    return f"needs {', '.join(missing)}", f'pip install "{what}"'


def _extra(point: metadata.EntryPoint, package: metadata.Distribution) -> str:
    name = point.module.partition(".")[0].removeprefix(OURS)
    return name if name in (package.metadata.get_all("Provides-Extra") or ()) else ""


def _missing(package: metadata.Distribution, extra: str) -> Iterator[str]:
    for text in package.requires or ():
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": extra}):
            continue
        try:
            version = metadata.version(canonicalize_name(need.name))
        except metadata.PackageNotFoundError:
            yield f"{need.name}{need.specifier}"
        else:
            if not need.specifier.contains(version, prereleases=True):
                yield f"{need.name}{need.specifier} (there is {version})"
