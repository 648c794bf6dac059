"""The guide for authors of plugins, followed to the letter: from its first command to a certified plugin."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from prefect_webapi.testing import Certificate

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "plugin-authors.md").read_text()
SERVE = """
from kiln_service import KilnService
with KilnService().start() as url:
    print(url, flush=True)
    input()
"""


def files_of_the_guide() -> dict[str, str]:
    """Path to text, of every sample that names the file that it is."""
    samples = re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```', TEXT, re.DOTALL | re.MULTILINE)
    assert len(samples) == 5
    return dict(samples)


def commands_of(section: str) -> list[str]:
    part = TEXT[TEXT.index(f"\n## {section}") :]
    block = re.search(r"^```sh\n(.*?)^```", part, re.DOTALL | re.MULTILINE)
    assert block is not None
    return block[1].splitlines()


def run(folder: Path, command: Sequence[str], **env: str) -> subprocess.CompletedProcess[str]:
    """In this environment, as if the package were installed in it."""
    programs = {
        "pytest": [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"],
        "prefect-webapi": [sys.executable, "-c", "from prefect_webapi.cli import main; main()"],
    }
    return subprocess.run(
        [*programs[command[0]], *command[1:]],
        cwd=folder,
        env={**os.environ, "COLUMNS": "200", "PYTHONPATH": str(folder), **env},
        capture_output=True,
        text=True,
        check=False,
    )


def write(folder: Path) -> None:
    """Take over what the guide shows: whole files, and the lines that it changes in the block."""
    for name, text in files_of_the_guide().items():
        path, _, only_lines = name.partition(", ")
        if not only_lines:
            (folder / path).write_text(text)
            continue
        old = (folder / path).read_text()
        first, last = text.splitlines()
        old = re.sub(r"^    base_url: .*$", first, old, flags=re.MULTILINE)
        (folder / path).write_text(
            re.sub(r"^    token: .*$", last, old, flags=re.MULTILINE),
        )


@contextmanager
def stand_in(folder: Path) -> Generator[str]:
    """The service of the guide; gives its URL."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}:{folder / 'tests'}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.communicate("\n", timeout=30)


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_the_guide_leads_to_a_certified_plugin(tmp_path: Path) -> None:
    new, *_ = commands_of("2. A package that is green")
    made = run(tmp_path, shlex.split(new))
    assert made.returncode == 0, made.stderr
    folder = tmp_path / "prefect-webapi-kiln"
    write(folder)

    done = run(folder, shlex.split(commands_of("6. The certificate")[0]))
    assert done.returncode == 0, done.stdout
    certificate = Certificate.model_validate_json((folder / "certificate.json").read_text())
    assert certificate.conforms

    with stand_in(folder) as url:
        (command,) = commands_of("7. One job on the real service")
        words = shlex.split(command.replace("https://kiln.example.com", url))
        tried = run(folder, words, KILN_KEY="a-key-for-tests-only")
    assert tried.returncode == 0, tried.stdout + tried.stderr
    assert "SUCCESS" in tried.stdout
    assert "KilnResult(weight_g=311)" in tried.stdout


@pytest.mark.chaos
@pytest.mark.timeout(600)
def test_the_failure_that_the_guide_shows_is_what_one_sees(tmp_path: Path) -> None:
    assert run(tmp_path, ["prefect-webapi", "new", "plugin", "kiln"]).returncode == 0
    folder = tmp_path / "prefect-webapi-kiln"
    write(folder)
    plugin = folder / "prefect_webapi_kiln" / "plugin.py"
    key = "ctx.task_execution_metadata.generated_name"
    text = plugin.read_text()
    assert text.count(key) == 1
    plugin.write_text("import uuid\n" + text.replace(key, "uuid.uuid4().hex"))
    done = run(folder, ["pytest", "-k", "repeated-create"])
    assert done.returncode == 1
    (shown,) = re.findall(r"^```\n(repeated-create: .*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    assert " ".join(shown.split()) in " ".join(done.stdout.split())


def test_the_guides_code_uses_names_that_there_are() -> None:
    for name, text in files_of_the_guide().items():
        if "," in name or not name.endswith(".py"):
            continue
        ours = [
            node
            for node in ast.parse(text, name).body
            if isinstance(node, ast.ImportFrom)
            and str(node.module).partition(".")[0] == "prefect_webapi"
        ]
        assert ours, name
        exec(compile(ast.Module([*ours], []), name, "exec"), {})
