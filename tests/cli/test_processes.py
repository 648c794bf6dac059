"""What a command starts, it ends: on every way out, and if it is killed itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from prefect_webapi.cli.processes import Owned, Processes
from tests.support.waiting import eventually_blocking

SLEEPS = ("-c", "import time; time.sleep(300)")
DEAF = (
    "-c",
    "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(300)",
)
HAS_CHILD = (
    "-c",
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
    "print(child.pid, flush=True)\ntime.sleep(300)",
)
SAYS = ("-c", "import time; print('here', flush=True); time.sleep(300)")
ENVIRONMENT = dict(os.environ)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def open_files() -> Iterator[str]:
    for process in psutil.process_iter():
        try:
            yield from (each.path for each in process.open_files())
        except (psutil.Error, OSError):
            continue


def said(owned: Owned) -> str:
    return eventually_blocking(lambda: owned.said.strip(), within=30)


def test_all_processes_end_with_the_block(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        pids = [processes.start(name, SLEEPS, ENVIRONMENT).group for name in ("one", "two")]
        assert all(map(is_running, pids))
    assert not any(map(is_running, pids))


def test_all_processes_end_when_the_block_fails(tmp_path: Path) -> None:
    pids: list[int] = []

    def fail() -> None:
        with Processes(tmp_path) as processes:
            pids.append(processes.start("one", SLEEPS, ENVIRONMENT).group)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not is_running(pids[0])


def test_a_process_that_ignores_the_request_is_made_to_end(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        deaf = processes.start("deaf", DEAF, ENVIRONMENT)
        assert said(deaf) == "deaf"
    assert not is_running(deaf.group)


def test_a_process_of_a_process_ends_too_also_when_its_parent_was_killed(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        parents = [processes.start(f"parent {n}", HAS_CHILD, ENVIRONMENT) for n in range(2)]
        children = [int(said(parent)) for parent in parents]
        parents[0].kill()
        assert parents[0].code == -signal.SIGKILL
    eventually_blocking(lambda: not any(map(is_running, children)), within=10)


def test_an_owner_that_is_killed_leaves_nothing_behind(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import os, time
        from pathlib import Path
        from prefect_webapi.cli.processes import Processes
        with Processes(Path({str(tmp_path)!r})) as processes:
            started = [processes.start(str(n), {SLEEPS!r}, os.environ) for n in range(2)]
            print(*[each.group for each in started], flush=True)
            time.sleep(300)
    """)
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pids = [int(word) for word in owner.stdout.readline().split()]
    assert len(pids) == 2
    assert all(map(is_running, pids))
    owner.kill()
    owner.communicate()
    eventually_blocking(lambda: not any(map(is_running, pids)), within=20)


def test_an_owner_that_dies_while_it_starts_a_process_leaves_nothing_behind(tmp_path: Path) -> None:
    """The process exists, and the guard has not heard of it yet."""
    script = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from prefect_webapi.cli.processes import Processes
        Processes._tell_guard = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        with Processes(Path({str(tmp_path)!r})) as processes:
            processes.start("one", {SAYS!r}, os.environ)
    """)
    owner = subprocess.run([sys.executable, "-c", script], check=False)
    assert owner.returncode == -signal.SIGKILL
    (log,) = tmp_path.glob("*.log")
    eventually_blocking(lambda: not any(log.samefile(name) for name in open_files()), within=20)
    assert log.read_text() == ""


def test_a_process_says_how_it_ended_and_its_last_words(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        owned = processes.start("short", ("-c", "print('bye'); raise SystemExit(3)"), ENVIRONMENT)
        eventually_blocking(lambda: owned.code is not None, within=30)
        assert owned.code == 3
        assert owned.last_words == "bye"
