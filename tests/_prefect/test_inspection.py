"""What an operator is told of Prefect's side: server, clock, limits, block types."""

from __future__ import annotations

from datetime import timedelta
from uuid import uuid4

import prefect
import pytest
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from pydantic import Field, SecretStr

from prefect_webapi._prefect import inspection
from prefect_webapi._prefect.api import Api
from prefect_webapi._prefect.inspection import BlockType, Limit, Schema
from prefect_webapi.contract.errors import ConfigurationError
from tests.support.prefect import PrefectServer


async def test_the_server_tells_version_lease_storage_and_time(prefect_api: PrefectServer) -> None:
    async with Api() as api:
        found = await inspection.look_at_server(api)
    assert found.address == prefect_api.api_url
    assert found.version == prefect.__version__
    assert found.forgets_leases
    assert found.clock_ahead is not None
    assert abs(found.clock_ahead) < timedelta(seconds=5)


async def test_all_limits_of_a_prefix_are_found(
    prefect_api: PrefectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "PAGE", 2)
    prefix = f"webapi:inspection-{uuid4().hex[:6]}:"
    async with get_client() as client, Api() as api:
        for number in range(3):
            await client.create_global_concurrency_limit(
                GlobalConcurrencyLimitCreate(name=f"{prefix}{number}", limit=5, active=number > 0)
            )
        await client.increment_concurrency_slots([f"{prefix}2"], 4, "concurrency")
        assert await inspection.look_at_limits(api, prefix) == [
            Limit(f"{prefix}0", 5, 0, False),
            Limit(f"{prefix}1", 5, 0, True),
            Limit(f"{prefix}2", 5, 4, True),
        ]


def _first(slug: str) -> type[Block]:
    class First(Block):
        _block_type_name = slug
        _block_type_slug = slug
        token: SecretStr = Field(description="Token.")

    return First


def _second(slug: str) -> type[Block]:
    """Of the same type, as a newer version of its package has it."""

    class Second(Block):
        _block_type_name = slug
        _block_type_slug = slug
        token: SecretStr = Field(description="Token.")
        region: str = Field(description="Region.")

    return Second


@pytest.mark.filterwarnings("ignore:Type .Second. at .* has key")
async def test_a_block_type_is_compared_with_its_class(prefect_api: PrefectServer) -> None:
    """Absent, as the code has it, of another version; saved blocks that the code refuses, without their secrets."""
    slug = f"inspected-{uuid4().hex[:6]}"
    first = _first(slug)
    async with Api() as api:
        assert await inspection.look_at_block_type(api, first) == BlockType(
            slug, Schema.ABSENT, 0, {}
        )
        document = first.model_validate({"token": "canary"})
        await document.asave("prod")
        assert await inspection.look_at_block_type(api, first) == BlockType(
            slug, Schema.CURRENT, 1, {}
        )
        second = _second(slug)
        found = await inspection.look_at_block_type(api, second)
        assert (found.schema, found.documents) == (Schema.OTHER, 1)
        assert found.invalid == {"prod": "region: is missing. Give it a value."}
        await second.aregister_type_and_schema()
        found = await inspection.look_at_block_type(api, second)
        assert found.schema is Schema.CURRENT


def test_no_server_is_started_only_to_look_at_it(
    prefect_api: PrefectServer,
) -> None:
    inspection.require_server()
    with (
        prefect.settings.temporary_settings(restore_defaults={prefect.settings.PREFECT_API_URL}),
        pytest.raises(ConfigurationError, match="prefect config set PREFECT_API_URL"),
    ):
        inspection.require_server()
