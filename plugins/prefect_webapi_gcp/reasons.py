"""What BigQuery's reasons mean: of a refused request, and of a job that failed."""

from collections.abc import Callable
from datetime import timedelta
from functools import partial

from prefect_webapi import (
    Answer,
    AuthError,
    PhaseInfo,
    RemoteError,
    RemoteUserError,
    Throttled,
    error_of_status,
)

THROTTLES = {  # reason: how long to wait, where BigQuery's own backing off is not enough
    "rateLimitExceeded": None,
    "jobRateLimitExceeded": None,
    "quotaExceeded": timedelta(minutes=10),  # of a day, mostly
}
USER_REASONS = (
    *("accessDenied", "billingNotEnabled", "billingTierLimitExceeded", "blocked", "duplicate"),
    *("invalid", "invalidQuery", "invalidUser", "notFound", "notImplemented", "policyViolation"),
    *("resourcesExceeded", "responseTooLarge"),
)
SYSTEM_REASONS = (
    *("backendError", "internalError", "jobBackendError", "jobInternalError"),
    *("resourceInUse", "tableUnavailable"),
)
ENDS: dict[str, Callable[..., PhaseInfo]] = {
    **{reason: partial(PhaseInfo.failure, reason) for reason in USER_REASONS},
    **{reason: partial(PhaseInfo.system_retryable_failure, reason) for reason in SYSTEM_REASONS},
    **{reason: partial(PhaseInfo.retryable_failure, reason) for reason in THROTTLES},
    "stopped": PhaseInfo.aborted,
    "timeout": partial(PhaseInfo.failure, "Timeout"),
}


def end_of(reason: str) -> Callable[..., PhaseInfo]:
    """How a job ended that is DONE, by the reason of its error."""
    return ENDS.get(reason, partial(PhaseInfo.system_failure, reason))


def judge(answer: Answer, method: str) -> RemoteError | None:
    """The reason in the body decides, not the status: a 403 may be a throttle."""
    is_googles = isinstance(answer.at("error"), dict)
    error = error_of_status(answer, method, is_the_services=is_googles)
    reason = answer.at("error", "errors", 0, "reason")
    if error is None or not isinstance(reason, str) or not reason:
        return error
    if reason in THROTTLES and not isinstance(error, Throttled):
        return Throttled(error.message, retry_after=THROTTLES[reason], code=reason)
    if not isinstance(error, AuthError):
        error.code = reason
    elif reason in USER_REASONS and reason != "accessDenied":  # new credentials would not help
        return RemoteUserError(error.message, code=reason)
    return error
