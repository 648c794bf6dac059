"""Validators of handles and results, built once per type: building one costs more than a whole job."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from pydantic import TypeAdapter

from prefect_webapi.contract.plugin import AsyncPlugin, handle_type
from prefect_webapi.registry import Loaded

__all__ = ["adapter_of", "handle_adapter"]

_cached = lru_cache(maxsize=512)(TypeAdapter)


def adapter_of(kind: Any) -> TypeAdapter[Any]:
    """Writes and reads values of this type."""
    try:
        return _cached(kind)
    except TypeError:  # a type that can't be hashed
        return TypeAdapter(kind)


def handle_adapter(loaded: Loaded) -> TypeAdapter[Any]:
    """Writes and reads this plugin's handles."""
    plugin = loaded.plugin
    assert isinstance(plugin, AsyncPlugin)
    return adapter_of(handle_type(type(plugin), loaded.config))
