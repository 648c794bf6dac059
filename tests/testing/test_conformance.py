"""The contract's kit: good plugins get their certificate, each wrong one fails the check that is meant for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from prefect_webapi import ConfigurationError, PluginEntry
from prefect_webapi.testing import Certificate, EmbeddedJobServer, certify
from prefect_webapi.testing.conformance.certificate import Verdict
from prefect_webapi.testing.conformance.contract import CHECKS
from prefect_webapi.testing.conformance.loading import entry_of, service_of
from prefect_webapi.testing.conformance.trial import Trial
from prefect_webapi_jobserver import entry
from prefect_webapi_jobserver.plugin import JobServerPlugin
from tests.plugins import test_athena as athena
from tests.plugins import test_bigquery as bigquery
from tests.plugins import test_databricks as databricks
from tests.plugins import test_flyte_connector as flyte
from tests.plugins import test_http as described
from tests.plugins import test_snowflake as snowflake
from tests.plugins import test_step_functions as step_functions
from tests.plugins.suite import CANARY, PluginSuite
from tests.servers.base import Server
from tests.testing.broken import BROKEN, AsksInStatus, Broken
from tests.testing.conforming import JobServerService, VendorService

pytest_plugins = ["pytester"]

HERE = "tests.testing.conforming:JobServerService"
CHECK = {check.name: check for check in CHECKS}


def told(certificate: Certificate) -> str:
    """What went wrong, for a test that fails."""
    return "\n".join(f"{each.check}: {each.told}" for each in certificate.of(Verdict.FAILS))


@pytest.mark.chaos
def test_the_skeleton_keeps_the_whole_contract() -> None:
    """CASE-040, REQ-04: unchanged, and in far less than two minutes."""
    certificate = certify(entry, JobServerService())
    assert certificate.conforms, told(certificate)
    assert [each.check for each in certificate.of(Verdict.HOLDS)] == list(CHECK)
    assert certificate.seconds < 120
    assert "CONFORMS: 29 holds" in certificate.text()


def test_status_that_opens_a_socket_fails(job_server: EmbeddedJobServer) -> None:
    """CASE-092, REQ-53: the kit refuses it the socket, and the plugin its certificate."""
    (broken,) = (each for each in BROKEN if each.plugin is AsksInStatus)
    with Trial(broken.entry, JobServerService(job_server), CHECKS) as trial:
        text = trial.finding(CHECK["status-offline"]).told
    assert "the service: got the snapshot JobView(" in text
    assert broken.words in text
    assert "change:      judge by `ctx.resource` alone" in text


@pytest.mark.chaos
@pytest.mark.parametrize("broken", BROKEN, ids=[each.plugin.__name__ for each in BROKEN])
def test_a_wrong_plugin_fails_the_check_that_is_meant_for_it_and_no_other(broken: Broken) -> None:
    class Impatient(JobServerService):
        patience = 4

    certificate = certify(broken.entry, Impatient())
    assert [each.check for each in certificate.of(Verdict.FAILS)] == [broken.check], told(
        certificate
    )
    assert not certificate.conforms
    text = told(certificate)
    assert broken.words in text
    assert CANARY not in text
    assert "DOES NOT CONFORM" in certificate.text()


def databricks_server() -> Server:
    server = databricks.DatabricksServer(token=CANARY)
    server.secrets[databricks.CLIENT] = CANARY
    return server


VENDORS: dict[str, tuple[Callable[[], PluginSuite], Callable[[], Server], str]] = {
    "databricks": (databricks.TestDatabricks, databricks_server, ""),
    "databricks with OAuth": (databricks.TestDatabricksOAuth, databricks_server, "/token"),
    "snowflake": (snowflake.TestSnowflake, lambda: snowflake.SnowflakeServer(token=CANARY), ""),
    "bigquery": (bigquery.TestBigQuery, lambda: bigquery.BigQueryServer(access=CANARY), "/token"),
    "athena": (athena.TestAthena, athena.AthenaServer, ""),
    "step functions": (
        step_functions.TestStepFunctions,
        step_functions.StepFunctionsServer,
        "",
    ),
    "a described API": (
        described.TestTaskFarm,
        lambda: described.TaskFarm(secret=CANARY),
        "/oauth/token",
    ),
}


@pytest.mark.chaos
@pytest.mark.parametrize("vendor", VENDORS)
def test_the_vendors_plugins_keep_the_contract(vendor: str) -> None:
    """CASE-040: against their servers, which know nothing of the kit; the proxy brings the faults."""
    suite, server, token_path = VENDORS[vendor]
    tests = suite()
    certificate = certify(tests.entry, VendorService(tests, server(), token_path=token_path))
    assert certificate.conforms, told(certificate)
    unclaimed = {each.check for each in certificate.findings if each.verdict is not Verdict.HOLDS}
    assert unclaimed <= {"find", "batch"}


@pytest.mark.chaos
def test_the_flyte_connectors_plugin_keeps_what_can_be_tried_without_http() -> None:
    """CASE-040: a connector speaks gRPC, the proxy does not; its own suite tries what the kit lists as left out."""
    tests, server = flyte.TestFlyteConnector(), flyte.FlyteConnectorServer(token=CANARY)
    service = VendorService(tests, server)
    service.speaks_http = False
    service.lacks = {"unknown-job": "the protocol has no answer that says so"}
    certificate = certify(tests.entry, service)
    assert certificate.conforms, told(certificate)
    left_out = {each.check: each.verdict for each in certificate.findings}
    for check in CHECKS:
        verdict = left_out.pop(check.name)
        if check.on_the_wire or check.name == "unknown-job":
            assert verdict is Verdict.NOT_CHECKED
        elif check.name in ("repeated-create", "find", "batch"):
            assert verdict is Verdict.NOT_IMPLEMENTED
        else:
            assert verdict is Verdict.HOLDS, check.name
    assert certificate.subject.guarantee == "at-most-once"


# --- nothing is left out in silence ----------------------------------------------------------


SPARED = ("states", "redirect", "vanish")


class Sparse(JobServerService):
    """Says little, and leaves a check out."""

    states = ()
    unknown_handle = None
    lacks = MappingProxyType({"redirect": "its proxy redirects"})


def test_what_is_not_described_is_not_checked_and_said_to_be(
    job_server: EmbeddedJobServer,
) -> None:
    sparse = Sparse(job_server)
    checks = [replace(check, after=()) for check in CHECKS]
    with Trial(entry, sparse, checks) as trial:
        found = {each.name: trial.finding(each) for each in checks if each.name in SPARED}
    assert {each.verdict for each in found.values()} == {Verdict.NOT_CHECKED}
    assert "`Service.states` is empty" in found["states"].told
    assert found["redirect"].told == "its proxy redirects"
    assert "`Service.unknown_handle` is None" in found["vanish"].told


def test_a_service_that_lacks_a_check_which_there_is_not_is_refused(
    job_server: EmbeddedJobServer,
) -> None:
    class Odd(JobServerService):
        lacks = MappingProxyType({"telepathy": "not yet"})

    with (
        pytest.raises(ConfigurationError, match="telepathy"),
        Trial(entry, Odd(job_server), CHECKS),
    ):
        pass


class Modest(JobServerPlugin):
    """Keeps the key, and does not say so."""

    guarantee = "at-most-once"
    lacks = ("find",)


def test_a_promise_that_is_not_claimed_and_kept_is_told(job_server: EmbeddedJobServer) -> None:
    check = replace(CHECK["repeated-create"], after=())
    with Trial(Broken(Modest, "", "").entry, JobServerService(job_server), [check]) as trial:
        finding = trial.finding(check)
    assert finding.verdict is Verdict.NOT_IMPLEMENTED
    assert "'key' could be claimed" in finding.told


# --- under pytest ----------------------------------------------------------------------------


@pytest.fixture
def pytester_here(pytester: pytest.Pytester) -> pytest.Pytester:
    """pytest in a folder of its own, which finds the modules of these tests."""
    pytester.syspathinsert(Path(__file__).parents[2])
    return pytester


def test_one_option_runs_the_contract_and_writes_the_certificate(
    pytester_here: pytest.Pytester,
) -> None:
    run = pytester_here.runpytest_inprocess(
        *("--webapi-plugin", "prefect_webapi_jobserver:entry", "--webapi-service", HERE),
        *("--webapi-certificate", "it.json", "--webapi-certificate", "it.txt"),
        *("-k", "handle or unknown-state", "-p", "no:asyncio"),
    )
    run.assert_outcomes(passed=2, deselected=len(CHECKS) - 2)
    certificate = Certificate.model_validate_json((pytester_here.path / "it.json").read_text())
    assert [each.check for each in certificate.of(Verdict.HOLDS)] == ["handle", "unknown-state"]
    assert not certificate.conforms  # most checks were not run, and it says so
    text = (pytester_here.path / "it.txt").read_text()
    assert "Not run this time (27)" in text
    assert text.strip() in run.stdout.str()
    assert json.loads((pytester_here.path / "it.json").read_text())["subject"]["guarantee"] == "key"


def test_one_import_in_a_test_file_runs_the_contract(pytester_here: pytest.Pytester) -> None:
    pytester_here.makepyfile(
        """
        from prefect_webapi.testing import PluginConformance
        from tests.testing.conforming import JobServerService
        from tests.testing.broken import BROKEN

        class TestContract(PluginConformance):
            entry = BROKEN[4].entry
            service = JobServerService
        """
    )
    run = pytester_here.runpytest_inprocess("-k", "unknown-state or handle", "-p", "no:asyncio")
    run.assert_outcomes(passed=1, failed=1, deselected=len(CHECKS) - 2)
    run.stdout.fnmatch_lines(["*change:*return `PhaseInfo.undefined`*", "*DOES NOT CONFORM*"])


def test_loading_the_pytest_plugin_costs_nothing() -> None:
    """Every run of pytest in an environment with this package loads it."""
    heavy = ["prefect", "httpx", "fastapi", "pydantic", "sqlalchemy", "asyncio"]
    code = (
        "import sys, pytest; before = set(sys.modules)\n"
        "import prefect_webapi.testing.pytest_plugin\n"
        f"print(sorted((set(sys.modules) - before) & set({heavy})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("find", "name", "words"),
    [
        (entry_of, "prefect_webapi_jobserver", "write MODULE:NAME"),
        (entry_of, "no_such_package:entry", "could not be imported"),
        (entry_of, "prefect_webapi_jobserver:nothing", "has no 'nothing'"),
        (entry_of, "prefect_webapi_jobserver:JobServer", "not a PluginEntry"),
        (service_of, "prefect_webapi_jobserver:entry", "not a Service"),
        (service_of, "nowhere.py:It", "there is no file nowhere.py"),
    ],
)
def test_a_name_that_names_nothing_of_use_is_refused(
    find: Callable[[str], object], name: str, words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        find(name)


def test_a_plugin_that_is_none_is_refused_before_anything_is_made(
    job_server: EmbeddedJobServer,
) -> None:
    nothing: Any = object()
    wrong: PluginEntry[Any] = PluginEntry(
        id="wrong",
        supported_task_types=["job-server"],
        connection=entry.connection,
        spec=entry.spec,
        plugin_loader=lambda setup: nothing,
    )
    service = JobServerService(job_server)
    with (
        pytest.raises(ConfigurationError, match="returned object, not an AsyncPlugin"),
        Trial(wrong, service, CHECKS),
    ):
        pass
