"""Key-pair authentication: tokens signed with the user's key by PyJWT, which is imported when the first is needed."""

import asyncio
import base64
import hashlib
from datetime import UTC, datetime, timedelta
from functools import partial

from pydantic import SecretStr

from prefect_webapi import ConfigurationError
from prefect_webapi.auth import Token, library

__all__ = ["KeyPair"]

_library = partial(library, install="prefect-webapi[snowflake]")

LIVES = timedelta(minutes=59)
"""Snowflake refuses tokens that live longer than an hour."""


class KeyPair:
    """A fetch for `TokenAuth`. Source: Snowflake's guide "Authenticating to the server", key-pair authentication."""

    def __init__(
        self, account: str, user: str, key: SecretStr, passphrase: SecretStr | None
    ) -> None:
        self._subject = f"{_account(account)}.{user}".upper()
        self._key = key
        self._passphrase = passphrase

    async def __call__(self) -> Token:
        return await asyncio.to_thread(self._signed)

    def _signed(self) -> Token:
        jwt, forms = _library("jwt"), _library("cryptography.hazmat.primitives.serialization")
        rsa = _library("cryptography.hazmat.primitives.asymmetric.rsa")
        word = self._passphrase and self._passphrase.get_secret_value().encode()
        try:
            pem = self._key.get_secret_value().encode()
            key = forms.load_pem_private_key(pem, password=word or None)
        except (ValueError, TypeError):
            told = (
                "`private_key` can't be read: it is no PEM, or its passphrase is wrong or missing"
            )
            raise ConfigurationError(told) from None
        if not isinstance(key, rsa.RSAPrivateKey):
            raise ConfigurationError(
                "`private_key` is no RSA key: tokens are signed with one (RS256)"
            )
        public = key.public_key().public_bytes(
            forms.Encoding.DER, forms.PublicFormat.SubjectPublicKeyInfo
        )
        print_ = base64.b64encode(hashlib.sha256(public).digest()).decode()
        now = datetime.now(UTC)
        claims = {
            "iss": f"{self._subject}.SHA256:{print_}",
            "sub": self._subject,
            "iat": now,
            "exp": now + LIVES,
        }
        return Token(SecretStr(jwt.encode(claims, key, algorithm="RS256")), LIVES)


def _account(identifier: str) -> str:
    """Without its region: tokens name the account alone."""
    return identifier.partition("-" if ".global" in identifier else ".")[0]
