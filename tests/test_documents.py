"""What the documents show runs, and what they name exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import HttpUrl, SecretStr

from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import JobServer
from tests.support.jobserver import TOKEN
from tests.support.prefect import PrefectServer, Scripts

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "flows/README.md")
PAGES = sorted(str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "docs").rglob("*.md"))
RUN_SECONDS = 120.0

# Blocks are shared by a session's workers, and each has a job server of its own.
in_one_worker = pytest.mark.xdist_group("documents")


def text_of(document: str) -> str:
    return (REPOSITORY / document).read_text()


def code_in(document: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text_of(document), re.DOTALL | re.MULTILINE)


@pytest.fixture
def environment(
    prefect_api: PrefectServer, job_server: EmbeddedJobServer, tmp_path: Path
) -> dict[str, str]:
    """Of a script whose connections, `prod` and `quickstart`, are saved, and whose ledger is new."""
    block = JobServer(base_url=HttpUrl(job_server.url), token=SecretStr(TOKEN))
    for name in ("prod", "quickstart"):
        block.save(name, overwrite=True)
    ledger = f"sqlite+aiosqlite:///{tmp_path / 'ledger.db'}"
    return {"PREFECT_INTEGRATIONS_WEBAPI_LEDGER_URL": ledger}


@in_one_worker
@pytest.mark.timeout(300)
def test_the_flow_of_the_readme_runs(
    scripts: Scripts, environment: dict[str, str], job_server: EmbeddedJobServer
) -> None:
    (code,) = code_in("README.md")
    told = scripts.run(scripts.write(code), within=RUN_SECONDS, **environment)
    assert "3 reports ready, see http://" in told
    assert job_server.stats().created == 3


@in_one_worker
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


@pytest.mark.parametrize("document", PAGES)
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


def test_every_path_of_the_map_exists() -> None:
    """A path is given from the root, or from `prefect_webapi/` where the one before it begins there."""
    named = re.findall(r"`([a-z_.]+/[a-z_./]*)`", text_of("CONTRIBUTING.md"))
    roots = (REPOSITORY, REPOSITORY / "prefect_webapi")
    missing = [path for path in named if not any((root / path).exists() for root in roots)]
    assert missing == []
    assert len(named) > 20
