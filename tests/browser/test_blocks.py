"""Each plugin's block, made and changed by hand in the form of Prefect's UI."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import pytest
from prefect.blocks.core import Block
from prefect.plugins import load_prefect_collections
from prefect.utilities.dispatch import get_registry_for_type
from pydantic import SecretStr

from prefect_webapi import EngineSettings, PluginConfig

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("ui_server")]

CANARY = "canary-of-the-form"
FILLED: dict[str, dict[str, str]] = {
    "amazon-athena": {"Region": "eu-central-1"},
    "aws-step-functions": {"Region": "eu-central-1"},
    "bigquery": {"Project": "a-project", "Location": "EU"},
    "databricks": {"Host": "https://dbc.example.com/", "Token": CANARY},
    "flyte-connector": {"Address": "localhost:8000"},
    "job-server": {"Base Url": "http://127.0.0.1:1/", "Token": CANARY},
    "snowflake": {"Account": "org-account", "Token": CANARY},
}
"""What a person must fill in, by the form's labels; all else has a default."""


def blocks() -> dict[str, type[Block]]:
    load_prefect_collections()
    registered = cast(dict[str, type[Block]], get_registry_for_type(Block))
    return {slug: c for slug, c in registered.items() if c.__module__.startswith("prefect_webapi")}


def field(page: Page, label: str, nth: int = 1) -> Locator:
    """The input below a label: Prefect's form does not tie them together for machines."""
    said = f'(//*[normalize-space(text())="{label}"])[{nth}]'
    return page.locator(f"xpath={said}/following::*[self::input or self::textarea][1]")


def apart(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call something of Prefect's in a thread: in this one Playwright keeps a loop, and it would be a coroutine."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call, *arguments).result(60)


def loaded(kind: type[Block], name: str) -> Any:
    return apart(cast(Any, kind).load, name)


def test_every_block_is_filled_in_here() -> None:
    """But one: the API that `http-job-api` describes is a page of YAML, see the next test but one."""
    assert FILLED.keys() == blocks().keys() - {"http-job-api"}


@pytest.mark.parametrize("slug", sorted(FILLED))
def test_a_block_is_made_and_changed_in_the_form(
    page: Page, keep: Callable[[str], None], slug: str
) -> None:
    """Nested defaults are filled in and described; what was made by hand loads, and so does what was changed."""
    kind, name = blocks()[slug], f"by-hand-{uuid4().hex[:6]}"
    apart(kind.register_type_and_schema)
    page.goto(f"/blocks/catalog/{slug}/create")
    field(page, "Block Name").fill(name)
    for label, value in FILLED[slug].items():
        field(page, label).fill(value)
    for nested in (PluginConfig, EngineSettings):
        for each in nested.model_fields.values():
            assert each.description
            assert page.get_by_text(each.description.split("`")[0]).count() > 0, each.description
    wanted: PluginConfig = kind.model_fields["engine"].get_default()
    assert field(page, "Qps").input_value() == str(wanted.read_rate_limiter.qps)
    keep("form")
    page.get_by_role("button", name="Create").click()
    page.wait_for_url("**/blocks/block/*")
    made = loaded(kind, name)
    assert made.engine == wanted
    assert made.settings == EngineSettings()

    page.goto(f"{page.url}/edit")
    field(page, "Qps").fill("7")
    field(page, "Create timeout (Optional)").fill("45s")
    page.get_by_role("button", name="Save").click()
    page.wait_for_url("**/blocks/block/*")
    changed = loaded(kind, name)
    assert changed.engine.read_rate_limiter.qps == 7
    assert changed.engine.write_rate_limiter == wanted.write_rate_limiter
    assert changed.settings.create_timeout.total_seconds() == 45


def test_a_secret_is_masked_and_survives_an_edit(page: Page) -> None:
    """Who sees the block sees stars, and who saves the form with its stars keeps the secret."""
    kind, name = blocks()["job-server"], f"secret-{uuid4().hex[:6]}"
    apart(kind.register_type_and_schema)
    page.goto("/blocks/catalog/job-server/create")
    for label, value in {"Block Name": name, **FILLED["job-server"]}.items():
        field(page, label).fill(value)
    page.get_by_role("button", name="Create").click()
    page.wait_for_url("**/blocks/block/*")
    page.get_by_text("********").first.wait_for()
    assert CANARY not in page.content()
    page.goto(f"{page.url}/edit")
    assert set(field(page, "Token").input_value()) == {"*"}
    field(page, "Qps").fill("8")
    page.get_by_role("button", name="Save").click()
    page.wait_for_url("**/blocks/block/*")
    assert loaded(kind, name).token.get_secret_value() == CANARY


def test_the_block_of_a_described_api_shows_its_parts_and_is_changed_in_the_form(
    page: Page,
) -> None:
    """It is made by code from the page that describes the API; what belongs to the connection is changed by hand."""
    from flows.http_job import QUEUE
    from prefect_webapi_http import HttpJobApi, JobApi

    name = f"http-{uuid4().hex[:6]}"
    made = cast(Any, HttpJobApi)(
        base_url="http://127.0.0.1:1/", api=JobApi.model_validate(QUEUE), secret=SecretStr(CANARY)
    )
    page.goto(f"/blocks/block/{apart(made.save, name)}/edit")
    assert field(page, "Base Url").input_value() == "http://127.0.0.1:1/"
    field(page, "Qps").fill("7")
    for absent in ("batch", "find"):  # Prefect's form offers an empty one instead of none
        heading = f'(//*[normalize-space(text())="{absent}"])[1]'
        page.locator(f'xpath={heading}/following::button[normalize-space()="null"][1]').click()
    page.get_by_role("button", name="Save").click()
    page.wait_for_url("**/blocks/block/*")
    assert CANARY not in page.content()
    changed = loaded(HttpJobApi, name)
    assert changed.engine.read_rate_limiter.qps == 7
    assert changed.secret.get_secret_value() == CANARY
    assert changed.api == made.api
