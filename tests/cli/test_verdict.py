"""The quickstart's judge: it must see every way in which a run is not as designed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from prefect_webapi.cli.verdict import DESIGN, Seen, differences, gather_calls
from prefect_webapi.contract.keys import Base, Fingerprint, JobKey
from prefect_webapi.contract.phase import Phase, PhaseInfo
from prefect_webapi.ledger.records import Details, JobState, Record

NOW = datetime(2024, 5, 1, tzinfo=UTC)


def record(name: str, phase: str, attempt: int = 1) -> Record:
    return Record(
        key=JobKey(name),
        base=Base(name.split("-")[0]),
        ordinal=0,
        attempt=attempt,
        state=JobState.CLOSED,
        fence=1,
        runtime="runtime",
        plugin="job-server",
        task_type="job-server",
        connection="quickstart",
        fingerprint=Fingerprint(name),
        created_at=NOW,
        updated_at=NOW,
        details=Details(phase=PhaseInfo(phase=Phase[phase])),
    )


def create(name: str, label: str, status: int = 201) -> dict[str, Any]:
    kind, day = label.split()
    body = {"spec": {"kind": kind, "day": int(day)}}
    return {"op": "create", "name": name, "status": status, "body": body}


def as_designed(**changes: Any) -> Seen:
    """What the witnesses say of a run without a fault."""
    days = itertools.count(1)
    log: list[dict[str, Any]] = [{"op": "get", "name": "any", "status": 200, "body": None}]
    records: list[Record] = []
    prefect: dict[str, set[str]] = {}
    for kind, part in DESIGN.items():
        for _ in range(part.calls):
            label = f"{kind} {next(days)}"
            prefect[label] = {part.prefect}
            for attempt in range(1, part.attempts + 1):
                name = f"{label.replace(' ', '')}-{attempt}"
                phase = part.phase if attempt == part.attempts else "RETRYABLE_FAILURE"
                log.append(create(name, label))
                records.append(record(name, phase, attempt))
    seen = Seen(
        calls=gather_calls(log, records),
        stats={"created": 22, "live": 0, "peak_live": 5, "duplicates": {}, "requests": {}},
        prefect=prefect,
        flow_state="Completed",
        quota=5,
        was_killed=False,
        links={},
    )
    return replace(seen, **changes)


def test_a_run_as_designed_has_no_differences() -> None:
    assert differences(as_designed()) == []


def test_twenty_calls_are_designed() -> None:
    assert sum(part.calls for part in DESIGN.values()) == 20


def test_a_create_that_is_sent_again_makes_no_second_job() -> None:
    log = [create("one", "report 1"), create("one", "report 1", status=200)]
    (call,) = gather_calls(log, [])
    assert (len(call.made), call.creates) == (1, 2)


def test_a_second_job_for_one_call_is_seen_whatever_the_ledger_says() -> None:
    seen = as_designed()
    seen.calls[0].made.add("another")
    assert differences(seen) == ["report 1: 2 jobs were made, designed: 1"]


def test_a_job_that_the_ledger_does_not_know_is_seen() -> None:
    stats = {**as_designed().stats, "created": 23}
    assert "made 23 jobs, the ledger knows 22" in differences(as_designed(stats=stats))[0]


def test_two_jobs_under_one_key_are_seen() -> None:
    stats = {**as_designed().stats, "duplicates": {"report1-1": 2}}
    assert differences(as_designed(stats=stats)) == ["made twice at the job server: report1-1"]


def test_more_live_jobs_than_the_quota_are_seen() -> None:
    stats = {**as_designed().stats, "peak_live": 6}
    assert differences(as_designed(stats=stats)) == ["6 jobs were live at once, quota: 5"]


def test_a_job_that_is_left_alive_is_seen() -> None:
    stats = {**as_designed().stats, "live": 1}
    assert differences(as_designed(stats=stats)) == ["1 jobs are still live at the job server"]


def test_a_missing_call_is_seen() -> None:
    seen = as_designed(calls=as_designed().calls[1:], stats={**as_designed().stats, "created": 21})
    assert differences(seen) == ["report: 16 calls reached the job server, designed: 17"]


def test_another_end_than_designed_is_seen() -> None:
    seen = as_designed()
    seen.calls[0].attempts = [record("report1-1", "ABORTED")]
    assert differences(seen) == ["report 1: ended as ABORTED, designed: SUCCESS"]


def test_another_state_in_prefect_is_seen() -> None:
    prefect = {**as_designed().prefect, "endless 20": {"CRASHED"}}
    assert differences(as_designed(prefect=prefect)) == [
        "endless 20: Prefect shows CRASHED, designed: CANCELLED"
    ]


def test_a_flow_run_that_did_not_complete_is_seen() -> None:
    found = differences(as_designed(flow_state="Failed"))
    assert found == ["the flow run is Failed, designed: Completed"]


def test_a_flow_run_that_is_run_again_may_try_anew_what_had_failed_and_nothing_else() -> None:
    seen = as_designed(was_killed=True, stats={**as_designed().stats, "created": 24})
    hopeless = next(call for call in seen.calls if call.kind == "hopeless")
    for attempt in (3, 4):
        name = f"hopeless19-{attempt}"
        hopeless.made.add(name)
        hopeless.attempts.append(record(name, "RETRYABLE_FAILURE", attempt))
    assert differences(seen) == []
    fragile = next(call for call in seen.calls if call.kind == "fragile")
    fragile.made.add("another")
    assert differences(seen) == ["fragile 18: 3 jobs were made, designed: 2"]
