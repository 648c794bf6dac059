"""`prefect-webapi new plugin`: what it writes is a plugin that keeps the contract before anybody has changed a line."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from prefect_webapi.testing import Certificate
from tests.cli.command import Command, command_for
from tests.test_packaging import uv

LEAST_FREE, MOST_FREE = 20, 40
"""About as many places as an author should have to change."""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return command_for(monkeypatch, capsys)


def pytest_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run its tests with this environment's packages, from its folder, as its author does."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_new_plugin_names_nobody_but_its_service(command: Command, tmp_path: Path) -> None:
    ended = command("new", "plugin", "orbital-batch", "--into", str(tmp_path))
    assert (ended.code, ended.err) == (0, "")
    folder = tmp_path / "prefect-webapi-orbital-batch"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"blocks.py", "models.py", "plugin.py", "py.typed"}
    assert folder / "tests" / "orbital_batch_service.py" in files
    text = "\n".join(f"{path.relative_to(folder)}\n{path.read_text()}" for path in files)
    assert "acme" not in text.lower()
    assert 'id="orbital-batch"' in text
    assert "class OrbitalBatchPlugin(" in text
    marks = text.count("CHANGE") - text.count("grep -rn CHANGE")
    assert LEAST_FREE <= marks <= MOST_FREE
    for path in files:
        if path.suffix == ".py":
            compile(path.read_text(), path.name, "exec")


@pytest.mark.chaos
@pytest.mark.timeout(300)
def test_its_tests_are_green_at_once_and_end_in_a_certificate(
    command: Command, tmp_path: Path
) -> None:
    """REQ-04, CASE-040: also for those who install nothing, and by the option alone."""
    assert command("new", "plugin", "orbital-batch", "--into", str(tmp_path)).code == 0
    folder = tmp_path / "prefect-webapi-orbital-batch"
    done = pytest_in(folder, "--webapi-certificate", "certificate.json")
    assert done.returncode == 0, done.stdout
    certificate = Certificate.model_validate_json((folder / "certificate.json").read_text())
    assert certificate.conforms
    assert certificate.subject.guarantee == "key"
    alone = pytest_in(folder, "--webapi-plugin", "prefect_webapi_orbital_batch:entry", "-k", "find")
    assert alone.returncode == 0, alone.stdout + alone.stderr
    assert "Not implemented by the plugin (1)" in alone.stdout
    assert "there is no `find`" in alone.stdout


@pytest.mark.chaos
@pytest.mark.timeout(300)
def test_its_wheel_announces_the_plugin(command: Command, tmp_path: Path) -> None:
    assert command("new", "plugin", "orbital", "--into", str(tmp_path)).code == 0
    uv("build", "--wheel", "--out-dir", tmp_path, tmp_path / "prefect-webapi-orbital")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
        (points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "orbital = prefect_webapi_orbital:entry" in files.read(points).decode()
    assert not [name for name in names if name.startswith(("tests", "flows"))]


def test_the_template_is_a_plugin_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect_webapi.cli.new import TEMPLATE
    from prefect_webapi.registry import Registry

    monkeypatch.syspath_prepend(str(TEMPLATE))  # pyright: ignore[reportUnknownMemberType] - pytest's own
    Registry().register(importlib.import_module("prefect_webapi_acme").entry)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Orbital Batch", "Try 'orbital-batch'."),
        ("9to5", "Try 'to5'."),
        ("a--b", "Try 'a-b'."),
        ("../x", "Try 'x'."),
        ("", "a letter first"),
        ("x" * 41, "at most 40 characters"),
        ("jobserver", "there is a package prefect_webapi_jobserver already"),
    ],
)
def test_a_bad_name_is_refused_and_nothing_is_written(
    command: Command, tmp_path: Path, name: str, words: str
) -> None:
    ended = command("new", "plugin", "--into", str(tmp_path), "--", name)
    assert ended.code == 2
    assert re.search(re.escape(words), ended.err)
    assert len(ended.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_written_over(command: Command, tmp_path: Path) -> None:
    (tmp_path / "prefect-webapi-orbital").mkdir()
    ended = command("new", "plugin", "orbital", "--into", str(tmp_path))
    assert ended.code == 2
    assert "is there already" in ended.err
