"""Prefect's API where it can't be used: what is said of it."""

from __future__ import annotations

import logging
from uuid import uuid4

import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import Flow
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_webapi._prefect import identity
from prefect_webapi._prefect.api import Api, PrefectUnavailable
from prefect_webapi.contract.errors import WebApiError
from tests.support.prefect import PrefectServer, free_port

PASSWORD = "canary-of-the-api"


async def _flow(client: PrefectClient) -> Flow:
    return await client.read_flow(uuid4())


@pytest.mark.parametrize("login", ["user:{}", "{}"])
async def test_an_unreachable_api_is_named_without_its_credentials(
    prefect_api: PrefectServer, login: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What was wanted, the address, what to do; the password is in no part of the error, nor in its cause."""
    port = free_port()
    address = f"http://{login.format(PASSWORD)}@127.0.0.1:{port}/api"
    with temporary_settings({PREFECT_API_URL: address}):
        async with Api() as api:
            with pytest.raises(PrefectUnavailable) as raised:
                await api.once("read a flow", _flow)
        with pytest.raises(WebApiError) as unknown:
            identity._ask(lambda client: client.read_flow(uuid4()))  # pyright: ignore[reportPrivateUsage] # no public way
    for error in (raised.value, unknown.value):
        assert f"http://127.0.0.1:{port}/api" in str(error)
        logging.getLogger("here").error("as people log it", exc_info=error)
    assert "to read a flow" in str(raised.value)
    assert "PREFECT_API_URL" in str(raised.value)
    assert "no job" in str(unknown.value) or "none is made" in str(unknown.value)
    assert PASSWORD not in caplog.text


async def test_a_refusal_is_named_without_credentials_too(
    prefect_api: PrefectServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Prefect's own error shows the whole address of the request."""

    async def refused(client: PrefectClient) -> object:
        return await client.request("GET", "/collections/work_pool_types")  # pyright: ignore[reportArgumentType] # no such page

    address = prefect_api.api_url.replace("://", f"://user:{PASSWORD}@")
    with temporary_settings({PREFECT_API_URL: address}):
        async with Api() as api:
            with pytest.raises(PrefectUnavailable, match="404") as raised:
                await api.once("read what is not there", refused)
    logging.getLogger("here").error("as people log it", exc_info=raised.value)
    assert prefect_api.api_url in str(raised.value)
    assert PASSWORD not in caplog.text
