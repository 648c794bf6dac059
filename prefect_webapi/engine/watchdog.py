"""Notices when the engine's loop stands still, and names the plugin whose code holds it up.

Whatever runs on the loop must not wait: one blocking call in a coroutine stops every job of the process. The loop notes
some four times a second that it turns, a thread looks whether it has; only when it has not, the loop's stack is read,
twice: who is named has not let go in between. In a process that computes more than Python lets it, hundreds of short
steps make a long turn as well, and each of them waits for Python's lock; that is the fault of none.
Pauses for Python's collector do not count.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType

from prefect_webapi.contract.plugin import AsyncPlugin, PluginEntry, SyncPlugin
from prefect_webapi.metrics import Metrics
from prefect_webapi.registry import Loaded

__all__ = ["BLOCKED_SECONDS", "watching"]

logger = logging.getLogger(__name__)

BLOCKED_SECONDS = 1.0
"""A loop that has not turned for longer is blocked."""
LOG_SECONDS = 60.0
TURN = "_run_once"
"""The function of asyncio's loop that calls one callback after the other."""


@dataclass(frozen=True, slots=True)
class _Culprit:
    """Whose code runs: a plugin's id and the method that the engine called. `told`: for people."""

    plugin: str
    method: str
    told: str


_NOBODY = _Culprit(
    "",
    "",
    "turns slowly: each of its steps is short, but this process has more to do than Python lets it, or many calls "
    "of plugins block for a moment each. Jobs are read and made late; fewer tasks in one process, or `run_many`, help",
)


@contextmanager
def watching(metrics: Metrics, *, limit: float = BLOCKED_SECONDS) -> Generator[None]:
    """Watch over the running loop, which is this thread's, until the block ends. `limit` in seconds."""
    loop, thread, over = asyncio.get_running_loop(), threading.get_ident(), threading.Event()
    pause = limit / 4
    turned = collecting_since = time.monotonic()
    collected = collected_before = 0.0  # seconds, of the collector's pauses; before the last turn

    def collecting(phase: str, _: dict[str, int]) -> None:
        """It holds up everybody, and is nobody's fault."""
        nonlocal collected, collecting_since
        if phase == "start":
            collecting_since = time.monotonic()
        else:
            collected += time.monotonic() - collecting_since

    def turn() -> None:
        nonlocal turned, collected_before, timer
        turned, collected_before = time.monotonic(), collected
        timer = loop.call_later(pause, turn)

    def watch() -> None:
        told, silent_until, blocks = 0.0, 0.0, 0
        stacks = deque[list[FrameType]](maxlen=2)
        while True:
            slept = time.monotonic()
            if over.wait(pause):
                return
            now, seen = time.monotonic(), turned
            if now - slept > pause + limit / 2:
                continue  # the whole process stood still
            stood = now - seen - (collected - collected_before)
            if stood <= limit / 2 or seen == told:
                stacks.clear()
                continue
            stacks.append(_stack_of(thread))
            if stood <= limit or len(stacks) < 2:
                continue
            told = seen
            blocks += 1
            culprit = _culprit(*stacks)
            metrics.count("blocked_total", plugin=culprit.plugin, op=culprit.method)
            if now >= silent_until:
                silent_until = now + LOG_SECONDS
                logger.warning(
                    "the engine %s%s",
                    culprit.told,
                    f"; {blocks} times by now" if blocks > 1 else "",
                    extra={"plugin": culprit.plugin},
                )

    timer: asyncio.Handle = loop.call_soon(turn)
    watcher = threading.Thread(target=watch, name="prefect-webapi watchdog", daemon=True)
    watcher.start()
    gc.callbacks.append(collecting)
    try:
        yield
    finally:
        gc.callbacks.remove(collecting)
        over.set()
        timer.cancel()
        watcher.join()


def _stack_of(thread: int) -> list[FrameType]:
    """What a thread is doing now, innermost first."""
    frames = sys._current_frames()  # pyright: ignore[reportPrivateUsage] - documented, "for specialised purposes"
    frame = frames.get(thread)
    stack: list[FrameType] = []
    while frame is not None:
        stack.append(frame)
        frame = frame.f_back
    return stack


def _step_of(stack: list[FrameType]) -> FrameType | None:
    """The callback of the loop that runs, each with a frame of its own; None: the loop is not one of Python's own."""
    for called, caller in pairwise(stack):
        if caller.f_code.co_name == TURN:
            return called
    return None


def _culprit(before: list[FrameType], stack: list[FrameType]) -> _Culprit:
    """The engine's own frames know the plugin; the next one is the method that it called."""
    if _step_of(before) is not _step_of(stack):
        return _NOBODY
    if not stack:
        return _Culprit("", "", "stands still, nobody knows where")
    plugin, method = "", ""
    for called in reversed(stack):
        names = called.f_locals
        for known in (names.get("loaded"), names.get("entry")):
            if isinstance(known, Loaded):
                plugin = known.entry.id
            elif isinstance(known, PluginEntry):  # it is being loaded
                plugin, method = known.id, "plugin_loader"
        if isinstance(names.get("self"), AsyncPlugin | SyncPlugin):
            method = called.f_code.co_name
            break
    where = f"line {stack[0].f_lineno} of {Path(stack[0].f_code.co_filename).name}"
    by = f"{method} of plugin {plugin!r}" if method else "something"
    return _Culprit(
        plugin if method else "",
        method,
        f"stands still: {by} blocks it in {where}. No job of this process is looked after meanwhile. Let the method "
        "await, or make it a plain function, which gets a thread of its own (`status` may do neither)",
    )
