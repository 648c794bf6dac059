"""Secrets, looked up anew at each use: a Prefect Secret block, the connection's block, the environment."""

from __future__ import annotations

import os
import re
from typing import Any

from prefect.exceptions import ObjectNotFound

from prefect_webapi._prefect.api import Api
from prefect_webapi.contract.errors import SecretNotFound
from prefect_webapi.contract.secrecy import secret_field, secret_text

__all__ = ["BlockSecrets"]

_SLUGS = ("secret", "secret-str")
"""What `Secret(...)` and `Secret[str](...)` are saved as."""


class BlockSecrets:
    """`engine.Secrets`. The first place that has the key wins, in the order of the module's first line."""

    def __init__(self, api: Api) -> None:
        self._api = api

    async def get(self, key: str, connection: Any) -> str:
        """The present value.

        The Secret block is the one named `key`, as block documents are named: in small letters with
        dashes. A field of the connection may be reached by dots: `auth.token`. The variable is the key
        itself.

        Raises:
            SecretNotFound: names the key and the places searched.
            PrefectUnavailable: whether there is a Secret block can't be found out.
        """
        document = re.sub(r"[^a-z0-9]+", "-", key.lower()).strip("-")
        value = await self._from_block(document)
        if value is None:
            value = secret_field(connection, key)
        if value is None:
            value = os.environ.get(key)
        if value is None:
            kind = type(connection).__name__
            searched = (
                f"Secret block {document!r}",
                f"field {key!r} of the connection's block {kind}",
                f"environment variable {key!r}",
            )
            raise SecretNotFound(key, searched)
        return value

    async def _from_block(self, document: str) -> str | None:
        if not document:
            return None
        for slug in _SLUGS:
            try:
                found = await self._api.ask(
                    f"read block {slug}/{document}",
                    lambda client, slug=slug: client.read_block_document_by_name(document, slug),
                )
            except ObjectNotFound:
                continue
            return secret_text(found.data["value"])
        return None
