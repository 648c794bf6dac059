"""The command line itself: help comes quickly, errors are plain."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from cyclopts import App

from prefect_webapi.cli import app
from tests.cli.command import Command, command_for


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return command_for(monkeypatch, capsys)


def test_help_names_every_verb(command: Command) -> None:
    ended = command("--help")
    assert ended.code == 0
    for verb in ("config", "doctor", "jobs", "limits", "plugins", "quickstart", "sweep"):
        assert re.search(rf"^│ {verb} +\w", ended.out, re.MULTILINE), f"{verb} says what it is for"


def _verbs(group: App, *above: str) -> Iterator[tuple[str, ...]]:
    names = [name for name in group if not name.startswith("-")]
    if not names:
        yield above
    for name in names:
        yield from _verbs(group[name], *above, name)


def test_each_verb_shows_an_example_that_it_understands(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    verbs = list(_verbs(app))
    assert ("jobs", "resolve") in verbs
    for verb in verbs:
        shown = command(*verb, "--help").out
        example = re.search(r"Example: (prefect-webapi .*)", shown)
        assert example is not None, f"the help of {verb} has no example"
        words = shlex.split(example[1])[1:]
        assert tuple(words[: len(verb)]) == verb
        app.parse_args(words, exit_on_error=False, print_error=False)


def test_a_shell_completes_the_verbs(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    script = tmp_path / "completion.bash"
    assert command("--install-completion", "--shell", "bash", "--output", str(script)).code == 0
    asked = (
        f"source {script}; COMP_WORDS=(prefect-webapi jo); COMP_CWORD=1; "
        "$(complete -p prefect-webapi | sed 's/.*-F \\([^ ]*\\).*/\\1/'); echo \"${COMPREPLY[@]}\""
    )
    told = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["jobs"]


def test_the_version_is_the_packages(command: Command) -> None:
    assert command("--version").out.strip() == metadata.version("prefect-webapi")


def test_help_needs_neither_prefect_nor_sqlalchemy() -> None:
    """They take seconds to import."""
    script = (
        "import sys, prefect_webapi.cli as cli\n"
        f"for verb in {[(), *_verbs(app)]!r}:\n"
        "    sys.argv = ['prefect-webapi', *verb, '--help']\n"
        "    try:\n        cli.main()\n    except SystemExit as end:\n        assert end.code == 0\n"
        "    assert not {'prefect', 'sqlalchemy'} & sys.modules.keys(), verb\n"
        "print('quick')\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "quick"
    assert "Usage: prefect-webapi jobs list" in ended.stdout


def test_an_unknown_verb_gets_a_hint_and_an_exit_code(command: Command) -> None:
    ended = command("job")
    assert ended.code != 0
    assert "jobs" in ended.err
