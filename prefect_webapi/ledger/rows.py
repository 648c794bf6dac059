"""How a record is written as a row and read back, and what becomes of one that can't be read."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple

from pydantic import ValidationError

from prefect_webapi.contract.errors import LedgerError, LedgerFormatTooNew
from prefect_webapi.contract.keys import Base, Fingerprint, JobKey
from prefect_webapi.contract.phase import Phase
from prefect_webapi.ledger.records import FORMAT, Details, JobState, Record

__all__ = ["JobRow", "Owner", "RecordReader", "from_micros", "has_failed", "micros", "names_of"]
__all__ += ["names_text", "plain_text", "row_of"]

logger = logging.getLogger(__name__)


class JobRow(NamedTuple):
    """A job's row: the columns of its table, in their order, as they are stored."""

    key: str
    base: str
    ordinal: int
    attempt: int
    state: str
    fence: int
    runtime: str
    plugin: str
    task_type: str
    connection: str
    fingerprint: str
    quotas: str
    weight: int
    counted: int
    failed: int
    handle: str | None
    cancel_reason: str | None
    flow_run: str
    root_run: str
    task_run: str
    deadline: int | None
    created_at: int
    updated_at: int
    details: str


class Owner(NamedTuple):
    """Who drives a job, and the runs that it belongs to."""

    runtime: str
    flow_run: str
    root_run: str
    task_run: str


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def micros(at: datetime) -> int:
    """Whole microseconds since 1970: exact, and equal on both data bases."""
    return (at - _EPOCH) // _MICROSECOND


def from_micros(stored: int) -> datetime:
    return _EPOCH + timedelta(microseconds=stored)


def plain_text(text: str) -> str:
    """What both data bases can hold: no NUL, no half of a surrogate pair."""
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def names_text(names: Iterable[str]) -> str:
    """Names of limits as one column holds them: equal names, equal text."""
    return json.dumps(list(names))


@lru_cache(maxsize=1024)
def names_of(stored: str) -> tuple[str, ...]:
    return tuple(json.loads(stored))


def has_failed(details: Details) -> bool:
    """Whether a record with these details, once over, did not succeed."""
    return details.phase is None or details.phase.phase is not Phase.SUCCESS


def row_of(record: Record) -> dict[str, Any]:
    """The columns of a record, as JSON data."""
    return {
        "key": record.key,
        "base": record.base,
        "ordinal": record.ordinal,
        "attempt": record.attempt,
        "state": record.state,
        "fence": record.fence,
        "runtime": record.runtime,
        "plugin": record.plugin,
        "task_type": record.task_type,
        "connection": record.connection,
        "fingerprint": record.fingerprint,
        "quotas": names_text(record.quotas),
        "weight": record.weight,
        "counted": int(record.counted),
        "failed": int(has_failed(record.details)),
        "handle": record.handle,
        "cancel_reason": record.cancel_reason,
        "flow_run": record.flow_run,
        "root_run": record.root_run,
        "task_run": record.task_run,
        "deadline": None if record.deadline is None else micros(record.deadline),
        "created_at": micros(record.created_at),
        "updated_at": micros(record.updated_at),
        "details": record.details.to_json(),
    }


class RecordReader:
    """Reads rows; one that can't be read is logged once and hurts its own job only."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._logged: set[str] = set()

    def read(self, row: Sequence[Any], heir: Owner | None = None) -> Record:
        """The record of a job's row; with `heir`, as it will be once that one has taken it over.

        Raises:
            LedgerFormatTooNew: a newer version of the package wrote it.
            LedgerError: it is corrupt.
        """
        job = JobRow._make(row)
        try:
            details = Details.from_json(job.details)
            if details.format > FORMAT:
                raise self._too_new(job.key, details.format)
            return _record(job, details, heir)
        except (ValidationError, ValueError, TypeError, OverflowError) as exc:
            newer = _format_of(job.details)
            if newer > FORMAT:
                raise self._too_new(job.key, newer) from exc
            raise self._corrupt(job.key, exc) from exc

    def read_all(self, rows: Iterable[Sequence[Any]]) -> list[Record]:
        """The records that can be read; the others are logged and left out."""
        records: list[Record] = []
        for row in rows:
            try:
                records.append(self.read(row))
            except LedgerError:
                continue  # logged where it was found
        return records

    def _too_new(self, key: str, found: int) -> LedgerFormatTooNew:
        error = LedgerFormatTooNew(
            f"job {key} in the ledger at {self._address} has format {found}, this version of "
            f"prefect-webapi reads up to {FORMAT}: a newer version has written it. Upgrade "
            "prefect-webapi here, or let a process of the newer version finish the job."
        )
        self._log(key, error)
        return error

    def _corrupt(self, key: str, why: Exception) -> LedgerError:
        kind = "; ".join(sorted(_reasons(why)))
        error = LedgerError(
            f"job {key} in the ledger at {self._address} can't be read ({kind}). Other jobs are "
            "not touched. Look for the job of this name at the remote service, then mend or delete the "
            "row in table webapi_job."
        )
        self._log(key, error)
        return error

    def _log(self, key: str, error: LedgerError) -> None:
        if key not in self._logged:
            self._logged.add(key)
            logger.error("%s", error, extra={"job_key": key})


def _reasons(why: Exception) -> set[str]:
    """What was wrong, without the values: they are the user's."""
    if isinstance(why, ValidationError):
        return {f"{'.'.join(map(str, e['loc'])) or 'details'}: {e['type']}" for e in why.errors()}
    return {str(why)}


def _format_of(details: Any) -> int:
    try:
        found = json.loads(details)["format"]
    except (ValueError, TypeError, KeyError):
        return 0
    return found if isinstance(found, int) else 0


def _record(row: JobRow, details: Details, heir: Owner | None) -> Record:
    owner, fence = (row, row.fence) if heir is None else (heir, row.fence + 1)
    return Record(
        key=JobKey(row.key),
        base=Base(row.base),
        ordinal=row.ordinal,
        attempt=row.attempt,
        state=JobState(row.state),
        fence=fence,
        runtime=owner.runtime,
        plugin=row.plugin,
        task_type=row.task_type,
        connection=row.connection,
        fingerprint=Fingerprint(row.fingerprint),
        quotas=names_of(row.quotas),
        weight=row.weight,
        counted=bool(row.counted),
        handle=row.handle,
        cancel_reason=row.cancel_reason,
        flow_run=owner.flow_run,
        root_run=owner.root_run,
        task_run=owner.task_run,
        deadline=None if row.deadline is None else from_micros(row.deadline),
        created_at=from_micros(row.created_at),
        updated_at=from_micros(row.updated_at),
        details=details,
    )
