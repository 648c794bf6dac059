"""Results are counted while they are read."""

from __future__ import annotations

import pytest
from pydantic_core import to_json

from prefect_webapi import RemoteUserError
from prefect_webapi.results import SizeLimit

ROWS = [{"n": 1}, {"n": 2}]


def test_a_result_that_just_fits_is_kept_and_one_byte_more_is_not() -> None:
    """CASE-235: the bound includes itself, and all parts count together."""
    size_bytes = 2 * len(to_json(ROWS))
    fits, too_large = SizeLimit(size_bytes), SizeLimit(size_bytes - 1)
    assert fits.kept(ROWS) is ROWS
    assert fits.kept(ROWS) is ROWS
    too_large.kept(ROWS)
    with pytest.raises(RemoteUserError) as caught:
        too_large.kept(ROWS, "Use the table.")
    assert caught.value.code == "OutputSizeExceeded"
    assert f"{size_bytes} bytes or more" in caught.value.message
    assert caught.value.message.endswith(f"is {size_bytes - 1}. Use the table.")


def test_without_a_limit_everything_is_kept() -> None:
    size = SizeLimit(-1)
    for _ in range(100):
        size.kept(ROWS)
