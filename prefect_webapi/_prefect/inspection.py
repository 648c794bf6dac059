"""What an operator asks of Prefect's API: server, clock, limits, block types. It reads, and changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import Any

from prefect.blocks.core import Block
from prefect.client.orchestration import PrefectClient
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from pydantic import ValidationError

from prefect_webapi._prefect.api import Api, api_address
from prefect_webapi.contract.errors import ConfigurationError
from prefect_webapi.contract.faults import explain

__all__ = [
    "BlockType",
    "Limit",
    "Schema",
    "Server",
    "look_at_block_type",
    "look_at_limits",
    "look_at_server",
    "require_server",
]

PAGE = 200
MEMORY = "prefect.server.concurrency.lease_storage.memory"


@dataclass(frozen=True, slots=True)
class Server:
    """A Prefect server.

    Attributes:
        lease_storage: module that keeps leases; None: it does not tell, as Prefect Cloud.
        clock_ahead: by how much its clock is ahead of ours, known to a second; None: it does not tell.
    """

    address: str
    version: str
    lease_storage: str | None
    clock_ahead: timedelta | None

    @property
    def forgets_leases(self) -> bool:
        """Whether a restart costs it all leases, while the slots stay taken."""
        return self.lease_storage == MEMORY


@dataclass(frozen=True, slots=True)
class Limit:
    """A global concurrency limit. One that is not `active` bounds nothing."""

    name: str
    limit: int
    active_slots: int
    active: bool


class Schema(StrEnum):
    """How a block type on the server stands to its class here."""

    ABSENT = "absent"
    CURRENT = "current"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class BlockType:
    """A block type on the server. `invalid`: saved blocks that this class refuses, by name: what is wrong."""

    slug: str
    schema: Schema
    documents: int
    invalid: dict[str, str]


def require_server() -> None:
    """Refuse to start a server of this process's own, only to look at it.

    Raises:
        ConfigurationError: the settings name no API.
    """
    if not PREFECT_API_URL.value():
        raise ConfigurationError(
            "no Prefect API is named: each process would start a server of its own, and what it had taken of a limit "
            "stays taken when it ends. Start one with `prefect server start`, and name it: "
            "`prefect config set PREFECT_API_URL=http://127.0.0.1:4200/api`"
        )


async def look_at_server(api: Api) -> Server:
    """Ask who is there. Raises `PrefectUnavailable`."""
    return await api.once("ask for its version", _server)


async def _server(client: PrefectClient) -> Server:
    sent = datetime.now(UTC)
    answer = await client.hello()
    between = sent + (datetime.now(UTC) - sent) / 2
    version = await client.api_version()
    try:
        settings: Any = (await client.request("GET", "/admin/settings")).json()
        storage = settings["server"]["concurrency"]["lease_storage"]
    except (ObjectNotFound, KeyError, TypeError):
        storage = None
    told = answer.headers.get("Date")
    ahead = parsedate_to_datetime(told) - between if told else None
    return Server(api_address(), version, storage, ahead)


async def look_at_limits(api: Api, prefix: str) -> Sequence[Limit]:
    """Every global concurrency limit whose name begins so, by name. Raises `PrefectUnavailable`."""
    found: list[Limit] = []
    offset = 0
    while True:

        async def page(client: PrefectClient, offset: int = offset) -> list[Any]:
            return await client.read_global_concurrency_limits(limit=PAGE, offset=offset)

        limits = await api.once("read its concurrency limits", page)
        found += [
            Limit(each.name, each.limit, int(each.active_slots), each.active)
            for each in limits
            if each.name.startswith(prefix)
        ]
        offset += len(limits)
        if len(limits) < PAGE:
            return sorted(found, key=lambda each: each.name)


async def look_at_block_type(api: Api, kind: type[Block]) -> BlockType:
    """Compare a block class with its type and its saved blocks on the server. Raises `PrefectUnavailable`."""
    slug = kind.get_block_type_slug()

    async def ask(client: PrefectClient) -> BlockType:
        try:
            known = await client.read_block_type_by_slug(slug)
        except ObjectNotFound:
            return BlockType(slug, Schema.ABSENT, 0, {})
        try:
            schema = await client.read_block_schema_by_checksum(
                kind._calculate_schema_checksum(),  # pyright: ignore[reportPrivateUsage] - as `prefect block register`
                version=kind.get_block_schema_version(),
            )
            is_current = schema.block_type_id == known.id
        except ObjectNotFound:
            is_current = False
        documents = await client.read_block_documents_by_type(slug, include_secrets=True)
        invalid = {
            str(each.name): told for each in documents if (told := _refused(kind, each.data))
        }
        current = Schema.CURRENT if is_current else Schema.OTHER
        return BlockType(slug, current, len(documents), invalid)

    return await api.once(f"read block type {slug}", ask)


def _refused(kind: type[Block], data: dict[str, Any]) -> str:
    try:
        kind.model_validate(data)
    except ValidationError as error:
        return "; ".join(str(fault) for fault in explain(error, kind).faults)
    return ""
