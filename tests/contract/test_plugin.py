"""What a plugin is asked for, and what it need not have."""

from __future__ import annotations

from typing import Any

import pytest

from prefect_webapi import AsyncPlugin, OptionalMethod
from prefect_webapi.contract.plugin import overrides
from prefect_webapi_jobserver.plugin import JobServerPlugin


class Described(JobServerPlugin):
    """One class for services that offer different things."""

    def __init__(self, *lacks: OptionalMethod) -> None:
        self.lacks = lacks


@pytest.mark.parametrize(
    ("plugin", "expected"),
    [
        (Described(), {"find", "get_many"}),
        (Described("find"), {"get_many"}),
        (Described("get_many", "find", "outputs"), set[str]()),
    ],
)
def test_an_optional_method_is_there_if_the_class_has_it_and_the_instance_does_not_lack_it(
    plugin: AsyncPlugin[Any, Any], expected: set[str]
) -> None:
    methods: tuple[OptionalMethod, ...] = ("find", "get_many", "outputs")
    assert {method for method in methods if overrides(plugin, method)} == expected
