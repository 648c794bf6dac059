"""Cards and progress: what they say, how many there are, and what they cost at most."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import pytest

from prefect_webapi._prefect import artifacts as module
from prefect_webapi._prefect.artifacts import BURST, CARDS, Artifacts, Card, Progress
from prefect_webapi._prefect.cards import Story, card
from prefect_webapi.cli.views import job_data
from prefect_webapi.contract.phase import PhaseInfo, TaskInfo, TaskLog
from prefect_webapi.engine.job import Job
from prefect_webapi.ledger.records import Steps
from prefect_webapi_aws import Athena
from prefect_webapi_aws.athena import AthenaPlugin
from prefect_webapi_aws.athena_models import Query, QueryHandle
from prefect_webapi_flyte.models import ConnectorHandle
from tests._prefect.test_reports import RECORD
from tests.support.waiting import eventually

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


def story(**more: Any) -> Story:
    return Story("jcard", "report", 2, 3, **more)


# --- what a card says ----------------------------------------------------------------------------


def test_a_card_tells_where_a_job_is_and_why_its_times_and_the_services_words() -> None:
    """Attempt, the service's id, its cost, the link; no secret, and no text that breaks the table."""
    handle = json.dumps({"id": "q-17", "access_token": "canary-of-the-handle"})
    logs = (TaskLog(name="Query q-17", uri="https://console/q-17"),)
    told = TaskInfo(logs=logs, custom_info={"DataScannedInBytes": 1024, "token": "canary"})
    seen = story(record=replace(RECORD, handle=handle), info=PhaseInfo.running(info=told))
    seen.note("WAITING_FOR_RESOURCES", NOW, "quota a|b: limit 1, position 1")
    seen.note("WAITING_FOR_RESOURCES", NOW, "quota a|b: limit 1, position 1, waits for 60 s")
    seen.note("RUNNING", NOW + timedelta(seconds=90), "https://user:canary@host/")
    key, about, text = card(seen)
    assert (key, about) == ("job-jcard", "Job jcard of report")
    assert text.startswith("**RUNNING** since 2026-11-24 12:01:30")
    assert "| id | q-17 |" in text
    assert "| attempt | 2 of 3 |" in text
    assert "| DataScannedInBytes | 1024 |" in text
    assert (
        "2026-11-24 12:00:00 | 0:01:30 | quota a\\|b: limit 1, position 1, waits for 60 s" in text
    )
    assert text.endswith("[Query q-17](<https://console/q-17>)")
    assert "canary" not in text


def test_what_only_a_plugin_can_read_of_a_handle_is_shown_to_nobody() -> None:
    """What a Flyte connector gives may hold a token, and is kept as it is where plain handles are allowed."""
    handle = ConnectorHandle(
        task_type="spark",
        task_type_version=0,
        output_prefix="/x",
        is_encrypted=False,
        opaque_meta="eyJhdXRoX3Rva2VuIjoiY2FuYXJ5In0=",
    )
    record = replace(RECORD, handle=handle.model_dump_json())
    text = card(story(record=record))[2]
    assert "task\\_type: spark" in text
    assert handle.opaque_meta not in text
    shown = job_data(record)["handle"]
    assert shown["task_type"] == "spark"
    assert shown["opaque_meta"] == "***"


def test_a_job_that_goes_to_and_fro_has_a_bounded_history() -> None:
    """Its card shows the end of it, its record the beginning too."""
    seen, job = story(), object.__new__(Job)
    job.steps = Steps()
    for n in range(1000):
        name = ("QUEUED", "WAITING_FOR_RESOURCES")[n % 2]
        seen.note(name, NOW + timedelta(seconds=n), "")
        job.note(name, NOW + timedelta(seconds=n))
    assert len(seen.steps) < 50
    rows = card(seen)[2].splitlines()
    assert sum(row.startswith("| …") for row in rows) == 1
    assert sum("12:16:" in row for row in rows) > 20
    assert [(step.at - NOW).seconds for step in job.steps] == [*range(25), *range(975, 1000)]


def test_a_failure_says_its_code_and_whose_fault_it_is() -> None:
    seen = story(info=PhaseInfo.failure("OutOfMemory", "killed"))
    seen.note("PERMANENT_FAILURE", NOW, "killed")
    assert "| error | OutOfMemory \\(user\\) |" in card(seen)[2]


async def test_what_a_query_has_scanned_is_told_by_its_plugin() -> None:
    """It is what Athena bills."""
    described = {"Status": {"State": "RUNNING"}, "Statistics": {"DataScannedInBytes": 7}}
    seen = SimpleNamespace(
        resource=Query.model_validate(described), resource_meta=QueryHandle(id="q")
    )
    plugin = AthenaPlugin(Athena(region="eu-central-1"))
    info = plugin.status(cast(Any, seen))
    await plugin.aclose()
    assert info.info.custom_info == {"DataScannedInBytes": 7}


# --- what they cost -----------------------------------------------------------------------------------


class Api:
    """Stands for Prefect's API: counts, and fails as long as it shall."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fails = False

    async def __aenter__(self) -> Api:
        return self

    async def __aexit__(self, *exc_info: object) -> None: ...

    async def request(self, method: str, path: str, **sent: Any) -> Any:
        self.calls.append(method)
        if self.fails:
            raise OSError("no route to Prefect")
        return SimpleNamespace(json=lambda: {"id": str(uuid4())})


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    made = Api()
    monkeypatch.setattr(module, "get_client", lambda: made)
    return made


def cards(count: int) -> list[Card]:
    run = Artifacts().progress(flow_run=None, task_run=uuid4())
    return [Card(story(), run, flow_run=None, task_run=uuid4()) for _ in range(count)]


async def test_a_burst_is_written_and_then_a_few_a_second(api: Api) -> None:
    now = 0.0
    writer = Artifacts(monotonic=lambda: now)
    for each in cards(BURST + 10):
        writer.offer(each, urgent=True)
    running = asyncio.ensure_future(writer.run())
    await eventually(lambda: len(api.calls) == BURST, within=5)
    now = 2.0
    writer.offer(cards(1)[0], urgent=True)  # wakes it up
    await eventually(lambda: len(api.calls) == BURST + 4, within=5)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert len(api.calls) == BURST + 4


async def test_a_card_is_written_once_and_its_news_wait_unless_they_are_urgent(api: Api) -> None:
    writer = Artifacts()
    (one,) = cards(1)
    running = asyncio.ensure_future(writer.run())
    writer.offer(one)
    assert api.calls == []
    await eventually(lambda: api.calls == ["POST"], within=5)
    writer.offer(one)
    assert 9 < one.due_in() <= 10
    writer.offer(one, urgent=True)
    await eventually(lambda: api.calls == ["POST", "PATCH"], within=5)
    writer.offer(one)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert api.calls == ["POST", "PATCH", "PATCH"]  # a process that ends leaves no news behind


def test_the_first_cards_of_many_jobs_let_them_start() -> None:
    run = Artifacts().progress(flow_run=None, task_run=uuid4())
    card = Card(story(), run, flow_run=None, task_run=uuid4())
    assert 0 < card.due_in() <= 1
    run.expect(CARDS + 1)
    assert 9 < card.due_in() <= 10


async def test_cards_wait_while_the_server_is_busy_and_a_progress_does_not(api: Api) -> None:
    busy = 30.0
    writer = Artifacts(busy_for=lambda: busy)
    one, other = cards(2)
    progress = writer.progress(flow_run=uuid4(), task_run=uuid4())
    running = asyncio.ensure_future(writer.run())
    writer.offer(one, urgent=True)
    writer.offer(progress, urgent=True)
    await eventually(lambda: api.calls == ["POST"], within=5)
    writer.offer(progress, urgent=True)
    await eventually(lambda: api.calls == ["POST", "PATCH"], within=5)
    busy = 0.0
    writer.offer(other, urgent=True)  # wakes it up
    await eventually(lambda: api.calls == ["POST", "PATCH", "POST", "POST"], within=5)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_an_api_that_is_away_ends_nothing(api: Api) -> None:
    api.fails = True
    writer = Artifacts()
    running = asyncio.ensure_future(writer.run())
    writer.offer(cards(1)[0], urgent=True)
    await eventually(lambda: len(api.calls) == 1, within=5)
    api.fails = False
    writer.offer(cards(1)[0], urgent=True)
    await eventually(lambda: len(api.calls) == 2, within=5)
    assert not running.done()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def test_a_flow_run_with_many_jobs_has_one_progress_and_a_bounded_number_of_cards() -> None:
    writer, flow_run = Artifacts(), uuid4()
    given = [writer.progress(flow_run=flow_run, task_run=uuid4()) for _ in range(100)]
    progress = given[0]
    assert all(each is progress for each in given)
    assert not progress.is_many
    progress.expect(100)
    assert progress.is_many
    assert sum(progress.wants_card() for _ in range(100)) == CARDS
    assert sum(progress.wants_card(failed=True) for _ in range(100)) == CARDS
    progress.note("a", "Running")
    progress.note("b", "RemoteQueued")
    progress.over("a", failed=True)
    shown = progress.content()
    assert (shown.type, shown.data) == ("progress", 1.0)
    assert shown.description == "1 of 100 jobs are over, 1 of them failed; 1 RemoteQueued"
    assert shown.key == f"jobs-{flow_run}"


def test_flow_runs_that_are_over_are_forgotten_and_live_ones_are_not() -> None:
    writer = Artifacts()
    live = writer.progress(flow_run=(first := uuid4()), task_run=uuid4())
    live.expect()
    for _ in range(1000):
        writer.progress(flow_run=uuid4(), task_run=uuid4())
    kept = cast(dict[Any, Progress], writer._runs)  # pyright: ignore[reportPrivateUsage] # memory is what this is about
    assert len(kept) <= 200
    assert kept[first] is live
