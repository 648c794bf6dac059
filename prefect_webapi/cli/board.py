"""What the quickstart shows: a board while the jobs run, a table of how they ended. Values in, renderables out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from prefect_webapi.cli import views
from prefect_webapi.cli.verdict import Call, Seen
from prefect_webapi.ledger.records import JobState, Record

__all__ = ["counts_of", "outcome_table", "progress"]

_SHORT = {
    "WAITING_FOR_RESOURCES": "waits",
    "SLOT_HELD": "has a place",
    "RETRYABLE_FAILURE": "failed",
}


def counts_of(records: Sequence[Record], states: Mapping[str, str]) -> str:
    """How many jobs are where, in one line. `states`: the job server's word for each job that it has."""
    words: Counter[str] = Counter()
    for record in records:
        if record.state.is_over:
            words["over"] += 1
        elif record.key in states:
            words[states[record.key]] += 1
        else:
            words["waiting for a place"] += 1
    order = ("waiting for a place", "queued", "initializing", "running", "over")
    names = [name for name in order if words[name]] + sorted(set(words) - set(order))
    return ", ".join(f"{words[name]} {name}" for name in names) or "no job yet"


def progress(calls: Sequence[Call], states: Mapping[str, str], counts: str) -> Group:
    """A line per call whose job was sent, below the counts."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("job", "attempt", "phase", ""):
        table.add_column(name, no_wrap=True)
    for call in calls:
        last = call.last
        if last is None:
            continue
        phase = _phase_now(last, states)
        table.add_row(
            call.label,
            str(last.attempt),
            Text(phase, style=views.phase_style(phase)),
            Text(views.why(last), style="dim", overflow="ellipsis"),
        )
    return Group(counts, "", table)


def _phase_now(record: Record, states: Mapping[str, str]) -> str:
    """Phases of a living job are in its process's memory: the server's word is newer than the ledger's."""
    if record.state.is_over:
        return views.last_phase(record)
    if record.state is JobState.CANCELLING:
        return "CANCELLING"
    return states.get(record.key, "").upper() or views.last_phase(record)


def outcome_table(seen: Seen, *, with_address: bool) -> Table:
    """A line per call: attempts, phases with times, result or reason, link."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("job", no_wrap=True)
    table.add_column("attempts", justify="right")
    table.add_column("phases, seconds since the call", overflow="fold")
    table.add_column("result or reason", overflow="fold")
    table.add_column("link", no_wrap=True)
    for call in seen.calls:
        last = call.last
        if last is None:
            table.add_row(call.label, "0", "", "unknown to the ledger", "")
            continue
        style = views.phase_style(views.last_phase(last))
        link = views.link_of(last) or seen.links.get(last.key, "")
        table.add_row(
            Text(call.label, style=style),
            str(len(call.attempts)),
            _phases(call),
            Text(_told(last)),
            Text(
                link if with_address or not link else "page", style=f"link {link}" if link else ""
            ),
        )
    return table


def _told(record: Record) -> str:
    if not views.ended_well(record) or record.details.outputs is None:
        return views.why(record)
    return json.dumps(record.details.outputs.value["data"])


def _phases(call: Call) -> Text:
    steps = [
        step for record in call.attempts for step in record.details.steps if step.name != "ADMITTED"
    ]
    text = Text()
    for step in steps:
        name = _SHORT.get(step.name) or step.name.lower().replace("_", " ")
        seconds = (step.at - steps[0].at).total_seconds()
        text.append("" if step is steps[0] else ", ", style="dim")
        text.append(name, style=views.phase_style(step.name))
        text.append(f" {seconds:.1f}")
    return text
