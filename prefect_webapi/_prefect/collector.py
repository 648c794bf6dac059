"""Python's garbage collector while thousands of task runs live."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager

__all__ = ["collected_seldom"]


@contextmanager
def collected_seldom(threshold: int) -> Generator[None]:
    """Let young objects be that many before they are looked at, unless the process has a higher number already.

    With Python's 700, which a dozen task runs make in a moment, most of what a call needs only for a while is taken for
    lasting, and each quarter more of that has the whole heap searched (`benchmarks.overhead` shows what it takes).

    Args:
        threshold: 0: Python's own stays.
    """
    young, *older = gc.get_threshold()
    changes = 0 < young < threshold  # 0: somebody has switched the collector off
    if changes:
        gc.set_threshold(threshold, *older)
    try:
        yield
    finally:
        if changes and gc.get_threshold() == (threshold, *older):  # nobody else has changed it
            gc.set_threshold(young, *older)
