"""How often Python's garbage collector looks while the engine works."""

from __future__ import annotations

import gc
from collections.abc import Generator

import pytest
from prefect import flow

from prefect_webapi import sync_task_for
from prefect_webapi._prefect.collector import collected_seldom
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import ReportJob
from tests.support.engine import block


@pytest.fixture(autouse=True)
def as_python_has_it() -> Generator[None]:
    before = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*before)


def test_young_objects_are_looked_at_less_often_and_then_as_before() -> None:
    with collected_seldom(5_000):
        assert gc.get_threshold() == (5_000, 10, 10)
    assert gc.get_threshold() == (700, 10, 10)


@pytest.mark.parametrize(
    ("set_by_the_process", "asked"),
    [((0, 10, 10), 5_000), ((50_000, 20, 5), 5_000), ((700, 10, 10), 0)],
    ids=["switched off", "higher already", "left to Python"],
)
def test_what_the_process_wants_stays(set_by_the_process: tuple[int, int, int], asked: int) -> None:
    gc.set_threshold(*set_by_the_process)
    with collected_seldom(asked):
        assert gc.get_threshold() == set_by_the_process
    assert gc.get_threshold() == set_by_the_process


def test_what_somebody_sets_meanwhile_is_not_taken_back() -> None:
    with collected_seldom(5_000):
        gc.set_threshold(1_000, 10, 10)
    assert gc.get_threshold() == (1_000, 10, 10)


@pytest.mark.usefixtures("engine_here")
def test_the_engine_of_a_flow_has_it_so(job_server: EmbeddedJobServer) -> None:
    run = sync_task_for("job-server", ReportJob, name="run", connection=block(job_server))

    @flow
    def reports() -> tuple[int, int, int]:
        run(seconds=0)
        return gc.get_threshold()

    assert reports() == (50_000, 10, 10)
