"""What is installed from wheels into an empty environment: the core, its plugins, and a third party's."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client

from tests.support.operator import Operator, ended, stop
from tests.support.prefect import PrefectServer, pointed_at

ROOT = Path(__file__).parents[1]
ACME = """
[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "prefect-webapi-acme"
version = "0.1.0"
requires-python = ">=3.11"
dependencies = ["prefect-webapi>=0.1,<0.2"]

[project.entry-points."prefect_webapi.plugins"]
acme = "prefect_webapi_acme:entry"

[project.entry-points."prefect.collections"]
prefect_webapi_acme = "prefect_webapi_acme.blocks"
"""
LOOK = """
import json
from importlib.metadata import entry_points
from importlib.util import find_spec
from prefect.utilities.dispatch import get_registry_for_type
from prefect.blocks.core import Block
from prefect.plugins import load_prefect_collections
from prefect_webapi.registry import default_registry

load_prefect_collections()
print(json.dumps({
    "announced": sorted(point.name for point in entry_points(group="prefect_webapi.plugins")),
    "found": sorted(default_registry.entries),
    "blocks": sorted(get_registry_for_type(Block)),
    "libraries": [name for name in ("botocore", "flyteidl", "grpc", "jwt") if find_spec(name)],
}))
"""


BLOCKS = (
    *("amazon-athena", "aws-step-functions", "bigquery", "databricks", "flyte-connector"),
    *("http-job-api", "snowflake"),
)


def uv(*arguments: object) -> None:
    command = os.environ.get("UV") or shutil.which("uv")
    assert command is not None, "the tests are run by uv"
    subprocess.run([command, *map(str, arguments)], check=True, cwd=ROOT, capture_output=True)


def third_party(folder: Path) -> Path:
    """The skeleton, copied and renamed as an author does."""
    package = folder / "prefect_webapi_acme"
    shutil.copytree(ROOT / "plugins" / "prefect_webapi_jobserver", package)
    for file in package.glob("*.py"):
        text = file.read_text()
        for old, new in (
            ("prefect_webapi_jobserver", "prefect_webapi_acme"),
            ("job-server", "acme"),
            ('"Job Server"', '"Acme"'),
            ("class JobServer(", "class Acme("),
            ("import JobServer\n", "import Acme as JobServer\n"),
        ):
            text = text.replace(old, new)
        file.write_text(text)
    (folder / "pyproject.toml").write_text(ACME)
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with both wheels and what they need, and no vendor's library."""
    folder = tmp_path_factory.mktemp("wheels")
    acme = third_party(folder / "acme")
    for source in (ROOT, acme):
        uv("build", "--wheel", "--out-dir", folder, source)
    uv("venv", "--python", sys.executable, folder / "env")
    python = folder / "env" / "bin" / "python"
    uv("pip", "install", "--python", python, *folder.glob("*.whl"))
    return python


def told(python: Path, code: str, home: Path) -> Any:
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "PREFECT_HOME": str(home)}
    done = subprocess.run(
        [python, "-c", code], env=env, cwd=home, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.chaos
def test_plugins_of_a_wheel_are_found_and_their_blocks_register(
    installed: Path, tmp_path: Path
) -> None:
    """REQ-50, REQ-52: without any vendor's library, each plugin is known."""
    seen = told(installed, LOOK, tmp_path)
    assert seen["libraries"] == []
    assert seen["found"] == seen["announced"]
    assert {"acme", "job-server"} <= set(seen["found"])
    assert {"acme", "job-server", *BLOCKS} <= set(seen["blocks"])


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_a_flow_of_the_wheel_is_deployed_and_run_without_the_repository(
    installed: Path, own_prefect_server: PrefectServer, tmp_path: Path
) -> None:
    """The `prefect.yaml` that flows/README.md shows, in an empty folder."""
    (shown,) = re.findall(
        r"^```yaml\n(.*?)^```", (ROOT / "flows/README.md").read_text(), re.DOTALL | re.MULTILINE
    )
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "prefect.yaml").write_text(shown)
    ledger = f"sqlite+aiosqlite:///{tmp_path / 'webapi.db'}"
    env = own_prefect_server.environment(PREFECT_INTEGRATIONS_WEBAPI_LEDGER_URL=ledger)
    operator = Operator(installed, folder, env)
    operator.prefect("work-pool", "create", "webapi", "--type", "process")
    operator.prefect("deploy", "--all", "--no-prompt")
    worker = operator.worker("webapi")
    try:
        run = operator.run("webapi-sweep/sweep", dry_run=True)
        with pointed_at(own_prefect_server), get_client(sync_client=True) as client:
            assert ended(client, run, folder / "worker.log") == "Completed"
    finally:
        stop(worker)


@pytest.mark.chaos
def test_a_wheel_holds_the_packages_and_nothing_beside_them(installed: Path) -> None:
    (wheel,) = installed.parents[2].glob("prefect_webapi-*.whl")
    with zipfile.ZipFile(wheel) as files:
        top = {name.partition("/")[0] for name in files.namelist()}
    packages = {path.name for path in (ROOT / "plugins").glob("prefect_webapi_*")}
    assert {name for name in top if not name.endswith(".dist-info")} == packages | {
        "prefect_webapi"
    }
