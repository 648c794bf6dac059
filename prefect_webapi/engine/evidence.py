"""What an error of the remote service proves, and how long to wait before the next try. Pure rules."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from prefect_webapi.chance import chance
from prefect_webapi.contract.errors import (
    AlreadyExists,
    AuthError,
    NotFound,
    RemoteError,
    RemoteUserError,
    Throttled,
)
from prefect_webapi.contract.phase import PhaseInfo
from prefect_webapi.contract.plugin import Guarantee

__all__ = ["Verdict", "back_off", "failure_of", "judge"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows from an error.

    Attributes:
        then: ``repeat``: the same key again; ``refused``: nothing was made; ``stuck``: can't be known.
        may_exist: whether this try can have made the job.
    """

    then: Literal["repeat", "refused", "stuck"]
    may_exist: bool = False


def judge(
    error: RemoteError,
    guarantee: Guarantee,
    *,
    tries: int,
    max_tries: int,
    on_unknown: Literal["fail", "retry"],
) -> Verdict:
    """What an error of create proves, and what to do: SPEC 2.5's tables. `tries` counts this one."""
    if isinstance(error, Throttled):
        return Verdict("repeat", may_exist=error.job_may_exist)
    if isinstance(error, RemoteUserError | AuthError | NotFound | AlreadyExists):
        return Verdict("refused")
    if not error.job_may_exist:
        return Verdict("repeat" if tries < max_tries else "refused")
    if guarantee == "at-most-once" and on_unknown == "fail":
        return Verdict("stuck", may_exist=True)
    return Verdict("repeat" if tries < max_tries else "stuck", may_exist=True)


def failure_of(error: RemoteError) -> PhaseInfo:
    """The phase that an attempt ends with when this error is final."""
    code, message = error.code or type(error).__name__, error.message
    if isinstance(error, RemoteUserError | AuthError | NotFound | AlreadyExists):
        return PhaseInfo.failure(code, message)
    return PhaseInfo.system_retryable_failure(code, message)


def back_off(tries: int, base: timedelta, cap: timedelta) -> float:
    """Seconds until the next try: exponential with full jitter."""
    ceiling = min(cap.total_seconds(), base.total_seconds() * 2 ** min(tries - 1, 30))
    return chance.uniform(0.1, 1.0) * ceiling
