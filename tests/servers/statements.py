"""What the warehouses of these tests do with SQL: SQLite runs it in memory, and a comment says how long it takes.

`/* queued 2 */`, `/* running 600 */` and `/* queued 1 running 5 */` are seconds.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Mapping, Sequence
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


def run(statement: str, values: Mapping[str, Any] | Sequence[Any] = ()) -> Ran:
    """Run one. Tables live as long as the call: a script may make its own before its last statement."""
    *before, last = [each for each in statement.split(";") if each.strip()] or [""]
    with sqlite3.connect(":memory:") as database:
        try:
            for each in before:
                database.execute(each)
            done = database.execute(last, values)
            rows = done.fetchall()
        except sqlite3.Error as error:
            return Ran(failure=str(error))
        finally:
            database.commit()
        if done.description is None:
            return Ran(affected=max(0, done.rowcount))
        return Ran([column[0] for column in done.description], rows)


def spans(statement: str) -> tuple[float, float]:
    """How long it waits and how long it runs, in seconds."""
    told = dict(re.findall(r"\b(queued|running) ([0-9.]+)", " ".join(_comments(statement))))
    return float(told.get("queued", QUEUED_SECONDS)), float(told.get("running", RUNNING_SECONDS))


def _comments(statement: str) -> list[str]:
    return re.findall(r"/\*(.*?)\*/", statement, re.DOTALL)
