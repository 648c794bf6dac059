"""Prefect's result storage: large results, and what plugins keep there."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from prefect.blocks.core import Block
from prefect.context import AsyncClientContext
from prefect.filesystems import LocalFileSystem, RemoteFileSystem, WritableFileSystem
from prefect.results import aget_default_result_storage

from prefect_webapi.contract.errors import WebApiError

__all__ = ["ResultStorage"]

_BLOCK = "prefect-block"


class ResultStorage:
    """A `DataStore` on the default result storage.

    What `write` answers names the file of this machine, or the saved block and the name in it: it can be read after
    another storage was made the default.
    """

    async def write(self, name: str, data: bytes, /) -> str:
        try:
            storage = await _default()
            uri = _lasting(storage, name)
            await _call(storage, "write_path", _name_of(uri), data)
        except Exception as error:  # a storage block may raise whatever its client raises
            raise WebApiError(f"{name} could not be stored: {error}") from error
        return uri

    async def uri(self, name: str, /) -> str:
        try:
            storage = await _default()
            if isinstance(storage, RemoteFileSystem):
                return f"{storage.basepath.rstrip('/')}/{name}"
            return _lasting(storage, name)
        except Exception as error:  # as above
            raise WebApiError(f"where {name} would be stored can't be told: {error}") from error

    async def read(self, uri: str, /) -> bytes | None:
        scheme = urlsplit(uri).scheme
        try:
            if scheme == _BLOCK:
                block = {"block_document_id": urlsplit(uri).netloc}
                storage = await Block.aload_from_ref(block)
            elif scheme == "file":
                storage = LocalFileSystem(basepath=str(Path(_name_of(uri)).parent))
            else:  # the storage's own address
                return await _call(await _default(), "read_path", uri)
            return await _call(storage, "read_path", _name_of(uri))
        except (FileNotFoundError, ValueError, KeyError):
            return None
        except Exception as error:  # as above
            raise WebApiError(f"what is stored at {uri} could not be read: {error}") from error


async def _default() -> WritableFileSystem:
    # Prefect asks its server which storage that is, and closes only the context's client.
    async with AsyncClientContext.get_or_create():
        return await aget_default_result_storage()


def _lasting(storage: WritableFileSystem, name: str) -> str:
    block_id = storage._block_document_id  # pyright: ignore[reportPrivateUsage] # as Prefect's own records keep it
    if block_id is not None:
        return f"{_BLOCK}://{block_id}/{quote(name)}"
    if isinstance(storage, LocalFileSystem) and storage.basepath:
        return (Path(storage.basepath).expanduser().resolve() / name).as_uri()
    raise WebApiError(
        "the default result storage is a block that was never saved, so nobody could read from it later. "
        "Save it and name it in PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK."
    )


def _name_of(uri: str) -> str:
    """The name in the block, or the file's path."""
    at = urlsplit(uri)
    name = unquote(at.path)
    return name.removeprefix("/") if at.scheme == _BLOCK else name


async def _call(storage: Any, method: str, *args: Any) -> Any:
    """Storage blocks have an `a…` method, or one that is both, or a plain one."""
    explicit = getattr(storage, f"a{method}", None)
    answer = explicit(*args) if explicit is not None else getattr(storage, method)(*args)
    return await answer if inspect.isawaitable(answer) else answer
