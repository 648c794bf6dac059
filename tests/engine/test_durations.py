"""What is learned from the ends of a task's jobs, and what the next ones are spared by it."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from prefect_webapi import Phase
from prefect_webapi.engine.durations import LATEST, Durations
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import ReportJob
from tests.support.engine import at, request, run
from tests.support.waiting import eventually

TASK = "plugin", "task"


def test_what_few_jobs_fall_short_of_is_expected() -> None:
    durations = Durations({})
    assert durations.expected(*TASK) == 0.0
    for seconds in range(10, 30):
        durations.note(*TASK, float(seconds), float(seconds))
    assert durations.expected(*TASK) == 12.0
    assert durations.expected("plugin", "another") == 0.0


def test_jobs_that_begin_together_and_end_in_order_are_learned_from_alike() -> None:
    """The last to end are the longest, and no better known for it."""
    durations = Durations({})
    for seconds in range(1_000):
        durations.note(*TASK, float(seconds), float(seconds))
    assert 20 < durations.expected(*TASK) < 300


def test_a_task_that_has_become_faster_is_expected_sooner() -> None:
    durations = Durations({TASK: [1_000.0] * 100})
    chance = Random(0)
    for _ in range(300):
        seconds = chance.uniform(9, 11)
        durations.note(*TASK, seconds, seconds)
    assert 9 <= durations.expected(*TASK) <= 11


def test_only_news_are_told_and_can_be_read_back() -> None:
    durations = Durations({TASK: [3.0, 4.0]})
    assert not durations.news()
    durations.note(*TASK, 4.5, 5.5)
    news = durations.news()
    assert news == {TASK: (3.0, 4.0, 5.0)}
    assert not durations.news()
    assert Durations(news).expected(*TASK) == 3.0


@pytest.mark.parametrize(
    ("seen", "foreseen"),
    [
        pytest.param([(4.0, 5.2), (4.5, 5.1), (5.0, 5.6)], [5.1, 5.355], id="one length"),
        pytest.param([(4.0, 5.2), (4.5, 5.1), (4.8, 5.6)], [4.95, 5.1], id="not well known"),
        pytest.param([(4.0, 5.05), (5.1, 5.6), (4.9, 5.9)], [5.202, 5.4621], id="but for chance"),
        pytest.param([(4.0, 5.0), (5.3, 5.6), (4.9, 5.9)], [5.3], id="nearly one length"),
        pytest.param([(4.0, 5.0), (5.7, 6.2), (4.9, 5.9)], [], id="lengths that differ"),
        pytest.param([(4.0, 5.2), (4.5, 5.1)], [], id="too few"),
        pytest.param(
            [(50.0, 51.0), *[(5.4, 5.5)] * LATEST], [5.5, 5.775], id="one that was long ago"
        ),
        pytest.param([(50.0, 51.0), *[(5.4, 5.5)] * (LATEST - 1)], [], id="one of the latest"),
    ],
)
def test_an_end_is_foreseen_where_the_last_jobs_were_of_one_length(
    seen: list[tuple[float, float]], foreseen: list[float]
) -> None:
    """What they were seen at as alive and as over fits one length."""
    durations = Durations({TASK: [5.0] * 100})
    assert durations.ends(*TASK) == ()
    for alive, over in seen:
        durations.note(*TASK, alive, over)
    assert list(durations.ends(*TASK)) == pytest.approx(foreseen)
    assert durations.ends("plugin", "another") == ()


def test_the_length_of_jobs_that_are_alike_is_known_better_with_each() -> None:
    """Each is read before its end once more at most, until that is known."""
    length, over, reads = 300.0, 308.0, list[int]()
    durations = Durations({})
    for _ in range(3):
        durations.note(*TASK, 280.0, 308.0)
    for _ in range(10):
        alive, asked = 280.0, 0
        while (over := next(age for age in durations.ends(*TASK) if age > alive)) < length:
            alive, asked = over, asked + 1
        durations.note(*TASK, alive, over)
        reads.append(asked)
    assert max(reads) == 1
    assert sum(reads) < 5
    assert over - length < 0.02 * length


async def test_a_job_is_read_when_its_end_is_foreseen(
    job_server: EmbeddedJobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one at the age of 28 s would be a second read, after one at 20 s. Ten times as fast."""
    noted: list[tuple[float, float]] = []

    def note(self: Durations, plugin: str, task: str, alive: float, over: float) -> None:
        noted.append((alive, over))

    def ends(self: Durations, plugin: str, task: str) -> list[float]:
        return [15.0]

    monkeypatch.setattr(Durations, "note", note)
    monkeypatch.setattr(Durations, "ends", ends)
    with at(tmp_path, job_server, speed=10, initialInterval="20s") as host:
        await run(host, ReportJob(day=1, seconds=1.2), "keys")
    [get] = job_server.log("get")
    [create] = job_server.log("create")
    assert 14.5 < 10 * (get.mono - create.mono) < 18
    [(alive, over)] = noted
    assert 0 <= alive < 12 < 14.5 < over < 18


async def test_the_end_of_a_job_that_is_deleted_is_not_foreseen(
    job_server: EmbeddedJobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its age begins anew, and what others took says nothing of it. Ten times as fast."""

    def ends(self: Durations, plugin: str, task: str) -> list[float]:
        return [3.0]

    monkeypatch.setattr(Durations, "ends", ends)
    with at(tmp_path, job_server, speed=10, initialInterval="20s") as host:
        ticket = host.admit(request(ReportJob(outcome="never", dies_in=1.0), task_type="keys"))
        await eventually(lambda: job_server.log("get"), within=20)  # at 3 s, as foreseen
        ticket.cancel("cancelled by user")
        await ticket.outcome()
    [delete] = job_server.log("delete")
    after = [10 * (get.mono - delete.mono) for get in job_server.log("get")]
    assert [seconds for seconds in after if 1 < seconds < 15] == []


async def test_a_tasks_second_run_reads_less_and_is_no_later(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """The first run's process has ended; what it learned is in the ledger. Ten times as fast."""
    reads: list[int] = []
    lags: list[float] = []
    for day in (1, 2):
        before = len(job_server.log())
        with at(tmp_path, job_server, speed=10) as host:
            outcome = await run(host, ReportJob(day=day, seconds=4), "single", execution=f"{day}")
        assert outcome.info.phase is Phase.SUCCESS
        log = job_server.log("get", since=before)
        [create] = job_server.log("create", since=before)
        reads.append(len(log))
        lags.append(10 * (log[-1].mono - create.mono) - 40)
    assert reads[0] > 15
    assert reads[1] < reads[0] / 2
    assert max(lags) < 6  # a tenth of 40 s, and what a loaded machine adds


async def test_a_failure_tells_nothing_of_how_long_a_job_takes(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    reads: list[int] = []
    for spec in (ReportJob(day=1, seconds=2, outcome="fail"), ReportJob(day=2, seconds=2)):
        before = len(job_server.log())
        with at(tmp_path, job_server, speed=10) as host:
            await run(host, spec, "single", execution=f"{spec.day}")
        reads.append(len(job_server.log("get", since=before)))
    assert abs(reads[0] - reads[1]) <= 3


async def test_a_job_that_create_told_about_is_not_read_at_once(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """One that is over by then is not read at all."""
    with at(tmp_path, job_server, initialInterval="1s") as host:
        done = await run(host, ReportJob(day=1, seconds=0, result=7), "keys")
        assert done.value.data == 7
        assert not job_server.log("get")
        await run(host, ReportJob(day=2, seconds=0.5), "keys")
    [create] = job_server.log("create")[1:]
    [get] = job_server.log("get")
    assert get.mono - create.mono > 0.8
