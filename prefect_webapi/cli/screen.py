"""What the verbs print: a console as wide as its reader, JSON, instants, spans, tables of pairs."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["console", "pairs", "quiet", "say_json", "span", "when"]


@contextmanager
def quiet(name: str) -> Generator[None]:
    """Keep what a logger says off the screen: the verb says it better."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def console(*, pipe_columns: int = 160) -> Console:
    """As wide as the terminal (or `COLUMNS`); `pipe_columns` where the output goes to a file or a pipe."""
    return Console(width=shutil.get_terminal_size((pipe_columns, 50)).columns)


def say_json(data: Any) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False))


def when(instant: datetime | None) -> str:
    """An instant in the reader's own time zone; empty for none."""
    return "" if instant is None else instant.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def span(length: timedelta) -> str:
    """`0.4 s`, `12 s`, `3 min 20 s`, `2 h 5 min`, `3 d 2 h`."""
    seconds = length.total_seconds()
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, name, part, part_name in (
        (86_400, "d", 3_600, "h"),
        (3_600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // part} {part_name}"
    return f"{whole} s"


def pairs(rows: Iterable[tuple[str, str | Text]]) -> Table:
    """Names and values below each other; what is empty is left out."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        if value:
            table.add_row(name, value)
    return table
