"""Where a ledger is and how it is reached: URL, engine, and what the data base's errors mean."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from enum import Enum, auto
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from prefect_webapi.contract.errors import ConfigurationError, LedgerUnavailable
from prefect_webapi.ledger.connection import OnLoop, OnThread, WritingConnection

__all__ = ["Backend", "Trouble", "copied"]

BUSY_SECONDS = 5.0  # how long SQLite itself waits for a lock
CONNECT_SECONDS = 10.0
COMMAND_SECONDS = 30.0


class Trouble(Enum):
    """What an error of the data base means for what was being written."""

    PASSING = auto()  # busy, deadlock, connection lost: repeat everything
    LASTING = auto()  # nothing can be written until somebody mends it
    OPERATION = auto()  # one operation is at fault


class Backend:
    """One ledger's data base.

    Args:
        url: `sqlite:///path` or `postgresql://…`; the async driver is put in where it is missing.

    Raises:
        ConfigurationError: it is no URL, of another data base, or in memory only.
    """

    def __init__(self, url: str) -> None:
        self._url = _with_driver(url)
        self.dialect = self._url.get_backend_name()
        self.path: Path | None = None
        if self.dialect == "sqlite":
            self.path = _sqlite_path(self._url)
            if self.path is not None:
                self._url = self._url.set(database=str(self.path))
        self.address = self._address()

    def _address(self) -> str:
        if self.dialect == "sqlite":
            return str(self.path or self._url.database)
        query = self._url.query
        host = self._url.host or query.get("host") or "localhost"
        port = f":{self._url.port}" if self._url.port else ""
        return f"postgresql://{host}{port}/{self._url.database or ''}"

    @property
    def is_missing(self) -> bool:
        """Whether there surely is no data base."""
        return self.path is not None and not self.path.exists()

    def make_engine(self, *, read_only: bool = False) -> AsyncEngine:
        """An engine of its own for one loop.

        Args:
            read_only: it makes no data base, can't change one, and needs no right to write.
        """
        if self.dialect == "sqlite":
            engine = create_async_engine(
                self._read_only_url() if read_only else self._url, **_SQLITE_OPTIONS
            )
            _set_up_sqlite(engine.sync_engine, _forbid_writes if read_only else _prepare_sqlite)
            return engine
        server_settings = {"application_name": "prefect-webapi", "jit": "off"}
        if read_only:
            server_settings["default_transaction_read_only"] = "on"
        return create_async_engine(
            self._url,
            connect_args={
                "timeout": CONNECT_SECONDS,
                "command_timeout": COMMAND_SECONDS,
                "server_settings": server_settings,
            },
            isolation_level="READ COMMITTED",
            hide_parameters=True,
            pool_pre_ping=True,
        )

    def make_writing_connection(
        self, engine: AsyncEngine, on_work: Callable[[], None]
    ) -> WritingConnection:
        """The connection for the writer of the loop that has this engine."""
        if self.dialect != "sqlite":
            return OnLoop(engine, on_work)
        url = self._url.set(drivername="sqlite+pysqlite")
        own = create_engine(url, poolclass=NullPool, **_SQLITE_OPTIONS)
        _set_up_sqlite(own, _prepare_sqlite)
        return OnThread(own, on_work)

    def _read_only_url(self) -> URL:
        if self.path is None:
            return self._url
        query = {"uri": "true", "mode": "ro"}
        wal = self.path.with_name(self.path.name + "-wal")
        if not os.access(self.path.parent, os.W_OK) and not wal.exists():
            # Nobody is writing, and SQLite could not make the files through which it would hear of a writer.
            query["immutable"] = "1"
        return self._url.set(database=f"file:{quote(str(self.path))}", query=query)

    @property
    def read_options(self) -> dict[str, Any]:
        """Execution options of what only reads: each statement by itself, no transaction."""
        return (
            {"webapi_reads": True}
            if self.dialect == "sqlite"
            else {"isolation_level": "AUTOCOMMIT"}
        )

    def make_directory(self) -> None:
        """Make the directory of a SQLite file where it is missing.

        Raises:
            LedgerUnavailable: it can't be made, or is on a disk of another machine.
        """
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise LedgerUnavailable(
                f"the directory of the ledger at {self.address} can't be made: {exc.strerror}. "
                "Name a path in PREFECT_INTEGRATIONS_WEBAPI_LEDGER_URL that this user may write."
            ) from exc
        kind = network_file_system(self.path.parent.resolve(), _mounts())
        if kind:
            raise LedgerUnavailable(
                f"the ledger at {self.address} is on a network file system ({kind}), where SQLite's locks "
                "and its shared memory can't be trusted. Name a path on a disk of this machine in "
                "PREFECT_INTEGRATIONS_WEBAPI_LEDGER_URL, or a Postgres for several machines."
            )

    def judge(self, error: Exception) -> Trouble:
        if not isinstance(error, DBAPIError):
            return Trouble.PASSING if isinstance(error, OSError) else Trouble.OPERATION
        if error.connection_invalidated:
            return Trouble.PASSING
        if self.dialect == "sqlite":
            return _judge_sqlite(str(error.orig))
        return _judge_postgres(getattr(error.orig, "sqlstate", None))

    def unavailable(self, error: Exception) -> LedgerUnavailable:
        """The error that people see: where, what, and what to do."""
        words = _words(error)
        return LedgerUnavailable(
            f"the ledger at {self.address} can't be used: {words}. {self._remedy(words)}"
        )

    def _remedy(self, words: str) -> str:
        if self.dialect != "sqlite":
            return (
                "Check that the server runs and can be reached from here, that the data base exists, "
                "and that the user in PREFECT_INTEGRATIONS_WEBAPI_LEDGER_URL may use it."
            )
        for pattern, remedy in _SQLITE_REMEDIES:
            if pattern in words:
                return remedy
        return "Check the file and the disk it is on."


def copied(exc: LedgerUnavailable) -> LedgerUnavailable:
    """One for each waiter: a raised exception collects its raiser's traceback."""
    error = LedgerUnavailable(*exc.args)
    error.__cause__ = exc.__cause__
    return error


_SQLITE_REMEDIES = (
    ("full", "Free some space on its disk."),
    ("disk I/O error", "Check its disk: free space, quota, file size limit, hardware."),
    ("readonly", "Let this user write the file and its directory, or name another path."),
    (
        "unable to open",
        "Check that the path names a file, and that this user may write it and its directory.",
    ),
    (
        "not a database",
        "Name another path: the file is something else, or was overwritten. It was not touched.",
    ),
    (
        "malformed",
        "The file is damaged: keep a copy, restore it from a backup or name another path.",
    ),
    ("locked", "Another program keeps it locked: end that program. Copying tools may do this too."),
    ("no such table", "Its file was emptied or replaced while in use: start the process again."),
)


def _words(error: Exception) -> str:
    """The driver's own words on one line: no SQL, no values."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    words = str(cause).strip() or type(cause).__name__
    words = re.sub(r"^<class '[^']*'>:\s*", "", words)  # as SQLAlchemy quotes asyncpg
    return " ".join(words.split()).rstrip(".")


def _judge_sqlite(words: str) -> Trouble:
    if "locked" in words or "busy" in words:
        return Trouble.PASSING
    lasting = (
        "full",
        "I/O",
        "readonly",
        "unable to open",
        "not a database",
        "malformed",
        "no such table",
    )
    return Trouble.LASTING if any(word in words for word in lasting) else Trouble.OPERATION


def _judge_postgres(sqlstate: str | None) -> Trouble:
    if sqlstate is None:  # the driver's own: the connection is in no usable state
        return Trouble.PASSING
    # Connection, resources, operator, deadlock, lock not available, system error; 25006 is read-only,
    # as the old primary is after a failover.
    if sqlstate[:2] in ("08", "40", "53", "55", "57", "58") or sqlstate == "25006":
        return Trouble.PASSING
    # Data and constraints are an operation's fault; log-in, missing tables and rights are not.
    return Trouble.OPERATION if sqlstate[:2] in ("21", "22", "23") else Trouble.LASTING


def _with_driver(url: str) -> URL:
    try:
        parsed = make_url(re.sub(r"^postgres:", "postgresql:", url))
    except ArgumentError as exc:
        raise ConfigurationError(
            "the ledger's URL can't be read. Write sqlite:////absolute/path.db or "
            "postgresql://user:password@host/database."
        ) from exc
    match parsed.get_backend_name():
        case "sqlite":
            return parsed.set(drivername="sqlite+aiosqlite")
        case "postgresql":
            query: dict[str, Any] = dict(parsed.query)
            if "sslmode" in query:  # libpq's name; asyncpg takes the same values as `ssl`
                query["ssl"] = query.pop("sslmode")
            return parsed.set(drivername="postgresql+asyncpg", query=query)
        case other:
            raise ConfigurationError(
                f"the ledger can't be kept in {other!r}. Use sqlite:////absolute/path.db or postgresql://…"
            )


def _sqlite_path(url: URL) -> Path | None:
    """The file; None where the URL is SQLite's own `file:` form, which is left as it is."""
    database = url.database or ""
    if database in ("", ":memory:") or ":memory:" in database or url.query.get("mode") == "memory":
        raise ConfigurationError(
            "the ledger can't be kept in memory: it would forget its jobs with the process. "
            "Name a file: sqlite:////absolute/path.db"
        )
    if database.startswith("file:"):
        return None
    return Path(database).expanduser().absolute()


def network_file_system(directory: Path, mounts: str) -> str | None:
    """The type of the network file system that `directory` is on; None: it is on none.

    Args:
        mounts: as in `/proc/mounts`: device, mount point and type in each line, blanks as `\\040`.
    """
    nearest, kind = Path(), ""
    for line in mounts.splitlines():
        _, point, this_kind, *_ = line.split(" ")
        path = Path(point.replace("\\040", " "))
        if directory.is_relative_to(path) and len(path.parts) >= len(nearest.parts):
            nearest, kind = path, this_kind
    return kind if kind in _NETWORK_FILE_SYSTEMS else None


_NETWORK_FILE_SYSTEMS = frozenset(
    "afs ceph cifs fuse.ceph fuse.glusterfs fuse.sshfs gpfs lustre nfs nfs4 smb3 smbfs".split()  # noqa: SIM905
)


def _mounts() -> str:
    try:
        return Path("/proc/mounts").read_text()
    except OSError:  # not Linux: nobody to ask
        return ""


_SQLITE_OPTIONS: Mapping[str, Any] = {
    "connect_args": {"isolation_level": None, "timeout": BUSY_SECONDS},
    "hide_parameters": True,
}


def _set_up_sqlite(engine: Engine, prepare: Callable[[Any, Any], None]) -> None:
    event.listen(engine, "connect", prepare)
    event.listen(engine, "begin", _begin_sqlite)


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    try:
        cursor.execute("PRAGMA journal_mode")
        if cursor.fetchone()[0] != "wal":  # setting it needs the file for oneself
            cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")
    finally:
        cursor.close()


def _forbid_writes(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    try:
        cursor.execute("PRAGMA query_only = ON")
    finally:
        cursor.close()


def _begin_sqlite(conn: Connection) -> None:
    if not conn.get_execution_options().get("webapi_reads"):
        conn.exec_driver_sql("BEGIN IMMEDIATE")
