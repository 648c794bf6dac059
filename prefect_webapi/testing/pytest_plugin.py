"""For pytest: `--webapi-plugin my_package:entry` runs the contract; the certificate stands at the end of the run.

Every run of pytest in an environment with this package imports this module, so it imports nothing before it is needed.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

if TYPE_CHECKING:
    from prefect_webapi.testing.conformance.certificate import Certificate

__all__ = ["FINDING", "SUBJECT"]

SUBJECT, FINDING = "webapi_subject", "webapi_finding"
_SERVICE = "service"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("prefect-webapi", "the contract of prefect-webapi plugins")
    group.addoption(
        "--webapi-plugin",
        metavar="MODULE:NAME",
        help="run the contract on this plugin entry; the tests of the folder only if paths are given",
    )
    group.addoption(
        "--webapi-service",
        metavar="MODULE:NAME",
        help="the Service class for it (MODULE may be a path); "
        "default: `webapi_service` of the configuration file, else <package of the entry>.conformance:service",
    )
    group.addoption(
        "--webapi-certificate",
        metavar="FILE",
        action="append",
        default=[],
        help="write the certificate there: as JSON if the name ends so, else as text; may be repeated",
    )
    parser.addini("webapi_service", "the Service class for --webapi-plugin, as MODULE:NAME")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if _contract_alone(config) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    if not config.getoption("--webapi-plugin"):
        return
    from prefect_webapi.testing.conformance.contract import CHECKS

    contract = _under(_Contract, session, name=str(config.getoption("--webapi-plugin")))
    items += [_under(_Item, contract, name=check.name, check=check) for check in CHECKS]


def _under(node: Any, parent: pytest.Collector, **arguments: Any) -> Any:
    """pytest's way to make a node, whose types say little."""
    return node.from_parent(parent, **arguments)


def _contract_alone(config: pytest.Config) -> bool:
    given = config.args_source is pytest.Config.ArgsSource.ARGS
    return bool(config.getoption("--webapi-plugin")) and not given


class _Contract(pytest.Collector):
    """The checks of one plugin; its server runs from the first of them to the last."""

    _trial: Any = None

    def collect(self) -> list[pytest.Item]:
        return []

    @property
    def trial(self) -> Any:
        if self._trial is None:
            from prefect_webapi.testing.conformance.contract import CHECKS
            from prefect_webapi.testing.conformance.loading import entry_of, service_of
            from prefect_webapi.testing.conformance.trial import Trial

            entry = entry_of(self.name)
            service = service_of(_service_name(self.config, self.name))
            opening = ExitStack()
            self._trial = opening.enter_context(Trial(entry, service, CHECKS))
            self.addfinalizer(opening.close)
        return self._trial


def _service_name(config: pytest.Config, entry: str) -> str:
    if given := config.getoption("--webapi-service"):
        return str(given)
    if written := str(config.getini("webapi_service")):
        module, _, name = written.rpartition(":")  # a path is written from the folder of that file
        return f"{config.rootpath / module}:{name}" if module.endswith(".py") else written
    return f"{entry.partition(':')[0]}.conformance:{_SERVICE}"


class _Item(pytest.Item):
    def __init__(self, *, check: Any, **arguments: Any) -> None:
        super().__init__(**arguments)  # pyright: ignore[reportUnknownMemberType] - pytest's own
        self._check = check

    def runtest(self) -> None:
        from prefect_webapi.testing.conformance.suite import conclude

        assert isinstance(self.parent, _Contract)
        conclude(self.parent.trial, self._check, self._record)

    def _record(self, name: str, value: object) -> None:
        self.user_properties.append((name, value))

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.path, None, f"contract of {self.parent and self.parent.name}: {self.name}"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    reports = [report for found in terminalreporter.stats.values() for report in found]
    for certificate in _certificates(reports):
        terminalreporter.section(f"contract of {certificate.subject.plugin}")
        terminalreporter.write_line(certificate.text())
        for name in cast(list[str], config.getoption("--webapi-certificate")):
            text = (
                certificate.model_dump_json(indent=2)
                if name.endswith(".json")
                else certificate.text()
            )
            Path(name).write_text(text + "\n")
            terminalreporter.write_line(f"written to {name}")


def _certificates(reports: list[Any]) -> list[Certificate]:
    told: list[dict[str, str]] = [dict(getattr(each, "user_properties", ())) for each in reports]
    told = [each for each in told if SUBJECT in each]
    if not told:
        return []
    from prefect_webapi.testing.conformance.concluding import certificates

    return certificates((each[SUBJECT], each[FINDING]) for each in told)
