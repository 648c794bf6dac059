"""A real Prefect server per test session, and ways to point this process and children at it.

A server takes some twenty seconds to start, so all workers of a session share one: the first that asks
starts it under a file lock, and a guard process ends it when the session's first process is gone,
whatever became of the workers. Tests that stop or restart a server use `own_prefect_server`.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from prefect.blocks.core import Block
from prefect.exceptions import ObjectAlreadyExists

from tests.support.waiting import eventually_blocking

TestT = TypeVar("TestT", bound=Callable[..., Any])

READY_SECONDS = 100
STOP_SECONDS = 20
DRAIN_SECONDS = 5.0

_GUARD = """
"$@" & server=$!
trap 'kill $server 2>/dev/null' TERM INT
while kill -0 "$WATCHED" 2>/dev/null && kill -0 $server 2>/dev/null; do sleep 0.5; done
kill $server 2>/dev/null
wait $server
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(slots=True)
class PrefectServer:
    """A `prefect server` with a home and a port of its own, which it keeps over restarts."""

    home: Path
    port: int
    watched: int = field(default_factory=os.getpid)  # the server ends when this process does
    group: int | None = None  # process group of guard and server

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    @property
    def is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.api_url}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def start(self, **settings: str) -> None:
        """Start it, with settings that win over ours, and wait until it answers."""
        env = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
        env |= {
            "WATCHED": str(self.watched),
            "DO_NOT_TRACK": "1",
            "PREFECT_HOME": str(self.home),
            "PREFECT_PROFILES_PATH": str(self.home / "profiles.toml"),
            "PREFECT_API_URL": self.api_url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_UI_ENABLED": "false",
            "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
            "PREFECT_LOGGING_LEVEL": "WARNING",
            "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",
            "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": "false",
            "PREFECT_SERVER_SERVICES_FOREMAN_ENABLED": "false",
            "PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED": "false",
            **settings,
        }
        server = [
            *(sys.executable, "-m", "prefect", "server", "start"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
        ]
        with (self.home / "server.log").open("ab") as log:
            guard = subprocess.Popen(
                ["sh", "-c", _GUARD, "guard", *server],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.group = guard.pid
        end = time.monotonic() + READY_SECONDS
        while not self.is_healthy:
            if guard.poll() is not None or time.monotonic() > end:
                told = (self.home / "server.log").read_text(errors="replace")[-3000:]
                self.kill()
                raise AssertionError(
                    f"the Prefect server is not ready ({shlex.join(server)})\n{told}"
                )
            time.sleep(0.2)
        # The guard is this process's child here and nobody's elsewhere: `stop` looks at its group.
        guard.returncode = 0

    def stop(self) -> None:
        """End it in order; it keeps its data base."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a power cut would."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        if self.group is None:
            return
        end = time.monotonic() + STOP_SECONDS
        try:
            os.killpg(self.group, how)
            while time.monotonic() < end:
                _reap(self.group)
                os.killpg(self.group, 0)
                time.sleep(0.05)
            os.killpg(self.group, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.group = None

    def restart(self, **settings: str) -> None:
        """Stop and start again: same port, same data base."""
        self.stop()
        self.start(**settings)

    def environment(self, **more: str) -> dict[str, str]:
        """What a child process needs to talk to this server, and nothing of this process's Prefect."""
        env = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
        return env | _client_settings(self) | more


def _reap(pid: int) -> None:
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def _client_settings(server: PrefectServer) -> dict[str, str]:
    home = server.home / "client"
    return {
        "DO_NOT_TRACK": "1",
        "PREFECT_HOME": str(home),
        "PREFECT_PROFILES_PATH": str(home / "profiles.toml"),
        "PREFECT_LOCAL_STORAGE_PATH": str(home / "storage"),
        "PREFECT_API_URL": server.api_url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_TELEMETRY_ENABLED": "false",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    }


def _session_process() -> int:
    """The process that outlives all workers of this session."""
    return os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> PrefectServer:
    """The session's server; shared by all workers, so nobody stops it."""
    base = tmp_path_factory.getbasetemp()
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    home = (base.parent if is_worker else base) / "prefect"
    home.mkdir(exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        note = home / "server.json"
        if note.exists():
            server = PrefectServer(home, **json.loads(note.read_text()))
        else:
            server = PrefectServer(home, free_port(), watched=_session_process())
            server.start()
            note.write_text(json.dumps({"port": server.port}))
    return server  # its guard ends it, after the last log line of this process was sent


@pytest.fixture
def own_prefect_server(tmp_path: Path) -> Iterator[PrefectServer]:
    """A server that this test may stop, kill and restart."""
    home = tmp_path / "prefect"
    home.mkdir()
    server = PrefectServer(home, free_port())
    server.start()
    yield server
    server.stop()


@contextmanager
def pointed_at(server: PrefectServer, **more: str) -> Generator[None]:
    """Let this process's Prefect, and the children it starts, use `server`."""
    from prefect.context import refresh_global_settings_context

    with pytest.MonkeyPatch.context() as patch:
        for key in [key for key in os.environ if key.startswith("PREFECT_")]:
            patch.delenv(key)
        for key, value in (_client_settings(server) | more).items():
            patch.setenv(key, value)
        refresh_global_settings_context()
        _end_events_worker()
        try:
            yield
        finally:
            _end_events_worker()
            patch.undo()
            refresh_global_settings_context()


def _end_events_worker() -> None:
    """Prefect's own, one per process: it would go on sending to the server that it knows."""
    from prefect.events.worker import EventsWorker

    with ThreadPoolExecutor(1) as thread:  # on a thread with a loop it can't be waited for
        thread.submit(EventsWorker.drain_all, DRAIN_SECONDS).result()


def save_block(block: Block, name: str) -> None:
    """Save a block from a test without a loop; another worker may be registering its type at this very moment."""

    def is_saved() -> bool:
        try:
            block.save(name, overwrite=True)
        except ObjectAlreadyExists:
            return False
        return True

    eventually_blocking(is_saved, within=20)


@pytest.fixture(scope="session")
def prefect_api(prefect_server: PrefectServer) -> Iterator[PrefectServer]:
    """The session's server, with this process's Prefect settings pointed at it."""
    with pointed_at(prefect_server):
        yield prefect_server


@dataclass(frozen=True, slots=True)
class Child:
    """A process that runs a user's script."""

    process: subprocess.Popen[str]
    script: Path

    def finish(self, *, within: float = 60) -> str:
        """Wait for its end and return what it printed; fail if it failed."""
        code, told = self.end(within=within)
        assert code == 0, f"{self.script.name} ended with {code}:\n{told[-5000:]}"
        return told

    def end(self, *, within: float = 60) -> tuple[int, str]:
        """Wait for its end; exit code (negative: the signal) and what it printed."""
        try:
            told, _ = self.process.communicate(timeout=within)
        except subprocess.TimeoutExpired:
            self.process.kill()
            told, _ = self.process.communicate()
            raise AssertionError(f"not over within {within} s:\n{told[-5000:]}") from None
        return self.process.returncode, told

    def send(self, how: signal.Signals) -> None:
        self.process.send_signal(how)


class Scripts:
    """Runs scripts as a user would, in processes of their own, against a server."""

    def __init__(self, server: PrefectServer, folder: Path) -> None:
        self._server = server
        self._folder = folder
        self._children: list[Child] = []

    def write(self, text: str, name: str = "flow.py") -> Path:
        path = self._folder / name
        path.write_text(textwrap.dedent(text))
        return path

    def start(self, script: str | Path, *args: str, **env: str) -> Child:
        """Start a script (its text, or its path); the test session ends it if it is still there."""
        path = script if isinstance(script, Path) else self.write(script)
        process = subprocess.Popen(
            [sys.executable, str(path), *args],
            cwd=self._folder,
            env=self._server.environment(**env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        child = Child(process, path)
        self._children.append(child)
        return child

    def run(self, script: str | Path, *args: str, within: float = 60, **env: str) -> str:
        return self.start(script, *args, **env).finish(within=within)

    def close(self) -> None:
        for child in self._children:
            if child.process.poll() is None:
                child.process.kill()
            if child.process.stdout is not None and not child.process.stdout.closed:
                child.process.communicate()


@pytest.fixture
def scripts(prefect_server: PrefectServer, tmp_path: Path) -> Iterator[Scripts]:
    """Runs users' scripts against the session's server."""
    runner = Scripts(prefect_server, tmp_path)
    yield runner
    runner.close()


@pytest.fixture
def garbage_collected() -> Iterator[None]:
    yield
    gc.collect()


def prefect_leaks(test: TestT) -> TestT:
    """Marks a test that runs an async flow, or submits an async task, in this process.

    Prefect leaves one socket open for each (seen with a flow of one plain task): `prefect.results` asks for the
    server's default storage with a client that it never enters. It is left to the garbage collector, so it is
    collected at the end of the marked test, and no other one has to suffer for it.
    """
    for known in ("Exception ignored in. <socket", "Exception ignored in. <ssl"):
        test = pytest.mark.filterwarnings(f"ignore:{known}")(test)
    return pytest.mark.usefixtures("garbage_collected")(test)


@pytest.fixture
def engine_here(
    prefect_api: PrefectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Lets tasks of this process use an engine with a ledger of the test's own; closed at the end."""
    from prefect_webapi._prefect import service

    ledger = tmp_path / "webapi.db"
    monkeypatch.setenv("PREFECT_INTEGRATIONS_WEBAPI_LEDGER_URL", f"sqlite+aiosqlite:///{ledger}")
    monkeypatch.setenv("PREFECT_INTEGRATIONS_WEBAPI_WATCH_CANCEL_SECONDS", "0.2")
    service.close()
    yield ledger
    service.close()
