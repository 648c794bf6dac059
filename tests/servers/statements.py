"""What the warehouses of these tests do with SQL: SQLite runs it in memory, and a comment says how long it takes.

`/* queued 2 */`, `/* running 600 */` and `/* queued 1 running 5 */` are seconds.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Ran", "run", "spans"]

QUEUED_SECONDS = 0.05
RUNNING_SECONDS = 0.15


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of a statement. `affected`: rows that it changed; None: it only read."""

    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = field(default_factory=list[Sequence[Any]])
    affected: int | None = None
    failure: str = ""


def run(script: str, values: Mapping[str, Any] | Sequence[Any] = ()) -> list[Ran]:
    """Run the statements of a script, to the first that fails; the last takes `values`. Tables live for the call."""
    done: list[Ran] = []
    statements = [each for each in script.split(";") if each.strip()] or [""]
    with closing(sqlite3.connect(":memory:")) as database:
        for nth, each in enumerate(statements, start=1):
            try:
                cursor = database.execute(each, values if nth == len(statements) else ())
                rows = cursor.fetchall()
            except sqlite3.Error as error:
                return [*done, Ran(failure=str(error))]
            if cursor.description is None:
                done.append(Ran(affected=max(0, cursor.rowcount)))
            else:
                done.append(Ran([column[0] for column in cursor.description], rows))
    return done


def spans(statement: str) -> tuple[float, float]:
    """How long it waits and how long it runs, in seconds."""
    told = dict(re.findall(r"\b(queued|running) ([0-9.]+)", " ".join(_comments(statement))))
    return float(told.get("queued", QUEUED_SECONDS)), float(told.get("running", RUNNING_SECONDS))


def _comments(statement: str) -> list[str]:
    return re.findall(r"/\*(.*?)\*/", statement, re.DOTALL)
