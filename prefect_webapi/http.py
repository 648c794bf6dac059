"""The only module beside `transport` that knows httpx: requests are built here, and answers become our errors here.

No httpx exception crosses this border, no error text holds a secret, a header or a request body, and what a lost
connection proves about a create is decided here once (`job_may_exist`).
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json as json_module
import logging
import re
import socket
import ssl
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from http import HTTPStatus
from importlib import metadata
from typing import Any, Literal, TypeVar, cast
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx
from pydantic import SecretStr

from prefect_webapi.contract.errors import (
    AlreadyExists,
    AuthError,
    BadTaskSpecification,
    ConfigurationError,
    NotFound,
    OutcomeUnknown,
    RemoteError,
    RemoteSystemError,
    RemoteUserError,
    Throttled,
)
from prefect_webapi.contract.secrecy import Mask, looks_secret, mask_url
from prefect_webapi.tracing import request_span
from prefect_webapi.transport import Transports, connection

__all__ = [
    "ANSWER_TOO_LARGE",
    "Answer",
    "HeaderSource",
    "Judge",
    "Outgoing",
    "RemoteClient",
    "classify",
    "error_of_status",
    "path",
    "retry_after",
]

logger = logging.getLogger(__name__)

Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
T = TypeVar("T")

MAX_ANSWER_BYTES = 32 * 1024 * 1024
MAX_ERROR_BYTES = 64 * 1024
"""So much of an error's body is read: no message is longer, and no large one shall hide the status."""
SHOWN_CHARACTERS = 200
ANSWER_TOO_LARGE = "AnswerTooLarge"
"""Code of the error for an answer that was cut off; asking again brings no less."""
MESSAGE_CHARACTERS = 800
CONNECT_SECONDS = 10.0
"""Shorter than the engine's own time-outs: a connect that hangs is then known to have sent nothing."""
POOL_SECONDS = 20.0

_ALWAYS_SENT = {
    "Accept": "*/*",
    "Accept-Encoding": "gzip, deflate",
    "User-Agent": f"prefect-webapi/{metadata.version('prefect-webapi')}",
}
_NOTHING_SENT = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.ProxyError,
    ConnectionRefusedError,
    socket.gaierror,
    ssl.SSLCertVerificationError,
)


def path(*segments: object) -> str:
    """A path of encoded segments: an id may hold `/`, `?`, `#`, `%` or blanks.

    Raises:
        RemoteUserError: a segment is empty, `.` or `..`: the path would mean something else.
    """
    texts = [str(segment) for segment in segments]
    for text in texts:
        if text in ("", ".", ".."):
            raise RemoteUserError(f"{text!r} can't be part of a path", code="InvalidId")
    return "".join(f"/{quote(text, safe='')}" for text in texts)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, whole. `headers` have lower-case names; `mask` takes the client's secrets out of a text."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    mask: Callable[[str], str] = field(default=str, repr=False, compare=False)

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")

    @property
    def beginning(self) -> str:
        """The first 200 characters, without secrets: for messages."""
        return _beginning(self.body, self.mask)

    @property
    def next_page(self) -> str | None:
        """The address that a `Link` header gives as the next page. Source: RFC 8288."""
        links = httpx.Response(self.status, headers=dict(self.headers)).links
        return links.get("next", {}).get("url")

    def json(self) -> Any:
        """The body as data; whole numbers of any length stay exact.

        Raises:
            RemoteSystemError: it isn't JSON in UTF-8.
        """
        try:
            return json_module.loads(self.body.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            pass  # the error to raise must not carry this one, which holds the whole text
        raise RemoteSystemError(
            f"the answer (HTTP {self.status}) is not JSON: {self.beginning!r}",
            code="UnreadableAnswer",
        )

    def at(self, *steps: str | int) -> Any:
        """What stands in the JSON at these keys and indexes, such as ``"errors", 0, "code"``; all of it without any.

        None: nothing is there, or the body is no JSON. For a judge, which must not fail.
        """
        try:
            found = self.json()
            for step in steps:
                found = found[step]
        except (RemoteSystemError, LookupError, TypeError):
            return None
        return found


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A request just before it is sent, for who signs it. `url` is whole, with its query, as it goes out."""

    method: Method
    url: str
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)


HeaderSource = Callable[[Outgoing], Awaitable[Mapping[str, str | SecretStr]]]
Judge = Callable[[Answer, str], RemoteError | None]
"""Tells a failure from a success, which is None."""


class RemoteClient:
    """A JSON client for one service, for use from the runtime's loop.

    Args:
        base_url: root of the API; a path in it is kept.
        token: sent as a bearer token.
        headers: sent with each request; secrets as `SecretStr`.
        auth: asked before each request for further headers, such as a fresh token or a signature; all of them count
            as secret. See `prefect_webapi.auth`.
        request_timeout: longest wait between two parts of an answer; a connection gets 10 s at most. The engine's own
            time-outs bound a call as a whole.
        max_answer_bytes: larger answers are cut off and refused while they are read.
        judge: what an answer means, where the service's own words say more than the status; None: `error_of_status`.
        allow_insecure: permit `http://` with credentials to a host that is not this machine.
        transport: for tests. Never one over aiohttp: that sends a PUT or DELETE again by itself, and tells a lost
            connection as one that was never made (`benchmarks.transport`).

    Raises:
        ConfigurationError: the address, or the environment's proxy for it, can't be used, a header can't be sent, or
            credentials would travel in the clear.
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
        judge: Judge | None = None,
        allow_insecure: bool = False,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        given = dict(headers or {})
        if token is not None:
            given["Authorization"] = SecretStr(f"Bearer {token.get_secret_value()}")
        secrets = tuple(_secrets_of(given))
        _check_address(base_url, credentials=bool(secrets or auth) and not allow_insecure)
        self._base_url = base_url.rstrip("/")
        self._headers = _sendable(given)
        self._mask = Mask(secrets)
        self._auth = auth
        self._judge = judge or error_of_status
        self._max_answer_bytes = max_answer_bytes
        longest = request_timeout.total_seconds()
        timeout = httpx.Timeout(
            longest, connect=min(longest, CONNECT_SECONDS), pool=min(longest, POOL_SECONDS)
        )
        self._extensions = {"timeout": timeout.as_dict()}
        self._cookies = httpx.Cookies()
        if transport is not None:
            self._transports = Transports(lambda: transport)
        else:
            make = partial(connection, base_url, _proxy_to(base_url))
            self._transports = Transports(
                make, most=max_connections, patience=min(longest, POOL_SECONDS)
            )
        self._is_closed = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._base_url!r})"

    async def get(
        self,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str | SecretStr] | None = None,
    ) -> Any:
        """The answer's JSON. Raises what `request` and `Answer.json` raise, and the judge's errors."""
        return await self._data("GET", path, params=params, headers=headers)

    async def post(
        self,
        path: str,
        *,
        json: Any = None,
        form: Mapping[str, str | SecretStr] | None = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str | SecretStr] | None = None,
    ) -> Any:
        return await self._data("POST", path, params=params, json=json, form=form, headers=headers)

    async def put(
        self,
        path: str,
        *,
        json: Any = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str | SecretStr] | None = None,
    ) -> Any:
        return await self._data("PUT", path, params=params, json=json, headers=headers)

    async def patch(
        self,
        path: str,
        *,
        json: Any = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str | SecretStr] | None = None,
    ) -> Any:
        return await self._data("PATCH", path, params=params, json=json, headers=headers)

    async def delete(
        self,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str | SecretStr] | None = None,
    ) -> Any:
        """As `get`; None where the service confirms without a body, as many do."""
        return await self._data("DELETE", path, params=params, headers=headers)

    async def request(
        self,
        method: Method,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        json: Any = None,
        form: Mapping[str, str | SecretStr] | None = None,
        headers: Mapping[str, str | SecretStr] | None = None,
    ) -> Answer:
        """Send one request and read its answer, whatever its status.

        The body is `json`, or `form` as a web form would send it.

        Parameters may be `SecretStr`; these, and those under telling names such as `api_key`, are kept out of texts.
        Redirects are not followed: they would carry the credentials along. Of an error's body the first 64 KiB are
        read.

        Raises:
            RemoteSystemError: nothing came back, or too much; `job_may_exist` tells whether anything was sent.
            BadTaskSpecification: `json` has no JSON form.
        """
        content, kind = b"", ""
        if json is not None:
            content, kind = _encoded(json), "application/json"
        elif form is not None:
            content = urlencode({name: _plain(value) for name, value in form.items()}).encode()
            kind = "application/x-www-form-urlencoded"
        sent = self._headers
        if kind or headers:
            own = {"Content-Type": kind} if kind else {}
            sent = _merged(own, sent, _sendable(headers or {}))
        asked = {key: _plain(value) for key, value in (params or {}).items() if value is not None}
        try:
            url = httpx.URL(self._base_url + path)
            url = url.copy_merge_params(asked) if asked else url
        except httpx.InvalidURL as error:
            raise classify(error) from None
        fresh: Mapping[str, SecretStr] = {}
        if self._auth is not None:
            fresh = await self._fresh_headers(self._auth, Outgoing(method, str(url), sent, content))
        mask = self._mask.with_more(
            _secrets_of({**(headers or {}), **_texts(params), **(form or {}), **fresh})
        )
        sent = _merged(_ALWAYS_SENT, sent, _sendable(fresh))
        began, came = time.monotonic(), "no answer"
        try:
            with request_span(method, url.scheme, url.host) as span:
                request = httpx.Request(
                    method,
                    url,
                    headers=sent,
                    content=content or None,
                    extensions=self._extensions,
                )
                async with self._sent(request) as response:
                    came = str(response.status_code)
                    if span is not None:
                        span.set_attribute("http.response.status_code", response.status_code)
                    body = await self._body(response, mask)
                return Answer(response.status_code, dict(response.headers.items()), body, mask)
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError) as error:
            found = classify(error)
        finally:
            if logger.isEnabledFor(logging.DEBUG):
                asked, seconds = mask(mask_url(str(url))), time.monotonic() - began
                logger.debug("%s %s -> %s in %.3f s", method, asked, came, seconds)
        # Raised outside the handler: what httpx raised holds the request, and so the credentials.
        found.message = mask(found.message)
        found.args = (found.message,)
        raise found

    async def aclose(self) -> None:
        self._is_closed = True
        await self._transports.aclose()

    async def _data(self, method: Method, path: str, **arguments: Any) -> Any:
        answer = await self.request(method, path, **arguments)
        error = self._judge(answer, method)
        if error is not None:
            raise error
        if not answer.body and (
            method == "DELETE" or answer.status in (HTTPStatus.ACCEPTED, HTTPStatus.NO_CONTENT)
        ):
            return None
        return answer.json()

    async def _fresh_headers(
        self, auth: HeaderSource, request: Outgoing
    ) -> Mapping[str, SecretStr]:
        try:
            given = await auth(request)
        except ConfigurationError:
            raise
        except Exception as error:  # an author's code; whatever it raises, nothing was sent yet
            found = classify(error)
            found.job_may_exist = False
            if found is error:
                raise
            raise found from error
        return {name: SecretStr(_plain(value)) for name, value in given.items()}

    @asynccontextmanager
    async def _sent(self, request: httpx.Request) -> AsyncGenerator[httpx.Response]:
        """Straight through a transport: what httpx's client would add takes as long as the request itself."""
        if self._cookies:
            self._cookies.set_cookie_header(request)
        transport = await self._taken()
        try:
            response = await transport.handle_async_request(request)
            try:
                if "set-cookie" in response.headers:
                    response.request = request
                    self._cookies.extract_cookies(response)
                yield response
            finally:
                await response.aclose()
        finally:
            self._transports.give(transport)

    async def _body(self, response: httpx.Response, mask: Callable[[str], str]) -> bytes:
        is_error = response.status_code >= HTTPStatus.MULTIPLE_CHOICES
        limit = MAX_ERROR_BYTES if is_error else self._max_answer_bytes
        assert isinstance(response.stream, httpx.AsyncByteStream)
        is_plain = "content-encoding" not in response.headers
        body = bytearray()
        async for part in response.stream if is_plain else response.aiter_bytes():
            body += part
            if len(body) > limit:
                break
        if len(body) > limit and not is_error:
            raise RemoteSystemError(
                f"the answer (HTTP {response.status_code}) is larger than {limit} bytes: "
                f"{_beginning(body, mask)!r}",
                code=ANSWER_TOO_LARGE,
            )
        return bytes(body[:limit])

    async def _taken(self) -> httpx.AsyncBaseTransport:
        if self._is_closed:
            raise RemoteSystemError("the client is closed", code="Closed", job_may_exist=False)
        return await self._transports.take()


def _proxy_to(url: str) -> httpx.Proxy | None:
    """What the environment names as the proxy for this address (`HTTPS_PROXY` and so on, `NO_PROXY`).

    Raises:
        ConfigurationError: no proxy has such an address.
    """
    address = urlsplit(url)
    if proxy_bypass(address.netloc):
        return None
    proxies = getproxies()
    named = proxies.get(address.scheme) or proxies.get("all")
    if not named:
        return None
    try:
        return httpx.Proxy(named if "://" in named else f"http://{named}")
    except (ValueError, httpx.InvalidURL):  # its text may hold the proxy's password
        told = (
            f"the proxy that the environment names for {address.scheme}:// addresses can't be used"
        )
    raise ConfigurationError(
        f"{told}. Write it like {address.scheme.upper()}_PROXY=http://proxy.example.com:3128"
    )


def error_of_status(
    answer: Answer, method: str, *, is_the_services: bool = True
) -> RemoteError | None:
    """What an HTTP status means by default; None: it is a success.

    A plugin whose service gives a status another meaning looks at the `Answer` itself.

    Args:
        is_the_services: False where the answer has not the form of the service's errors: a proxy or another server
            gave it, whose 404 tells nothing of a job.

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
        case 404 | 410 if not is_the_services:
            return RemoteSystemError(told, code=code, job_may_exist=False)
        case 404 | 410:
            return NotFound(told, code="NotFound")
        case 408:
            return RemoteSystemError(told, code=code)
        case 409 if method in ("POST", "PUT"):
            return AlreadyExists(told)
        case 425:
            return RemoteSystemError(told, code=code, job_may_exist=False)
        case 429:
            return Throttled(told, retry_after=hint, code=code)
        case 503 if "retry-after" in answer.headers:
            return Throttled(told, retry_after=hint, code=code)
        case 303 if method != "GET":  # done, and the outcome is to be seen elsewhere
            return RemoteSystemError(told, code=code)
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
    """The wait that a `Retry-After` header asks for, in seconds or as a date; None: absent or unreadable.

    A date counts from the answer's own `Date`, so that clocks may differ; `now` is used where it has none.
    """
    lower = {key.lower(): value for key, value in headers.items()}
    text = lower.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]*)?", text):
        try:
            return timedelta(seconds=float(text))
        except OverflowError:
            return timedelta.max
    when = _date(text)
    if when is None:
        return None
    return max(timedelta(0), when - (_date(lower.get("date", "")) or now or datetime.now(UTC)))


def classify(error: Exception) -> RemoteError:
    """What an exception of an author's own client means.

    httpx's exceptions are known in detail. A configuration error is the user's; any other exception is a system
    failure named after its class, and nothing is concluded from it about whether a job was made.
    """
    name = type(error).__name__
    if isinstance(error, RemoteError):
        return error
    if isinstance(error, ConfigurationError):
        return BadTaskSpecification(str(error), code=name)
    told = mask_url(str(error))  # httpx shows addresses whole
    if isinstance(error, httpx.HTTPStatusError):
        return _of_response(error.response, error.request) or RemoteSystemError(told)
    if isinstance(error, httpx.LocalProtocolError):  # its text may hold a header
        return RemoteUserError("the request can't be sent: it breaks the protocol", code=name)
    if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol):
        return RemoteUserError(f"{name}: {told}", code=name)
    if isinstance(error, _NOTHING_SENT):
        return RemoteSystemError(f"{name}: {told}", code=name, job_may_exist=False)
    if isinstance(error, httpx.TimeoutException | TimeoutError):
        return OutcomeUnknown(f"no answer in time ({name})", code="Timeout")
    if isinstance(error, httpx.TransportError | ConnectionError):
        return OutcomeUnknown(f"the connection was lost ({name}: {told})", code="ConnectionLost")
    return RemoteSystemError(f"{name}: {told}", code=name)


def _of_response(response: httpx.Response, request: httpx.Request) -> RemoteError | None:
    try:
        body = response.content
    except httpx.ResponseNotRead:
        body = b""
    mask = Mask(_secrets_of({**request.headers, **request.url.params}))
    answer = Answer(response.status_code, dict(response.headers.items()), body, mask)
    return error_of_status(answer, request.method)


# --- texts without secrets -------------------------------------------------------------------


def _without_secrets(record: logging.LogRecord) -> bool:
    """httpx logs the address of each request whole, Prefect's own with the password of its API too."""
    if isinstance(record.args, tuple):
        record.args = tuple(
            mask_url(str(arg.copy_with(username="", password="")))
            if isinstance(arg, httpx.URL)
            else arg
            for arg in record.args
        )
    return True


logging.getLogger("httpx").addFilter(_without_secrets)


def _secrets_of(headers: Mapping[str, str | SecretStr]) -> Iterator[str]:
    """The values that must never be shown, whole and without their scheme; a plain string under a telling name too."""
    for name, value in headers.items():
        if isinstance(value, SecretStr) or looks_secret(name) or name.lower() == "cookie":
            yield (whole := _plain(value))
            scheme, _, rest = whole.partition(" ")
            yield rest
            if scheme.lower() == "basic":
                plain = _decoded(rest)
                yield plain
                yield plain.partition(":")[2]


def _decoded(text: str) -> str:
    try:
        return base64.b64decode(text, validate=True).decode("utf-8", "replace")
    except binascii.Error:
        return ""


def _plain(value: T | SecretStr) -> T | str:
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def _texts(params: Mapping[str, Any] | None) -> dict[str, str | SecretStr]:
    """The parameters that can hold a secret."""
    return {k: v for k, v in (params or {}).items() if isinstance(v, str | SecretStr)}


def _beginning(body: bytes | bytearray, mask: Callable[[str], str]) -> str:
    """Masked before it is cut: the cut must not leave half a secret."""
    return mask(body[:MAX_ERROR_BYTES].decode("utf-8", "replace"))[:SHOWN_CHARACTERS]


def _message(answer: Answer) -> str:
    """The service's own words: a JSON answer's message where it has one, else its first characters."""
    try:
        data: Any = json_module.loads(answer.body)
    except (ValueError, RecursionError):
        data = None
    told = _told(data)
    if told:
        return answer.mask(told)[:MESSAGE_CHARACTERS]
    return answer.beginning.strip() or "no message"


def _told(data: Any) -> str:
    if not isinstance(data, dict):
        return ""
    fields = cast(dict[str, Any], data)
    for key in ("message", "detail", "error", "error_description", "reason"):
        value = fields.get(key)
        if isinstance(value, dict):  # {"error": {"message": …}}
            value = _told(cast(Any, value))
        if isinstance(value, str) and value:
            return value
    return ""


# --- what may be sent ------------------------------------------------------------------------


def _sendable(headers: Mapping[str, str | SecretStr]) -> dict[str, str]:
    plain = {name: _plain(value) for name, value in headers.items()}
    for name, value in plain.items():
        if not value.isascii() or not value.isprintable() or value != value.strip():
            raise ConfigurationError(
                f"header {name} can't be sent: its value has a line break, a blank at an end, or a character "
                "outside ASCII. Was a secret pasted or read with its line end?"
            )
    return plain


def _merged(*given: Mapping[str, str]) -> dict[str, str]:
    """Each header once, however its name is written: the last one counts."""
    pairs = {name.lower(): (name, value) for each in given for name, value in each.items()}
    return dict(pairs.values())


def _encoded(data: Any) -> bytes:
    try:
        return json_module.dumps(data, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        problem = error.reason if isinstance(error, UnicodeEncodeError) else str(error)
    raise BadTaskSpecification(f"the request has no JSON form: {problem}")


def _check_address(base_url: str, *, credentials: bool) -> None:
    """Refuse what can't work, and what would send credentials in the clear."""
    try:
        address = urlsplit(base_url)
        host, scheme = address.hostname or "", address.scheme
    except ValueError:
        host, scheme, address = "", "", None
    if address is None or scheme not in ("http", "https") or not host:
        raise ConfigurationError(
            "base_url is no address of a web service. Write it like https://jobs.example.com/"
        )
    if address.username is not None or address.query or address.fragment:
        raise ConfigurationError(
            f"base_url {scheme}://{host} has a user, a query or a fragment. Credentials belong in the block's own "
            "fields; leave the rest out"
        )
    if credentials and scheme == "http" and not _is_this_machine(host):
        raise ConfigurationError(
            f"base_url {scheme}://{host} would send credentials in the clear. Use https://, or set "
            "allow_insecure in the block's settings if the network is yours"
        )


def _is_this_machine(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _date(text: str) -> datetime | None:
    try:
        when = parsedate_to_datetime(text)
    except (TypeError, ValueError, OverflowError):
        return None
    return when if when.tzinfo is not None else when.replace(tzinfo=UTC)
