"""What every test can use. The fixtures live beside their servers in `tests/support/`."""

pytest_plugins = [
    "tests.support.jobserver",
    "tests.support.ledger",
    "tests.support.prefect",
]
