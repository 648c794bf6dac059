"""For tests of flows and plugins: a job server with faults on command, and the contract that a plugin must keep.

Ships with the package. Each name is loaded at its first use: the pytest plugin, a module here, is imported by every
run of pytest in an environment that has the package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect_webapi.testing.conformance.certificate import Certificate, Finding
    from prefect_webapi.testing.conformance.service import Service
    from prefect_webapi.testing.conformance.suite import PluginConformance
    from prefect_webapi.testing.conformance.trial import certify
    from prefect_webapi.testing.embedded import EmbeddedJobServer
    from prefect_webapi.testing.jobserver.api import Behaviour, JobView, Stats
    from prefect_webapi.testing.jobserver.faults import Fault, LoggedRequest
    from prefect_webapi.testing.proxy import Reply
    from prefect_webapi.testing.serving import serve_app

__all__ = [
    "Behaviour",
    "Certificate",
    "EmbeddedJobServer",
    "Fault",
    "Finding",
    "JobView",
    "LoggedRequest",
    "PluginConformance",
    "Reply",
    "Service",
    "Stats",
    "certify",
    "serve_app",
]

_HOMES = {
    "Behaviour": "jobserver.api",
    "Certificate": "conformance.certificate",
    "EmbeddedJobServer": "embedded",
    "Fault": "jobserver.faults",
    "Finding": "conformance.certificate",
    "JobView": "jobserver.api",
    "LoggedRequest": "jobserver.faults",
    "PluginConformance": "conformance.suite",
    "Reply": "proxy",
    "Service": "conformance.service",
    "Stats": "jobserver.api",
    "certify": "conformance.trial",
    "serve_app": "serving",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{home}")
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
