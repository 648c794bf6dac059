"""`prefect-webapi doctor` and `limits show`: what is, and what to do about it; nothing is touched."""

from __future__ import annotations

import asyncio
import re
import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import (
    GlobalConcurrencyLimitCreate,
    GlobalConcurrencyLimitUpdate,
)
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_webapi import quotas
from prefect_webapi.cli import checks, limits, usage
from prefect_webapi.cli.checks import Mark
from prefect_webapi.cli.usage import Usage
from prefect_webapi.engine.liveness import this_process
from prefect_webapi.ledger import inspection, schema
from prefect_webapi.ledger.records import JobState
from prefect_webapi.ledger.store import Store
from tests.cli.command import Command, command_for
from tests.support.ledger import another_store, draft_for, moved, sqlite_url
from tests.support.prefect import PrefectServer


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.setenv("COLUMNS", "250")
    return command_for(monkeypatch, capsys)


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Path of the ledger that the settings name; nothing is there yet."""
    path = tmp_path / "ledger.db"
    monkeypatch.setenv("PREFECT_INTEGRATIONS_WEBAPI_LEDGER_URL", sqlite_url(path))
    return path


@dataclass(frozen=True, slots=True)
class Quota:
    """A quota of 5 in Prefect and in the ledger: one job has 2 places, one waits; Prefect counts 3."""

    name: str


@pytest.fixture
def quota(prefect_api: PrefectServer, ledger: Path, monkeypatch: pytest.MonkeyPatch) -> Quota:
    name = f"webapi:doctor:{uuid4().hex[:6]}:default"
    monkeypatch.setattr(usage, "OURS", name)  # the server has limits of other tests, too
    monkeypatch.setattr(quotas, "LOOKS", 1)  # nobody else is at work here

    async def make() -> None:
        async with get_client() as client:
            await client.create_global_concurrency_limit(
                GlobalConcurrencyLimitCreate(name=name, limit=5)
            )
            await client.increment_concurrency_slots([name], 3, "concurrency")
        async with another_store(sqlite_url(ledger)) as store:
            await store.set_quota(name, 5)
            await store.beat(this_process(datetime.now(UTC)))
            await _leave_jobs(store, name)

    asyncio.run(make())
    return Quota(name)


async def _leave_jobs(store: Store, name: str) -> None:
    waits = {"state": JobState.SLOT_REQUESTED, "quotas": (name,), "weight": 2}
    since = datetime.now(UTC) - timedelta(minutes=3)
    drawn = await store.intent(draft_for("has", **waits))
    await moved(store, drawn.record, JobState.SLOT_HELD, count=1)
    await store.intent(draft_for("waits", at=since, **waits))


def _by_subject(ended: Any) -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = {}
    for finding in ended.data["findings"]:
        found.setdefault(finding["subject"], []).append(finding)
    return found


def test_limits_show_tells_who_has_places_who_waits_and_what_has_leaked(
    quota: Quota, command: Command
) -> None:
    ended = command("limits", "show", "--json")
    assert ended.code == 0, ended.err
    (found,) = ended.data
    assert datetime.fromisoformat(found.pop("waiting_since")) < datetime.now(UTC)
    assert found == {
        "name": quota.name,
        "limit": 5,
        "active_slots": 3,
        "is_on": True,
        "holders": 1,
        "places": 2,
        "waiters": 1,
        "leaked": 1,
    }


def test_a_table_shows_the_same_and_owns_up_to_what_it_can_not_know(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    since = datetime.now(UTC) - timedelta(minutes=3, seconds=10)
    limits.print_table(
        [
            Usage("webapi:a:b:c", 5, 3, True, 1, 2, 1, since, 1),
            Usage("webapi:a:b:d", 5, None, False, 0, 0, 0, None, None),
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"webapi:a:b:c +5 +3 +1 +1 +3 min 10 s +1", lines[1])
    assert re.fullmatch(r"webapi:a:b:d +5 \(off\) +- +0 +0 +\?", lines[2])
    assert "one Postgres ledger for all knows" in lines[3]


def test_doctor_names_what_is_wrong_and_the_remedy(
    quota: Quota, command: Command, ledger: Path
) -> None:
    """A leak, a limit that is off, jobs that a dead process has left: each with what to do; exit code 1."""

    async def switch_off() -> None:
        async with get_client() as client:
            await client.update_global_concurrency_limit(
                quota.name, GlobalConcurrencyLimitUpdate(active=False)
            )

    asyncio.run(switch_off())
    before = ledger.read_bytes()
    ended = command("doctor", "--json")
    assert ended.code == 1
    assert not ended.data["ok"]
    found = _by_subject(ended)
    off, leaked = found[f"limit {quota.name}"]
    assert (off["mark"], off["remedy"]) == ("wrong", f'prefect gcl update "{quota.name}" --enable')
    assert leaked["told"] == "1 of 3 taken slots have leaked: no job has them"
    assert [each["mark"] for each in found["jobs"]] == ["ok", "note"]
    assert "2 not over whose process has ended" in found["jobs"][1]["told"]
    assert found["ledger"][0]["told"] == f"{ledger}, schema {schema.REVISION}"
    assert found["ledger locks"][0]["mark"] == "ok"
    assert found["clock"][0]["mark"] == "ok"
    assert found["lease storage"][0]["mark"] == "note"
    assert ledger.read_bytes() == before


def test_doctor_makes_no_ledger_and_a_missing_one_is_not_wrong(
    prefect_api: PrefectServer, ledger: Path, command: Command
) -> None:
    found = _by_subject(command("doctor", "--json"))
    assert found["ledger"][0]["mark"] == "note"
    assert "there is no ledger" in found["ledger"][0]["told"]
    assert not ledger.exists()
    assert found["Prefect API"][0]["mark"] == "ok"
    assert found["block job-server"]
    shown = command("doctor").out
    assert "note  ledger: there is no ledger" in shown
    assert "      → let the server keep leases: PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE=" in shown


def test_doctor_goes_on_where_prefect_is_away(
    ledger: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with temporary_settings({PREFECT_API_URL: "http://me:canary@127.0.0.1:9/api"}):
        ended = command("doctor", "--json")
    assert ended.code == 1
    found = _by_subject(ended)
    assert found["Prefect API"][0]["mark"] == "wrong"
    assert "prefect server start" in found["Prefect API"][0]["told"]
    assert "canary" not in ended.out
    assert "ledger" in found


def test_wrong_settings_are_the_first_thing_to_mend(
    ledger: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_WEBAPI_SLOT_LEASE", "1s")
    ended = command("doctor", "--json")
    assert ended.code == 1
    (finding,) = ended.data["findings"]
    assert "SLOT_LEASE" in finding["told"]


@pytest.mark.parametrize(
    ("seconds", "mark", "told"),
    [
        (0.4, Mark.OK, "the server's is 0 s ahead of this machine's"),
        (-10, Mark.OK, "the server's is 10 s behind this machine's"),
        (-11, Mark.WRONG, "the server's is 11 s behind this machine's"),
        (3600, Mark.WRONG, "the server's is 3600 s ahead of this machine's"),
    ],
)
def test_clocks_may_differ_by_ten_seconds(seconds: float, mark: Mark, told: str) -> None:
    found = checks.clock(timedelta(seconds=seconds))
    assert (found.mark, found.told) == (mark, told)
    assert bool(found.remedy) == (mark is Mark.WRONG)


def test_a_ledger_that_can_not_be_written_is_wrong(
    prefect_api: PrefectServer, ledger: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def make() -> None:
        async with another_store(sqlite_url(ledger)):
            pass

    asyncio.run(make())
    monkeypatch.setattr(usage, "OURS", "webapi:none-of-these")
    monkeypatch.setattr(inspection, "WRITE_SECONDS", 0.05)
    other = sqlite3.connect(ledger, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    found = _by_subject(command("doctor", "--json"))
    other.close()
    assert found["ledger locks"][0]["mark"] == "wrong"
    assert "Another program keeps it locked" in found["ledger locks"][0]["told"]
