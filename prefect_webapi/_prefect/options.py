"""What the adapter needs to know of the process's settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from pydantic import SecretStr

__all__ = ["Options"]


class Options(Protocol):
    """Implemented by `prefect_webapi.settings`, which lies above."""

    @property
    def ledger_url(self) -> SecretStr: ...
    @property
    def names_ledger(self) -> bool: ...
    @property
    def run_key(self) -> str | None: ...
    @property
    def disabled_plugins(self) -> frozenset[str]: ...
    @property
    def state_events_per_second(self) -> int: ...
    @property
    def watch_cancel_seconds(self) -> float: ...
    @property
    def gc_threshold(self) -> int: ...
    @property
    def metrics_port(self) -> int | None: ...
    @property
    def metrics_host(self) -> str: ...
    def overrides(self) -> Mapping[str, Any]: ...
