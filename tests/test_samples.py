"""The flows that the documents show run, against real servers; the README's walk is walked."""

from __future__ import annotations

import json
import os
import re
import subprocess
import urllib.request
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from pydantic import HttpUrl, SecretStr

from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_databricks import Databricks
from prefect_webapi_jobserver import JobServer
from tests.samples import ROOT, samples_in
from tests.servers.databricks import JOB_ID, DatabricksServer
from tests.servers.databricks import TOKEN as DATABRICKS_TOKEN
from tests.support.jobserver import TOKEN
from tests.support.prefect import PrefectServer, Scripts, free_port, save_block
from tests.support.waiting import eventually_blocking

RUN = {
    "README.md": 1,
    "docs/index.md": 1,
    "docs/flow-authors.md": 7,
    "docs/from/flyte.md": 0,
    "docs/from/airflow.md": 1,
    "docs/from/prefect-databricks.md": 1,
}
"""Flows of each page."""
OF_THE_WALK = "http://127.0.0.1:8300"


@pytest.mark.timeout(300)
def test_the_flows_of_the_pages_run(
    prefect_api: PrefectServer, job_server: EmbeddedJobServer, scripts: Scripts
) -> None:
    files = [
        scripts.write(code, f"{Path(document).stem}_{line}.py")
        for document in RUN
        for line, code in samples_in(ROOT / document)
        if OF_THE_WALK not in code
    ]
    with DatabricksServer() as databricks:
        workspace = Databricks(host=HttpUrl(databricks.url), token=SecretStr(DATABRICKS_TOKEN))
        save_block(workspace, "prod")
        server = JobServer(base_url=HttpUrl(job_server.url), token=SecretStr(TOKEN))
        save_block(server, "prod")
        told = scripts.run(
            ROOT / "tests" / "sample_runner.py",
            json.dumps({"job_id": JOB_ID, "day": 1}),
            *map(str, files),
            within=240,
            PREFECT_INTEGRATIONS_WEBAPI_LEDGER_URL=f"sqlite:///{files[0].parent / 'ledger.db'}",
        )
        assert (databricks.made(), databricks.live()) == (3, 0)
    assert f"{len(files)} samples with {sum(RUN.values())} flows ran" in told
    assert told.count("3 reports ready, see http://") == 2
    assert "30 reports ready, 0 failed" in told
    stats = job_server.stats()
    assert (stats.live, stats.duplicates) == (0, {})


# --- the walk of the README ----------------------------------------------------------------------


FOREVER = ("prefect server start", "prefect worker start", "python -m prefect_webapi.testing")
STEP_SECONDS = 120


class Walk:
    """Terminals of one environment in one folder. Ports of the text are replaced by free ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prefect, self.service = free_port(), free_port()
        env = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        self._env = env | {
            "DO_NOT_TRACK": "1",
            "PATH": f"{folder / '.venv' / 'bin'}:{env['PATH']}",
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_API_PORT": str(self.prefect),
            "VIRTUAL_ENV": str(folder / ".venv"),
        }

    def adapted(self, text: str) -> str:
        for old, new in (
            ("4200", str(self.prefect)),
            ("8300", str(self.service)),
            ("../prefect-webapi", str(ROOT)),
        ):
            text = text.replace(old, new)
        return text

    def run(self, commands: str) -> str:
        """What they printed."""
        done = subprocess.run(
            ["bash", "-ec", self.adapted(commands)],
            cwd=self.folder,
            env=self._env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=STEP_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    @contextmanager
    def started(self, command: str) -> Generator[None]:
        with (self.folder / "terminals.log").open("a") as log:
            process = subprocess.Popen(
                ["bash", "-ec", f"exec {self.adapted(command)}"],
                cwd=self.folder,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            yield
        finally:
            process.terminate()
            process.wait(timeout=30)

    def is_served(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.prefect}/api/health") as answer:
                return answer.status == 200
        except OSError:
            return False

    def live(self) -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.service}/control/stats") as answer:
            return json.load(answer)["live"]


def steps_of_the_walk() -> list[tuple[str, str]]:
    """Shell commands, as `("", commands)`, and files, as `(name, code)`, in order."""
    text = (ROOT / "README.md").read_text()
    walk = text[text.index("[start:walk]") : text.index("[end:walk]")]
    steps: list[tuple[str, str]] = []
    for each in re.finditer(r"^```(sh|python)\n(.*?)^```", walk, re.DOTALL | re.MULTILINE):
        names = re.findall(r"`(\w+\.py)`", walk[: each.start()])
        steps.append((names[-1] if each[1] == "python" else "", each[2].strip()))
    return steps


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_stranger_gets_from_nothing_to_a_cancelled_job(tmp_path: Path) -> None:
    """The README from the empty folder on, command by command."""
    walk, told = Walk(tmp_path), ""
    with ExitStack() as terminals:
        for name, text in steps_of_the_walk():
            if name:
                (tmp_path / name).write_text(walk.adapted(text))
            elif text.startswith(FOREVER):
                terminals.enter_context(walk.started(text))
            elif "flow-run cancel ID" in text:
                eventually_blocking(lambda: walk.live() == 2, within=60)
                (run,) = re.findall(r"UUID: ([0-9a-f-]{36})", told)
                walk.run(text.replace("ID ", f"{run} "))
                eventually_blocking(lambda: walk.live() == 0, within=60)
            else:
                if "config set" in text:
                    eventually_blocking(walk.is_served, within=100)
                told = walk.run(text)
    assert told.count("ABORTED") == 3
    assert '"live":0' in told.replace(" ", "")
