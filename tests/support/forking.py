"""Forks while the engine works: `forking.py FOLDER URL`. Prints what parent and child got."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from prefect_webapi.engine.host import Host, Ticket
from prefect_webapi_jobserver import ReportJob
from tests.support.engine import Told, at, request
from tests.support.waiting import eventually_blocking

SHARED = ReportJob(seconds=3, result="shared")


def ask(host: Host, who: str, spec: ReportJob) -> Ticket:
    return host.admit(request(spec, task_type="keys", execution=who))


def tell(who: str, ticket: Ticket) -> None:
    sys.stdout.write(f"{who}:{ticket.outcome_blocking().value.data}\n")
    sys.stdout.flush()


def live(host: Host, who: str) -> None:
    """One job of its own, and one that both ask for."""
    shared = ask(host, who, SHARED)
    tell(who, ask(host, who, ReportJob(day=1 + (who == "child"), seconds=0, result="mine")))
    tell(who, shared)


def main(folder: str, url: str) -> None:
    with at(Path(folder), url) as host:
        told = Told()
        host.admit(request(SHARED, task_type="keys", execution="parent", reporter=told))
        eventually_blocking(lambda: "RUNNING" in told.names, within=30)
        child = os.fork()
        if child == 0:
            live(host, "child")
            host.close()
            os._exit(0)
        live(host, "parent")
        _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(*sys.argv[1:])
