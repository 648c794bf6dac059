"""Certificates from what single tests of a run found out, in whichever process each of them ran."""

from __future__ import annotations

from collections.abc import Iterable

from prefect_webapi.testing.conformance.certificate import Certificate, Finding, Subject, Verdict
from prefect_webapi.testing.conformance.contract import CHECKS
from prefect_webapi.testing.conformance.trial import certificate_of

__all__ = ["certificates"]


def certificates(told: Iterable[tuple[str, str]]) -> list[Certificate]:
    """One per plugin and service, from pairs of a subject and a finding in JSON; checks that no test ran are named."""
    found: dict[str, dict[str, Finding]] = {}
    for subject, finding in told:
        one = Finding.model_validate_json(finding)
        found.setdefault(subject, {})[one.check] = one
    return [
        certificate_of(
            Subject.model_validate_json(subject),
            [
                findings.get(check.name)
                or Finding(check=check.name, promise=check.promise, verdict=Verdict.NOT_RUN)
                for check in CHECKS
            ],
        )
        for subject, findings in found.items()
    ]
