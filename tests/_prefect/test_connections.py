"""Connections and secrets, kept where Prefect's users keep theirs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from prefect.blocks.core import Block
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from pydantic import BaseModel, SecretStr

from prefect_webapi._prefect import api as api_module
from prefect_webapi._prefect.api import Api, PrefectUnavailable
from prefect_webapi._prefect.connections import BlockConnections
from prefect_webapi._prefect.secrets import BlockSecrets
from prefect_webapi.contract.errors import ConfigurationError, SecretNotFound
from prefect_webapi.tasks import task_for
from prefect_webapi_jobserver import ReportJob
from tests.support.prefect import PrefectServer, free_port, pointed_at

CANARY = "canary-of-a-connection"


class Auth(BaseModel):
    token: SecretStr


class Lab(Block):
    """A connection for tests."""

    _block_type_name = "Lab"
    _block_type_slug = "webapi-test-lab"

    url: str
    auth: Auth
    workers: int = 1


class Other(Block):
    """A block of another type."""

    _block_type_slug = "webapi-test-other"

    url: str = ""


LAB = Lab(url="http://lab", auth=Auth(token=SecretStr(CANARY)))


@pytest.fixture
async def api(prefect_api: PrefectServer) -> AsyncIterator[Api]:
    async with Api() as made:
        yield made


def secret_block(value: str) -> Block:
    return cast(Any, Secret)(value=value)  # a parametrised class would be another block type


async def save(block: Block, name: str) -> None:
    await block.asave(name, overwrite=True)


# --- connections ----------------------------------------------------------------------------------------


async def test_a_saved_block_is_found_by_its_name(api: Api) -> None:
    await save(LAB, "prod")
    found = await BlockConnections(api).resolve("prod", Lab)
    assert (found.name, found.inline) == ("prod", False)
    assert found.value.auth.token.get_secret_value() == CANARY
    assert found.value.url == "http://lab"
    by_slug = await BlockConnections(api).resolve("webapi-test-lab/prod", Lab)
    assert by_slug == found


async def test_a_changed_block_has_another_revision_and_an_unchanged_one_the_same(
    api: Api,
) -> None:
    """CASE-227."""
    await save(LAB, "changing")
    before = await BlockConnections(api).resolve("changing", Lab)
    await save(LAB, "changing")
    same = await BlockConnections(api).resolve("changing", Lab)
    await save(Lab(url="http://lab", auth=Auth(token=SecretStr("new"))), "changing")
    after = await BlockConnections(api).resolve("changing", Lab)
    assert before.revision == same.revision != after.revision
    assert CANARY not in before.revision


async def test_a_missing_document_is_told_with_the_way_to_make_it(api: Api) -> None:
    with pytest.raises(ConfigurationError) as raised:
        await BlockConnections(api).resolve("nowhere", Lab)
    told = str(raised.value)
    assert "no block document webapi-test-lab/nowhere" in told
    assert 'Lab(...).save("nowhere")' in told
    assert "prefect block register -m" in told


async def test_without_a_name_the_document_default_is_meant(api: Api) -> None:
    with pytest.raises(ConfigurationError, match="webapi-test-lab/default"):
        await BlockConnections(api).resolve(None, Lab)


async def test_a_stored_value_that_is_not_allowed_is_explained_without_secrets(api: Api) -> None:
    await save(LAB, "broken")
    async with get_client() as client:
        document = await client.read_block_document_by_name("broken", "webapi-test-lab")
        data = {"url": "u", "auth": {"token": CANARY}, "workers": "many"}
        await client.request(
            "PATCH",
            cast(Any, "/block_documents/{id}"),
            path_params={"id": str(document.id)},
            json={"data": data, "merge_existing_data": False},
        )
    with pytest.raises(ConfigurationError) as raised:
        await BlockConnections(api).resolve("broken", Lab)
    told = str(raised.value)
    assert "webapi-test-lab/broken" in told
    assert "workers" in told
    assert CANARY not in told
    assert raised.value.__context__ is None


async def test_an_inline_block_is_taken_as_it_is(api: Api) -> None:
    """CASE-285."""
    found = await BlockConnections(api).resolve(LAB, Lab)
    assert found.inline
    assert found.name == "inline"
    assert found.value is LAB


async def test_a_block_of_another_type_is_refused(api: Api) -> None:
    connections = BlockConnections(api)
    with pytest.raises(ConfigurationError, match="is a Other; its plugin takes a Lab"):
        await connections.resolve(Other(), Lab)
    with pytest.raises(ConfigurationError, match="is a webapi-test-other block"):
        await connections.resolve("webapi-test-other/prod", Lab)


async def test_a_burst_of_jobs_reads_its_block_once(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    await save(LAB, "burst")
    connections, reads = BlockConnections(api), 0
    ask = api.ask

    async def counted(*args: Any) -> Any:
        nonlocal reads
        reads += 1
        return await ask(*args)

    monkeypatch.setattr(api, "ask", counted)
    await asyncio.gather(*(connections.resolve("burst", Lab) for _ in range(50)))
    assert reads == 1


async def test_a_task_names_a_saved_block_instead_of_holding_it(api: Api) -> None:
    """CASE-231. The private name `Block._block_document_name`."""
    await save(LAB, "named")
    loaded = await Lab.aload("named")
    task = task_for("job-server", ReportJob, connection=loaded)
    assert task.job.connection == "webapi-test-lab/named"


async def test_an_api_that_is_away_is_told_after_a_while(
    prefect_server: PrefectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_module, "PATIENCE_SECONDS", 0.5)
    nobody = PrefectServer(prefect_server.home, free_port())
    with pointed_at(nobody, PREFECT_CLIENT_MAX_RETRIES="0"):
        async with Api() as api:
            with pytest.raises(PrefectUnavailable, match="Is the server up"):
                await BlockConnections(api).resolve("prod", Lab)


# --- secrets ------------------------------------------------------------------------------------------------


async def test_a_secret_block_wins_over_the_field_and_the_field_over_the_environment(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """REQ-61."""
    secrets = BlockSecrets(api)
    monkeypatch.setenv("auth.token", "of the environment")
    assert await secrets.get("auth.token", LAB) == CANARY
    await save(secret_block("of the block"), "auth-token")
    assert await secrets.get("auth.token", LAB) == "of the block"
    await Secret.adelete("auth-token")
    assert await secrets.get("auth.token", Other()) == "of the environment"


async def test_a_missing_secret_names_the_places_and_no_value(api: Api) -> None:
    """CASE-224."""
    with pytest.raises(SecretNotFound) as raised:
        await BlockSecrets(api).get("NO_SUCH_KEY", LAB)
    assert raised.value.key == "NO_SUCH_KEY"
    assert [place.split()[0] for place in raised.value.searched] == [
        "Secret",
        "field",
        "environment",
    ]
    assert CANARY not in str(raised.value)


async def test_a_rotated_secret_is_seen_at_the_next_look(api: Api) -> None:
    """CASE-227."""
    secrets = BlockSecrets(api)
    for value in ("old", "new"):
        await save(secret_block(value), "rotating")
        assert await secrets.get("rotating", LAB) == value
