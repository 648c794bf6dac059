"""The phases of a remote job and what is known with each. Values only: no I/O, no clock but "now"."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

__all__ = [
    "ErrorKind",
    "ExecutionError",
    "ExternalResource",
    "Phase",
    "PhaseInfo",
    "ReasonInfo",
    "TaskInfo",
    "TaskLog",
]

logger = logging.getLogger(__name__)

REASON_BYTES = 4 * 1024
MESSAGE_BYTES = 64 * 1024
CUSTOM_INFO_BYTES = 64 * 1024

ErrorKind = Literal["user", "system", "unknown"]


class Phase(IntEnum):
    """Where a job is. The numbers may be stored.

    Source: SPEC 2.1.
    """

    UNDEFINED = 0
    NOT_READY = 1
    WAITING_FOR_RESOURCES = 2
    QUEUED = 3
    INITIALIZING = 4
    RUNNING = 5
    SUCCESS = 6
    RETRYABLE_FAILURE = 7
    PERMANENT_FAILURE = 8
    WAITING_FOR_CACHE = 9
    ABORTED = 10

    @property
    def is_terminal(self) -> bool:
        return self in _TERMINAL

    @property
    def is_failure(self) -> bool:
        return self in (Phase.RETRYABLE_FAILURE, Phase.PERMANENT_FAILURE)


_TERMINAL = frozenset(
    {Phase.SUCCESS, Phase.RETRYABLE_FAILURE, Phase.PERMANENT_FAILURE, Phase.ABORTED}
)


def cut_text(text: str, size_bytes: int) -> str:
    """Shorten `text` to at most `size_bytes` of UTF-8, marking the cut with `…`."""
    raw = text.encode("utf-8", "replace")
    if len(raw) <= size_bytes:
        return raw.decode("utf-8")
    return raw[: size_bytes - 3].decode("utf-8", "ignore") + "…"


def _whole(text: str) -> str:
    """`text` without halves of surrogate pairs: JSON may escape one, and no data base holds it."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _short_reason(text: str) -> str:
    return cut_text(text, REASON_BYTES)


def _short_message(text: str) -> str:
    return cut_text(text, MESSAGE_BYTES)


_warned_naive: set[str] = set()


def _aware(value: Any) -> Any:
    """Read a naive time as UTC, with one warning per process."""
    if isinstance(value, datetime) and value.tzinfo is None:
        if not _warned_naive:
            _warned_naive.add("naive")
            logger.warning("a plugin gave a time without a time zone; it is read as UTC")
        return value.replace(tzinfo=UTC)
    return value


def _small_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what JSON can hold and what fits; the rest would hurt every reader of the record."""
    text = _whole(json.dumps(value, default=str, ensure_ascii=False))
    if len(text.encode()) > CUSTOM_INFO_BYTES:
        return {
            "truncated": f"custom_info had {len(text.encode())} bytes, limit {CUSTOM_INFO_BYTES}"
        }
    return json.loads(text)


Text = Annotated[str, AfterValidator(_whole)]
Instant = Annotated[datetime, BeforeValidator(_aware)]
CustomInfo = Annotated[dict[str, Any], AfterValidator(_small_json)]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ExecutionError(_Value):
    """Why a job failed. `kind` says whose fault it is."""

    code: Text = "Unknown"
    message: Annotated[str, AfterValidator(_short_message)] = ""
    kind: ErrorKind = "system"
    error_uri: Text | None = None
    timestamp: Instant | None = None
    worker: Text | None = None


class TaskLog(_Value):
    """A link to the job's page or logs at the remote service."""

    name: Text
    uri: Text
    message_format: Literal["unknown", "csv", "json"] = "unknown"
    ttl: timedelta | None = None
    show_while_pending: bool = False
    hide_once_finished: bool = False


class ExternalResource(_Value):
    """A part of the job that the service reports by itself. `index` is stable across reports."""

    external_id: Text
    index: int = 0
    retry_attempt: int = 0
    phase: Phase = Phase.UNDEFINED
    logs: tuple[TaskLog, ...] = ()
    cache_status: Text | None = None
    custom_info: CustomInfo = Field(default_factory=dict)


class ReasonInfo(_Value):
    """A further reason and when it held."""

    reason: Annotated[str, AfterValidator(_short_reason)]
    occurred_at: Instant | None = None


class TaskInfo(_Value):
    """Links, times and details that go with a phase. `custom_info` is JSON of at most 64 KiB."""

    logs: tuple[TaskLog, ...] = ()
    occurred_at: Instant | None = None
    reported_at: Instant | None = None
    custom_info: CustomInfo = Field(default_factory=dict)
    external_resources: tuple[ExternalResource, ...] = ()
    additional_reasons: tuple[ReasonInfo, ...] = ()


def _in_order(parts: tuple[ExternalResource, ...]) -> list[ExternalResource]:
    """Services list the parts of a job in any order."""
    return sorted(parts, key=lambda part: (part.index, part.retry_attempt, part.external_id))


class PhaseInfo(_Value):
    """What `status` says of a job: immutable; build it with the constructor of the phase.

    Attributes:
        version: tells two reports of one phase apart; the engine raises it when the content changed.
        reason: free text for people, cut at 4 KiB.
        err: with a failure always; an author who forgets it gets code `Unknown`, kind system.
        cleanup_on_failure: the job failed but still runs remotely: it is deleted before the slot
            is given back.

    Source: SPEC 2.2.
    """

    phase: Phase
    version: int = Field(default=0, ge=0)
    reason: Annotated[str, AfterValidator(_short_reason)] = ""
    info: TaskInfo = TaskInfo()
    err: ExecutionError | None = None
    cleanup_on_failure: bool = False

    def model_post_init(self, context: Any, /) -> None:
        if self.phase.is_failure and self.err is None:
            object.__setattr__(self, "err", ExecutionError(message=self.reason))
        if self.info.occurred_at is None:
            now = datetime.now(UTC)
            object.__setattr__(self, "info", self.info.model_copy(update={"occurred_at": now}))

    def same_content(self, other: PhaseInfo) -> bool:
        """Whether a report of `self` after `other` would tell people nothing new."""
        return (
            self.phase == other.phase
            and self.reason == other.reason
            and self.err == other.err
            and self.info.logs == other.info.logs
            and _in_order(self.info.external_resources) == _in_order(other.info.external_resources)
            and self.info.custom_info == other.info.custom_info
            and self.info.additional_reasons == other.info.additional_reasons
        )

    @property
    def kind(self) -> ErrorKind:
        """Whose fault a failure is; `unknown` where nothing failed."""
        return self.err.kind if self.err else "unknown"

    @property
    def has_text(self) -> bool:
        """Whether it holds words of the author's or the service's."""
        info = self.info
        told = info.logs, info.custom_info, info.external_resources, info.additional_reasons
        return bool(self.reason) or self.err is not None or any(told)

    @property
    def may_retry(self) -> bool:
        return self.phase is Phase.RETRYABLE_FAILURE

    # Constructors: the first argument of the non-failures is the reason, so that a state table
    # maps the service's word to a constructor and calls it with the service's message.

    @classmethod
    def undefined(cls, reason: str = "", *, info: TaskInfo = TaskInfo()) -> Self:
        """The state can't be told this time; the job is read again."""
        return cls(phase=Phase.UNDEFINED, reason=reason, info=info)

    @classmethod
    def not_ready(cls, reason: str = "", *, info: TaskInfo = TaskInfo()) -> Self:
        return cls(phase=Phase.NOT_READY, reason=reason, info=info)

    @classmethod
    def waiting_for_resources(cls, reason: str = "", *, info: TaskInfo = TaskInfo()) -> Self:
        return cls(phase=Phase.WAITING_FOR_RESOURCES, reason=reason, info=info)

    @classmethod
    def waiting_for_cache(cls, reason: str = "", *, info: TaskInfo = TaskInfo()) -> Self:
        return cls(phase=Phase.WAITING_FOR_CACHE, reason=reason, info=info)

    @classmethod
    def queued(cls, reason: str = "", *, info: TaskInfo = TaskInfo()) -> Self:
        return cls(phase=Phase.QUEUED, reason=reason, info=info)

    @classmethod
    def initializing(cls, reason: str = "", *, info: TaskInfo = TaskInfo()) -> Self:
        return cls(phase=Phase.INITIALIZING, reason=reason, info=info)

    @classmethod
    def running(cls, reason: str = "", *, info: TaskInfo = TaskInfo()) -> Self:
        return cls(phase=Phase.RUNNING, reason=reason, info=info)

    @classmethod
    def success(cls, reason: str = "", *, info: TaskInfo = TaskInfo()) -> Self:
        return cls(phase=Phase.SUCCESS, reason=reason, info=info)

    @classmethod
    def aborted(cls, reason: str = "", *, info: TaskInfo = TaskInfo()) -> Self:
        """Stopped on request: ours, or a third party's at the service."""
        return cls(phase=Phase.ABORTED, reason=reason, info=info)

    @classmethod
    def _failed(
        cls, phase: Phase, kind: ErrorKind, code: str, message: str, cleanup: bool, info: TaskInfo
    ) -> Self:
        err = ExecutionError(code=code, message=message, kind=kind)
        return cls(phase=phase, reason=message, err=err, cleanup_on_failure=cleanup, info=info)

    @classmethod
    def failure(
        cls, code: str, reason: str = "", *, cleanup: bool = False, info: TaskInfo = TaskInfo()
    ) -> Self:
        """Failed for good by the user's fault: no retry helps."""
        return cls._failed(Phase.PERMANENT_FAILURE, "user", code, reason, cleanup, info)

    @classmethod
    def system_failure(
        cls, code: str, reason: str = "", *, cleanup: bool = False, info: TaskInfo = TaskInfo()
    ) -> Self:
        """Failed for good, not by the user's fault."""
        return cls._failed(Phase.PERMANENT_FAILURE, "system", code, reason, cleanup, info)

    @classmethod
    def retryable_failure(
        cls, code: str, reason: str = "", *, cleanup: bool = False, info: TaskInfo = TaskInfo()
    ) -> Self:
        """Failed by the user's fault; a new attempt may help."""
        return cls._failed(Phase.RETRYABLE_FAILURE, "user", code, reason, cleanup, info)

    @classmethod
    def system_retryable_failure(
        cls, code: str, reason: str = "", *, cleanup: bool = False, info: TaskInfo = TaskInfo()
    ) -> Self:
        """Failed by the service's fault; a new attempt may help."""
        return cls._failed(Phase.RETRYABLE_FAILURE, "system", code, reason, cleanup, info)
