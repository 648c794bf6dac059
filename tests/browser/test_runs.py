"""What a person sees of jobs in Prefect's UI: states as they happen, why, links, cards, progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import TimeoutError

from prefect_webapi.testing import EmbeddedJobServer
from tests.support.jobserver import TOKEN
from tests.support.prefect import Child, PrefectServer, Scripts
from tests.support.waiting import eventually_blocking

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

FLOW = """
import asyncio, sys
from prefect import flow
from prefect.runtime import flow_run
from prefect_webapi import PluginConfig, run_many
from prefect_webapi_jobserver import JobServer, ReportJob, run_job
from pydantic import HttpUrl, SecretStr

here = JobServer(
    base_url=HttpUrl("{url}"), token=SecretStr("{token}"), engine=PluginConfig(resource_quotas={{"default": 1}})
)

@flow
async def nightly():
    print("RUN", flow_run.id, flush=True)
    job = run_job.with_options(connection=here, task_run_name="{{kind}}")
    first = asyncio.ensure_future(job(kind="first", outcome="never"))
    await asyncio.sleep(1)
    second = job(kind="second", seconds=0.5, outcome="fail", message="no figures")
    await asyncio.gather(first, second, return_exceptions=True)
    if "many" in sys.argv:
        await run_many(job, [ReportJob(kind="many", seconds=0.1) for _ in range(5)])

asyncio.run(nightly())
"""


@pytest.fixture
def scripts(ui_server: PrefectServer, tmp_path: Path) -> Iterator[Scripts]:
    runner = Scripts(ui_server, tmp_path)
    yield runner
    runner.close()


def start(scripts: Scripts, service: EmbeddedJobServer, folder: Path, *more: str) -> Child:
    text = FLOW.format(url=service.url, token=TOKEN)
    ledger = f"sqlite+aiosqlite:///{folder / 'webapi.db'}"
    return scripts.start(text, *more, PREFECT_INTEGRATIONS_WEBAPI_LEDGER_URL=ledger)


def id_told(child: Child) -> str:
    assert child.process.stdout is not None
    for line in child.process.stdout:
        if line.startswith("RUN "):
            return line.split()[1]
    raise AssertionError("the flow did not start")


def open_tab(page: Page, run: str, name: str) -> None:
    """A part of the flow run's page."""
    page.goto(f"/runs/flow-run/{run}")
    page.get_by_text(name, exact=True).last.click()


def card_of(page: Page, run: str, text: str) -> None:
    """Open the artifact of the flow run whose card says so."""
    open_tab(page, run, "Artifacts")
    page.get_by_text("job-j").first.wait_for()
    links = page.locator("a[href*='/artifacts/artifact/']").all()
    for href in [link.get_attribute("href") or "" for link in links]:
        page.goto(href)
        with suppress(TimeoutError):  # it is another one's card
            page.get_by_text(text).first.wait_for(timeout=5_000)
            return
    raise AssertionError(f"no card says {text!r}")


@pytest.mark.timeout(280)
def test_states_reasons_links_cards_and_progress_are_seen(
    page: Page,
    keep: Callable[[str], None],
    scripts: Scripts,
    job_server: EmbeddedJobServer,
    tmp_path: Path,
) -> None:
    """One job runs, one waits for its quota behind it; then the first ends, the second fails, and five more come."""
    child = start(scripts, job_server, tmp_path, "many")
    run = id_told(child)
    eventually_blocking(lambda: job_server.stats().live == 1, within=60)
    open_tab(page, run, "Task Runs")
    page.get_by_text("AwaitingConcurrencySlot").first.wait_for()
    page.get_by_text("Running", exact=True).first.wait_for()
    keep("waits")
    open_tab(page, run, "Logs")
    page.get_by_text("is AwaitingConcurrencySlot: quota").first.wait_for()
    page.get_by_text("limit 1, position").first.wait_for()

    card_of(page, run, "WAITING_FOR_RESOURCES")  # where it waits, and why
    assert page.get_by_text("limit 1, position").count() > 0
    keep("why-it-waits")

    (first,) = job_server.jobs()
    job_server.end(first.name, "succeeded")
    child.finish(within=120)

    open_tab(page, run, "Task Runs")
    page.get_by_text("RetryableFailure").first.wait_for()
    open_tab(page, run, "Artifacts")
    page.get_by_text("7 of 7 jobs are over, 1 of them failed").first.wait_for()
    assert page.get_by_text(f"jobs-{run}").count() >= 1  # one of the flow run, changed in place
    keep("progress")

    card_of(page, run, "no figures")
    shown = page.inner_text("body")
    for part in (
        "RETRYABLE_FAILURE",
        "QUEUED",
        "RUNNING",
        "job-server",
        "1 of 1",
        "took",
        "JobFailed",
    ):
        assert part in shown, part
    assert TOKEN not in page.content()
    keep("failed")

    card_of(page, run, "SUCCESS")
    assert first.name in page.inner_text("body")  # the service's own name for it
    with page.expect_popup() if _opens_apart(page) else page.expect_navigation():
        page.get_by_role("link", name="Job", exact=True).first.click()
    pages = page.context.pages
    eventually_blocking(lambda: any(first.name in each.url for each in pages), within=20)
    assert any(first.name in each.inner_text("body") for each in pages)


def _opens_apart(page: Page) -> bool:
    link = page.get_by_role("link", name="Job", exact=True).first
    return link.get_attribute("target") == "_blank"
