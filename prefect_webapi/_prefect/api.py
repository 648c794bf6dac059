"""Prefect's API for the adapters that live on the runtime's loop: one client, and our errors."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Self, TypeVar
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import stamina
from prefect.client.orchestration import PrefectClient, get_client
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL

from prefect_webapi.contract.errors import RemoteSystemError
from prefect_webapi.contract.secrecy import mask_url

__all__ = ["Api", "PrefectUnavailable", "api_address", "server_is_here", "told_by"]

T = TypeVar("T")

CALL_SECONDS = 15.0
PATIENCE_SECONDS = 60.0
"""A server that restarts is away for some twenty seconds."""


class PrefectUnavailable(RemoteSystemError):
    """Prefect's API did not answer. No job was made for it."""

    def __init__(self, what: str, error: BaseException) -> None:
        super().__init__(
            f"Prefect's API at {api_address()} can't be used to {what}: {told_by(error)}. Is the server up "
            "(`prefect server start`), and PREFECT_API_URL right (`prefect config view`)?",
            code="PrefectUnavailable",
            job_may_exist=False,
        )


class _Refused(PrefectUnavailable):
    """It answered, with an error that a repetition won't change."""


class Api:
    """One client of Prefect's API, opened by the first call, owned by the loop that makes it."""

    def __init__(self) -> None:
        self._client: PrefectClient | None = None
        self._opening = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.__aexit__(None, None, None)

    async def ask(self, what: str, question: Callable[[PrefectClient], Awaitable[T]]) -> T:
        """The answer; repeated while the API is away.

        Raises:
            ObjectNotFound: Prefect's own, for what does not exist.
            PrefectUnavailable: no answer for a minute, or a refusal.
        """
        async for attempt in stamina.retry_context(
            on=_may_be_asked_again, attempts=None, timeout=PATIENCE_SECONDS, wait_max=5.0
        ):
            with attempt:
                return await self.once(what, question)
        raise AssertionError("stamina repeats or raises")

    async def once(self, what: str, question: Callable[[PrefectClient], Awaitable[T]]) -> T:
        """The answer, asked for once; raises as `ask`."""
        try:
            with anyio.fail_after(CALL_SECONDS):
                return await question(await self._opened())
        except ObjectNotFound:
            raise
        except PrefectHTTPStatusError as error:
            refused = error.response.status_code < 500
            raise (_Refused if refused else PrefectUnavailable)(what, error) from None
        except Exception as error:  # noqa: BLE001 - raised as ours; theirs shows the address with its password
            raise PrefectUnavailable(what, error) from None

    async def _opened(self) -> PrefectClient:
        if self._client is None:
            async with self._opening:
                if self._client is None:
                    # In a thread: without PREFECT_API_URL this starts a server and waits for it.
                    client = await anyio.to_thread.run_sync(get_client)
                    self._client = await client.__aenter__()
        return self._client


def api_address() -> str:
    """Where this process looks for Prefect's API, without credentials."""
    url = PREFECT_API_URL.value()
    return _without_credentials(str(url)) if url else "(a server of this process's own)"


def server_is_here() -> bool:
    """Whether Prefect's server runs on this machine: then our ledger knows all who use its limits."""
    url = PREFECT_API_URL.value()
    if not url:
        return True  # a server of this process's own
    return urlsplit(str(url)).hostname in ("127.0.0.1", "localhost", "::1")


def told_by(error: BaseException) -> str:
    """What kind of failure it was, and what it says, without credentials."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    said = _without_credentials(str(error)).partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _without_credentials(text: str) -> str:
    return mask_url(re.sub(r"(?<=://)[^/?#\s]*@", "", text))


def _may_be_asked_again(error: Exception) -> bool:
    return isinstance(error, PrefectUnavailable) and not isinstance(error, _Refused)
