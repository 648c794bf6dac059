"""`prefect-webapi plugins list`: what is installed, what it serves, and what the rest lacks."""

from __future__ import annotations

import importlib
import sys
from importlib import metadata
from pathlib import Path

import pytest

from prefect_webapi.cli.installed import Installed, installed_plugins
from prefect_webapi.registry import ENTRY_POINT_GROUP, Registry
from tests.cli.command import Command, command_for

ACME = """
from prefect_webapi_jobserver import entry as job_server
from prefect_webapi import PluginEntry

entry = PluginEntry(
    id="acme",
    supported_task_types=["acme-job"],
    connection=job_server.connection,
    spec=job_server.spec,
    plugin_loader=job_server.plugin_loader,
)
"""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    monkeypatch.setenv("COLUMNS", "200")
    return command_for(monkeypatch, capsys)


def test_every_plugin_of_the_package_is_listed_with_what_it_serves(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_INTEGRATIONS_WEBAPI_DISABLED_PLUGINS", "athena")
    ended = command("plugins", "list", "--json")
    found = {each["id"]: each for each in ended.data}
    announced = {point.name for point in metadata.entry_points(group=ENTRY_POINT_GROUP)}
    assert announced <= found.keys()
    assert found["http"]["task_types"] == ["http-job"]
    assert found["http"]["connection"] == "prefect_webapi_http.blocks.HttpJobApi"
    assert found["http"]["is_usable"]
    assert (found["athena"]["is_disabled"], found["athena"]["is_usable"]) == (True, False)
    assert "disabled by DISABLED_PLUGINS" in command("plugins", "list").out


def _installed(site: Path, module: str, *requires: str, extra: str = "") -> list[Installed]:
    """What is told of package `acme-jobs`, whose entry point names `module`."""
    about = site / "acme_jobs-1.0.dist-info"
    about.mkdir()
    needs = "".join(f"Requires-Dist: {each}\n" for each in requires)
    extras = f"Provides-Extra: {extra}\n" if extra else ""
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: acme-jobs\nVersion: 1.0\n{extras}{needs}"
    )
    (about / "entry_points.txt").write_text(f"[{ENTRY_POINT_GROUP}]\nacme = {module}:entry\n")
    registry = Registry(lambda: metadata.entry_points(group=ENTRY_POINT_GROUP))
    return [each for each in installed_plugins(registry) if each.package == "acme-jobs"]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path of imports."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    return tmp_path


def test_a_library_that_an_extra_brings_is_named_with_the_command(site: Path) -> None:
    (site / "prefect_webapi_acme.py").write_text(ACME)
    (found,) = _installed(
        site,
        "prefect_webapi_acme",
        "prefect-webapi>=0.1",
        "pyyaml>=9999",
        'no-such-library>=2 ; extra == "acme"',
        'another>=2 ; extra == "other"',
        'nothing>=2 ; python_version < "3"',
        extra="acme",
    )
    version = metadata.version("pyyaml")
    assert found.problem == f"needs pyyaml>=9999 (there is {version}), no-such-library>=2"
    assert found.remedy == 'pip install "acme-jobs[acme]"'
    assert (found.id, found.is_broken, found.is_usable) == ("acme", False, False)


def test_a_package_that_can_not_be_imported_is_broken(site: Path) -> None:
    (site / "acme_broken.py").write_text("import no_such_module_of_acme\n")
    (found,) = _installed(site, "acme_broken")
    assert found.is_broken
    assert "No module named 'no_such_module_of_acme'" in found.problem
    assert 'pip install --force-reinstall "acme-jobs"' in found.remedy
