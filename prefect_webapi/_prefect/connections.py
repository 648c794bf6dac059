"""Connections are Prefect blocks: looked up by document name, or given as they are."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import anyio
from prefect.blocks.core import Block
from prefect.exceptions import ObjectNotFound
from pydantic import ValidationError

from prefect_webapi._prefect.api import Api
from prefect_webapi.contract.errors import ConfigurationError
from prefect_webapi.contract.faults import explain
from prefect_webapi.registry import Connection, digest

__all__ = ["INLINE", "BlockConnections"]

C = TypeVar("C")

DEFAULT = "default"
INLINE = "inline"
FRESH_SECONDS = 1.0
"""A value read so recently is handed out again: a burst of jobs reads its block once."""


@dataclass(frozen=True, slots=True)
class _Read:
    at: float
    connection: Connection[Any]


class BlockConnections:
    """`registry.Connections` on Prefect's blocks."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._reads: dict[tuple[str, str], _Read] = {}
        self._reading: dict[tuple[str, str], anyio.Lock] = {}

    async def resolve(self, ref: Any, kind: type[C], /, *, fresh: bool = False) -> Connection[C]:
        """The present value behind a document's name (None: `default`), `slug/name`, or a block.

        Raises:
            ConfigurationError: there is no such document, it is of another type, or it is not valid.
            PrefectUnavailable: Prefect's API can't be asked.
        """
        block_type = _block_type(kind)
        if isinstance(ref, Block):
            return _inline(ref, kind, block_type)
        slug = block_type.get_block_type_slug()
        name = _document(DEFAULT if ref is None else ref, slug)
        key = slug, name
        oldest = time.monotonic() - (0.0 if fresh else FRESH_SECONDS)
        async with self._reading.setdefault(key, anyio.Lock()):
            read = self._reads.get(key)
            if read is None or read.at < oldest:
                read = _Read(time.monotonic(), await self._read(slug, name, block_type))
                self._reads[key] = read
        return cast(Connection[C], read.connection)

    async def _read(self, slug: str, name: str, block_type: type[Block]) -> Connection[Any]:
        try:
            document = await self._api.ask(
                f"read block {slug}/{name}",
                lambda client: client.read_block_document_by_name(name, slug),
            )
        except ObjectNotFound:
            raise ConfigurationError(_absent(slug, name, block_type)) from None
        try:
            value = block_type.model_validate(document.data)
        except ValidationError as found:
            error = explain(found, block_type, subject=f"the saved block {slug}/{name}")
        else:
            return Connection(name=name, revision=digest(value), value=value)
        raise error  # outside the handler: the original shows its input


def _block_type(kind: type[Any]) -> type[Block]:
    if issubclass(kind, Block):
        return kind
    raise ConfigurationError(
        f"the plugin's connection class {kind.__name__} is no Prefect block; make it a Block."
    )


def _inline(block: Block, kind: type[C], block_type: type[Block]) -> Connection[C]:
    if not isinstance(block, kind):
        raise ConfigurationError(
            f"the task's connection is a {type(block).__name__}; its plugin takes a "
            f"{block_type.__name__}."
        )
    return Connection(name=INLINE, revision=digest(block), value=block, inline=True)


def _document(ref: Any, slug: str) -> str:
    if not isinstance(ref, str) or not ref:
        raise ConfigurationError(
            f"connection is {ref!r}; give the name of a {slug} block document, or a block."
        )
    given, _, name = ref.rpartition("/")
    if given and given != slug:
        raise ConfigurationError(
            f"connection {ref!r} is a {given} block; this task's plugin takes a {slug} block."
        )
    return name


def _absent(slug: str, name: str, block_type: type[Block]) -> str:
    where = f"{block_type.__module__}.{block_type.__name__}"
    return (
        f"there is no block document {slug}/{name}, which the task's connection names. Create it in "
        f"Prefect's UI under Blocks, or in Python: `from {block_type.__module__} import "
        f'{block_type.__name__}; {block_type.__name__}(...).save("{name}")`. If its type is unknown '
        f"there: `prefect block register -m {where.rpartition('.')[0]}`."
    )
