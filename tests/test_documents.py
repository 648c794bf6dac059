"""What the documents show runs, and what they name exists."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from prefect.cli.deploy._models import PrefectYamlModel  # what `prefect deploy` reads the file with
from pydantic import HttpUrl, SecretStr
from rich.console import Console

import prefect_webapi
import prefect_webapi.auth
import prefect_webapi.http
import prefect_webapi.template
import prefect_webapi.testing
from prefect_webapi import AsyncPlugin, Phase, SyncPlugin, default_registry
from prefect_webapi.cli import app
from prefect_webapi.engine.machine import TRANSITIONS
from prefect_webapi.ledger.records import JobState
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import JobServer
from tests.support.jobserver import TOKEN
from tests.support.prefect import PrefectServer, Scripts

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "flows/README.md")
PAGES = sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "docs").rglob("*.md"))
RUN_SECONDS = 120.0


def text_of(document: str) -> str:
    return (REPOSITORY / document).read_text()


def code_in(document: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text_of(document), re.DOTALL | re.MULTILINE)


@pytest.fixture
def environment(
    prefect_api: PrefectServer, job_server: EmbeddedJobServer, tmp_path: Path
) -> dict[str, str]:
    """Of a script whose connection `quickstart` is saved, and whose ledger is new."""
    block = JobServer(base_url=HttpUrl(job_server.url), token=SecretStr(TOKEN))
    block.save("quickstart", overwrite=True)
    ledger = f"sqlite+aiosqlite:///{tmp_path / 'ledger.db'}"
    return {"PREFECT_INTEGRATIONS_WEBAPI_LEDGER_URL": ledger}


@pytest.mark.timeout(400)
def test_the_example_that_is_started_twice_makes_its_jobs_once(
    scripts: Scripts, environment: dict[str, str], job_server: EmbeddedJobServer
) -> None:
    """REQ-27: `run_key`."""
    for _ in range(2):
        told = scripts.run(REPOSITORY / "flows/report.py", within=RUN_SECONDS, **environment)
        assert "3 reports ready, see http://" in told
    assert job_server.stats().created == 4


def test_every_deployment_names_a_flow_of_this_repository() -> None:
    described: dict[str, Any] = yaml.safe_load(text_of("prefect.yaml"))
    entrypoints = [each["entrypoint"] for each in described["deployments"]]
    for entrypoint in entrypoints:
        path, _, name = entrypoint.partition(":")
        assert re.search(rf"@flow.*\n(async )?def {name}\(", text_of(path))
    flows = {f"flows/{path.name}" for path in (REPOSITORY / "flows").glob("*.py")}
    assert flows - {"flows/local.py"} == {
        entrypoint.partition(":")[0] for entrypoint in entrypoints
    }


def test_the_flows_are_listed_in_reading_order() -> None:
    for path in (REPOSITORY / "flows").glob("*.py"):
        assert f"`{path.name}`" in text_of("flows/README.md")


@pytest.mark.parametrize("document", ["README.md", *PAGES])
def test_samples_are_python_and_import_what_there_is(document: str) -> None:
    for code in code_in(document):
        imports = [
            node
            for node in ast.parse(code, document).body
            if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        exec(compile(ast.Module([*imports], []), document, "exec"), {})


@pytest.mark.parametrize("document", [*DOCUMENTS, *PAGES])
def test_every_link_leads_somewhere(document: str) -> None:
    here = (REPOSITORY / document).parent
    prose = re.sub(r"^```.*?^```", "", text_of(document), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#]+)", prose):
        assert target.startswith("https://") or (here / target).exists(), target


def test_the_diagram_of_a_jobs_life_is_the_table_of_the_engine() -> None:
    """What leads back to its own state is told in words: drawn, its label lies on others."""
    page = text_of("docs/concepts.md")
    drawn = re.findall(r"^    (\w+) --> (\w+): (.+)$", page, re.MULTILINE)
    told = [(to, to, event) for event, to in re.findall(r"\*([a-z ]+)\* to `([A-Z]+)`", page)]
    assert all(state != to for state, to, _ in drawn)
    assert sorted(drawn + told) == sorted(
        (state.value, to.value, event.value) for (state, event), to in TRANSITIONS.items()
    )


def test_every_state_and_phase_is_explained() -> None:
    page = text_of("docs/concepts.md")
    for each in (*JobState, *Phase):
        assert f"| `{each.name}`" in page


def plugin_classes(base: type[Any]) -> dict[str, type[Any]]:
    """Those of this repository, by name."""
    below = [*base.__subclasses__()]
    for each in base.__subclasses__():
        below += plugin_classes(each).values()
    return {each.__name__: each for each in below if each.__module__.startswith("prefect_webapi_")}


def test_the_guarantees_told_are_those_of_the_plugins() -> None:
    """A plugin's class is what its loader names; that of HTTP learns its guarantee from the description."""
    page = text_of("docs/guarantees.md")
    rows = re.findall(r"^\| \[?`([\w-]+)`.*?\| (\S.*?) \|", page, re.MULTILINE)
    told = dict(rows)
    assert told.keys() == default_registry.entries.keys()
    assert told.pop("http") == "as described"
    import_module("prefect_webapi_flyte.plugin")  # its loader does so later
    classes = plugin_classes(AsyncPlugin) | plugin_classes(SyncPlugin)
    for plugin, guarantee in told.items():
        loader: Any = default_registry.entries[plugin].plugin_loader
        (found,) = [classes[name] for name in loader.__code__.co_names if name in classes]
        if issubclass(found, SyncPlugin):
            assert not found.idempotent
            assert guarantee == "`at-most-once`"
        else:
            assert guarantee == f"`{found.guarantee}`"


def test_the_readme_and_the_page_tell_the_same_guarantees() -> None:
    page = text_of("docs/guarantees.md")
    for guarantee, named in re.findall(
        r"^\| `([\w-]+)` \| .*? \| ([^|]+) \|$", text_of("README.md"), re.MULTILINE
    ):
        for name in named.split(", "):
            plugin = name.lower().replace(" ", "-")
            if not plugin.startswith("an-http-api"):
                row = rf"^\| \[?`{plugin.removesuffix('s')}s?`.*?\| `{guarantee}` \|"
                assert re.search(row, page, re.MULTILINE), (plugin, guarantee)


def test_the_deployment_that_is_shown_is_one_for_prefect() -> None:
    (described,) = re.findall(
        r"^```yaml\n(.*?)^```", text_of("docs/flow-authors.md"), re.DOTALL | re.MULTILINE
    )
    (deployment,) = PrefectYamlModel.model_validate(yaml.safe_load(described)).deployments
    assert deployment.entrypoint == "nightly.py:nightly"
    assert deployment.schedules


@pytest.mark.parametrize(
    ("module", "pages"),
    [
        (prefect_webapi, "flows plugins http"),
        (prefect_webapi.http, "http"),
        (prefect_webapi.auth, "http"),
        (prefect_webapi.template, "http"),
        (prefect_webapi.testing, "testing"),
    ],
)
def test_the_reference_has_every_public_name(module: ModuleType, pages: str) -> None:
    shown = "".join(text_of(f"docs/reference/{page}.md") for page in pages.split())
    names = set(re.findall(r"^::: [\w.]+\.(\w+)$", shown, re.MULTILINE))
    assert set(module.__all__) <= names


def commands_in(document: str) -> Iterator[str]:
    """What follows `prefect-webapi` in shell samples and in the text."""
    text = text_of(document)
    for block in re.findall(r"^```(?:sh|bash)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield from re.findall(r"^(?:uv run )?prefect-webapi (.*?)(?: +#.*)?$", block, re.MULTILINE)
    yield from re.findall(r"`(?:uv run )?prefect-webapi ([^`]+)`", text)


@pytest.mark.parametrize("document", [*DOCUMENTS, *PAGES])
def test_every_command_of_ours_is_one(document: str) -> None:
    """Its verbs exist, and each option is in the help."""
    for command in commands_in(document):
        words, verbs, found = re.split(r"[\s\[\]]+", command), list[str](), app
        while len(verbs) < len(words) and words[len(verbs)] in found:
            verbs.append(words[len(verbs)])
            found = found[verbs[-1]]
        assert found.default_command or words == verbs, command
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            app(
                [*verbs, "--help"],
                console=Console(file=shown, width=200),
                exit_on_error=False,
                result_action="return_value",
            )
        for option in re.findall(r"--[a-z-]+", command):
            assert option in shown.getvalue(), command


def test_every_path_of_the_map_exists() -> None:
    """A path is given from the root, or from `prefect_webapi/` where the one before it begins there."""
    named = re.findall(r"`([a-z_.]+/[a-z_./]*)`", text_of("CONTRIBUTING.md"))
    roots = (REPOSITORY, REPOSITORY / "prefect_webapi")
    missing = [path for path in named if not any((root / path).exists() for root in roots)]
    assert missing == []
    assert len(named) > 20
