"""Waiting on a condition with a deadline: the only way tests wait."""

from prefect_webapi.testing.waiting import eventually, eventually_blocking

__all__ = ["eventually", "eventually_blocking"]
