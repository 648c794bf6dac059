"""What a task returns, read from its spec's class."""

from types import NoneType
from typing import Any, Generic, TypeVar

import pytest

from prefect_webapi import JobSpec
from prefect_webapi.contract.task import result_type

A = TypeVar("A")


class Plain(JobSpec[int]): ...


class Silent(JobSpec[None]): ...


class Unsaid(JobSpec): ...  # pyright: ignore[reportMissingTypeArgument] - that is the point


class Family(JobSpec[A], Generic[A]): ...


class Leaf(Family[str]): ...


@pytest.mark.parametrize(
    ("spec", "returns"),
    [
        (Plain, int),
        (Silent, NoneType),
        (Unsaid, Any),
        (Family, Any),
        (Family[str], str),
        (Leaf, str),
        (Family[None], NoneType),
    ],
)
def test_a_spec_says_what_its_task_returns(spec: type[JobSpec[Any]], returns: Any) -> None:
    """Also where a family of specs leaves it to each member."""
    assert result_type(spec) == returns
