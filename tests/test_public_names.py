"""What users import: every name is there, and the contract comes without Prefect."""

from __future__ import annotations

import subprocess
import sys

import pytest

import prefect_webapi


def test_every_public_name_exists_and_is_listed() -> None:
    """`prefect block register -m` and editors look through `dir`."""
    for name in prefect_webapi.__all__:
        assert getattr(prefect_webapi, name) is not None
    assert set(prefect_webapi.__all__) <= set(dir(prefect_webapi))


def test_public_names_are_listed_once() -> None:
    assert len(set(prefect_webapi.__all__)) == len(prefect_webapi.__all__)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        prefect_webapi.Nothing  # noqa: B018


@pytest.mark.parametrize(
    ("names", "absent"),
    [
        ("AsyncPlugin, PhaseInfo, JobSpec, PluginConfig, Throttled", "prefect httpx fastapi"),
        ("RemoteClient, classify", "prefect fastapi"),
    ],
)
def test_plugin_authors_do_not_pay_for_what_they_do_not_use(names: str, absent: str) -> None:
    """The contract comes in tenths of a second, Prefect in seconds."""
    program = (
        f"import sys\nfrom prefect_webapi import {names}\n"
        f"print(*[name for name in {absent.split()} if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == ""
