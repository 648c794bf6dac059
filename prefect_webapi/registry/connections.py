"""A block's value at one moment, and how to tell two values apart without keeping secrets."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

from pydantic import BaseModel

__all__ = ["Connection", "Connections", "digest"]

C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Connection(Generic[C]):
    """A block's value at one moment.

    Attributes:
        name: the document's name; for an inline block a name of the adapter's choice.
        revision: differs when the value does, secrets included: the document's time of change, or
            `digest` of the value.
        inline: never saved, so nobody else can look it up by name.
    """

    name: str
    revision: str
    value: C
    inline: bool = False


class Connections(Protocol):
    """Looks blocks up. The Prefect side brings it."""

    async def resolve(self, ref: Any, kind: type[C], /, *, fresh: bool = False) -> Connection[C]:
        """The present value behind a document's name (None: the default one) or a block.

        Args:
            fresh: as it is now, not as it was a moment ago: the value known so far was refused.
        """
        ...


_SALT = secrets.token_bytes(32)


def digest(value: Any, *, exclude: Collection[str] = ()) -> str:
    """A fingerprint of a value, secrets included, that means nothing outside this process.

    Args:
        exclude: fields of the value (not of its parts) that don't count.
    """
    state = hashlib.blake2b(key=_SALT, digest_size=16)
    for piece in _pieces(value, frozenset(exclude)):
        data = piece.encode()
        state.update(len(data).to_bytes(8, "big") + data)
    return state.hexdigest()


def _pieces(value: Any, exclude: frozenset[str] = frozenset()) -> Iterable[str]:
    reveal = getattr(value, "get_secret_value", None)
    if callable(reveal):
        value = reveal()
    yield f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, BaseModel):
        for name in sorted(type(value).model_fields.keys() - exclude):
            yield name
            yield from _pieces(getattr(value, name))
    elif isinstance(value, Mapping):
        entries = cast(Mapping[Any, Any], value)
        yield str(len(entries))
        for key in sorted(entries, key=repr):
            yield repr(key)
            yield from _pieces(entries[key])
    elif isinstance(value, list | tuple):
        parts = cast(list[Any], value)
        yield str(len(parts))
        for part in parts:
            yield from _pieces(part)
    elif isinstance(value, set | frozenset):
        yield from sorted(map(repr, cast(set[Any], value)))
    elif isinstance(value, str):
        yield value
    else:
        yield repr(value)
