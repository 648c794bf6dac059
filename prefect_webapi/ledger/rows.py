"""How a record is written as a row and read back, and what becomes of one that can't be read."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from pydantic import ValidationError

from prefect_webapi.contract.errors import LedgerError, LedgerFormatTooNew
from prefect_webapi.contract.keys import Base, Fingerprint, JobKey
from prefect_webapi.contract.phase import Phase
from prefect_webapi.ledger import schema
from prefect_webapi.ledger.records import FORMAT, Details, JobState, Record

__all__ = ["COLUMNS", "RecordReader", "from_micros", "has_failed", "micros", "names_of"]
__all__ += ["names_text", "plain_text", "row_of"]

logger = logging.getLogger(__name__)

COLUMNS = tuple(schema.job.columns.keys())
"""Of a job's row, in the order in which it is read."""

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

    def read(self, row: Sequence[Any], changes: Mapping[str, Any] | None = None) -> Record:
        """The record of a row of `COLUMNS`; with `changes`, as it will be once these have other values.

        Raises:
            LedgerFormatTooNew: a newer version of the package wrote it.
            LedgerError: it is corrupt.
        """
        stored = dict(zip(COLUMNS, row, strict=True))
        stored.update(changes or {})
        try:
            details = Details.from_json(stored["details"])
            if details.format > FORMAT:
                raise self._too_new(stored["key"], details.format)
            return _record(stored, details)
        except (ValidationError, ValueError, TypeError, OverflowError) as exc:
            newer = _format_of(stored["details"])
            if newer > FORMAT:
                raise self._too_new(stored["key"], newer) from exc
            raise self._corrupt(stored["key"], exc) from exc

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


def _record(stored: Mapping[str, Any], details: Details) -> Record:
    deadline = stored["deadline"]
    return Record(
        key=JobKey(stored["key"]),
        base=Base(stored["base"]),
        ordinal=stored["ordinal"],
        attempt=stored["attempt"],
        state=JobState(stored["state"]),
        fence=stored["fence"],
        runtime=stored["runtime"],
        plugin=stored["plugin"],
        task_type=stored["task_type"],
        connection=stored["connection"],
        fingerprint=Fingerprint(stored["fingerprint"]),
        quotas=names_of(stored["quotas"]),
        weight=stored["weight"],
        counted=bool(stored["counted"]),
        handle=stored["handle"],
        cancel_reason=stored["cancel_reason"],
        flow_run=stored["flow_run"],
        root_run=stored["root_run"],
        task_run=stored["task_run"],
        deadline=None if deadline is None else from_micros(deadline),
        created_at=from_micros(stored["created_at"]),
        updated_at=from_micros(stored["updated_at"]),
        details=details,
    )
