"""Calls of the AWS JSON protocols: signed by botocore, judged by the code of the error and not by its HTTP status."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, cast

from pydantic import SecretStr

from prefect_webapi import (
    Answer,
    AuthError,
    ConfigurationError,
    Outgoing,
    RemoteClient,
    RemoteError,
    RemoteSystemError,
    RemoteUserError,
    Throttled,
    error_of_status,
)
from prefect_webapi.auth import library
from prefect_webapi_aws.blocks import AwsConnection

THROTTLES = frozenset(
    [
        *("ThrottlingException", "Throttling", "ThrottledException", "TooManyRequestsException"),
        *("RequestThrottled", "RequestThrottledException", "RequestLimitExceeded", "SlowDown"),
        *("BandwidthLimitExceeded", "LimitExceededException", "KmsThrottlingException"),
        "ExecutionLimitExceeded",  # of Step Functions: too many executions run
    ]
)
REFUSALS = frozenset(
    [
        *("AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "NotAuthorized"),
        *("UnrecognizedClientException", "InvalidClientTokenId", "InvalidAccessKeyId"),
        *("InvalidSignatureException", "SignatureDoesNotMatch", "IncompleteSignature"),
        *("IncompleteSignatureException", "MissingAuthenticationToken", "AuthFailure"),
        *("MissingAuthenticationTokenException", "ExpiredToken", "ExpiredTokenException"),
        *("RequestExpired", "RequestTimeTooSkewed", "OptInRequired"),
    ]
)
MESSAGE_CHARACTERS = 2000
RENEW_SECONDS = 30.0
"""Until credentials that could not be renewed are tried again; botocore begins minutes before their end."""

# At DEBUG it writes down what it signs, session tokens too.
logging.getLogger("botocore.auth").addFilter(lambda record: record.levelno > logging.DEBUG)


class AwsJson:
    """A client of one service.

    Args:
        service: its name in signatures, and in addresses unless `host` is another.
        target: what stands before the operation in `X-Amz-Target`.
        version: of the protocol.
        longest: wait for an answer.
    """

    def __init__(
        self,
        at: AwsConnection,
        service: str,
        target: str,
        version: str,
        *,
        host: str | None = None,
        longest: timedelta = timedelta(minutes=1),
    ) -> None:
        self._client = RemoteClient(
            at.address(host or service),
            request_timeout=longest,
            auth=Signer(at, service),
            judge=lambda answer, _method: error_of(answer),
            allow_insecure=at.settings.allow_insecure,
        )
        self._target = target
        self._content_type = f"application/x-amz-json-{version}"

    async def call(self, operation: str, **fields: Any) -> Any:
        """The answer's data. Fields that are None are left out.

        Raises:
            RemoteError: with the service's own code.
        """
        headers = {
            "Content-Type": self._content_type,
            "X-Amz-Target": f"{self._target}.{operation}",
        }
        body = {name: value for name, value in fields.items() if value is not None}
        return await self._client.post("/", json=body, headers=headers)

    async def aclose(self) -> None:
        await self._client.aclose()


class Signer:
    """Signature version 4, with credentials that botocore finds, caches and renews."""

    def __init__(self, at: AwsConnection, service: str) -> None:
        self._at, self._service = at, service
        self._turn = asyncio.Lock()
        self._credentials: Any = None
        self._frozen: Any = None
        self._renew_at = 0.0

    async def __call__(self, request: Outgoing, /) -> Mapping[str, str | SecretStr]:
        if self._must_wait():
            async with self._turn:
                if self._must_wait():
                    # It imports botocore, reads files and asks services.
                    await asyncio.to_thread(self._renew)
        signed = _botocore("awsrequest").AWSRequest(
            request.method, request.url, data=request.body, headers=dict(request.headers)
        )
        _botocore("auth").SigV4Auth(self._frozen, self._service, self._at.region).add_auth(signed)
        return {
            name: SecretStr(value)
            for name, value in signed.headers.items()
            if name not in request.headers
        }

    def _must_wait(self) -> bool:
        if self._frozen is None:
            return True
        # Those of a fixed key have no `refresh_needed`.
        is_old = getattr(self._credentials, "refresh_needed", bool)
        return time.monotonic() >= self._renew_at and is_old()

    def _renew(self) -> None:
        for module in ("auth", "awsrequest"):
            _botocore(module)  # used on the loop, which the import would hold up
        errors = _botocore("exceptions")
        try:
            if self._credentials is None:
                self._credentials = self._found()
            frozen = self._credentials.get_frozen_credentials()
        except errors.ProfileNotFound as error:
            raise ConfigurationError(f"profile {self._at.profile!r}: {error}") from error
        except errors.ClientError as error:  # an answer of the service that gives a role's
            told, code = f"no AWS credentials: {error}", str(error.response["Error"].get("Code"))
            if code in REFUSALS:
                raise AuthError(told, code=code) from error
            raise RemoteSystemError(told, code=code, job_may_exist=False) from error
        except errors.BotoCoreError as error:  # the service that gives them is away
            raise RemoteSystemError(
                f"no AWS credentials now: {error}", code=type(error).__name__, job_may_exist=False
            ) from error
        if frozen == self._frozen:  # it failed, and botocore knows that they are still good
            self._renew_at = time.monotonic() + RENEW_SECONDS
        self._frozen = frozen

    def _found(self) -> Any:
        at = self._at
        if at.secret_access_key is not None:
            token = at.session_token and at.session_token.get_secret_value()
            secret = at.secret_access_key.get_secret_value()
            return _botocore("credentials").Credentials(at.access_key_id, secret, token)
        found = _botocore("session").Session(profile=at.profile).get_credentials()
        if found is None:
            raise AuthError(
                "no AWS credentials were found: give the block an access key or a profile, or run where the "
                "environment or a role has some",
                code="NoCredentials",
            )
        return found


def _botocore(module: str) -> Any:
    return library(f"botocore.{module}", install="prefect-webapi[aws]")


def error_of(answer: Answer) -> RemoteError | None:
    """What an answer means; None: it is a success.

    Throttles and refused credentials come as HTTP 400 too, and what the signature's check refuses may come as XML.
    """
    if answer.status < 300:
        return None
    code, message = _told(answer)
    if not code:
        return error_of_status(answer, "GET", is_the_services=False)
    message = answer.mask(message)[:MESSAGE_CHARACTERS]
    if code in THROTTLES:
        return Throttled(message, code=code)
    if code in REFUSALS:
        return AuthError(message, code=code)
    if answer.status >= 500:
        return RemoteSystemError(message, code=code)
    return RemoteUserError(message, code=code)


def _told(answer: Answer) -> tuple[str, str]:
    """Code and message. The code may have a namespace before it and an address after it."""
    data = answer.at()
    if isinstance(data, dict):
        fields = cast(dict[str, Any], data)
        kind = fields.get("__type") or answer.headers.get("x-amzn-errortype") or ""
        code = fields.get("AthenaErrorCode") or str(kind).partition(":")[0].rpartition("#")[2]
        message = fields.get("message") or fields.get("Message") or code
        return str(code), str(message)
    found = re.search(r"<Code>(.+?)</Code>\s*<Message>(.*?)</Message>", answer.text, re.DOTALL)
    return (found[1], found[2]) if found else ("", "")
