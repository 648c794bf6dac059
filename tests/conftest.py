"""What every test can use. The fixtures live beside their servers in `tests/support/`."""

import hypothesis
import pytest

# A test proves that something is right, not how fast it is: a machine that stalls fails none.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")

pytest_plugins = [
    "tests.support.jobserver",
    "tests.support.ledger",
    "tests.support.prefect",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A Prefect server of a test's own takes most of a minute to start: such tests are among the long ones."""
    for item in items:
        if "own_prefect_server" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.chaos)
