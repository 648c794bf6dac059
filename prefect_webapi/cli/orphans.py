"""Ends process groups whose owner has died. Run by path, as `python -I -S orphans.py`: it needs nothing but Python.

It reads lines from its standard input, a pipe that only the owner holds: `+123` makes group 123 its ward, `-123` lets
it go. The pipe closes when the owner ends, however it ends; then every ward is asked to end, and soon made to.
"""

from __future__ import annotations

import os
import signal
import sys
import time

_PATIENCE_SECONDS = 5.0


def main() -> None:
    wards: set[int] = set()
    for line in sys.stdin:
        group = int(line[1:])
        if line.startswith("+"):
            wards.add(group)
        else:
            wards.discard(group)
    _send(wards, signal.SIGTERM)
    end = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < end:
        wards = _send(wards, 0)
        if not wards:
            return
        time.sleep(0.1)
    _send(wards, signal.SIGKILL)


def _send(groups: set[int], how: int) -> set[int]:
    """Send a signal to each group; those that are there."""
    there: set[int] = set()
    for group in groups:
        try:
            os.killpg(group, how)
        except (ProcessLookupError, PermissionError):
            continue
        there.add(group)
    return there


if __name__ == "__main__":
    main()
