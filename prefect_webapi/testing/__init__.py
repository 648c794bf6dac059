"""For tests of flows and plugins: a job server with faults on command. Ships with the package."""

from prefect_webapi.testing.embedded import EmbeddedJobServer
from prefect_webapi.testing.jobserver.api import Behaviour, JobView, Stats
from prefect_webapi.testing.jobserver.faults import Fault, LoggedRequest

__all__ = ["Behaviour", "EmbeddedJobServer", "Fault", "JobView", "LoggedRequest", "Stats"]
