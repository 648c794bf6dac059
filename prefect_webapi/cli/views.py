"""Records for people and for programs: tables, a page per job, JSON data. Values in, values out; it reads nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import zip_longest
from typing import Any, cast

from rich.table import Table
from rich.text import Text

from prefect_webapi.cli.screen import pairs, span, when
from prefect_webapi.contract.phase import Phase
from prefect_webapi.contract.secrecy import is_shown, mask_url
from prefect_webapi.ledger.records import JobState, Pace, Record

__all__ = [
    "Attempt",
    "attempts_of",
    "ended_well",
    "job_data",
    "job_page",
    "job_table",
    "last_phase",
    "link_of",
    "pace_lines",
    "phase_style",
    "result_of",
    "step_table",
    "why",
]

_RESULT_CHARS = 2_000
_WHY_CHARS = 120
_MIDDLE_COLUMNS = 110
_WIDE_COLUMNS = 150
_KEY_CHARS = 26

_STYLES = {
    "SUCCESS": "green",
    "RETRYABLE_FAILURE": "red",
    "PERMANENT_FAILURE": "red",
    "ABORTED": "yellow",
    "RUNNING": "cyan",
}


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try of a job that was retried: each has a key, and at most one remote job, of its own."""

    number: int
    key: str
    state: JobState
    phase: str
    reason: str


def attempts_of(record: Record, relatives: Iterable[Record]) -> list[Attempt]:
    """All attempts of the call that `record` belongs to, first one first."""
    own = {
        each.key: each
        for each in (*relatives, record)
        if (each.base, each.ordinal) == (record.base, record.ordinal)
    }
    return [
        Attempt(each.attempt, each.key, each.state, last_phase(each), why(each))
        for each in sorted(own.values(), key=lambda each: each.attempt)
    ]


def last_phase(record: Record) -> str:
    """Name of the last phase that is known; empty before the first."""
    phase = record.details.phase
    if phase is not None and (phase.phase is not Phase.UNDEFINED or not record.details.steps):
        return phase.phase.name
    return record.details.steps[-1].name if record.details.steps else ""


def ended_well(record: Record) -> bool:
    phase = record.details.phase
    return record.state.is_over and phase is not None and phase.phase is Phase.SUCCESS


def phase_style(phase: str) -> str:
    return _STYLES.get(phase.upper(), "")


def why(record: Record) -> str:
    """Why the job is where it is, in one line; empty where there is nothing to tell."""
    details = record.details
    phase = details.phase
    told = ""
    if phase is not None:
        told = f"{phase.err.code}: {phase.err.message}" if phase.err else phase.reason
    if record.state is JobState.SLOT_REQUESTED:
        told = f"waits for a place in {', '.join(record.quotas)}"
    parts = [told, record.cancel_reason if record.state is JobState.CANCELLING else ""]
    if not record.state.is_over and details.last_error:
        parts.append(f"last error: {details.last_error}")
    unique = dict.fromkeys(" ".join(part.split()) for part in parts if part)
    return mask_url("; ".join(unique))


def link_of(record: Record) -> str:
    """Address of the job's page or logs; empty where the service gave none."""
    phase = record.details.phase
    return phase.info.logs[0].uri if phase is not None and phase.info.logs else ""


def result_of(record: Record) -> str:
    """The result as JSON text, or where it is kept; empty where there is none."""
    outputs = record.details.outputs
    if outputs is None:
        return ""
    if outputs.pointer is not None:
        return f"kept at {mask_url(outputs.pointer)}"
    return "" if outputs.value is None else json.dumps(outputs.value, ensure_ascii=False)


def job_table(records: Sequence[Record], *, columns: int) -> Table:
    """A line per job, made for a screen of so many columns: a narrow one gets less, but always whole keys."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = ["key", "task", "state", "phase", "try", "made", "connection"]
    if columns < _MIDDLE_COLUMNS:
        names = ["key", "task", "phase"]
    elif columns < _WIDE_COLUMNS:
        names = ["key", "task", "state", "phase", "try"]
    for name in names:
        table.add_column(
            name,
            no_wrap=True,
            justify="right" if name == "try" else "left",
            min_width=_KEY_CHARS if name == "key" else None,
        )
    table.add_column("why or result", overflow="ellipsis")
    for record in records:
        phase = last_phase(record) or ("" if "state" in names else record.state)
        cells = {
            "key": record.key,
            "task": _cut(record.details.task_name or record.task_type, 40),
            "state": record.state,
            "phase": phase,
            "try": str(record.attempt),
            "made": when(record.created_at),
            "connection": f"{record.plugin}/{record.connection}",
        }
        table.add_row(
            *(
                Text(cells[name], style=phase_style(phase) if name == "phase" else "")
                for name in names
            ),
            Text(_cut(why(record) or result_of(record), _WHY_CHARS)),
        )
    return table


def job_page(record: Record, attempts: Sequence[Attempt]) -> Table:
    details = record.details
    phase = last_phase(record)
    tries = f"creates sent: {_creates(record)}"
    deletes = f", deletes sent: {details.delete_tries}" if details.delete_tries else ""
    cancel = record.cancel_reason or ""
    quota = f"{', '.join(record.quotas)} ({record.weight} of its places)" if record.quotas else ""
    return pairs(
        [
            ("job", Text(record.key, style="bold")),
            ("task", details.task_name),
            (
                "type",
                f"{record.task_type} (plugin {record.plugin}, connection {record.connection})",
            ),
            ("state", f"{record.state} since {when(record.updated_at)}"),
            ("phase", Text(phase, style=phase_style(phase))),
            ("why", Text(why(record))),
            ("cancel asked", Text(cancel)),
            ("attempt", f"{record.attempt}; {tries}{deletes}"),
            *(
                ("", Text(f"attempt {each.number}: {each.key}, {_attempt_told(each)}"))
                for each in attempts
                if each.key != record.key
            ),
            ("handle", Text(_compact(_handle(record)))),
            ("link", Text(link_of(record))),
            ("result", Text(_cut(result_of(record), _RESULT_CHARS))),
            ("quota", Text(quota)),
            ("deadline", when(record.deadline)),
            ("flow run", record.flow_run),
            ("root flow run", record.root_run if record.root_run != record.flow_run else ""),
            ("task run", record.task_run),
            ("made", when(record.created_at)),
        ]
    )


def _attempt_told(attempt: Attempt) -> str:
    told = attempt.phase or str(attempt.state)
    return f"{told} ({attempt.reason})" if attempt.reason else told


def step_table(record: Record) -> Table:
    """The phases that people saw, when each began and how long it lasted."""
    steps = record.details.steps
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("phase", "began", "lasted", "reason"):
        table.add_column(name, overflow="fold")
    for step, after in zip_longest(steps, steps[1:]):
        lasted = "" if after is None else span(after.at - step.at)
        name = Text(step.name, style=phase_style(step.name))
        table.add_row(name, when(step.at), lasted, Text(mask_url(step.reason)))
    return table


def pace_lines(paces: Mapping[str, Sequence[Pace]]) -> list[str]:
    """How often live jobs are read, a line per process and connection."""
    return [
        f"{pace.plugin}/{pace.connection}: {pace.jobs:,} live jobs, each read every "
        f"{span(timedelta(seconds=pace.every))}, {span(timedelta(seconds=pace.late))} after it was due"
        for each in paces.values()
        for pace in each
    ]


def job_data(
    record: Record,
    attempts: Sequence[Attempt] | None = None,
    *,
    paces: Mapping[str, Sequence[Pace]] | None = None,
) -> dict[str, Any]:
    """A record as JSON data. Instants are ISO 8601 in UTC; names stay, new ones may come."""
    details = record.details
    phase = details.phase
    error = phase.err if phase is not None else None
    data: dict[str, Any] = {
        "key": record.key,
        "task": details.task_name,
        "task_type": record.task_type,
        "plugin": record.plugin,
        "connection": record.connection,
        "state": record.state.value,
        "phase": last_phase(record) or None,
        "why": why(record) or None,
        "error": None
        if error is None
        else {"code": error.code, "message": mask_url(error.message), "kind": error.kind},
        "attempt": record.attempt,
        "creates_sent": _creates(record),
        "deletes_sent": details.delete_tries,
        "cancel_reason": record.cancel_reason,
        "handle": _handle(record),
        "links": []
        if phase is None
        else [{"name": log.name, "uri": log.uri} for log in phase.info.logs],
        "result": details.outputs.value if details.outputs is not None else None,
        "result_pointer": None
        if details.outputs is None or details.outputs.pointer is None
        else mask_url(details.outputs.pointer),
        "steps": [
            {"name": step.name, "at": _iso(step.at), "reason": mask_url(step.reason)}
            for step in details.steps
        ],
        "quotas": list(record.quotas),
        "weight": record.weight,
        "deadline": _iso(record.deadline),
        "flow_run": record.flow_run or None,
        "root_run": record.root_run or None,
        "task_run": record.task_run or None,
        "runtime": record.runtime,
        "created_at": _iso(record.created_at),
        "updated_at": _iso(record.updated_at),
    }
    if paces is not None:
        data["read_every_seconds"] = _read_every(record, paces.get(record.runtime, ()))
    if attempts is not None:
        data["attempts"] = [
            {
                "attempt": each.number,
                "key": each.key,
                "state": each.state.value,
                "phase": each.phase or None,
                "why": each.reason or None,
            }
            for each in attempts
        ]
    return data


def _read_every(record: Record, paces: Sequence[Pace]) -> float | None:
    """Mean of its connection's jobs in its process; None: it is not read, or it is not known yet."""
    if record.state not in (JobState.CREATED, JobState.CANCELLING):
        return None
    mine = record.plugin, record.connection
    return next((round(p.every, 3) for p in paces if (p.plugin, p.connection) == mine), None)


def _creates(record: Record) -> int:
    """How often create was sent, as far as the ledger knows: a first one that is answered isn't counted."""
    return max(record.details.tries, int(record.handle is not None))


def _handle(record: Record) -> Any:
    """The service's own names for the job, of those that people may see."""
    return None if record.handle is None else _masked(json.loads(record.handle))


def _masked(value: Any) -> Any:
    if isinstance(value, Mapping):
        fields = cast(Mapping[str, Any], value)
        return {name: _masked(part) if is_shown(name) else "***" for name, part in fields.items()}
    if isinstance(value, list):
        return [_masked(part) for part in cast(list[Any], value)]
    return mask_url(value) if isinstance(value, str) else value


def _compact(value: Any) -> str:
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _cut(text: str, chars: int) -> str:
    return text if len(text) <= chars else text[: chars - 1] + "…"


def _iso(instant: datetime | None) -> str | None:
    return None if instant is None else instant.isoformat()
