"""`prefect-webapi try`: one job without Prefect, told call by call; no secret is told, and Ctrl-C leaves no job."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from prefect_webapi.testing import EmbeddedJobServer
from tests.cli.command import Command, Ended, command_for
from tests.support.jobserver import TOKEN
from tests.support.waiting import eventually_blocking

ENTRY = "prefect_webapi_jobserver:entry"
Try = Callable[..., Ended]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return command_for(monkeypatch, capsys)


@pytest.fixture
def attempt(
    command: Command,
    job_server: EmbeddedJobServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Try:
    """Try a job of the job server; its token comes from the environment."""
    monkeypatch.setenv("JOBS_TOKEN", TOKEN)

    def run(*more: str, entry: str = ENTRY, **spec: object) -> Ended:
        file = tmp_path / "job.json"
        file.write_text(json.dumps(spec))
        given = ("--set", f"base_url={job_server.url}", "--set", "token=${JOBS_TOKEN}")
        return command("try", entry, "--spec", str(file), *given, *more)

    return run


def test_each_call_and_each_phase_is_told(attempt: Try, job_server: EmbeddedJobServer) -> None:
    ended = attempt(seconds=0.2, result="the figures")
    assert ended.code == 0, ended.err
    lines = [line.split(" s  ", 1)[1] for line in ended.out.splitlines()]
    (job,) = job_server.jobs()
    url = re.escape(f"{job_server.url}/jobs/{job.name}")
    assert re.fullmatch(rf"create    PUT {url} -> 201 in \d\.\d\d\d s", lines[0])
    assert lines[1] == f"create    returned JobHandle(name='{job.name}')"
    assert any(re.fullmatch(rf"get       GET {url} -> 200 in \d\.\d\d\d s", each) for each in lines)
    assert "phase     RUNNING" in lines
    assert lines[-2] == "end       SUCCESS"
    assert "the figures" in lines[-1]


def test_a_job_that_fails_gives_exit_code_one_and_the_services_words(attempt: Try) -> None:
    ended = attempt(seconds=0.1, outcome="fail", message="no such table")
    assert ended.code == 1
    assert "end       RETRYABLE_FAILURE JobFailed: no such table" in ended.out


def test_no_secret_is_told(attempt: Try, job_server: EmbeddedJobServer) -> None:
    """REQ-62: not even if the service echoes it."""
    job_server.fault("create", status=400, body={"message": f"bad {TOKEN}"}, times=None)
    ended = attempt(seconds=0.1)
    assert ended.code == 1
    assert "create    raised RemoteUserError: HTTP 400: bad ***" in ended.out
    assert TOKEN not in ended.out + ended.err


def test_a_connection_may_come_from_a_file(
    attempt: Try, job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    file = tmp_path / "prod.yaml"
    file.write_text("settings: {deadline: 1s}\nbase_url: http://127.0.0.1:9\n")
    ended = attempt("--connection", str(file), outcome="never")
    assert ended.code == 1
    assert "deadline of 1s exceeded" in ended.out
    assert job_server.stats().live == 0


@pytest.mark.parametrize(
    ("more", "entry", "spec", "words"),
    [
        ((), ENTRY, {"secs": 1}, "secs: unknown key"),
        (("--set", "tokens=x"), ENTRY, {}, "tokens: unknown key. Did you mean `token`?"),
        (("--set", "token"), ENTRY, {}, "write FIELD=VALUE"),
        (("--set", "token=${NO_SUCH_ONE}"), ENTRY, {}, "no such environment variable"),
        (("--connection", "no-such-file"), ENTRY, {}, "no-such-file can't be read"),
        ((), "prefect_webapi_jobserver:nothing", {}, "has no 'nothing'"),
    ],
)
def test_bad_input_is_one_error_and_no_job(
    attempt: Try,
    job_server: EmbeddedJobServer,
    more: tuple[str, ...],
    entry: str,
    spec: dict[str, object],
    words: str,
) -> None:
    ended = attempt(*more, entry=entry, **spec)
    assert ended.code == 2
    assert words in ended.err
    assert TOKEN not in ended.err
    assert job_server.log() == []


@pytest.mark.chaos
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_deletes_the_job(
    job_server: EmbeddedJobServer, tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "job.yaml").write_text("outcome: never\n")
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", "from prefect_webapi.cli import main; main()", "try", ENTRY),
            *("--spec", "job.yaml", "--set", f"base_url={job_server.url}"),
            *("--set", "token=${JOBS_TOKEN}"),
        ],
        cwd=tmp_path,
        env={**os.environ, "JOBS_TOKEN": TOKEN},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        eventually_blocking(lambda: job_server.log("get"), within=60)
        process.send_signal(number)
        out, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "end       ABORTED" in out
    assert (job_server.stats().created, job_server.stats().live) == (1, 0)
