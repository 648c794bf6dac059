"""How much of a result may be read: counted while its parts come, so that no more is kept than may be returned."""

from __future__ import annotations

from typing import TypeVar

from pydantic_core import to_json

from prefect_webapi.contract.errors import RemoteUserError

__all__ = ["SizeLimit"]

T = TypeVar("T")


class SizeLimit:
    """Counts the parts of a result that a plugin reads, page by page, against `ctx.max_dataset_size_bytes`.

    Args:
        size_bytes: of all parts as JSON, this many included; -1: any number.
    """

    def __init__(self, size_bytes: int) -> None:
        self._limit = size_bytes
        self._read = 0

    def kept(self, part: T, remedy: str = "") -> T:
        """The part, counted.

        Args:
            remedy: what users may do instead, as a sentence.

        Raises:
            RemoteUserError: it is more than may be kept. Reading it again brings no less, so it is final.

        Source: SPEC REQ-69.
        """
        self._read += len(to_json(part))
        if 0 <= self._limit < self._read:
            told = f"the result has {self._read} bytes or more, max_dataset_size_bytes is {self._limit}"
            raise RemoteUserError(f"{told}. {remedy}".rstrip(), code="OutputSizeExceeded")
        return part
