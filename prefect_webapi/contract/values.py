"""Data classes that nobody changes, for what a process makes by the hundred thousand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform

__all__ = ["value_class"]

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def value_class(cls: type[T]) -> type[T]:
    """A data class with slots, made by keywords. That nobody changes its values is the type checker's business.

    One that Python itself freezes is made field by field past its own `__setattr__`, which takes several times as long.
    """
    return dataclass(slots=True, kw_only=True, unsafe_hash=True)(cls)
