"""Access tokens by google-auth, which is imported when the first one is needed."""

import asyncio
import json
from datetime import UTC, datetime
from functools import partial

from pydantic import SecretStr

from prefect_webapi import AuthError, ConfigurationError, RemoteSystemError
from prefect_webapi.auth import Token, library

__all__ = ["GoogleToken"]

_library = partial(library, install="prefect-webapi[gcp]")

SCOPES = ("https://www.googleapis.com/auth/cloud-platform",)
"""As Google's own client asks for: what the account may do is for IAM to say."""


class GoogleToken:
    """A fetch for `TokenAuth`: from a service account's key, or the machine's own credentials."""

    def __init__(self, key: SecretStr | None) -> None:
        self._key = key

    async def __call__(self) -> Token:
        return await asyncio.to_thread(self._fetch)

    def _fetch(self) -> Token:
        auth, accounts = _library("google.auth"), _library("google.oauth2.service_account")
        errors, transport = auth.exceptions, _library("google.auth.transport.requests")
        try:
            if self._key is None:
                credentials, _ = auth.default(scopes=SCOPES)
            else:
                key = json.loads(self._key.get_secret_value())
                credentials = accounts.Credentials.from_service_account_info(key, scopes=SCOPES)
            with _library("requests").Session() as session:
                credentials.refresh(transport.Request(session))
        except errors.GoogleAuthError as error:
            passing = error.retryable or isinstance(error, errors.TransportError)
            raise (RemoteSystemError if passing else AuthError)(f"no token: {error}") from None
        except ValueError:
            told = "the private key in service_account_info can't be read"
            raise ConfigurationError(f"{told}; paste the whole key file") from None
        expires = credentials.expiry  # naive, UTC
        lives = None if expires is None else expires.replace(tzinfo=UTC) - datetime.now(UTC)
        return Token(SecretStr(credentials.token), lives)
