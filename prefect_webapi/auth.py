"""Where a plugin's requests get their credentials, when these are more than a fixed header: cached per connection.

A plugin is loaded once per connection and revision of it, so a thousand jobs share one token. A token that the service
refuses needs nothing here: the engine loads the plugin anew, once, and the new one asks for a new token.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

import stamina
from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError

from prefect_webapi.contract.errors import (
    AuthError,
    ConfigurationError,
    RemoteError,
    RemoteSystemError,
    Throttled,
)
from prefect_webapi.http import Outgoing, RemoteClient

__all__ = ["ClientCredentials", "Token", "TokenAuth", "basic", "library"]

TRIES = 3
MARGIN = timedelta(minutes=1)
SHARE = 0.5
"""A token that lives less than twice the margin is used for half of its life."""


@dataclass(frozen=True, slots=True)
class Token:
    """A credential and how long it is good for from now; None: until it is refused."""

    value: SecretStr
    lives: timedelta | None = None


class TokenAuth:
    """Sends a token, and fetches a new one a minute before the old one ends. For `RemoteClient(auth=…)`.

    Requests that need a token at the same time wait for one fetch. A fetch that fails by the service's fault is
    repeated twice.

    Args:
        fetch: gets a token; called on the engine's loop.
        scheme: what stands before it in the `Authorization` header.
        headers: sent along with it.
    """

    def __init__(
        self,
        fetch: Callable[[], Awaitable[Token]],
        *,
        scheme: str = "Bearer",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._fetch = fetch
        self._scheme = scheme
        self._headers = dict(headers or {})
        self._token: Token | None = None
        self._renew_at = 0.0
        self._turn = asyncio.Lock()

    async def __call__(self, request: Outgoing, /) -> Mapping[str, str | SecretStr]:
        token = self._token
        if token is None or time.monotonic() >= self._renew_at:
            token = await self._renewed()
        value = SecretStr(f"{self._scheme} {token.value.get_secret_value()}")
        return {**self._headers, "Authorization": value}

    async def _renewed(self) -> Token:
        async with self._turn:
            if self._token is not None and time.monotonic() < self._renew_at:
                return self._token
            began = time.monotonic()
            async for attempt in stamina.retry_context(on=RemoteSystemError, attempts=TRIES):
                with attempt:
                    token = await self._fetch()
                    self._token, self._renew_at = token, began + _useful(token)
                    return token
        raise AssertionError("unreachable")


def _useful(token: Token) -> float:
    """Seconds."""
    if token.lives is None:
        return float("inf")
    lives = token.lives.total_seconds()
    return max(lives - MARGIN.total_seconds(), lives * SHARE)


class _Answer(BaseModel):
    """The token endpoint's answer. Source: RFC 6749, section 5.1."""

    model_config = ConfigDict(frozen=True)

    access_token: SecretStr
    expires_in: float | None = None


class ClientCredentials:
    """OAuth 2.0 client credentials: a fetch for `TokenAuth`. Source: RFC 6749, section 4.4.

    Args:
        token_url: whole address of the token endpoint.
        scope: names parted by blanks; None: the service's default.
        allow_insecure: as for `RemoteClient`.
    """

    def __init__(
        self,
        token_url: str,
        client_id: str,
        client_secret: SecretStr,
        *,
        scope: str | None = None,
        allow_insecure: bool = False,
    ) -> None:
        at = urlsplit(token_url)
        self._path = f"{at.path}?{at.query}" if at.query else at.path
        self._client = RemoteClient(
            f"{at.scheme}://{at.netloc}",
            headers={"Authorization": basic(client_id, client_secret)},
            allow_insecure=allow_insecure,
        )
        self._form = {"grant_type": "client_credentials", **({"scope": scope} if scope else {})}

    async def __call__(self) -> Token:
        """Fetch one.

        Raises:
            AuthError: the endpoint refuses the credentials, or answers without a token.
            RemoteSystemError, Throttled: it does not answer now.
        """
        refusal: RemoteError
        try:
            answer = _Answer.model_validate(await self._client.post(self._path, form=self._form))
        except ValidationError:
            refusal = AuthError("the token endpoint answered without a token", code="NoToken")
        except (RemoteSystemError, Throttled):
            raise
        except RemoteError as error:  # 400 invalid_client, 401, 403, 404
            refusal = AuthError(f"no token: {error.message}", code="Unauthorized")
        else:
            lives = None if answer.expires_in is None else timedelta(seconds=answer.expires_in)
            return Token(answer.access_token, lives)
        raise refusal

    async def aclose(self) -> None:
        await self._client.aclose()


def basic(user: str, password: SecretStr) -> SecretStr:
    """The value of an `Authorization` header. Source: RFC 7617."""
    pair = f"{user}:{password.get_secret_value()}"
    return SecretStr(f"Basic {base64.b64encode(pair.encode()).decode()}")


def library(name: str, *, install: str) -> Any:
    """A module of a vendor's library, imported when it is first used; untyped, as many of them are.

    Args:
        install: what brings it, such as ``prefect-webapi[gcp]``.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigurationError(f'{name} is missing: pip install "{install}"') from error
