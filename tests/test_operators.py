"""The operators' page: its samples print what it says they do, and it names every metric there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from prefect_webapi.metrics import METRICS
from prefect_webapi.settings import WebApiSettings

PAGE = (Path(__file__).parents[1] / "docs/operators.md").read_text()


def _blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def _printed(sample: str, capsys: pytest.CaptureFixture[str]) -> str:
    exec(compile(sample, "docs/operators.md", "exec"), {})
    return capsys.readouterr().out


def test_the_arithmetic_of_capacity_prints_what_the_page_shows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (sample,) = [code for code in _blocks("python") if "JOBS_PER_DAY" in code]
    assert _printed(sample, capsys) == _blocks("text")[0]


def test_the_flags_of_the_page_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    """CASE-017."""
    (sample,) = [code for code in _blocks("python") if "flag_set" in code]
    assert _printed(sample, capsys) == "0:00:45\n"


def test_the_page_tells_every_metric_as_the_code_does() -> None:
    for name, metric in METRICS.items():
        assert f"| `prefect_webapi_{name}` | {', '.join(metric.labels)} | {metric.help} |" in PAGE


def test_every_metric_and_setting_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`prefect_webapi_([a-z_]+)`", PAGE))
    assert named == set(METRICS)
    settings = set(re.findall(r"PREFECT_INTEGRATIONS_WEBAPI_([A-Z_]+)", PAGE))
    assert {name.lower() for name in settings} <= set(WebApiSettings.model_fields)
