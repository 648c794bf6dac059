"""A small soak: the whole of it is a command of its own, `tests/chaos/soak.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefect_webapi.testing import EmbeddedJobServer
from tests.chaos.soak import Soak, run
from tests.support.prefect import PrefectServer


@pytest.mark.parametrize(
    ("mood", "kills"), [("keys", 1), pytest.param("search", 3, marks=pytest.mark.chaos)]
)
def test_kills_at_random_moments_cost_nothing(
    prefect_server: PrefectServer,
    job_server: EmbeddedJobServer,
    tmp_path: Path,
    mood: str,
    kills: int,
) -> None:
    """CASE-199, CASE-200 in small: each job once, each result, nothing alive, no place taken, the quota kept."""
    soak = Soak(jobs=8, kills=kills, seed=1, mood=mood, seconds=2.0, quota=4)
    verdict = run(soak, job_server, prefect_server, tmp_path)
    assert verdict.kills == kills
    assert verdict.is_good, verdict
