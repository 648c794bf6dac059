"""The ledger's tables, and how an older ledger is brought up to date.

Instants are whole microseconds since 1970 (UTC) and flags are 0 or 1, so that both data bases hold
and compare the same exact values.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    Double,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    inspect,
    text,
)

from prefect_webapi.contract.errors import LedgerError, LedgerFormatTooNew, NoLedger

if TYPE_CHECKING:
    from alembic.config import Config

__all__ = [
    "MIGRATIONS",
    "REVISION",
    "VERSION_TABLE",
    "bring_up_to_date",
    "claim",
    "group",
    "job",
    "metadata",
]
__all__ += ["duration", "look_at", "migrations", "queue", "quota", "rate", "reading", "runtime"]
__all__ += ["surplus"]

REVISION = "0004"
"""The newest revision in `migrations/versions`; a test compares both."""

VERSION_TABLE = "webapi_schema_version"
MIGRATIONS = Path(__file__).with_name("migrations")
_UPGRADE_LOCK = 0x7765626170690001  # "webapi": one upgrade at a time in one Postgres data base

metadata = MetaData()

# One row per base: its lock orders the draws of all processes. Postgres only: SQLite has one lock for all.
group = Table(
    "webapi_group",
    metadata,
    Column("base", Text, primary_key=True),
    Column("draws", BigInteger, nullable=False),
)

# Which ordinal a call got. Only ever inserted, never moved; deleted with the records.
claim = Table(
    "webapi_claim",
    metadata,
    Column("base", Text, primary_key=True),
    Column("task_run", Text, primary_key=True),
    Column("nth", Integer, primary_key=True),
    Column("execution", Text, nullable=False),
    Column("levels", Text, nullable=False),  # JSON object: run id to state id
    Column("ordinal", Integer, nullable=False),
    Index("webapi_claim_execution", "base", "execution"),
)

job = Table(
    "webapi_job",
    metadata,
    Column("key", Text, primary_key=True),
    Column("base", Text, nullable=False),
    Column("ordinal", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("state", Text, nullable=False),
    Column("fence", Integer, nullable=False),
    Column("runtime", Text, nullable=False),
    Column("plugin", Text, nullable=False),
    Column("task_type", Text, nullable=False),
    Column("connection", Text, nullable=False),
    Column("fingerprint", Text, nullable=False),
    Column("quotas", Text, nullable=False),  # JSON: names of limits, sorted
    Column("weight", Integer, nullable=False),
    Column("counted", SmallInteger, nullable=False),
    Column(
        "failed", SmallInteger, nullable=False
    ),  # the phase is not SUCCESS; means something once over
    Column("handle", Text),
    Column("cancel_reason", Text),
    Column("flow_run", Text, nullable=False),
    Column("root_run", Text, nullable=False),
    Column("task_run", Text, nullable=False),
    Column("deadline", BigInteger),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("details", Text, nullable=False),  # JSON
    UniqueConstraint("base", "ordinal", "attempt", name="webapi_job_identity"),
    Index("webapi_job_root_run", "root_run"),
    Index("webapi_job_flow_run", "flow_run"),
)
# Few rows are open or to be cancelled at a time, so these two stay small.
Index(
    "webapi_job_open",
    job.c.runtime,
    job.c.state,
    sqlite_where=text("state <> 'CLOSED'"),
    postgresql_where=text("state <> 'CLOSED'"),
)
Index(
    "webapi_job_cancel",
    job.c.runtime,
    sqlite_where=text("cancel_reason IS NOT NULL"),
    postgresql_where=text("cancel_reason IS NOT NULL"),
)

# The first of those that wait for the same limits in one process.
Index(
    "webapi_job_waiting",
    job.c.runtime,
    job.c.quotas,
    job.c.created_at,
    sqlite_where=text("state = 'SLOT_REQUESTED'"),
    postgresql_where=text("state = 'SLOT_REQUESTED'"),
)

# live <= lim is no constraint: a limit may be lowered below what is taken.
quota = Table(
    "webapi_quota",
    metadata,
    Column("name", Text, primary_key=True),
    Column("live", Integer, nullable=False),
    Column("lim", Integer, nullable=False),
    CheckConstraint("live >= 0", name="webapi_quota_live"),
)

# When a process last asked in vain for places of these limits.
queue = Table(
    "webapi_queue",
    metadata,
    Column("runtime", Text, primary_key=True),
    Column("quotas", Text, primary_key=True),
    Column("asked_at", BigInteger, nullable=False),
)

# Slots that Prefect counted and nobody held, each time somebody looked since then; gone once they are given back.
surplus = Table(
    "webapi_surplus",
    metadata,
    Column("name", Text, primary_key=True),
    Column("slots", Integer, nullable=False),
    Column("since", BigInteger, nullable=False),
    CheckConstraint("slots > 0", name="webapi_surplus_slots"),
)

# When the next call of a rate that processes share may leave: microseconds of the backend's clock for it.
rate = Table(
    "webapi_rate",
    metadata,
    Column("name", Text, primary_key=True),
    Column("free_at", BigInteger, nullable=False),
)

runtime = Table(
    "webapi_runtime",
    metadata,
    Column("id", Text, primary_key=True),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("born", Double, nullable=False),
    Column("started", BigInteger, nullable=False),
    Column("last_beat", BigInteger, nullable=False),
)

# How long some of the latest jobs of a task took.
duration = Table(
    "webapi_duration",
    metadata,
    Column("plugin", Text, primary_key=True),
    Column("task", Text, primary_key=True),
    Column("seconds", Text, nullable=False),  # JSON: numbers
    Column("updated_at", BigInteger, nullable=False),
)

# How often a process reads the live jobs of a connection: means, in seconds.
reading = Table(
    "webapi_reading",
    metadata,
    Column("runtime", Text, primary_key=True),
    Column("plugin", Text, primary_key=True),
    Column("connection", Text, primary_key=True),
    Column("jobs", Integer, nullable=False),
    Column("every", Double, nullable=False),
    Column("late", Double, nullable=False),
)


def bring_up_to_date(conn: Connection, address: str) -> None:
    """Apply the migrations that are missing, inside the transaction of `conn`.

    Two processes may do so at once: the second one waits and finds the work done. SQLite's
    transaction must have been begun as IMMEDIATE.

    Raises:
        LedgerFormatTooNew: a migration was applied that this version does not know.
    """
    if conn.dialect.name == "postgresql":
        conn.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _UPGRADE_LOCK})
    found = _revision(conn)
    if found == REVISION:
        # A ledger that can only be read is found out now, not with the first job.
        conn.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = version_num"))
        return

    from alembic import command  # slow to import, and seldom needed

    if found is not None:
        _refuse_newer(found, address)
    command.upgrade(migrations(conn), REVISION)


def migrations(conn: Connection) -> Config:
    """What Alembic's commands take, to work inside the transaction of `conn`."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = conn
    return config


def look_at(conn: Connection, address: str) -> None:
    """Find out whether this version can read the ledger as it is; nothing is changed.

    Raises:
        NoLedger: none is there.
        LedgerFormatTooNew: a migration was applied that this version does not know.
        LedgerError: it is so old that it must be brought up to date first.
    """
    found = _revision(conn)
    if found is None:
        raise NoLedger(address)
    if found == REVISION:
        return
    _refuse_newer(found, address)
    there = inspect(conn)
    for table in metadata.tables.values():
        columns = there.get_columns(table.name) if there.has_table(table.name) else []
        if not {column.name for column in table.columns} <= {column["name"] for column in columns}:
            raise LedgerError(
                f"the ledger at {address} has schema {found}; this version of prefect-webapi reads {REVISION}. The "
                "first job that runs with this version brings it up to date; until then look at it with the version "
                "that wrote it."
            )


def _refuse_newer(found: str, address: str) -> None:
    from alembic.script import ScriptDirectory  # slow to import, and seldom needed

    known = {script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions()}
    if found not in known:
        raise LedgerFormatTooNew(
            f"the ledger at {address} has schema {found}, this version of prefect-webapi knows "
            f"only up to {REVISION}: a newer version has written it. Upgrade prefect-webapi here, or "
            "name another ledger."
        )


def _revision(conn: Connection) -> str | None:
    if not inspect(conn).has_table(VERSION_TABLE):
        return None
    return conn.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()
