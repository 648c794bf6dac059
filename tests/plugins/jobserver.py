"""The embedded job server as a service of the plugins' suite."""

from __future__ import annotations

import json
from typing import Any, cast
from urllib.parse import quote

from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi.testing.jobserver.faults import LoggedRequest
from tests.plugins.suite import Op, Service
from tests.servers.base import Fault, Seen

__all__ = ["JobServerService"]


class JobServerService(Service):
    """The embedded job server in the suite's words."""

    def __init__(self, server: EmbeddedJobServer) -> None:
        self.server = server
        self.url = server.url

    @property
    def seen(self) -> list[Seen]:
        """The server's own log tells the name decoded, and the body as data."""
        return [
            Seen(
                _op(entry),
                entry.method,
                f"/jobs/{quote(entry.name, safe='')}",
                quote(entry.query, safe="=&"),
                {},
                json.dumps(entry.body).encode(),
                entry.mono,
                entry.status,
            )
            for entry in self.server.log()
        ]

    def reset(self) -> None:
        self.server.reset()

    def made(self) -> int:
        return len(self.server.jobs())

    def live(self) -> int:
        return self.server.stats().live

    def ops(self) -> list[str]:
        return [_op(entry) for entry in self.server.log()]

    def times(self, op: Op) -> list[float]:
        return [entry.mono for entry in self.server.log() if _op(entry) == op]

    def spoil(self, fault: Fault) -> None:
        reply = fault.reply
        body, garbage = None, None
        if reply is not None:
            try:
                body = reply.content.decode()
            except UnicodeDecodeError:
                garbage = "charset"
        self.server.fault(
            cast(Any, "batch" if fault.op == "get_many" else fault.op),
            skip=fault.skip,
            times=fault.times,
            after_acceptance=fault.carried_out,
            drop=reply is None,
            status=None if reply is None else reply.status,
            headers={} if reply is None else reply.headers,
            body=body,
            garbage=garbage,
            retry_after=None if reply is None else reply.headers.get("Retry-After"),
        )

    def forget(self) -> None:
        for job in self.server.jobs():
            self.server.end(job.name, "forgotten")


def _op(entry: LoggedRequest) -> str:
    return "get_many" if entry.op == "batch" else entry.op
