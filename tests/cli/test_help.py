"""The command line itself: help comes quickly, errors are plain."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from tests.cli.command import Command, command_for


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return command_for(monkeypatch, capsys)


def test_help_names_every_verb(command: Command) -> None:
    ended = command("--help")
    assert ended.code == 0
    for verb in ("quickstart", "jobs", "config"):
        assert verb in ended.out


def test_the_version_is_the_packages(command: Command) -> None:
    assert command("--version").out.strip() == metadata.version("prefect-webapi")


@pytest.mark.parametrize("verb", ["", "jobs list", "jobs show", "config show", "quickstart"])
def test_help_needs_neither_prefect_nor_sqlalchemy(verb: str) -> None:
    """They take seconds to import."""
    script = (
        "import sys, prefect_webapi.cli as cli\n"
        f"sys.argv = ['prefect-webapi', *{verb.split()!r}, '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print({'prefect', 'sqlalchemy'} & sys.modules.keys())\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert ended.stdout.splitlines()[-1] == "set()"
    assert "Usage: prefect-webapi" in ended.stdout


def test_an_unknown_verb_gets_a_hint_and_an_exit_code(command: Command) -> None:
    ended = command("job")
    assert ended.code != 0
    assert "jobs" in ended.err
