"""A real job server, one process per test session, clean for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from prefect_webapi.testing import EmbeddedJobServer

TOKEN = "canary-of-the-job-server"


@pytest.fixture(scope="session")
def job_server_process() -> Iterator[EmbeddedJobServer]:
    with EmbeddedJobServer(token=TOKEN) as server:
        yield server


@pytest.fixture
def job_server(job_server_process: EmbeddedJobServer) -> EmbeddedJobServer:
    """The server with no jobs, no faults, an empty log, honouring keys."""
    job_server_process.reset()
    return job_server_process
