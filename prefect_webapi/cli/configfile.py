"""Files that hold plugins' configurations: ours, Flyte's, the body of a block. Text in, values or all faults out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from prefect_webapi.contract.config import EngineSettings, PluginConfig, read_mapping
from prefect_webapi.contract.faults import Fault, InvalidConfiguration

__all__ = ["Part", "parts_of"]


@dataclass(frozen=True, slots=True)
class Part:
    """One configuration of a file. `path`: where it stands there, empty: it is the whole file."""

    path: str
    config: PluginConfig | EngineSettings


@dataclass(frozen=True, slots=True)
class _Given:
    path: str
    model: type[PluginConfig | EngineSettings]
    data: Any


def parts_of(text: str, subject: str, over: Mapping[str, Any]) -> list[Part]:
    """Every configuration that a text holds.

    It is one `PluginConfig`; or the body of a block, with `engine` and `settings`; or Flyte's file, where each plugin
    below `plugins` has its own under `webApi`.

    Args:
        subject: what the text is called: the file's name.
        over: laid over each `PluginConfig`, as `FlagSet.given` returns it.

    Raises:
        InvalidConfiguration: every fault of all parts, each with its path in the file.
    """
    faults: list[Fault] = []
    parts: list[Part] = []
    for given in _found(read_mapping(text, subject)):
        try:
            config = given.model.load(_mapping(given))
            if isinstance(config, PluginConfig) and over:
                config = PluginConfig.load(over, base=config)
        except InvalidConfiguration as error:
            faults += [_placed(fault, given.path) for fault in error.faults]
        else:
            parts.append(Part(given.path, config))
    if not parts and not faults:
        remedy = "Give each plugin its limits under `webApi`."
        faults.append(Fault("plugins", "none of them has a configuration", remedy=remedy))
    if faults:
        raise InvalidConfiguration(subject, faults)
    return parts


def _found(data: Mapping[str, Any]) -> Iterator[_Given]:
    if isinstance(plugins := data.get("plugins"), Mapping):
        for name, body in cast(Mapping[str, Any], plugins).items():
            if isinstance(body, Mapping) and "webApi" in body:
                yield _Given(f"plugins.{name}.webApi", PluginConfig, body["webApi"])
    elif "webApi" in data:
        yield _Given("webApi", PluginConfig, data["webApi"])
    elif "engine" in data or "settings" in data:
        for name, model in (("engine", PluginConfig), ("settings", EngineSettings)):
            if name in data:
                yield _Given(name, model, data[name])
    else:
        yield _Given("", PluginConfig, data)


def _mapping(given: _Given) -> Mapping[str, Any]:
    data = given.data
    if isinstance(data, Mapping):
        return cast(Mapping[str, Any], data)
    told = f"holds {type(data).__name__} where keys with values are expected"
    raise InvalidConfiguration(given.path, [Fault("", told)])


def _placed(fault: Fault, path: str) -> Fault:
    return replace(fault, path=f"{path}.{fault.path}".strip("."))
