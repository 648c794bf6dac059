"""Runs a script with the engine's time sped up, or with the process killed at a named place of the engine.

For tests that need a process: `python -m prefect_webapi.testing.run --speed 20 flow.py`. The script runs as `__main__`,
as it would without us.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from prefect_webapi.clock import Clock, use_clock
from prefect_webapi.engine.faults import arm

__all__ = ["die_at", "main"]


def die_at(place: str) -> None:
    """Kill this process with SIGKILL when the engine passes a named place.

    Args:
        place: `KP-08`, or `KP-08:3` for its third passing. Passings are counted over all jobs.

    Raises:
        ValueError: it is neither.
    """
    parts = re.fullmatch(r"(KP-\d\d)(?::([1-9]\d*))?", place)
    if parts is None:
        raise ValueError(f"{place!r} names no place; write KP-08, or KP-08:3 for its third passing")
    name, left = parts[1], int(parts[2] or 1)

    def passing(at: str) -> None:
        nonlocal left
        if at == name:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    arm(passing)


def main(arguments: Sequence[str]) -> None:
    """Set time and end as told, then run the script in this process."""
    parser = argparse.ArgumentParser(
        prog="python -m prefect_webapi.testing.run", description=__doc__
    )
    parser.add_argument(
        "--speed", type=float, default=1.0, help="seconds of the engine's time in a real one"
    )
    parser.add_argument(
        "--epoch",
        type=float,
        help="instant (seconds since 1970) at which both times agree: the same one for processes that share a ledger",
    )
    parser.add_argument(
        "--kill-at", metavar="KP-nn[:n]", help="die by SIGKILL at the n-th passing of this place"
    )
    parser.add_argument("script", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own")
    given = parser.parse_args(arguments)
    if given.speed <= 0:
        parser.error(f"--speed is {given.speed:g}; it must be above 0")
    if not given.script.is_file():
        parser.error(f"there is no script {given.script}")
    if given.speed != 1.0:
        use_clock(Clock(given.speed, epoch=given.epoch))
    if given.kill_at is not None:
        try:
            die_at(given.kill_at)
        except ValueError as error:
            parser.error(f"--kill-at: {error}")
    sys.argv = [str(given.script), *given.arguments]
    sys.path.insert(0, str(given.script.resolve().parent))
    runpy.run_path(str(given.script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
