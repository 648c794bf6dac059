"""The one engine of this process: started by the first job, closed in order at exit, afresh after a fork."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from prefect.context import FlowRunContext

from prefect_webapi._prefect.options import Options
from prefect_webapi._prefect.reports import Display
from prefect_webapi._prefect.watch import Watch
from prefect_webapi.clock import process_clock
from prefect_webapi.contract.config import EngineSettings

if TYPE_CHECKING:  # the engine itself is loaded by the first job
    from prefect_webapi.engine.host import HostApi

__all__ = [
    "Engine",
    "close",
    "instead",
    "listen",
    "reason_told_to",
    "signal_since",
    "start",
    "started",
    "tell_reach",
]


logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Engine:
    """What a task needs of this process."""

    host: HostApi
    display: Display
    watch: Watch
    run_key: str | None = None


class _Process:
    """What belongs to one process id."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.watch = Watch()
        self.engine: Engine | None = None
        self.close: Callable[[], None] | None = None


_process = _Process()


def _here() -> _Process:
    if _process.pid != os.getpid():  # a fork that went past `register_at_fork`
        _forget()
    return _process


def _forget() -> None:
    global _process
    _process = _Process()


os.register_at_fork(after_in_child=_forget)


def started() -> Engine | None:
    """This process's engine, if there is one."""
    return _here().engine


def start(load: Callable[[], Options], *, sweeps: bool = True) -> Engine:
    """This process's engine; the first call makes it, from what `load` returns, in a second or two.

    Args:
        sweeps: as it starts, it takes up what is overdue in the ledger.

    Raises:
        ConfigurationError: the settings are wrong.
        LedgerError: the ledger can't be used.
    """
    here = _here()
    with here.lock:
        if here.engine is None:
            here.engine, here.close = _make(load(), here.watch, sweeps)
    return here.engine


def listen() -> None:
    """Hear signals from now on; called where tasks are submitted, as their threads can't."""
    _here().watch.listen()


def signal_since(at: float) -> signal.Signals | None:
    """The last signal that this process heard, if it came after this monotonic time."""
    return _here().watch.signal_since(at)


def reason_told_to(flow_run: UUID) -> str | None:
    """Why the jobs of this flow run were told to end; None: they were not."""
    return _here().watch.reason_told_to(flow_run)


def close() -> None:
    """Stop admitting, leave what is alive to the next process, end the engine's thread."""
    here = _here()
    with here.lock:
        end, here.engine, here.close = here.close, None, None
    if end is not None:
        end()


atexit.register(close)


@contextmanager
def instead(made: Engine) -> Generator[None]:
    """For tests: let `made` be this process's engine."""
    here = _here()
    before = here.engine, here.close
    here.engine, here.close = made, None
    try:
        yield
    finally:
        here.engine, here.close = before


def _make(options: Options, watch: Watch, sweeps: bool) -> tuple[Engine, Callable[[], None]]:
    """The one place where the engine meets its adapters."""
    tell_reach(options)
    from prefect_webapi._prefect.runtime import make_runtime
    from prefect_webapi.engine.host import Host

    display = Display(options.state_events_per_second)
    every = options.watch_cancel_seconds
    orphan_after = EngineSettings().overlaid(options.overrides()).orphan_after
    deleted_after = process_clock().real(orphan_after.total_seconds())
    host = Host(
        lambda: make_runtime(options, display, lambda api: watch.run(api, every, deleted_after)),
        sweeps=sweeps,
    )
    host.start()  # here, so that it is off the flow's loop
    return Engine(host, display, watch, options.run_key), host.close


def tell_reach(options: Options) -> None:
    """Say that other machines don't see our ledger, where a work pool may use several and nobody chose one."""
    context = FlowRunContext.get()
    pool = context.flow_run.work_pool_name if context and context.flow_run else None
    if pool is not None and not options.names_ledger:
        logger.warning(
            "This flow run comes from work pool %r, and its jobs are remembered in a file of this machine. If the pool "
            "runs flows on several machines or in containers, each counts quotas for itself, and a run that starts "
            "again elsewhere does not find its jobs. Name one Postgres for all in "
            "PREFECT_INTEGRATIONS_WEBAPI_LEDGER_URL, or this machine's file if there is no other machine.",
            pool,
        )
