"""What the quickstart was designed to do, what the witnesses saw, and where the two differ. Values only.

How many jobs there were is asked of the job server, never of our own records: its log names every create with the
spec, so a second job for one call would show whatever the ledger believed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefect_webapi.cli.views import last_phase
from prefect_webapi.ledger.records import Record

__all__ = ["DESIGN", "Call", "Part", "Seen", "differences", "gather_calls"]


@dataclass(frozen=True, slots=True)
class Part:
    """How all calls of one kind shall end.

    Attributes:
        calls: how many of them the flow makes.
        phase: of the last attempt. attempts: how many jobs each call makes.
        attempts_again: most jobs when the flow run is run again: what had failed gets another chance.
        prefect: type of the task run's last state.
    """

    calls: int
    phase: str
    attempts: int
    attempts_again: int
    prefect: str


DESIGN: Mapping[str, Part] = {
    "report": Part(17, "SUCCESS", 1, 1, "COMPLETED"),
    "fragile": Part(1, "SUCCESS", 2, 2, "COMPLETED"),
    "hopeless": Part(1, "RETRYABLE_FAILURE", 2, 4, "FAILED"),
    "endless": Part(1, "ABORTED", 1, 1, "CANCELLED"),
}


@dataclass(slots=True)
class Call:
    """One call of the flow, whatever it took.

    Attributes:
        label: as its task run is named: kind and day.
        attempts: its records, first attempt first.
        made: names of the jobs that the server made for it.
        creates: create requests that the server got for it.
    """

    label: str
    attempts: list[Record] = field(default_factory=list[Record])
    made: set[str] = field(default_factory=set[str])
    creates: int = 0

    @property
    def kind(self) -> str:
        return self.label.split()[0]

    @property
    def last(self) -> Record | None:
        return self.attempts[-1] if self.attempts else None


@dataclass(frozen=True, slots=True)
class Seen:
    """What the witnesses say at the end.

    Attributes:
        stats: the job server's counts.
        prefect: task run name to the types of its last states (one per execution of the flow run).
        flow_state: name of the flow run's state.
        was_killed: whether the flow process was killed and the flow run run again.
        links: job key to the address of its page.
    """

    calls: Sequence[Call]
    stats: Mapping[str, Any]
    prefect: Mapping[str, set[str]]
    flow_state: str
    quota: int
    was_killed: bool
    links: Mapping[str, str]

    @property
    def made_twice(self) -> list[str]:
        """Job keys that the server made more than one job for."""
        return sorted(self.stats["duplicates"])

    @property
    def attempts(self) -> int:
        return sum(len(call.attempts) for call in self.calls)


def gather_calls(log: Iterable[Mapping[str, Any]], records: Iterable[Record]) -> list[Call]:
    """The calls of the flow, from the server's log of creates and the ledger's records."""
    labels: dict[str, str] = {}
    calls: defaultdict[str, Call] = defaultdict(lambda: Call(""))
    for entry in log:
        if entry["op"] != "create":
            continue
        spec = entry["body"]["spec"]
        label = f"{spec['kind']} {spec['day']}"
        call = calls[label]
        call.label = label
        call.creates += 1
        if entry["status"] == 201:
            call.made.add(entry["name"])
        labels[entry["name"]] = label
    for record in records:
        if record.key in labels:
            calls[labels[record.key]].attempts.append(record)
    for call in calls.values():
        call.attempts.sort(key=lambda record: (record.ordinal, record.attempt))
    return sorted(calls.values(), key=lambda call: _place(call.label))


def _place(label: str) -> tuple[int, int]:
    kind, day = label.split()
    kinds = list(DESIGN)
    return (kinds.index(kind) if kind in kinds else len(kinds), int(day))


def differences(seen: Seen) -> list[str]:
    """What is not as designed, in words."""
    found: list[str] = []
    for kind, part in DESIGN.items():
        calls = [call for call in seen.calls if call.kind == kind]
        if len(calls) != part.calls:
            found.append(
                f"{kind}: {len(calls)} calls reached the job server, designed: {part.calls}"
            )
        for call in calls:
            found += _differences_of(call, part, seen)
    if unknown := [call.label for call in seen.calls if call.kind not in DESIGN]:
        found.append(f"jobs that nobody designed: {', '.join(unknown)}")
    if seen.made_twice:
        found.append(f"made twice at the job server: {', '.join(seen.made_twice)}")
    if seen.stats["created"] != seen.attempts:
        found.append(
            f"the job server made {seen.stats['created']} jobs, the ledger knows {seen.attempts}"
        )
    if seen.stats["peak_live"] > seen.quota:
        found.append(f"{seen.stats['peak_live']} jobs were live at once, quota: {seen.quota}")
    if seen.stats["live"]:
        found.append(f"{seen.stats['live']} jobs are still live at the job server")
    if seen.flow_state != "Completed":
        found.append(f"the flow run is {seen.flow_state}, designed: Completed")
    return found


def _differences_of(call: Call, part: Part, seen: Seen) -> Iterable[str]:
    phase = last_phase(call.last) if call.last else "unknown to the ledger"
    if phase != part.phase:
        yield f"{call.label}: ended as {phase}, designed: {part.phase}"
    most = part.attempts_again if seen.was_killed else part.attempts
    if not part.attempts <= len(call.made) <= most:
        yield f"{call.label}: {len(call.made)} jobs were made, designed: {part.attempts}"
    if part.prefect not in seen.prefect.get(call.label, set()):
        shown = ", ".join(sorted(seen.prefect.get(call.label, {"nothing"})))
        yield f"{call.label}: Prefect shows {shown}, designed: {part.prefect}"
