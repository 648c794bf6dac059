"""Processes that one command owns: started here, ended here, on every way out.

Each is the head of a process group of its own, so a Ctrl-C in the terminal reaches only the command, which then ends
the groups that it started and no others. If the command is killed itself, a small guard process notices that its pipe
has closed, and ends them (see `orphans.py`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from prefect_webapi.cli import orphans

__all__ = ["Owned", "Processes"]

_PATIENCE_SECONDS = 2.0
"""How long a process may take to end in order. What it would save by that is thrown away anyway."""
_LOG_LINES = 25
_WHEN_TOLD = 'read -r go && exec "$@" < /dev/null'
"""Nothing runs before the guard knows of it: whoever dies between both leaves a pipe that closes."""


class Owned:
    """One process with its group; its output goes to a file."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.log = log
        self._process = process

    @property
    def group(self) -> int:
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def last_words(self) -> str:
        return "\n".join(self.said.strip().splitlines()[-_LOG_LINES:])

    @property
    def is_gone(self) -> bool:
        """Whether nothing of the group is left."""
        self._process.poll()
        return not self._send(0)

    def kill(self) -> None:
        """End it as a power cut would, and wait for its end."""
        self._send(signal.SIGKILL)
        self._process.wait()

    def ask_to_end(self) -> None:
        self._send(signal.SIGTERM)

    def end_by_force(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, how: int) -> bool:
        try:
            os.killpg(self.group, how)
        except (ProcessLookupError, PermissionError):  # macOS: a group of zombies only
            return False
        return True


class Processes:
    """Owner of processes; a context manager that ends what is still there.

    Args:
        folder: where their output goes and where they work, so that no file of the user's current folder sets them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._owned: list[Owned] = []
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", orphans.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> Owned:
        """Start a Python module of this interpreter: `command` is what follows `python`."""
        path = self._folder / f"{name.replace(' ', '-')}-{len(self._owned) + 1}.log"
        with path.open("wb") as log:
            process = subprocess.Popen(
                ["sh", "-c", _WHEN_TOLD, "sh", sys.executable, *command],
                cwd=self._folder,
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        owned = Owned(name, process, path)
        self._owned.append(owned)
        self._tell_guard(f"+{owned.group}")
        with process.stdin or nullcontext():
            _say(process, "go")
        return owned

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with _deaf():
            self._end_all()
            for owned in self._owned:
                self._tell_guard(f"-{owned.group}")
            if self._guard is not None:
                with suppress(OSError):
                    self._guard.communicate()

    def _end_all(self) -> None:
        left = [owned for owned in self._owned if not owned.is_gone]
        for owned in left:
            owned.ask_to_end()
        end = time.monotonic() + _PATIENCE_SECONDS
        while left and time.monotonic() < end:
            time.sleep(0.05)
            left = [owned for owned in left if not owned.is_gone]
        for owned in left:
            owned.end_by_force()
        end = time.monotonic() + _PATIENCE_SECONDS
        while left and time.monotonic() < end:
            time.sleep(0.05)
            left = [owned for owned in left if not owned.is_gone]

    def _tell_guard(self, line: str) -> None:
        if self._guard is not None:
            _say(self._guard, line)


def _say(process: subprocess.Popen[bytes], line: str) -> None:
    """A line to a process's standard input; one that has ended hears nothing."""
    if process.stdin is not None:
        with suppress(OSError):
            process.stdin.write(f"{line}\n".encode())
            process.stdin.flush()


class _deaf:
    """No signal breaks off the clearing up, which is bounded."""

    def __enter__(self) -> None:
        self._before = {
            each: signal.signal(each, signal.SIG_IGN)
            for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if threading.current_thread() is threading.main_thread()
        }

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)
