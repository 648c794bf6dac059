"""Chance of our own: who has seeded Python's `random` gets the same numbers, whether jobs run in the process or not."""

from __future__ import annotations

from random import Random

__all__ = ["chance"]

chance = Random()
