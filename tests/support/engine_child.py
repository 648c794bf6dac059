"""A process of its own that runs jobs through the engine, to be killed, stopped or outlived.

Processes are forked from one that has everything imported, so that dozens of them can die in a minute.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import resource
import signal
import socket
import threading
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import psutil

from prefect_webapi._prefect.slots import PrefectSlots
from prefect_webapi.engine.faults import arm, fault_point
from prefect_webapi.engine.host import Host
from prefect_webapi.engine.request import Outcome
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi.testing.run import die_at
from prefect_webapi_jobserver import ReportJob
from tests.support.engine import FolderOutputs, LocalSlots, Told, at, request
from tests.support.prefect import PrefectServer, pointed_at
from tests.support.waiting import eventually

__all__ = ["Child", "End", "Work", "carry_out", "child", "hosted"]

_nursery = multiprocessing.get_context("forkserver")
_nursery.set_forkserver_preload(
    [
        "tests.support.engine_child",
        "aiosqlite",
        "asyncpg",
        "alembic.command",
        "anyio._backends._asyncio",
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """What a call came to, as data that may leave the process."""

    nth: int
    job_key: str
    phase: str
    code: str | None
    reason: str
    data: Any
    stopped_by_us: bool


def _end(nth: int, outcome: Outcome) -> End:
    info, value = outcome.info, outcome.value
    return End(
        nth=nth,
        job_key=outcome.job_key,
        phase=info.phase.name,
        code=info.err.code if info.err else None,
        reason=info.reason,
        data=value.data if value is not None else None,
        stopped_by_us=outcome.stopped_by_us,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a process shall do: one call per spec, all at once.

    Attributes:
        folder: where the ledger is; server: URL of the job server.
        config, settings: as `at` takes them.
        cancel: cancel each call as soon as it is there: waiting for a place, create at the server, or beyond.
        max_attempts: a failure that may be retried is tried again, as Prefect does.
        die_at: `KP-nn[:n]`.
        stop_at: `KP-nn`, where it stops once until it gets SIGCONT.
        full_at: `KP-nn`, from where on no file of its takes another byte.
        machine: the name of its host; None: this one's.
        prefect: where slots are taken; None: each process has slots of its own.
    """

    folder: Path
    server: str
    specs: tuple[ReportJob, ...]
    task_type: str = "keys"
    execution: str = "execution-1"
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    speed: float = 1.0
    epoch: float | None = None
    cancel: Literal["WAITING", "CREATING", "CREATED"] | None = None
    max_attempts: int = 1
    die_at: str | None = None
    stop_at: str | None = None
    full_at: str | None = None
    machine: str | None = None
    prefect: PrefectServer | None = None


class HalvedOutputs(FolderOutputs):
    """Writes a result in two parts, and may die in between."""

    async def write(self, name: str, data: bytes, /) -> str:
        await super().write(name, data[: len(data) // 2])
        fault_point("KP-15")
        return await super().write(name, data)


async def carry_out(work: Work, host: Host, nth: int) -> End:
    """One call with its retries."""
    attempt = 0
    while True:
        attempt += 1
        told = Told()
        ticket = host.admit(
            request(
                work.specs[nth],
                task_type=work.task_type,
                execution=work.execution,
                task_run=f"{work.execution}/{nth}",
                attempt=attempt,
                max_attempts=work.max_attempts,
                reporter=told,
            )
        )
        outcome = asyncio.ensure_future(ticket.outcome())
        if work.cancel is not None:
            await eventually(lambda d=outcome, t=told: d.done() or _is_at(work, t), within=60)
            ticket.cancel("enough")
        ended = await outcome
        if attempt >= work.max_attempts or not ended.info.may_retry:
            return _end(nth, ended)


def _is_at(work: Work, told: Told) -> bool:
    if work.cancel == "CREATING":
        server = EmbeddedJobServer()
        server.url = work.server
        return bool(server.log("create"))
    if work.cancel == "CREATED":
        return bool({"QUEUED", "RUNNING"} & {*told.names} or told.cancelled)
    return "WAITING_FOR_RESOURCES" in told.names


@contextmanager
def hosted(work: Work) -> Generator[Host]:
    """An engine as `work` wants it."""
    outputs = HalvedOutputs(work.folder / "outputs")
    with ExitStack() as stack:
        if work.prefect is not None:
            stack.enter_context(pointed_at(work.prefect))
        host = stack.enter_context(
            at(
                work.folder,
                work.server,
                dict(work.config),
                speed=work.speed,
                epoch=work.epoch,
                outputs=outputs,
                slots=LocalSlots if work.prefect is None else PrefectSlots,
                **work.settings,
            )
        )
        yield host


def _live(sender: Connection, work: Work) -> None:
    logging.basicConfig(filename=_log_of(work), level=logging.INFO)
    if work.die_at is not None:
        die_at(work.die_at)
    if work.stop_at is not None:
        _stop_once_at(work.stop_at)
    if work.full_at is not None:
        _no_room_from(work.full_at)
    if work.machine is not None:
        setattr(socket, "gethostname", partial(str, work.machine))  # noqa: B010 - for this process

    async def one(host: Host, nth: int) -> None:
        sender.send(await carry_out(work, host, nth))

    async def everything(host: Host) -> None:
        await asyncio.gather(*(one(host, nth) for nth in range(len(work.specs))))

    with hosted(work) as host:
        asyncio.run(everything(host))
    sender.close()


def _stop_once_at(place: str) -> None:
    def passing(here: str) -> None:
        if here == place:
            arm(None)
            signal.pthread_kill(
                threading.get_ident(), signal.SIGSTOP
            )  # before it does anything else

    arm(passing)


def _no_room_from(place: str) -> None:
    def passing(here: str) -> None:
        if here == place:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))

    arm(passing)


def _log_of(work: Work) -> Path:
    return work.folder / f"{work.execution}.log"


class Child:
    """A running process. `ends()` waits for its last word."""

    def __init__(self, work: Work) -> None:
        self._log = _log_of(work)
        self._receiver, sender = _nursery.Pipe(duplex=False)
        self._process = _nursery.Process(target=_live, args=(sender, work))
        self._process.start()
        sender.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    @property
    def is_stopped(self) -> bool:
        return psutil.Process(self.pid).status() == psutil.STATUS_STOPPED

    def said(self, words: str) -> int:
        """How often these words are in its log."""
        return self._log.read_text().count(words) if self._log.exists() else 0

    def ends(self, *, within: float = 60.0) -> list[End]:
        """The outcomes that it told before it ended, by whatever cause."""
        told: list[End] = []
        with suppress(EOFError):
            while self._receiver.poll(within):
                told.append(self._receiver.recv())
        self._process.join(within)
        return sorted(told, key=lambda end: end.nth)

    @property
    def code(self) -> int | None:
        """Exit code; negative: the signal that killed it."""
        return self._process.exitcode

    def close(self) -> None:
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._process.close()
        self._receiver.close()


@contextmanager
def child(work: Work) -> Generator[Child]:
    """Start a process; it is gone at the end of the block."""
    started = Child(work)
    try:
        yield started
    finally:
        started.close()
