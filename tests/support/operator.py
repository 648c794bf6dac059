"""Who deploys, starts and cancels flow runs with Prefect's own commands, and runs a worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient

from tests.support.waiting import eventually_blocking


class Operator:
    """Who has a shell, a Prefect server and the address of the job server."""

    def __init__(self, python: Path | str, folder: Path, env: dict[str, str]) -> None:
        self._prefect = [str(python), "-m", "prefect"]
        self._folder = folder
        self._env = env | {"PREFECT_WORKER_QUERY_SECONDS": "1", "NO_COLOR": "1", "COLUMNS": "200"}

    def prefect(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self._prefect, *arguments],
            cwd=self._folder,
            env=self._env,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(self, deployment: str, **parameters: Any) -> UUID:
        """Start a flow run of a deployment; its id."""
        given = [f"--param={name}={json.dumps(value)}" for name, value in parameters.items()]
        told = self.prefect("deployment", "run", deployment, *given)
        return UUID(told.split("UUID:")[1].split()[0])

    def worker(self, pool: str) -> subprocess.Popen[str]:
        with (self._folder / "worker.log").open("w") as log:
            return subprocess.Popen(
                [*self._prefect, "worker", "start", "--pool", pool, "--type", "process"],
                cwd=self._folder,
                env=self._env,
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,
            )


def ended(client: SyncPrefectClient, run: UUID, log: Path, *, within: float = 150) -> str:
    """Name of the state that the flow run ends in."""

    def final() -> str:
        state = client.read_flow_run(run).state
        return state.name or "" if state is not None and state.is_final() else ""

    try:
        return eventually_blocking(final, within=within, every=0.5)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{log.read_text()[-4000:]}") from None


def stop(worker: subprocess.Popen[str]) -> None:
    os.killpg(worker.pid, signal.SIGTERM)
    worker.wait(60)
