"""What the engine asks of a ledger. `sql.py` implements it for SQLite and Postgres."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Protocol

from prefect_webapi.contract.errors import LedgerError
from prefect_webapi.contract.keys import JobKey
from prefect_webapi.ledger.records import (
    Draft,
    Drawn,
    JobState,
    Move,
    MoveResult,
    OpenJob,
    Pace,
    QuotaRow,
    Record,
    RuntimeRow,
)

__all__ = ["Reader", "Store"]


class Reader(Protocol):
    """What the ledger tells. Used from one event loop.

    All methods raise `LedgerUnavailable` when the data base can't be reached.
    """

    @property
    def address(self) -> str:
        """Where the ledger is, without credentials."""
        ...

    @property
    def is_shared(self) -> bool:
        """Whether processes on other machines can use it too."""
        ...

    async def open(self) -> None:
        """Connect.

        Raises:
            NoLedger: none is there, and this one only reads.
            LedgerFormatTooNew: a newer version of the package wrote it.
        """
        ...

    async def aclose(self) -> None: ...

    async def get(self, key: JobKey) -> Record | None: ...

    async def select(
        self,
        *,
        states: Collection[JobState] | None = None,
        root_run: str | None = None,
        flow_run: str | None = None,
        runtime: str | None = None,
        newest_first: bool = False,
        limit: int | None = None,
    ) -> Sequence[Record]:
        """Records that match all that is given, oldest first. A corrupt row is logged and left out."""
        ...

    async def open_jobs(self) -> Sequence[OpenJob]:
        """All that are not closed, oldest first."""
        ...

    async def records(self, keys: Collection[JobKey]) -> Sequence[Record]:
        """Those of these jobs. A corrupt row is logged and left out."""
        ...

    async def quotas(self) -> Sequence[QuotaRow]: ...

    async def runtimes(self) -> Sequence[RuntimeRow]: ...

    async def paces(self) -> Mapping[str, Sequence[Pace]]:
        """How often each process, by its id, reads its jobs."""
        ...


class Store(Reader, Protocol):
    """Durable before a write returns; every change of a job is compare-and-set on (state, fence).

    What writes raises `LedgerUnavailable` when the data base can't be reached or can't write.
    """

    async def open(self) -> None:
        """Connect and bring the schema up to date."""
        ...

    async def aclose(self) -> None:
        """Write what is pending and disconnect."""
        ...

    async def intent(self, draft: Draft) -> Drawn:
        """Claim an ordinal and adopt its newest record, or make one.

        A new attempt is made when the newest record is over and failed and was delivered (or the caller
        is a Prefect retry), or when it succeeded, was delivered and results may not be reused.
        """
        ...

    async def intents(self, drafts: Sequence[Draft]) -> Sequence[Drawn | LedgerError]:
        """As `intent` for each of them, in their order; what one of them is refused hurts no other."""
        ...

    async def move(self, move: Move) -> MoveResult: ...

    async def ask_cancel(self, keys: Collection[JobKey], reason: str) -> None:
        """Note for the owners of these jobs that they shall end. A first reason stays."""
        ...

    async def cancels_asked(self, runtime: str) -> Sequence[Record]:
        """Records of this runtime that are not over, not yet CANCELLING, and shall end."""
        ...

    async def set_quota(self, name: str, limit: int) -> None:
        """Make or change the row of a limit; its count stays."""
        ...

    async def note_surplus(self, name: str, slots: int, at: datetime, since: datetime) -> int:
        """Remember that so many slots of a limit are counted and held by nobody; 0: there are none.

        Of all looks the smallest counts.

        Returns:
            How many have been there at every look since `since` or longer: it is the caller's to give them back,
            and nobody else's, as they are forgotten here with this.
        """
        ...

    async def reserve(self, name: str, seconds: float) -> float:
        """Take the next turn of a rate that processes share; the one after it is `seconds` later.

        Returns:
            Real seconds until the turn, 0 or more.
        """
        ...

    async def is_next(self, record: Record, at: datetime, *, waits: bool) -> bool:
        """Whether a job may ask for its places now: no earlier one, of any process on this ledger, goes first.

        Args:
            record: the first of its process that waits for places of these limits.
            waits: it has asked in vain, and those who come later shall know for a few seconds.
        """
        ...

    async def beat(self, runtime: RuntimeRow) -> None:
        """Say that a process is alive."""
        ...

    async def farewell(self, runtime: str) -> None:
        """Say that a process has ended in order."""
        ...

    async def set_paces(self, runtime: str, paces: Sequence[Pace]) -> None:
        """Say how often a process reads its jobs now."""
        ...

    async def durations(self) -> Mapping[tuple[str, str], Sequence[float]]:
        """Seconds that some of the latest jobs took, by plugin and task."""
        ...

    async def set_durations(
        self, of: Mapping[tuple[str, str], Sequence[float]], at: datetime
    ) -> None:
        """Remember them for the next processes, in place of what was known of these tasks."""
        ...

    async def prune(self, before: datetime) -> int:
        """Delete closed records (and claims without records) last changed before; returns how many.

        All attempts of a call go together, and nothing of a root run that has changed anything since
        or has a job that is not closed: its next execution counts on what it finds.
        """
        ...
