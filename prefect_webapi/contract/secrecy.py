"""What looks like a secret, and how to leave it out of texts. It guesses in favour of hiding."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, cast, get_args, get_origin
from urllib.parse import quote, quote_plus

from pydantic import BaseModel, SecretBytes, SecretStr
from pydantic.types import Secret

__all__ = [
    "Mask",
    "is_secret_type",
    "is_shown",
    "looks_secret",
    "mask_url",
    "scrub",
    "secret_field",
    "secret_text",
    "secrets_in",
]

LEAST_CHARACTERS = 8
"""Shorter secrets are taken out of messages only: in data they can't be told from ordinary words."""

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


def is_shown(name: str) -> bool:
    """Whether people may see a handle's field of this name.

    None that looks like a secret; nor one called `opaque…`, which only its plugin can read.
    """
    return not looks_secret(name) and not name.startswith("opaque")


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


class Mask:
    """Takes secrets out of texts and data, in each of the shapes in which services echo them."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._secrets = frozenset(filter(None, secrets))

    @cached_property
    def _any(self) -> re.Pattern[str] | None:
        return _pattern(self._secrets)

    @cached_property
    def _long(self) -> re.Pattern[str] | None:
        return _pattern(secret for secret in self._secrets if len(secret) >= LEAST_CHARACTERS)

    def __call__(self, text: str) -> str:
        """`text` with `***` in the place of each secret."""
        return self._any.sub("***", text) if self._any else text

    def with_more(self, secrets: Iterable[str]) -> Mask:
        more = self._secrets.union(secrets)
        return self if more == self._secrets else Mask(more)

    def hits(self, text: str) -> bool:
        """Whether `text`, which may be JSON, holds a secret of eight characters or more."""
        return self._long is not None and self._long.search(text) is not None

    def data(self, value: Any) -> Any:
        """`value`, as JSON knows it, without secrets of eight characters or more."""
        if self._long is None:
            return value
        if isinstance(value, str):
            return self._long.sub("***", value)
        if isinstance(value, Mapping):
            pairs = cast(Mapping[Any, Any], value).items()
            return {self.data(name): self.data(part) for name, part in pairs}
        if isinstance(value, list | tuple):
            return [self.data(part) for part in cast(list[Any], value)]
        return value

    def is_told_by(self, error: BaseException) -> bool:
        """Whether a traceback of `error` shows a secret: in its text, its notes, or in what led to it."""
        texts = "\n".join(_told(error, set()))
        return self(texts) != texts


def _told(error: BaseException, seen: set[int]) -> Iterator[str]:
    if id(error) in seen:
        return
    seen.add(id(error))
    yield str(error)
    yield from map(str, getattr(error, "__notes__", ()))
    parts = cast(tuple[BaseException, ...], getattr(error, "exceptions", ()))
    for other in (error.__cause__, error.__context__, *parts):
        if isinstance(other, BaseException):
            yield from _told(other, seen)


def _pattern(secrets: Iterable[str]) -> re.Pattern[str] | None:
    shapes = {shape for secret in secrets for shape in _shapes(secret) if shape}
    longest_first = sorted(shapes, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _shapes(secret: str) -> tuple[str, ...]:
    """The secret as it is, and as URLs, JSON, HTML and tracebacks write it."""
    return (
        secret,
        quote(secret, safe=""),
        quote_plus(secret),
        json.dumps(secret)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
        repr(secret)[1:-1],
        html.escape(secret),
    )


def scrub(text: str, value: Any) -> str:
    """`text` without the secrets that `value` holds."""
    return Mask(secrets_in(value))(text)


def secrets_in(value: Any) -> Iterator[str]:
    """Every secret in a block, or in any structure: by pydantic's secret types, whatever lies in them."""
    reveal = getattr(value, "get_secret_value", None)
    if callable(reveal):
        yield from _leaves(reveal())
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from secrets_in(getattr(value, name))
        yield from secrets_in(value.model_extra or {})
    elif isinstance(value, Mapping):
        for part in cast(Mapping[Any, Any], value).values():
            yield from secrets_in(part)
    elif isinstance(value, list | tuple | set | frozenset):
        for part in cast(list[Any], value):
            yield from secrets_in(part)


def _leaves(secret: Any) -> Iterator[str]:
    """The texts of a secret, which may be a structure."""
    if isinstance(secret, bytes):
        yield secret.decode(errors="replace")
    elif isinstance(secret, BaseModel):
        yield from _leaves(dict(secret))
    elif isinstance(secret, Mapping):
        for part in cast(Mapping[Any, Any], secret).values():
            yield from _leaves(part)
    elif isinstance(secret, list | tuple | set | frozenset):
        for part in cast(list[Any], secret):
            yield from _leaves(part)
    elif callable(reveal := getattr(secret, "get_secret_value", None)):
        yield from _leaves(reveal())
    elif isinstance(secret, str):
        yield secret
    elif len(str(secret)) >= LEAST_CHARACTERS:  # a number, say; a short one is in every other text
        yield str(secret)


def secret_field(connection: Any, path: str) -> str | None:
    """What a field of a connection holds, in plain text; parts of `path` are parted by dots."""
    value: Any = connection
    for name in path.split("."):
        reveal = getattr(value, "get_secret_value", None)
        if callable(reveal):
            value = reveal()
        if isinstance(value, BaseModel) and name in type(value).model_fields:
            value = getattr(value, name)
        elif isinstance(value, Mapping):
            value = cast(Mapping[str, Any], value).get(name)
        else:
            return None
    return None if value is None or isinstance(value, BaseModel) else secret_text(value)


def secret_text(value: Any) -> str:
    """A secret as text, whatever form it was saved in."""
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if isinstance(value, SecretBytes):
        value = value.get_secret_value().decode()
    return value if isinstance(value, str) else json.dumps(value)
