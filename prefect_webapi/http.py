"""The only module that knows httpx: clients are built here, and answers become our errors here.

No httpx exception crosses this border, no error text holds a secret, a header or a request body, and what a lost
connection proves about a create is decided here once (`job_may_exist`).
"""

from __future__ import annotations

import ipaddress
import json as json_module
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Literal
from urllib.parse import quote, urlsplit

import httpx
from pydantic import SecretStr

from prefect_webapi.contract.errors import (
    AlreadyExists,
    AuthError,
    ConfigurationError,
    NotFound,
    OutcomeUnknown,
    RemoteError,
    RemoteSystemError,
    RemoteUserError,
    Throttled,
)

__all__ = ["Answer", "RemoteClient", "classify", "error_of_status", "path", "retry_after"]

Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
HeaderSource = Callable[[], Awaitable[Mapping[str, str]]]

MAX_ANSWER_BYTES = 32 * 1024 * 1024
SHOWN_CHARACTERS = 200
_NOTHING_SENT = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.UnsupportedProtocol,
)


@lru_cache(maxsize=1)
def _trusted() -> ssl.SSLContext:
    """The certificates that are trusted; reading them takes longer than many a request."""
    return httpx.create_ssl_context()


def path(*segments: object) -> str:
    """A path of encoded segments: an id may hold `/`, `?`, `#`, `%` or blanks."""
    return "".join(f"/{quote(str(segment), safe='')}" for segment in segments)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, whole. `headers` have lower-case names."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")

    def json(self) -> Any:
        """The body as data; whole numbers of any length stay exact.

        Raises:
            RemoteSystemError: it isn't JSON in UTF-8.
        """
        try:
            return json_module.loads(self.body.decode("utf-8"))
        except ValueError as error:
            raise RemoteSystemError(
                f"the answer (HTTP {self.status}) is not JSON: {self.text[:SHOWN_CHARACTERS]!r}",
                code="UnreadableAnswer",
            ) from error


class RemoteClient:
    """A JSON client for one service, for use from the runtime's loop.

    Args:
        base_url: root of the API; a path in it is kept.
        token: sent as a bearer token.
        headers: sent with each request; secrets as `SecretStr`.
        auth: asked before each request for further headers, such as a fresh token.
        request_timeout: longest wait for a connection or between two parts of an answer; the engine's own time-outs
            bound a call as a whole.
        max_answer_bytes: larger answers are cut off and refused while they are read.
        allow_insecure: permit `http://` with credentials to a host that is not this machine.
        transport: for tests.

    Raises:
        ConfigurationError: credentials would travel in the clear.
    """

    def __init__(
        self,
        base_url: str,
        *,
        token: SecretStr | None = None,
        headers: Mapping[str, str | SecretStr] | None = None,
        auth: HeaderSource | None = None,
        request_timeout: timedelta = timedelta(seconds=60),
        max_connections: int = 100,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
        allow_insecure: bool = False,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._base_url = base_url.rstrip("/")
        self._headers = dict(headers or {})
        if token is not None:
            self._headers["Authorization"] = SecretStr(f"Bearer {token.get_secret_value()}")
        self._auth = auth
        self._secrets = [
            value.get_secret_value()
            for value in (*self._headers.values(), token)
            if isinstance(value, SecretStr) and value.get_secret_value()
        ]
        self._max_answer_bytes = max_answer_bytes
        self._timeout = request_timeout.total_seconds()
        self._limits = httpx.Limits(
            max_connections=max_connections, max_keepalive_connections=max_connections
        )
        self._transport = transport
        self._client: httpx.AsyncClient | None = None
        if (self._secrets or auth) and not allow_insecure:
            _refuse_clear_text(base_url)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._base_url!r})"

    async def get(
        self,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """The answer's JSON. Raises what `request` and `Answer.json` raise, and `error_of_status`'s errors."""
        return await self._data("GET", path, params=params, headers=headers)

    async def post(
        self,
        path: str,
        *,
        json: Any = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        return await self._data("POST", path, params=params, json=json, headers=headers)

    async def put(
        self,
        path: str,
        *,
        json: Any = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        return await self._data("PUT", path, params=params, json=json, headers=headers)

    async def patch(
        self,
        path: str,
        *,
        json: Any = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        return await self._data("PATCH", path, params=params, json=json, headers=headers)

    async def delete(
        self,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        return await self._data("DELETE", path, params=params, headers=headers)

    async def request(
        self,
        method: Method,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        json: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send one request and read its answer, whatever its status.

        Redirects are not followed: they would carry the credentials along.

        Raises:
            RemoteSystemError: nothing came back, or too much; `job_may_exist` tells whether anything was sent.
        """
        extra = dict(await self._auth()) if self._auth is not None else {}
        self._secrets += [v for v in extra.values() if v not in self._secrets][-8:]
        sent = {
            **{
                k: v.get_secret_value() if isinstance(v, SecretStr) else v
                for k, v in self._headers.items()
            },
            **extra,
            **(headers or {}),
        }
        content = None
        if json is not None:
            content = json_module.dumps(json, ensure_ascii=False).encode("utf-8")
            sent.setdefault("Content-Type", "application/json")
        try:
            async with self._opened().stream(
                method, self._base_url + path, params=params, content=content, headers=sent
            ) as response:
                return Answer(
                    response.status_code, dict(response.headers.items()), await self._body(response)
                )
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError) as error:
            raise self._masked(classify(error)) from None

    async def aclose(self) -> None:
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    async def _data(self, method: Method, path: str, **arguments: Any) -> Any:
        answer = await self.request(method, path, **arguments)
        error = error_of_status(answer, method)
        if error is not None:
            raise self._masked(error)
        if not answer.body and answer.status in (HTTPStatus.ACCEPTED, HTTPStatus.NO_CONTENT):
            return None
        try:
            return answer.json()
        except RemoteSystemError as unreadable:
            raise self._masked(unreadable) from None

    async def _body(self, response: httpx.Response) -> bytes:
        parts: list[bytes] = []
        size = 0
        async for part in response.aiter_bytes():
            size += len(part)
            if size > self._max_answer_bytes:
                raise RemoteSystemError(
                    f"the answer (HTTP {response.status_code}) is larger than {self._max_answer_bytes} bytes",
                    code="AnswerTooLarge",
                )
            parts.append(part)
        return b"".join(parts)

    def _opened(self) -> httpx.AsyncClient:
        """Made at the first use, on the loop that uses it."""
        if self._client is None:
            secure = self._base_url.startswith("https:")
            self._client = httpx.AsyncClient(
                verify=_trusted() if secure else False,
                timeout=self._timeout,
                limits=self._limits,
                transport=self._transport,
                follow_redirects=False,
            )
        return self._client

    def _masked(self, error: RemoteError) -> RemoteError:
        """Services echo what they were sent: no secret of ours leaves in an error's text."""
        text = error.message
        for secret in sorted(self._secrets, key=len, reverse=True):
            text = text.replace(secret, "***")
            text = text.replace(secret.removeprefix("Bearer "), "***")
        if text != error.message:
            error.message = text
            error.args = (text,)
        return error


def error_of_status(answer: Answer, method: Method) -> RemoteError | None:
    """What an HTTP status means by default; None: it is a success.

    A plugin whose service gives a status another meaning looks at the `Answer` itself.

    Source: SPEC 2.5.
    """
    status = answer.status
    if 200 <= status < 300:
        return None
    told = f"HTTP {status}: {_message(answer)}"
    hint = retry_after(answer.headers)
    code = f"HTTP{status}"
    match status:
        case 401:
            return AuthError(told, code="Unauthorized")
        case 403:
            return AuthError(told, code="Forbidden")
        case 404 | 410:
            return NotFound(told, code="NotFound")
        case 408:
            return RemoteSystemError(told, code=code)
        case 409 if method in ("POST", "PUT"):
            return AlreadyExists(told)
        case 429:
            return Throttled(told, retry_after=hint, code=code)
        case 503 if "retry-after" in answer.headers:
            return Throttled(told, retry_after=hint, code=code)
        case _ if 300 <= status < 400:
            return RemoteUserError(
                f"HTTP {status}: the service redirects elsewhere; redirects are not followed. Set the address it "
                "redirects to",
                code=code,
            )
        case _ if 400 <= status < 500:
            return RemoteUserError(told, code=code)
        case _:
            return RemoteSystemError(told, code=code)


def retry_after(headers: Mapping[str, str], *, now: datetime | None = None) -> timedelta | None:
    """The wait that a `Retry-After` header asks for, in seconds or as a date; None: absent or unreadable."""
    text = next((v for k, v in headers.items() if k.lower() == "retry-after"), "").strip()
    if not text:
        return None
    try:
        return timedelta(seconds=max(0.0, float(text)))
    except (ValueError, OverflowError):
        pass
    try:
        when = parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(timedelta(0), when - (now or datetime.now(UTC)))


def classify(error: Exception) -> RemoteError:
    """What an exception of an author's own client means.

    httpx's exceptions are known in detail; any other exception is a system failure named after its class, and
    nothing is concluded from it about whether a job was made.
    """
    if isinstance(error, RemoteError):
        return error
    if isinstance(error, httpx.HTTPStatusError):
        response = error.response
        method: Any = error.request.method
        answer = Answer(response.status_code, dict(response.headers.items()), response.content)
        return error_of_status(answer, method) or RemoteSystemError(str(error))
    name = type(error).__name__
    if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol):
        return RemoteUserError(f"{name}: {error}", code=name)
    if isinstance(error, (*_NOTHING_SENT, ConnectionRefusedError)):
        return RemoteSystemError(f"{name}: {error}", code=name, job_may_exist=False)
    if isinstance(error, httpx.TimeoutException | TimeoutError):
        return OutcomeUnknown(f"no answer in time ({name})", code="Timeout")
    if isinstance(error, httpx.TransportError | ConnectionError):
        return OutcomeUnknown(f"the connection was lost ({name}: {error})", code="ConnectionLost")
    return RemoteSystemError(f"{name}: {error}", code=name)


def _message(answer: Answer) -> str:
    """The service's own words: a JSON answer's message where it has one, else its first characters."""
    try:
        data: Any = json_module.loads(answer.body)
    except ValueError:
        data = None
    if isinstance(data, dict):
        for key in ("message", "detail", "error", "error_description", "reason"):
            value: Any = data.get(key)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            if isinstance(value, str) and value:
                return value[: 4 * SHOWN_CHARACTERS]
    return answer.text[:SHOWN_CHARACTERS].strip() or "no message"


def _refuse_clear_text(base_url: str) -> None:
    address = urlsplit(base_url)
    host = address.hostname or ""
    if address.scheme != "http" or host == "localhost":
        return
    try:
        if ipaddress.ip_address(host).is_loopback:
            return
    except ValueError:
        pass
    raise ConfigurationError(
        f"base_url {address.scheme}://{host} would send credentials in the clear. Use https://, or set "
        "allow_insecure in the block's settings if the network is yours"
    )
