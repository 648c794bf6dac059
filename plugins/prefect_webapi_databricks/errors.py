"""What an answer means by its error code, which says more than the HTTP status."""

import re
from dataclasses import replace

from prefect_webapi import (
    AlreadyExists,
    Answer,
    AuthError,
    NotFound,
    RemoteError,
    RemoteSystemError,
    Throttled,
    error_of_status,
)

THROTTLED = ("RESOURCE_EXHAUSTED", "REQUEST_LIMIT_EXCEEDED")
NO_SUCH_RUN = re.compile(r"Run .* does not exist|Run: .* in job: .* doesn't exist")


def judge(answer: Answer, method: str) -> RemoteError | None:
    code = str(answer.at("error_code") or "")
    if code in THROTTLED and answer.status >= 300:
        answer = replace(answer, status=429)
    error = error_of_status(answer, method, is_the_services=bool(code))
    if error is None:
        return None
    if code == "RESOURCE_DOES_NOT_EXIST" or (
        code == "INVALID_PARAMETER_VALUE" and NO_SUCH_RUN.search(error.message)
    ):
        return NotFound(error.message, code=code)
    if isinstance(error, AlreadyExists):  # ABORTED: two requests have met, and the token tells
        return RemoteSystemError(error.message, code=code)
    if code and not isinstance(error, AuthError | NotFound | Throttled):
        error.code = code
    return error
