"""What looks like a secret, and how to leave it out of texts. It guesses in favour of hiding."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast, get_args, get_origin

from pydantic import BaseModel, SecretBytes, SecretStr
from pydantic.types import Secret

__all__ = ["is_secret_type", "looks_secret", "mask_url", "scrub", "secrets_in"]

_SECRET_WORDS = frozenset(
    [
        *("token", "password", "passwd", "passphrase", "pwd", "secret", "secrets", "credential"),
        *("credentials", "apikey", "bearer", "authorization"),
    ]
)
_SECRET_PAIRS = frozenset([("api", "key"), ("access", "key"), ("private", "key")])
# A token of these kinds is a place in a list or an idempotency key; a secret's name is no secret.
_HARMLESS_BEFORE_TOKEN = frozenset(
    ["next", "page", "request", "client", "idempotency", "continuation"]
)
_NAMES_OF_SECRETS = frozenset(
    ["name", "arn", "id", "ref", "uri", "path", "type", "version", "count"]
)


def looks_secret(name: str) -> bool:
    """Whether a field of this name (snake or camel case) probably holds a secret."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+", name)
    words = [word.lower() for word in words]
    if words and words[-1] in _NAMES_OF_SECRETS:
        words = []
    for nth, word in enumerate(words):
        if word == "token" and nth and words[nth - 1] in _HARMLESS_BEFORE_TOKEN:
            continue
        if word in _SECRET_WORDS or (word, *words[nth + 1 : nth + 2]) in _SECRET_PAIRS:
            return True
    return False


def is_secret_type(kind: Any) -> bool:
    """Whether this annotation is, or holds, one of pydantic's secret types."""
    origin = get_origin(kind) or kind
    if isinstance(origin, type) and issubclass(origin, SecretStr | SecretBytes | Secret):
        return True
    return any(is_secret_type(part) for part in get_args(kind))


def mask_url(text: str) -> str:
    """`text` without the passwords of URLs in it: before the `@` and in the query."""
    text = re.sub(r"(://[^/?#\s:@]*):[^/?#\s]*@", r"\1:***@", text)
    return re.sub(
        r"([?&]([^=&#\s]+)=)[^&#\s]*",
        lambda hit: hit[1] + "***" if looks_secret(hit[2]) else hit[0],
        text,
    )


def scrub(text: str, value: Any) -> str:
    """`text` without the secrets that `value` holds."""
    for secret in sorted(secrets_in(value), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def secrets_in(value: Any) -> Iterator[str]:
    reveal = getattr(value, "get_secret_value", None)
    if callable(reveal):
        secret = reveal()
        text = secret.decode(errors="replace") if isinstance(secret, bytes) else str(secret)
        if text:
            yield text
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from secrets_in(getattr(value, name))
    elif isinstance(value, Mapping):
        for part in cast(Mapping[Any, Any], value).values():
            yield from secrets_in(part)
    elif isinstance(value, list | tuple):
        for part in cast(list[Any], value):
            yield from secrets_in(part)
