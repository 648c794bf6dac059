"""A real browser on a real Prefect server with its UI. Nothing is downloaded: it takes what the machine has."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.prefect import PrefectServer, free_port, pointed_at

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SCREENSHOTS = Path(__file__).parents[2] / "screenshots"
REMEDY = "no chromium on this machine: apt-get install -y chromium"
NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.fail(REMEDY, pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found,
            args=["--no-sandbox"],  # root may not have one
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def ui_server(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PrefectServer]:
    """A server with its UI; this process's Prefect uses it. It is started if there is a browser to look at it."""
    server = PrefectServer(tmp_path_factory.mktemp("prefect"), free_port())
    server.start(PREFECT_SERVER_UI_ENABLED="true")
    with pointed_at(server):
        yield server
    server.stop()


@pytest.fixture
def page(
    browser: Browser, ui_server: PrefectServer, request: pytest.FixtureRequest
) -> Iterator[Page]:
    """A tab of the UI; what it shows at the end of the test is kept in `screenshots/`."""
    page = browser.new_page(
        base_url=ui_server.api_url.removesuffix("/api"), viewport={"width": 1400, "height": 1600}
    )
    page.set_default_timeout(30_000)
    yield page
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{request.node.name}.png", full_page=True)
    page.close()


@pytest.fixture
def keep(page: Page, request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Keep what the tab shows now, beside what it shows at the end."""

    def shot(what: str) -> None:
        SCREENSHOTS.mkdir(exist_ok=True)
        page.screenshot(path=SCREENSHOTS / f"{request.node.name}-{what}.png", full_page=True)

    return shot
