"""One transaction of the ledger's writer: many intents and moves, some ten statements.

Each statement is a set statement over one JSON parameter: the number of statements is what a
transaction costs, not the number of rows. Jobs of dead processes take one for each flow run that
takes them over, and each state and fence that they were left with. What was asked is answered in
order of arrival. An answer such as "lost" or "full" is no error. Locks are taken in one order by all
processes: groups, claims and jobs, quotas.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from sqlalchemy import Connection, Row, TextClause

from prefect_webapi.contract.errors import LedgerError
from prefect_webapi.contract.keys import (
    JobKey,
    is_visible,
    job_key,
    lowest_free,
)
from prefect_webapi.ledger.records import Draft, Drawn, JobState, Move, MoveResult, Record
from prefect_webapi.ledger.rows import (
    JobRow,
    Owner,
    RecordReader,
    has_failed,
    micros,
    names_of,
    plain_text,
    row_of,
)
from prefect_webapi.ledger.statements import Statements, json_rows

__all__ = ["Intent", "Operation", "Party", "Shift", "run"]

Rows: TypeAlias = Sequence[Row[*tuple[Any, ...]]]

_OVER = frozenset(state for state in JobState if state.is_over)
_ALIVE = frozenset(JobState) - _OVER


class Party:
    """Operations whose answers are waited for together. `over` is done when the last one has its answer."""

    __slots__ = ("_left", "over")

    def __init__(self, size: int) -> None:
        self._left = size
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def one_is_answered(self) -> bool:
        """Whether it was the last one, so that the caller goes on."""
        self._left -= 1
        if not self._left and not self.over.done():  # done: its caller was cancelled
            self.over.set_result(None)
        return not self._left


@dataclass(slots=True, eq=False)
class Intent:
    """A draft that waits for its record. `levels`: the draft's, as they are stored."""

    draft: Draft
    levels: str
    party: Party
    answer: Drawn | LedgerError | None = None


@dataclass(slots=True, eq=False)
class Shift:
    """A move that waits for its outcome. Its columns are made where it is asked for."""

    move: Move
    party: Party
    columns: dict[str, Any] = field(default_factory=dict[str, Any])
    answer: MoveResult | LedgerError | None = None

    def __post_init__(self) -> None:
        self.columns = _columns(self.move)

    @property
    def counts(self) -> bool:
        return self.move.count != 0 and bool(self.move.old.quotas)

    def may_change(self, row: Row[Any]) -> bool:
        return row.state == self.columns["was"] and row.fence == self.columns["had"]

    def was_done(self, row: Row[Any]) -> bool:
        """Whether the row is as this move would have left it."""
        new = self.columns
        return (
            row.state == new["state"]
            and row.fence == new["fence"]
            and row.updated_at == new["updated_at"]
            and new["runtime"] in (None, row.runtime)
        )


Operation: TypeAlias = Intent | Shift


def _columns(move: Move) -> dict[str, Any]:
    old, reason, details = move.old, move.cancel_reason, move.details
    return {
        "key": old.key,
        "was": old.state,
        "had": old.fence,
        "state": move.state,
        "fence": old.fence + 1 if move.take_over else old.fence,
        "runtime": move.runtime,
        "flow_run": None if move.runs is None else move.runs[0],
        "root_run": None if move.runs is None else move.runs[1],
        "task_run": None if move.runs is None else move.runs[2],
        "handle": move.handle,
        "cancel_reason": None if reason is None else plain_text(reason),
        "counted": None,
        "failed": None if details is None else int(has_failed(details)),
        "updated_at": micros(move.at),
        "details": None if details is None else details.to_json(),
    }


def _fetch(conn: Connection, statement: TextClause, values: Iterable[Mapping[str, Any]]) -> Rows:
    return conn.execute(statement, json_rows(values)).all()


def _apply(conn: Connection, statement: TextClause, values: Iterable[Mapping[str, Any]]) -> None:
    conn.execute(statement, json_rows(values))


def run(
    conn: Connection,
    statements: Statements,
    reader: RecordReader,
    operations: Sequence[Operation],
    *,
    repeated: bool,
) -> None:
    """Carry out `operations` (at most one move per key) and set their answers; the caller commits.

    Args:
        repeated: a commit of the same operations had an unknown end, so each may find its own work
            done, and then says so.
    """
    for operation in operations:
        operation.answer = None
    intents = [o for o in operations if isinstance(o, Intent)]
    if intents:
        _draw(conn, statements, reader, intents, repeated)
    shifts = [o for o in operations if isinstance(o, Shift)]
    if shifts:
        _shift(conn, statements, shifts, repeated)


# --- intents ---------------------------------------------------------------------------------


def _draw(
    conn: Connection, sql: Statements, reader: RecordReader, intents: list[Intent], repeated: bool
) -> None:
    if sql.lock_groups is not None:
        bases = sorted({i.draft.base for i in intents})
        _apply(conn, sql.lock_groups, ({"base": base} for base in bases))
    ordinals, newest = _places(conn, sql, intents)
    made: dict[JobKey, Record] = {}
    left: dict[JobKey, tuple[JobRow, Owner]] = {}
    for intent in intents:
        draft, place = intent.draft, (intent.draft.base, ordinals[intent])
        found = newest.get(place)
        if found is None or _is_done_with(found, draft):
            record = _new_record(draft, place[1], 1 if found is None else found.attempt + 1)
            newest[place] = made[record.key] = record
            intent.answer = Drawn(record, made=True)
        elif isinstance(found, Record):
            intent.answer = Drawn(found, made=False)
        else:
            heir = _owner_of(draft) if _inherits(draft, found) else None
            try:
                newest[place] = record = reader.read(found, heir)
            except LedgerError as exc:
                intent.answer = exc
                continue
            made_it = repeated and _was_made_for(draft, record)
            intent.answer = Drawn(record, made=made_it, taken=heir is not None)
            if heir is not None:
                left[record.key] = found, heir
    if made:
        _apply(conn, sql.insert_jobs, map(row_of, made.values()))
    if left:
        lost = _take_over(conn, sql, left)
        for intent in intents:  # also the second one that asked for the same job
            if isinstance(intent.answer, Drawn) and intent.answer.record.key in lost:
                row = lost[intent.answer.record.key]
                intent.answer = Drawn(reader.read(row), made=False)


def _is_done_with(newest: JobRow | Record, draft: Draft) -> bool:
    """Whether a new attempt is due: the newest one is over, and its result can't be handed out."""
    if newest.state not in _OVER:
        return False
    was_delivered = newest.state != JobState.OVER
    failed = newest.failed if isinstance(newest, JobRow) else has_failed(newest.details)
    if failed:
        return was_delivered or draft.is_retry
    return was_delivered and not draft.reuse_results


def _inherits(draft: Draft, found: JobRow) -> bool:
    if found.state not in _ALIVE or found.runtime not in draft.heir_of:
        return False
    return found.fingerprint == draft.fingerprint  # else the call has no right to it


def _owner_of(draft: Draft) -> Owner:
    return Owner(draft.runtime, draft.flow_run, draft.root_run, draft.owner_task_run)


def _take_over(
    conn: Connection, sql: Statements, left: Mapping[JobKey, tuple[JobRow, Owner]]
) -> Mapping[JobKey, JobRow]:
    """Give jobs that were left behind to those who ask. Which were lost to others, as they were before."""
    groups: dict[tuple[Any, ...], list[dict[str, str]]] = defaultdict(list)
    for key, (row, heir) in sorted(left.items()):  # all processes lock in one order
        of_all = row.state, row.fence, heir.runtime, heir.flow_run, heir.root_run
        groups[of_all].append({"key": key, "task_run": heir.task_run})
    changed: set[str] = set()
    for of_all, wanted in groups.items():
        names = ("was", "had", "runtime", "flow_run", "root_run")
        values = json_rows(wanted) | dict(zip(names, of_all, strict=True))
        changed.update(conn.execute(sql.take_jobs, values).scalars().all())
    return {key: row for key, (row, _) in left.items() if key not in changed}


def _was_made_for(draft: Draft, record: Record) -> bool:
    return (
        record.fence == 1
        and record.state is draft.state
        and record.runtime == draft.runtime
        and record.task_run == draft.owner_task_run
        and micros(record.created_at) == micros(record.updated_at) == micros(draft.at)
    )


def _new_record(draft: Draft, ordinal: int, attempt: int) -> Record:
    return Record(
        key=job_key(draft.base, ordinal, attempt),
        base=draft.base,
        ordinal=ordinal,
        attempt=attempt,
        state=draft.state,
        fence=1,
        runtime=draft.runtime,
        plugin=draft.plugin,
        task_type=draft.task_type,
        connection=draft.connection,
        fingerprint=draft.fingerprint,
        quotas=draft.quotas,
        weight=draft.weight,
        flow_run=draft.flow_run,
        root_run=draft.root_run,
        task_run=draft.owner_task_run,
        deadline=draft.deadline,
        created_at=draft.at,
        updated_at=draft.at,
        details=draft.details,
    )


def _places(
    conn: Connection, sql: Statements, intents: list[Intent]
) -> tuple[dict[Intent, int], dict[tuple[str, int], JobRow | Record]]:
    """The ordinal of each intent: its own claim's, or the lowest that no visible claim has; and the newest record of
    each place, if it has any.
    """
    ordinals = {i: 0 for i in intents if i.draft.pinned}
    asked = [(i, _claim_of(i.draft)) for i in intents if not i.draft.pinned]
    known: dict[tuple[str, str, int], int] = {}
    newest: dict[tuple[str, int], JobRow | Record] = {}
    if asked:
        wanted = ({"base": base, "task_run": run, "nth": nth} for _, (base, run, nth) in asked)
        for row in _fetch(conn, sql.own_records, wanted):
            (base, run, nth, ordinal), columns = row[:4], row[4:]
            known[base, run, nth] = ordinal
            if columns[0] is not None:  # a claim without a job
                newest[base, ordinal] = JobRow._make(columns)
        if fresh := [(i, claim) for i, claim in asked if claim not in known]:
            known |= _draw_claims(conn, sql, fresh)
            ordinals |= {i: known[claim] for i, claim in fresh}
    if ordinals:
        places = {
            (i.draft.base, n): {"base": i.draft.base, "ordinal": n} for i, n in ordinals.items()
        }
        for row in map(JobRow._make, _fetch(conn, sql.records, places.values())):
            newest[row.base, row.ordinal] = row
    return {i: known[claim] for i, claim in asked} | ordinals, newest


def _draw_claims(
    conn: Connection, sql: Statements, fresh: Sequence[tuple[Intent, tuple[str, str, int]]]
) -> dict[tuple[str, str, int], int]:
    """The ordinals of claims that are new."""
    groups = {_group_of(i.draft) for i, _ in fresh}
    asked_for = ({"base": base, "execution": execution} for base, execution in groups)
    draws = _Draws(_fetch(conn, sql.claims_of_execution, asked_for))
    drawn: dict[tuple[str, str, int], int] = {}
    claims: list[dict[str, Any]] = []
    for intent, claim in fresh:
        if claim in drawn:  # the same call twice in this batch
            continue
        draft, (base, run, nth) = intent.draft, claim
        drawn[claim] = ordinal = draws.draw(_group_of(draft), intent.levels, draft.levels)
        row = {"base": base, "task_run": run, "nth": nth, "ordinal": ordinal}
        claims.append(row | {"execution": draft.execution, "levels": intent.levels})
    _apply(conn, sql.insert_claims, claims)
    return drawn


def _claim_of(draft: Draft) -> tuple[str, str, int]:
    return draft.base, draft.task_run, draft.nth


def _group_of(draft: Draft) -> tuple[str, str]:
    return draft.base, draft.execution


class _View:
    """The ordinals that callers of equal levels see taken."""

    __slots__ = ("levels", "next_free", "taken")

    def __init__(self, levels: Mapping[str, str], taken: set[int]) -> None:
        self.levels = levels
        self.taken = taken
        self.next_free = lowest_free(taken)

    def take(self, ordinal: int) -> None:
        self.taken.add(ordinal)
        while self.next_free in self.taken:
            self.next_free += 1


class _Draws:
    """Draws ordinals in order; earlier draws of the same batch count as taken."""

    def __init__(self, claims: Rows) -> None:
        self._claims: dict[tuple[str, str], list[tuple[Mapping[str, str], int]]] = defaultdict(list)
        self._views: dict[tuple[str, str], dict[str, _View]] = defaultdict(dict)
        parsed: dict[str, Mapping[str, str]] = {}
        for row in claims:
            if row.levels not in parsed:
                parsed[row.levels] = json.loads(row.levels)
            self._claims[row.base, row.execution].append((parsed[row.levels], row.ordinal))

    def draw(self, group: tuple[str, str], written: str, levels: Mapping[str, str]) -> int:
        claims, views = self._claims[group], self._views[group]
        mine = views.get(written)
        if mine is None:
            taken = {ordinal for theirs, ordinal in claims if is_visible(theirs, levels)}
            mine = views[written] = _View(levels, taken)
        ordinal = mine.next_free
        claims.append((levels, ordinal))
        for view in views.values():
            if is_visible(levels, view.levels):
                view.take(ordinal)
        return ordinal


# --- moves -----------------------------------------------------------------------------------


def _shift(conn: Connection, sql: Statements, shifts: list[Shift], repeated: bool) -> None:
    due = shifts
    if repeated or any(shift.counts for shift in shifts):
        keys = ({"key": shift.move.old.key} for shift in shifts)
        rows = {row.key: row for row in _fetch(conn, sql.lock_jobs, keys)}
        due = [shift for shift in shifts if _may_change(shift, rows, repeated)]
        due = _admit(conn, sql, due, rows)
    if not due:
        return
    values = json_rows(shift.columns for shift in due)
    changed = set(conn.execute(sql.update_jobs, values).scalars().all())
    for shift in due:
        done = shift.move.old.key in changed
        shift.answer = MoveResult.OK if done else MoveResult.LOST


def _may_change(shift: Shift, rows: Mapping[str, Row[Any]], repeated: bool) -> bool:
    row = rows.get(shift.move.old.key)
    if row is not None and shift.may_change(row):
        return True
    done = row is not None and repeated and shift.was_done(row)
    shift.answer = MoveResult.OK if done else MoveResult.LOST
    return False


def _admit(
    conn: Connection, sql: Statements, shifts: list[Shift], rows: Mapping[str, Row[Any]]
) -> list[Shift]:
    """Take and give back places in order of arrival; returns the moves that may go on."""
    wanted = {s: names_of(rows[s.move.old.key].quotas) for s in shifts if s.counts}
    names = {name for quotas in wanted.values() for name in quotas}
    if not names:
        return shifts
    found = _fetch(conn, sql.lock_quotas, ({"name": name} for name in sorted(names)))
    limits = {row.name: row.lim for row in found}
    live = {row.name: row.live for row in found}
    admitted: list[Shift] = []
    for shift in shifts:
        row, quotas = rows[shift.move.old.key], wanted.get(shift, ())
        shift.columns["counted"] = None
        if quotas and shift.move.count > 0 and not row.counted:
            shift.answer = _without_room(quotas, row.weight, live, limits)
            if shift.answer is not None:
                continue
            for name in quotas:
                live[name] += row.weight
            shift.columns["counted"] = 1
        elif quotas and shift.move.count < 0 and row.counted:
            for name in live.keys() & set(quotas):
                live[name] = max(0, live[name] - row.weight)
            shift.columns["counted"] = 0
        admitted.append(shift)
    changed = ({"name": r.name, "live": live[r.name]} for r in found if live[r.name] != r.live)
    values = list(changed)
    if values:
        _apply(conn, sql.update_quotas, values)
    return admitted


def _without_room(
    quotas: Sequence[str], weight: int, live: Mapping[str, int], limits: Mapping[str, int]
) -> MoveResult | LedgerError | None:
    """Why no place can be taken; None: each quota has one."""
    unknown = next((name for name in quotas if name not in limits), None)
    if unknown is not None:
        return LedgerError(
            f"limit {unknown!r} has no row in the ledger: set it before a job takes a place"
        )
    is_full = any(live[name] + weight > limits[name] for name in quotas)
    return MoveResult.FULL if is_full else None
