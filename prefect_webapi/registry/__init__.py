"""Which plugin serves a task (`entries`), and the plugins that live in this process (`living`)."""

from prefect_webapi.registry.connections import Connection, Connections, digest
from prefect_webapi.registry.entries import (
    ENTRY_POINT_GROUP,
    Registry,
    default_registry,
    register,
)
from prefect_webapi.registry.living import Loaded, Metrics, Plugins, Time, is_cancelled

__all__ = [
    "ENTRY_POINT_GROUP",
    "Connection",
    "Connections",
    "Loaded",
    "Metrics",
    "Plugins",
    "Registry",
    "Time",
    "default_registry",
    "digest",
    "is_cancelled",
    "register",
]
