"""The named places where a process may die between two acts. Free in production, armed by tests."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["arm", "fault_point"]

_hook: Callable[[str], None] | None = None


def fault_point(name: str) -> None:
    """Say that the engine stands at `name` (KP-nn of the specification) now."""
    if _hook is not None:
        _hook(name)


def arm(hook: Callable[[str], None] | None) -> None:
    """Let `hook` see every named place; None: off. Only tests do this."""
    global _hook
    _hook = hook
