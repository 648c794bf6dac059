"""`prefect-webapi quickstart`, the whole of it: real servers, a real kill."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import psutil
import pytest

from prefect_webapi.cli.stage import flow_file
from tests.support.waiting import eventually_blocking

REPOSITORY = Path(__file__).parents[2]
COMMAND = Path(sys.executable).with_name("prefect-webapi")
RUN_SECONDS = 400  # some forty when nothing else runs


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The command's temporary folder is in `tmp_path`; Prefect's settings of this test are none of its business."""
    kept = {
        k: v for k, v in os.environ.items() if k != "COLUMNS"
    }  # the width of pytest's own screen
    return {**kept, "TMPDIR": str(tmp_path), "PREFECT_API_URL": "http://127.0.0.1:1/api"}


def those_in(folder: Path) -> list[psutil.Process]:
    """Every process that works in `folder`."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(folder):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern!r} in:\n{text}"
    return int(found[1])


@pytest.mark.timeout(RUN_SECONDS + 60)
def test_a_killed_flow_is_run_again_and_no_job_is_made_twice(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    """REQ-27: the whole way of twenty jobs, with a SIGKILL half-way; counted at the job server."""
    ended = subprocess.run(
        [COMMAND, "quickstart", "--kill-after", "3"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    told = ended.stdout
    assert ended.returncode == 0, told + ended.stderr
    assert "Everything ended as designed" in told

    made_before = number(r"Killed the flow process.*: (\d+) jobs had been made", told)
    made = number(r"jobs made +(\d+) by", told)
    assert 0 < made_before < made
    assert made == number(r"jobs made .* expected (\d+):", told)
    assert re.search(r"jobs made twice +none", told)
    assert number(r"most live at once +(\d+), quota 5", told) <= 5
    assert number(r"requests made +(\d+):", told) >= 2 * made

    table = told.splitlines()
    for label, attempts, outcome in (
        ("report 17", 1, '{"sold": 1700}'),
        ("fragile 18", 2, '{"sold": 1800}'),
        ("hopeless 19", r"\d", "JobFailed: there are no figures for this day"),
        ("endless 20", 1, "cancelled"),
    ):
        row = next(line for line in table if line.startswith(label))
        assert re.match(rf"{label} +{attempts} ", row)
        assert outcome in row
        assert "http://127.0.0.1:" in row
    assert those_in(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_command_that_is_interrupted_leaves_no_process_behind(
    tmp_path: Path, environment: dict[str, str], how: signal.Signals
) -> None:
    """The three processes are running when the signal comes."""
    command = subprocess.Popen(
        [COMMAND, "quickstart"],
        env=environment,
        cwd=tmp_path.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    eventually_blocking(lambda: len(those_in(tmp_path)) == 3, within=60)
    command.send_signal(how)
    told, _ = command.communicate(timeout=60)
    assert command.returncode != 0
    assert "Traceback" not in told
    eventually_blocking(lambda: those_in(tmp_path) == [], within=30)


def test_a_checkout_runs_the_flow_that_a_newcomer_reads_and_a_wheel_carries_it() -> None:
    assert flow_file() == REPOSITORY / "flows" / "quickstart.py"
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    carried = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert carried["flows/quickstart.py"] == "prefect_webapi/cli/quickstart_flow.py"
