"""The contract as a class of tests: one import in a test file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest

from prefect_webapi.contract.plugin import PluginEntry
from prefect_webapi.testing.conformance.certificate import Verdict
from prefect_webapi.testing.conformance.contract import CHECKS
from prefect_webapi.testing.conformance.service import Service
from prefect_webapi.testing.conformance.trial import Check, Trial
from prefect_webapi.testing.pytest_plugin import FINDING, SUBJECT

__all__ = ["PluginConformance", "conclude"]


class PluginConformance:
    """Subclass it as `TestSomething`; each check of the contract is a test, and the run ends with a certificate.

    Attributes:
        entry: of the plugin. service: what the kit must know of the service.
    """

    entry: ClassVar[PluginEntry[Any]]
    service: ClassVar[type[Service]]

    @pytest.fixture(scope="class")
    @classmethod
    def webapi_trial(cls) -> Iterator[Trial]:
        with Trial(cls.entry, cls.service(), CHECKS) as trial:
            yield trial

    @pytest.mark.parametrize("check", CHECKS, ids=[check.name for check in CHECKS])
    def test_contract(
        self,
        check: Check,
        webapi_trial: Trial,
        record_property: Callable[[str, object], None],
    ) -> None:
        conclude(webapi_trial, check, record_property)


def conclude(trial: Trial, check: Check, record: Callable[[str, object], None]) -> None:
    """Run a check as a test; what it came to goes to the certificate at the end of the run.

    Raises:
        Failed, Skipped: of pytest.
    """
    finding = trial.finding(check)
    record(SUBJECT, trial.subject.model_dump_json())
    record(FINDING, finding.model_dump_json())
    match finding.verdict:
        case Verdict.HOLDS:
            return
        case Verdict.FAILS:
            pytest.fail(
                f"{finding.check}: not so: {finding.promise}\n{finding.told}", pytrace=False
            )
        case verdict:
            pytest.skip(f"{verdict.value}: {finding.told}")
