"""What is said of a ledger that other machines can't see."""

from __future__ import annotations

import logging
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext

from prefect_webapi._prefect.service import tell_reach
from prefect_webapi.settings import PREFIX, WebApiSettings


@pytest.mark.parametrize(
    ("pool", "url", "is_told"),
    [
        ("machines", None, True),
        ("machines", "postgresql://me@host/jobs", False),
        ("machines", "sqlite:////srv/webapi.db", False),
        (None, None, False),
    ],
)
def test_a_work_pool_without_a_named_ledger_is_told_what_does_not_hold(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    pool: str | None,
    url: str | None,
    is_told: bool,
) -> None:
    """SPEC 7.1: with the setting to change; nothing is said to a served flow or a script, nor to who has chosen."""
    if url is not None:
        monkeypatch.setenv(f"{PREFIX}LEDGER_URL", url)
    run = FlowRun(flow_id=uuid4(), work_pool_name=pool)
    with caplog.at_level(logging.INFO), FlowRunContext.model_construct(flow_run=run):
        tell_reach(WebApiSettings.load())
    assert [PREFIX in record.getMessage() for record in caplog.records] == [True] * is_told


def test_a_plain_call_is_told_nothing(caplog: pytest.LogCaptureFixture) -> None:
    tell_reach(WebApiSettings.load())
    assert not caplog.records
