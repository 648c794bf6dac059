"""What the quickstart plays on: a job server, a Prefect server and a flow process, each a process of its own.

Everything is in one temporary folder and on free ports of this machine; nothing of the user's own Prefect is read or
written.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefect_webapi.cli.processes import Owned, Processes
from prefect_webapi.contract.errors import WebApiError

__all__ = ["CONNECTION", "QUOTA", "QuickstartFailed", "Stage", "flow_file"]

QUOTA = 5
CONNECTION = "quickstart"
READY_SECONDS = 240.0
_LEDGER_URL = "PREFECT_INTEGRATIONS_WEBAPI_LEDGER_URL"
_ASK_SECONDS = 30.0

_straight = urllib.request.build_opener(
    urllib.request.ProxyHandler({})
)  # this machine needs no proxy


class QuickstartFailed(WebApiError):
    """A process of the quickstart did not do its part; its last words are in the text."""


def flow_file() -> Path:
    """`quickstart.py`: in a wheel beside this file, in a checkout the one in `flows/`.

    Raises:
        QuickstartFailed: it is in neither place.
    """
    here = Path(__file__)
    for path in (here.with_name("quickstart_flow.py"), here.parents[2] / "flows" / "quickstart.py"):
        if path.is_file():
            return path
    raise QuickstartFailed(
        "the quickstart's flow is missing from this installation. Install prefect-webapi anew"
    )


class Stage:
    """The servers and the flow process.

    Attributes:
        ledger_url: the ledger of the flow process.
    """

    def __init__(self, processes: Processes, folder: Path) -> None:
        self._processes = processes
        self._folder = folder
        self._note = folder / "flow-run"
        job_port, prefect_port = _free_ports(2)
        self.job_server_url = f"http://127.0.0.1:{job_port}"
        self._prefect_url = f"http://127.0.0.1:{prefect_port}"
        self.ledger_url = f"sqlite+aiosqlite:///{folder / 'webapi.db'}"
        environment = self._environment()
        server_only = {
            "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(folder / "ui"),
            "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",
            "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": "false",
            "PREFECT_SERVER_SERVICES_FOREMAN_ENABLED": "false",
            "PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED": "false",
            "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        }
        prefect = ["-m", "prefect", "server", "start", "--host", "127.0.0.1"]
        self._job_server = processes.start(
            "job server",
            ["-m", "prefect_webapi.testing.jobserver", "--port", str(job_port)],
            environment,
        )
        self._prefect = processes.start(
            "Prefect server",
            [*prefect, "--port", str(prefect_port)],
            environment | server_only,
        )
        self.flow = self._start_flow()

    @property
    def flow_run(self) -> str | None:
        """Id of the flow run; None until it is about to run."""
        return self._note.read_text() if self._note.exists() else None

    @property
    def ui_url(self) -> str:
        """Address of the flow run in Prefect's UI."""
        return f"{self._prefect_url}/runs/flow-run/{self.flow_run or ''}"

    @property
    def for_others(self) -> dict[str, str]:
        """Environment variables that let other processes use the same servers and the same ledger."""
        ours = self._environment()
        return {name: ours[name] for name in ("PREFECT_API_URL", _LEDGER_URL)}

    async def ready(self) -> None:
        """Wait until both servers answer and the flow is about to run.

        Raises:
            QuickstartFailed: one of them ended or took too long.
        """
        job_server, prefect = (
            f"{self.job_server_url}/control/health",
            f"{self._prefect_url}/api/health",
        )
        await self._until(self._job_server, lambda: _answers(job_server))
        await self._until(self._prefect, lambda: _answers(prefect))
        await self._flow_begun()

    async def _flow_begun(self) -> None:
        await self._until(self.flow, lambda: _soon(self.flow_run is not None))

    async def run_again(self) -> None:
        """Run the same flow run in a new process; the old one must be gone."""
        flow_run = self.flow_run
        if flow_run is None:
            raise QuickstartFailed("there is no flow run yet that could be run again")
        self._note.unlink()
        self.flow = self._start_flow("--flow-run", flow_run)
        await self._flow_begun()

    async def ask_job_server(self, what: str) -> Any:
        """What the job server says of itself: `stats`, `log` or `jobs`."""
        return await _ask(f"{self.job_server_url}/control/{what}")

    async def task_runs(self) -> list[dict[str, Any]]:
        """The task runs of the flow run, as Prefect's server shows them."""
        query = {"flow_runs": {"id": {"any_": [self.flow_run]}}, "limit": 200}
        return await _ask(f"{self._prefect_url}/api/task_runs/filter", query)

    async def flow_run_state(self) -> str:
        """Name of the flow run's state, as Prefect's server shows it."""
        run = await _ask(f"{self._prefect_url}/api/flow_runs/{self.flow_run}")
        return str(run["state_name"])

    def failure(self, owned: Owned, what: str) -> QuickstartFailed:
        """An error with the last words of a process."""
        return QuickstartFailed(f"the {owned.name} {what}. Its last words:\n{owned.last_words}")

    async def _until(self, awaited: Owned, condition: Callable[[], Awaitable[bool]]) -> None:
        end = time.monotonic() + READY_SECONDS
        while not await condition():
            for owned in (self._job_server, self._prefect, self.flow):
                if owned.code is not None:
                    raise self.failure(owned, f"ended with code {owned.code}")
            if time.monotonic() > end:
                raise self.failure(awaited, f"was not ready within {READY_SECONDS:.0f} s")
            await asyncio.sleep(0.1)

    def _start_flow(self, *more: str) -> Owned:
        return self._processes.start(
            "flow process",
            [
                *("-m", "prefect_webapi.cli.flow_process", f"{flow_file()}:quickstart"),
                *("--job-server", self.job_server_url, "--connection", CONNECTION),
                *("--quota", str(QUOTA), "--note", str(self._note), *more),
            ],
            self._environment(),
        )

    def _environment(self) -> dict[str, str]:
        """This process's, but for everything that would set Prefect or lead local calls elsewhere."""
        home = self._folder / "prefect"
        inherited = {key: val for key, val in os.environ.items() if not key.startswith("PREFECT_")}
        return inherited | {
            "DO_NOT_TRACK": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            "NO_COLOR": "1",
            "PYTHONUNBUFFERED": "1",
            "PREFECT_API_URL": f"{self._prefect_url}/api",
            "PREFECT_HOME": str(home),
            "PREFECT_PROFILES_PATH": str(home / "profiles.toml"),
            "PREFECT_LOCAL_STORAGE_PATH": str(home / "storage"),
            "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_TELEMETRY_ENABLED": "false",
            _LEDGER_URL: self.ledger_url,
        }


def _free_ports(count: int) -> Iterator[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return iter(ports)


async def _soon(value: bool) -> bool:
    return value


async def _answers(url: str) -> bool:
    with suppress(QuickstartFailed):
        await _ask(url)
        return True
    return False


async def _ask(url: str, body: Any = None) -> Any:
    """The JSON answer of a server of ours.

    Raises:
        QuickstartFailed: there is none.
    """
    return await asyncio.to_thread(_ask_blocking, url, body)


def _ask_blocking(url: str, body: Any) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with _straight.open(request, timeout=_ASK_SECONDS) as answer:
            return json.load(answer)
    except OSError as error:
        raise QuickstartFailed(f"{url} does not answer: {error}") from error
