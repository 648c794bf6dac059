"""The runner that speeds a process's time up, and kills it at a named place."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefect_webapi.testing.run import die_at, main

SCRIPT = """
import json, sys
from prefect_webapi.clock import process_clock
from prefect_webapi.engine.faults import fault_point
import beside

if __name__ == "__main__":
    clock = process_clock()
    print(json.dumps([clock.speed, clock.now().timestamp(), sys.argv, beside.WORD]), flush=True)
    for n in range(3):
        fault_point("KP-07")
        fault_point("KP-08")
        print(n, flush=True)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("WORD = 'here'")
    path = tmp_path / "flow.py"
    path.write_text(SCRIPT)
    return path


def runner(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "prefect_webapi.testing.run", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
    )


def test_a_script_runs_as_main_with_its_own_arguments_in_faster_time(script: Path) -> None:
    """The epoch is where both times agree, so that processes of one ledger do too."""
    epoch = time.time() - 100
    ended = runner("--speed", "20", "--epoch", str(epoch), script, "--speed", "3", "x")
    assert ended.returncode == 0, ended.stderr
    first, *passed = ended.stdout.splitlines()
    speed, now, arguments, word = json.loads(first)
    assert speed == 20
    assert 20 * 100 <= now - epoch < 20 * 200
    assert arguments == [str(script), "--speed", "3", "x"]
    assert word == "here"
    assert passed == ["0", "1", "2"]


def test_a_process_dies_at_the_place_it_was_told_to(script: Path) -> None:
    """The second passing; passings of other places don't count."""
    ended = runner("--kill-at", "KP-08:2", script)
    assert ended.returncode == -signal.SIGKILL
    first, *passed = ended.stdout.splitlines()
    assert json.loads(first)[0] == 1.0
    assert passed == ["0"]


@pytest.mark.parametrize("place", ["KP-8", "KP-08:0", "KP-08:", "kp-08", ""])
def test_a_place_that_has_no_such_name_is_refused(place: str) -> None:
    with pytest.raises(ValueError, match="write KP-08"):
        die_at(place)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--speed", "0", __file__], "must be above 0"),
        (["no-such-script.py"], "there is no script"),
        (["--kill-at", "KP-8", __file__], "names no place"),
    ],
)
def test_what_can_not_be_done_is_said_before_anything_runs(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err
