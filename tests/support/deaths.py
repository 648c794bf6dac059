"""Processes that die with a job in their hands."""

from __future__ import annotations

import signal
from dataclasses import replace

from prefect_webapi.testing import EmbeddedJobServer
from tests.support.engine_child import End, Work, child
from tests.support.waiting import eventually
from tests.support.witness import records

__all__ = ["killed", "killed_in_create", "killed_with_a_wish"]


def killed(work: Work) -> list[End]:
    """Run until the process dies where it was told to; the ends that it had told before."""
    with child(work) as process:
        told = process.ends()
        assert process.code == -signal.SIGKILL
    return told


async def killed_in_create(work: Work, server: EmbeddedJobServer) -> None:
    """The process dies while its create is on the way; the service takes the job after that."""
    server.fault("create", delay=0.2)
    with child(work) as process:
        await eventually(lambda: server.log("create"), within=30)
        process.signal(signal.SIGKILL)
        assert process.ends() == []
    await eventually(lambda: server.stats().created, within=5)


async def killed_with_a_wish(work: Work, server: EmbeddedJobServer) -> None:
    """As `killed_in_create`, after the job was cancelled and the wish was written down."""

    async def is_wished() -> bool:
        return any(record.cancel_reason for record in await records(work.folder))

    server.fault("create", delay=0.6)
    with child(replace(work, cancel="CREATING")) as process:
        await eventually(lambda: server.log("create"), within=30)
        await eventually(is_wished, within=5)
        process.signal(signal.SIGKILL)
        assert process.ends() == []
    await eventually(lambda: server.stats().created, within=5)
