"""Credentials; how tokens are shared and renewed is tested with the plugins that have some."""

from __future__ import annotations

import pytest

from prefect_webapi import ConfigurationError
from prefect_webapi.auth import library


def test_a_vendors_library_that_is_missing_is_named_with_what_brings_it() -> None:
    assert library("json", install="python").loads("1") == 1
    with pytest.raises(
        ConfigurationError, match=r'no_such_module is missing: pip install "a\[b\]"'
    ):
        library("no_such_module", install="a[b]")
