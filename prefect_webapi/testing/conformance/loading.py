"""Finds what a command names: the entry of a plugin, the description of a service."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from prefect_webapi.contract.errors import ConfigurationError
from prefect_webapi.contract.plugin import PluginEntry
from prefect_webapi.testing.conformance.service import Service

__all__ = ["entry_of", "named", "service_of"]


def entry_of(name: str) -> PluginEntry[Any]:
    """The entry that `MODULE:NAME` names. Raises ConfigurationError."""
    entry = named(name)
    if not isinstance(entry, PluginEntry):
        raise ConfigurationError(
            f"{name!r} is {_kind(entry)}, not a PluginEntry; name the plugin's entry."
        )
    return cast(PluginEntry[Any], entry)


def service_of(name: str) -> Service:
    """A `Service` of the class, or the very one, that `MODULE:NAME` names. Raises ConfigurationError."""
    found: Any = named(name)
    if isinstance(found, type) and issubclass(cast(type[Any], found), Service):
        return found()
    if isinstance(found, Service):
        return found
    raise ConfigurationError(
        f"{name!r} is {_kind(found)}, not a Service; name a subclass of Service."
    )


def named(name: str) -> Any:
    """What `MODULE:NAME` names; MODULE may be the path of a file.

    Raises:
        ConfigurationError: there is no such thing.
    """
    module, _, attribute = name.rpartition(":")
    if not module or not attribute:
        raise ConfigurationError(
            f"{name!r} names nothing; write MODULE:NAME, for example my_package:entry."
        )
    try:
        loaded = (
            _from_file(Path(module)) if module.endswith(".py") else importlib.import_module(module)
        )
    except ImportError as error:
        raise ConfigurationError(
            f"{name!r}: {module} could not be imported: {error}. Install the package, or correct the name."
        ) from error
    try:
        return getattr(loaded, attribute)
    except AttributeError:
        raise ConfigurationError(
            f"{name!r}: {module} has no {attribute!r}. Correct the name."
        ) from None


def _from_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses look their module up
    sys.path.insert(0, str(path.resolve().parent))  # it may import its neighbours
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
