"""A job's card as Markdown: where it is and why, its phases with times, the service's own words. It reads nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, cast

from prefect_webapi.contract.phase import Phase, PhaseInfo, TaskLog
from prefect_webapi.contract.secrecy import is_shown, looks_secret, mask_url
from prefect_webapi.ledger.records import Record, Step

__all__ = ["Story", "card", "links_of"]

MOST_PARTS = 20
MOST_STEPS = 30
MOST_FIELDS = 20
REASON_CHARS = 300


@dataclass(slots=True)
class Story:
    """What is known of one job.

    Attributes:
        steps: its phases as people saw them, oldest first; the last one is where it is, or how it ended.
        attempt / max_attempts: 0 where nobody knows.
        info: what came with the last phase.
    """

    key: str
    task: str
    attempt: int = 0
    max_attempts: int = 0
    record: Record | None = None
    info: PhaseInfo | None = None
    steps: list[Step] = field(default_factory=list[Step])

    def note(self, name: str, at: datetime, reason: str) -> bool:
        """Add a step; whether that is news. A phase that repeats is the same step with another reason."""
        last = self.steps[-1] if self.steps else None
        if last is not None and (last.name, last.reason) == (name, reason):
            return False
        if last is not None and last.name == name:
            self.steps[-1] = replace(last, reason=reason)
        else:
            self.steps.append(Step(name=name, at=at, reason=reason))
            del self.steps[: -MOST_STEPS - 1]  # one more than is shown tells that there were more
        return True


def card(story: Story) -> tuple[str, str, str]:
    """Key, description and text of the artifact."""
    about = f"Job {story.key} of {story.task}"
    steps = tuple(story.steps)  # they are told from other threads
    blocks = [_now(steps), _facts(story), _phases(steps)]
    if story.info is not None:
        blocks.append(links_of(story.info))
    return f"job-{story.key}", about, "\n\n".join(block for block in blocks if block)


def links_of(info: PhaseInfo) -> str:
    """The job's links as Markdown, one a line; those of its parts after its own."""
    logs = [_link(log) for log in _to_show(info)]
    for part in sorted(info.info.external_resources, key=lambda part: part.index)[:MOST_PARTS]:
        logs += [f"{_plain(part.external_id)}: {_link(log)}" for log in part.logs]
    return "\n\n".join(logs)


def _now(steps: Sequence[Step]) -> str:
    if not steps:
        return ""
    last = steps[-1]
    why = f": {_short(last.reason)}" if last.reason else ""
    return f"**{last.name}** since {_when(last.at)}{why}"


def _facts(story: Story) -> str:
    record, rows = story.record, list[tuple[str, str]]()
    if record is not None:
        rows.append(("service", f"{record.plugin}, connection {record.connection}"))
        if record.handle is not None:
            rows += [("id", text) for text in _handle(json.loads(record.handle))]
        if record.quotas:
            rows.append(("quota", ", ".join(record.quotas)))
    if story.attempt:
        rows.append(("attempt", f"{story.attempt} of {story.max_attempts}"))
    if story.info is not None:
        rows += _fields(story.info.info.custom_info)
        err = story.info.err
        if err is not None:
            rows.append(("error", f"{err.code} ({err.kind})"))
    return _table(("", ""), rows) if rows else ""


def _phases(steps: Sequence[Step]) -> str:
    if not steps:
        return ""
    ends = [*(step.at for step in steps[1:]), None]
    rows = [
        (step.name, _when(step.at), _took(step.at, end), _short(step.reason))
        for step, end in zip(steps, ends, strict=True)
    ]
    left_out = [("…", "", "", "")] if len(rows) > MOST_STEPS else []
    return _table(("phase", "since (UTC)", "took", "why"), [*left_out, *rows[-MOST_STEPS:]])


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(map(_cell, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _fields(given: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the service tells beside its phase (cost and progress among it): plain values, and no secrets."""
    plain = [
        (name, str(value))
        for name, value in given.items()
        if isinstance(value, str | int | float | bool) and not looks_secret(name)
    ]
    return plain[:MOST_FIELDS]


def _handle(value: Any) -> list[str]:
    """The service's names for the job: one a line, of those that people may see."""
    if not isinstance(value, Mapping):
        return [str(value)]
    fields = cast(Mapping[str, Any], value)
    named = {n: v for n, v in fields.items() if v not in (None, "") and is_shown(n)}
    if len(named) == 1:
        return [str(*named.values())]
    return [f"{name}: {text}" for name, text in named.items()]


def _to_show(info: PhaseInfo) -> tuple[TaskLog, ...]:
    logs = info.info.logs
    if info.phase.is_terminal:
        return tuple(log for log in logs if not log.hide_once_finished)
    if info.phase is Phase.RUNNING:
        return logs
    early = tuple(log for log in logs if log.show_while_pending)
    return early or logs[:1]  # a job that only waits has its page, not yet its logs


def _link(log: TaskLog) -> str:
    kept = f" (kept for {log.ttl})" if log.ttl else ""
    return f"[{_plain(log.name)}](<{log.uri}>){kept}"


def _short(text: str) -> str:
    text = mask_url(" ".join(text.split()))
    return text if len(text) <= REASON_CHARS else text[: REASON_CHARS - 1] + "…"


def _cell(text: str) -> str:
    return _plain(_short(text)).replace("|", "\\|")


def _when(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M:%S")


def _took(at: datetime, end: datetime | None) -> str:
    if end is None:
        return ""
    length = end - at
    if length < timedelta(minutes=1):
        return f"{length.total_seconds():.1f} s"
    return str(length).partition(".")[0]


def _plain(text: str) -> str:
    return "".join("\\" + c if c in "[]()<>*_`\\" else c for c in text)
