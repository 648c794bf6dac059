"""Large results, kept in Prefect's result storage under the job's own name."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from prefect.blocks.core import Block
from prefect.context import AsyncClientContext
from prefect.filesystems import LocalFileSystem, WritableFileSystem
from prefect.results import aget_default_result_storage

from prefect_webapi.contract.errors import WebApiError
from prefect_webapi.contract.keys import JobKey

__all__ = ["ResultStorage"]

_FOLDER = "prefect-webapi"
_BY_BLOCK = "block:"
_BY_PATH = "path:"


class ResultStorage:
    """`engine.OutputStore` on the default result storage.

    The pointer says where: a saved storage block and the path in it, or a path of this machine.
    """

    async def write(self, key: JobKey, data: bytes) -> str:
        try:
            # Prefect asks its server which storage that is, and closes only the context's client.
            async with AsyncClientContext.get_or_create():
                storage = await aget_default_result_storage()
            block_id = storage._block_document_id  # pyright: ignore[reportPrivateUsage] # as Prefect's own records keep it
            name = f"{_FOLDER}/{key}.json"
            if block_id is None:
                name = str(_local(storage) / name)
            await _call(storage, "write_path", name, data)
        except Exception as error:  # a storage block may raise whatever its client raises
            raise WebApiError(f"the result of job {key} could not be stored: {error}") from error
        return f"{_BY_BLOCK}{block_id}:{name}" if block_id is not None else f"{_BY_PATH}{name}"

    async def read(self, pointer: str) -> bytes | None:
        try:
            if pointer.startswith(_BY_BLOCK):
                block_id, _, name = pointer.removeprefix(_BY_BLOCK).partition(":")
                storage = await Block.aload_from_ref({"block_document_id": block_id})
            else:
                name = pointer.removeprefix(_BY_PATH)
                storage = LocalFileSystem(basepath=str(Path(name).parent))
            return await _call(storage, "read_path", name)
        except (FileNotFoundError, ValueError, KeyError):
            return None
        except Exception as error:
            raise WebApiError(f"a stored result ({pointer}) could not be read: {error}") from error


def _local(storage: WritableFileSystem) -> Path:
    if isinstance(storage, LocalFileSystem) and storage.basepath:
        return Path(storage.basepath).expanduser().resolve()
    raise WebApiError(
        "the default result storage is a block that was never saved, so nobody could read from it later. "
        "Save it and name it in PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK."
    )


async def _call(storage: Any, method: str, *args: Any) -> Any:
    """Storage blocks have an `a…` method, or one that is both, or a plain one."""
    explicit = getattr(storage, f"a{method}", None)
    answer = explicit(*args) if explicit is not None else getattr(storage, method)(*args)
    return await answer if inspect.isawaitable(answer) else answer
