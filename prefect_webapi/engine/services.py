"""The parts that the engine works with, handed to it once; nothing in it builds its own."""

from __future__ import annotations

from dataclasses import dataclass, field

from prefect_webapi.clock import Clock
from prefect_webapi.contract.config import EngineSettings
from prefect_webapi.contract.contexts import DataStore
from prefect_webapi.engine.liveness import Pulse
from prefect_webapi.engine.request import Runs, Secrets
from prefect_webapi.ledger.store import Store
from prefect_webapi.limiter import Gates
from prefect_webapi.metrics import Metrics
from prefect_webapi.quotas import Quotas
from prefect_webapi.registry import Plugins

__all__ = ["Services"]


@dataclass(frozen=True, slots=True)
class Services:
    """One of each per process, all on the runtime's loop.

    Attributes:
        runtime_id: names this process.
        settings: the process's own, for what belongs to no connection.
        pulse: tells whether our jobs can be somebody else's by now.
        owns_limits: everybody who uses our quotas' limits shares this ledger, so that slots which it
            does not know have leaked.
    """

    runtime_id: str
    clock: Clock
    store: Store
    plugins: Plugins
    gates: Gates
    quotas: Quotas
    secrets: Secrets
    outputs: DataStore
    metrics: Metrics
    runs: Runs
    settings: EngineSettings = field(default_factory=EngineSettings)
    pulse: Pulse = field(default_factory=Pulse)
    owns_limits: bool = False
