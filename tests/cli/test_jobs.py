"""`prefect-webapi jobs`: what the ledger knows, for people and for programs."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from prefect_webapi.contract.keys import JobKey
from prefect_webapi.contract.phase import PhaseInfo, TaskInfo, TaskLog
from prefect_webapi.ledger.records import Details, JobState, Outputs, Pace, Steps
from prefect_webapi.ledger.store import Store
from tests.cli.command import Command, command_for
from tests.support.ledger import another_store, draft_for, moved, sqlite_url

ROOT_RUN = "11111111-1111-4111-8111-111111111111"
SUB_RUN = "22222222-2222-4222-8222-222222222222"
OTHER_RUN = "33333333-3333-4333-8333-333333333333"
NOON = datetime(2024, 5, 1, 12, 0, tzinfo=UTC)
PAGE = TaskInfo(logs=(TaskLog(name="Job", uri="http://jobs.example/7"),))


@dataclass(frozen=True, slots=True)
class Keys:
    """Jobs of the ledger, oldest first."""

    good: JobKey
    bad: JobKey
    alive: JobKey
    waiting: JobKey


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return command_for(monkeypatch, capsys)


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Path of the ledger that the settings name; nothing is there yet."""
    path = tmp_path / "ledger.db"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_INTEGRATIONS_WEBAPI_LEDGER_URL", f"sqlite+aiosqlite:///{path}")
    monkeypatch.setenv("COLUMNS", "250")
    return path


@pytest.fixture
def jobs(ledger: Path) -> Keys:
    async def fill() -> Keys:
        async with another_store(sqlite_url(ledger)) as store:
            return Keys(*[await make(store) for make in (_good, _bad, _alive, _waiting)])

    return asyncio.run(fill())


async def _good(store: Store) -> JobKey:
    run = {"root_run": ROOT_RUN, "flow_run": ROOT_RUN, "at": NOON}
    drawn = await store.intent(draft_for("good", **run))
    record = await moved(store, drawn.record, JobState.CREATED, handle='{"name": "seven"}')
    over = Details(
        task_name="build report",
        tries=1,
        phase=PhaseInfo.success(info=PAGE),
        outputs=Outputs(value={"rows": 12}),
        steps=Steps()
        .then("QUEUED", NOON)
        .then("RUNNING", NOON + timedelta(seconds=3))
        .then("SUCCESS", NOON + timedelta(minutes=2, seconds=3)),
    )
    return (await moved(store, record, JobState.OVER, JobState.CLOSED, details=over)).key


async def _bad(store: Store) -> JobKey:
    """Failed in its first attempt, is about to be made again: the second attempt's key."""
    run = {"root_run": ROOT_RUN, "flow_run": SUB_RUN}
    drawn = await store.intent(draft_for("bad", at=NOON + timedelta(seconds=1), **run))
    record = await moved(store, drawn.record, JobState.CREATED, handle='{"token": "canary"}')
    over = Details(
        task_name="weigh", phase=PhaseInfo.retryable_failure("OutOfDisk", "disk is full")
    )
    await moved(store, record, JobState.OVER, JobState.CLOSED, details=over)
    later = NOON + timedelta(seconds=2)
    again = await store.intent(draft_for("bad", at=later, is_retry=True, **run))
    record = await moved(store, again.record, JobState.CREATED, handle='{"token": "canary"}')
    return (await moved(store, record, JobState.OVER, JobState.CLOSED, details=over)).key


async def _alive(store: Store) -> JobKey:
    run = {"root_run": OTHER_RUN, "flow_run": OTHER_RUN, "at": NOON + timedelta(seconds=3)}
    drawn = await store.intent(draft_for("alive", **run))
    told = Details(task_name="index", last_error="the service answered 503")
    return (await moved(store, drawn.record, JobState.CREATED, details=told)).key


async def _waiting(store: Store) -> JobKey:
    drawn = await store.intent(
        draft_for(
            "waiting",
            root_run="",
            flow_run="",
            at=NOON + timedelta(seconds=4),
            state=JobState.SLOT_REQUESTED,
            quotas=("webapi:plugin:connection:default",),
        )
    )
    return drawn.record.key


def test_jobs_are_listed_newest_first_with_state_phase_and_reason(
    jobs: Keys, command: Command
) -> None:
    ended = command("jobs", "list")
    assert ended.code == 0
    lines = ended.out.splitlines()[1:]
    first_attempt = next(line for line in lines if "weigh" in line and jobs.bad not in line)
    assert [line.split()[0] for line in lines] == [
        jobs.waiting,
        jobs.alive,
        jobs.bad,
        first_attempt.split()[0],
        jobs.good,
    ]
    assert "SLOT_REQUESTED" in lines[0]
    assert "waits for a place in webapi:plugin:connection:default" in lines[0]
    assert "last error: the service answered 503" in lines[1]
    assert "OutOfDisk: disk is full" in lines[2]
    assert '{"rows": 12}' in lines[4]


@pytest.mark.parametrize("columns", [80, 120, 160])
def test_a_narrow_screen_still_shows_whole_keys_tasks_phases_and_why(
    jobs: Keys, command: Command, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = command("jobs", "list").out.splitlines()
    good = next(line for line in lines if jobs.good in line)
    for told in ("build report", "SUCCESS", '{"rows":'):
        assert told in good
    assert "SLOT_REQUESTED" in next(line for line in lines if jobs.waiting in line)
    assert max(map(len, lines)) <= columns


def test_the_list_as_json_has_everything_by_name(jobs: Keys, command: Command) -> None:
    data = command("jobs", "list", "--json").data
    good = next(job for job in data if job["key"] == jobs.good)
    assert good["task"] == "build report"
    assert good["state"] == "CLOSED"
    assert good["phase"] == "SUCCESS"
    assert good["handle"] == {"name": "seven"}
    assert good["links"] == [{"name": "Job", "uri": "http://jobs.example/7"}]
    assert good["result"] == {"rows": 12}
    assert good["error"] is None
    assert good["created_at"] == "2024-05-01T12:00:00+00:00"
    assert [step["name"] for step in good["steps"]] == ["QUEUED", "RUNNING", "SUCCESS"]
    bad = next(job for job in data if job["key"] == jobs.bad)
    assert bad["error"] == {"code": "OutOfDisk", "message": "disk is full", "kind": "user"}


def test_the_list_says_how_often_live_jobs_are_read(
    jobs: Keys, ledger: Path, command: Command
) -> None:
    async def told() -> None:
        async with another_store(sqlite_url(ledger)) as store:
            alive = await store.get(jobs.alive)
            assert alive is not None
            pace = Pace(alive.plugin, alive.connection, 100_000, 3_333.3, 3_303.3)
            await store.set_paces(alive.runtime, [pace])

    asyncio.run(told())
    shown = command("jobs", "list").out
    assert "100,000 live jobs, each read every 55 min 33 s, 55 min 3 s after it was due" in shown
    every = {
        job["key"]: job["read_every_seconds"] for job in command("jobs", "list", "--json").data
    }
    assert every == {jobs.alive: 3_333.3} | dict.fromkeys((jobs.good, jobs.bad, jobs.waiting)) | {
        key: None for key in every if key not in (jobs.good, jobs.bad, jobs.alive, jobs.waiting)
    }


def test_the_list_is_narrowed_by_states_of_the_ledger(jobs: Keys, command: Command) -> None:
    ended = command("jobs", "list", "--json", "--state", "created", "--state", "slot-requested")
    assert [job["key"] for job in ended.data] == [jobs.waiting, jobs.alive]


def test_a_flow_runs_list_has_the_jobs_of_its_subflows_too(jobs: Keys, command: Command) -> None:
    of_root = command("jobs", "list", "--json", "--flow-run", ROOT_RUN).data
    assert {job["task"] for job in of_root} == {"weigh", "build report"}
    assert len(of_root) == 3
    of_sub = command("jobs", "list", "--json", "--flow-run", SUB_RUN).data
    assert {job["task"] for job in of_sub} == {"weigh"}


def test_a_list_that_was_cut_says_so(jobs: Keys, command: Command) -> None:
    ended = command("jobs", "list", "--limit", "2")
    assert jobs.alive in ended.out
    assert jobs.bad not in ended.out
    assert "the newest 2" in ended.out
    assert len(command("jobs", "list", "--limit", "2", "--json").data) == 2


def test_a_list_without_a_job_says_that_none_matches(jobs: Keys, command: Command) -> None:
    ended = command("jobs", "list", "--state", "suspect")
    assert (ended.code, ended.out.split(" in ")[0]) == (0, "No job")
    assert command("jobs", "list", "--state", "suspect", "--json").data == []


def test_one_job_is_shown_with_its_phases_and_how_long_each_lasted(
    jobs: Keys, command: Command
) -> None:
    ended = command("jobs", "show", jobs.good)
    assert ended.code == 0
    for told in (
        jobs.good,
        "build report",
        "http://jobs.example/7",
        '{"name": "seven"}',
        '{"rows": 12}',
        ROOT_RUN,
        "3.0 s",
        "2 min 0 s",
    ):
        assert told in ended.out


def test_a_retried_job_is_shown_with_all_its_attempts(jobs: Keys, command: Command) -> None:
    data = command("jobs", "show", jobs.bad, "--json").data
    assert data["attempt"] == 2
    assert [each["attempt"] for each in data["attempts"]] == [1, 2]
    assert data["attempts"][0]["why"] == "OutOfDisk: disk is full"
    assert f"attempt 1: {data['attempts'][0]['key']}" in command("jobs", "show", jobs.bad).out


def test_what_looks_like_a_secret_in_a_handle_is_masked(jobs: Keys, command: Command) -> None:
    for arguments in (["show", jobs.bad], ["show", jobs.bad, "--json"], ["list", "--json"]):
        ended = command("jobs", *arguments)
        assert "canary" not in ended.out
        assert "***" in ended.out


def test_an_unknown_key_is_one_clear_line_and_exit_code_2(jobs: Keys, command: Command) -> None:
    ended = command("jobs", "show", "jnobody")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.count("\n") == 1
    assert "has no job 'jnobody'" in ended.err


@pytest.mark.parametrize("arguments", [["list"], ["show", "jkey"]])
def test_a_ledger_that_does_not_exist_is_not_made(
    ledger: Path, command: Command, arguments: list[str]
) -> None:
    ended = command("jobs", *arguments)
    assert ended.code == 1
    assert f"there is no ledger at {ledger}" in ended.err
    assert list(ledger.parent.iterdir()) == []


def test_an_empty_data_base_gets_no_tables(ledger: Path, command: Command) -> None:
    ledger.touch()
    ended = command("jobs", "list")
    assert ended.code == 1
    assert "there is no ledger" in ended.err


def test_a_file_that_is_no_data_base_is_named_and_left_alone(
    ledger: Path, command: Command
) -> None:
    ledger.write_text("dear diary, today I wrote more than a hundred bytes " * 10)
    before = ledger.read_bytes()
    ended = command("jobs", "list")
    assert ended.code == 1
    assert str(ledger) in ended.err
    assert ended.err.count("\n") == 1
    assert ledger.read_bytes() == before


def test_a_ledger_that_cannot_be_reached_is_named_without_its_password(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    url = "postgresql+asyncpg://me:canary@127.0.0.1:1/jobs"
    monkeypatch.setenv("PREFECT_INTEGRATIONS_WEBAPI_LEDGER_URL", url)
    ended = command("jobs", "list")
    assert ended.code == 1
    assert "127.0.0.1:1/jobs" in ended.err
    assert "canary" not in ended.err


def test_a_wrong_setting_ends_the_command_with_exit_code_2(
    ledger: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_WEBAPI_RUNKEY", "x")
    ended = command("jobs", "list")
    assert ended.code == 2
    assert "Did you mean `PREFECT_INTEGRATIONS_WEBAPI_RUN_KEY`?" in ended.err


def test_a_wrong_option_is_named_with_what_is_allowed(ledger: Path, command: Command) -> None:
    ended = command("jobs", "list", "--state", "running")
    assert ended.code != 0
    assert "slot-requested" in ended.err
