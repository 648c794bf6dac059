"""The set statements of the writer: each takes a list of rows as one JSON parameter.

SQLite and Postgres differ in how such a parameter is read as rows and in how rows are locked, and in
nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic_core import to_json
from sqlalchemy import text

from prefect_webapi.ledger.rows import JobRow

__all__ = ["Statements", "json_rows"]

_JOB = {
    "key": "text",
    "base": "text",
    "ordinal": "int",
    "attempt": "int",
    "state": "text",
    "fence": "int",
    "runtime": "text",
    "plugin": "text",
    "task_type": "text",
    "connection": "text",
    "fingerprint": "text",
    "quotas": "text",
    "weight": "int",
    "counted": "smallint",
    "failed": "smallint",
    "handle": "text",
    "cancel_reason": "text",
    "flow_run": "text",
    "root_run": "text",
    "task_run": "text",
    "deadline": "bigint",
    "created_at": "bigint",
    "updated_at": "bigint",
    "details": "text",
}
_SHIFT = {"was": "text", "had": "int"} | {
    name: _JOB[name]
    for name in (
        *("key", "state", "fence", "runtime", "handle", "cancel_reason", "counted", "failed"),
        *("flow_run", "root_run", "task_run", "updated_at", "details"),
    )
}


class Statements:
    """The statements of one dialect, made once: SQLAlchemy and the driver keep them compiled."""

    def __init__(self, dialect: str) -> None:
        def values(**columns: str) -> str:
            """The JSON parameter `v`, a list of objects, as rows."""
            if dialect == "postgresql":
                names = ", ".join(f"{name} {kind}" for name, kind in columns.items())
                return f"jsonb_to_recordset(CAST(:v AS jsonb)) AS v({names})"
            names = ", ".join(f"json_extract(value, '$.{name}') AS {name}" for name in columns)
            return f"(SELECT {names} FROM json_each(:v)) AS v"

        def for_update(table: str) -> str:  # SQLite's transaction has the whole data base locked
            return f" FOR UPDATE OF {table}" if dialect == "postgresql" else ""

        job_columns = ", ".join(_JOB)
        kept = ("runtime", "flow_run", "root_run", "task_run", "handle", "cancel_reason")
        kept += ("counted", "failed", "details")
        keep = ", ".join(f"{name} = coalesce(v.{name}, webapi_job.{name})" for name in kept)
        claim = {"base": "text", "task_run": "text", "nth": "int"}

        self.lock_groups = None
        if dialect == "postgresql":  # as above
            self.lock_groups = text(
                f"INSERT INTO webapi_group (base, draws) SELECT base, 1 FROM {values(base='text')}"
                " ORDER BY base ON CONFLICT (base) DO UPDATE SET draws = webapi_group.draws + 1"
            )
        columns = ", ".join(f"j.{name}" for name in JobRow._fields)
        self.own_records = text(
            f"SELECT c.base, c.task_run, c.nth, c.ordinal, {columns} FROM {values(**claim)}"
            " JOIN webapi_claim c ON c.base = v.base AND c.task_run = v.task_run AND c.nth = v.nth"
            " LEFT JOIN webapi_job j ON j.base = c.base AND j.ordinal = c.ordinal ORDER BY j.attempt"
        )
        self.claims_of_execution = text(
            "SELECT c.base, c.execution, c.levels, c.ordinal"
            f" FROM {values(base='text', execution='text')} JOIN webapi_claim c"
            " ON c.base = v.base AND c.execution = v.execution"
        )
        self.insert_claims = text(
            "INSERT INTO webapi_claim (base, task_run, nth, execution, levels, ordinal)"
            " SELECT base, task_run, nth, execution, levels, ordinal"
            f" FROM {values(**claim, execution='text', levels='text', ordinal='int')} WHERE true"
        )
        self.records = text(
            f"SELECT {columns} FROM {values(base='text', ordinal='int')} JOIN webapi_job j"
            " ON j.base = v.base AND j.ordinal = v.ordinal ORDER BY j.attempt"
        )
        self.insert_jobs = text(
            f"INSERT INTO webapi_job ({job_columns}) SELECT {job_columns}"
            f" FROM {values(**_JOB)} WHERE true"
        )
        self.lock_jobs = text(
            "SELECT j.key, j.state, j.fence, j.runtime, j.quotas, j.weight, j.counted, j.updated_at"
            f" FROM {values(key='text')} JOIN webapi_job j ON j.key = v.key"
            f" ORDER BY j.key{for_update('j')}"
        )
        self.lock_quotas = text(
            f"SELECT q.name, q.live, q.lim FROM {values(name='text')} JOIN webapi_quota q"
            f" ON q.name = v.name ORDER BY q.name{for_update('q')}"
        )
        self.update_jobs = text(
            "UPDATE webapi_job SET state = v.state, fence = v.fence, updated_at = v.updated_at,"
            f" {keep} FROM {values(**_SHIFT)} WHERE webapi_job.key = v.key"
            " AND webapi_job.state = v.was AND webapi_job.fence = v.had RETURNING webapi_job.key"
        )
        # Of one process mostly: what its jobs have in common is said once.
        self.take_jobs = text(
            "UPDATE webapi_job SET fence = webapi_job.fence + 1, runtime = :runtime, flow_run = :flow_run,"
            f" root_run = :root_run, task_run = v.task_run FROM {values(key='text', task_run='text')}"
            " WHERE webapi_job.key = v.key AND webapi_job.state = :was AND webapi_job.fence = :had"
            " RETURNING webapi_job.key"
        )
        self.update_quotas = text(
            f"UPDATE webapi_quota SET live = v.live FROM {values(name='text', live='int')}"
            " WHERE webapi_quota.name = v.name"
        )
        self.ask_cancel = text(
            "UPDATE webapi_job SET cancel_reason = :reason"
            f" WHERE cancel_reason IS NULL AND key IN (SELECT key FROM {values(key='text')})"
            " AND state NOT IN ('OVER', 'DELIVERED', 'CLOSED')"
        )
        pairs = {"base": "text", "ordinal": "int"}
        # Each root run is deleted as a whole: as long as one is at work, a new execution may count
        # on all it has made. So is each call: a later attempt must not find the earlier ones gone.
        self.old_places = text(
            "WITH busy AS (SELECT DISTINCT root_run FROM webapi_job"
            " WHERE root_run <> '' AND (state <> 'CLOSED' OR updated_at >= :before))"
            " SELECT j.base, j.ordinal FROM webapi_job j"
            " LEFT JOIN busy ON busy.root_run = j.root_run"
            " WHERE busy.root_run IS NULL AND j.state = 'CLOSED' AND j.updated_at < :before"
            " GROUP BY j.base, j.ordinal ORDER BY j.base, j.ordinal"
        )
        self.lock_old_groups = text(
            "SELECT g.base FROM webapi_group g WHERE g.base IN"
            f" (SELECT base FROM {values(**pairs)}) ORDER BY g.base{for_update('g')}"
        )
        self.delete_jobs = text(
            "DELETE FROM webapi_job AS j"
            f" WHERE (j.base, j.ordinal) IN (SELECT base, ordinal FROM {values(**pairs)})"
            " AND NOT EXISTS (SELECT 1 FROM webapi_job k WHERE k.base = j.base"
            " AND k.ordinal = j.ordinal AND (k.state <> 'CLOSED' OR k.updated_at >= :before))"
        )
        self.delete_claims = text(
            "DELETE FROM webapi_claim AS c"
            f" WHERE c.base IN (SELECT base FROM {values(**pairs)}) AND NOT EXISTS"
            " (SELECT 1 FROM webapi_job j WHERE j.base = c.base AND j.ordinal = c.ordinal)"
        )
        self.delete_groups = text(
            "DELETE FROM webapi_group AS g"
            f" WHERE g.base IN (SELECT base FROM {values(**pairs)})"
            " AND NOT EXISTS (SELECT 1 FROM webapi_claim c WHERE c.base = g.base)"
            " AND NOT EXISTS (SELECT 1 FROM webapi_job j WHERE j.base = g.base)"
        )


def json_rows(values: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The parameter of a set statement."""
    return {"v": to_json(list(values)).decode()}
