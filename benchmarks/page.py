"""Write the figures of a run into `docs/benchmarks.md`, below its marker, and the plots into `docs/img`.

Run: `uv run python -m benchmarks.page FOLDER`, where `benchmarks.all --folder FOLDER` has left what each printed, or
you have put it: `benchmarks.NAME --json > FOLDER/NAME.json`. Of a benchmark that is not there, the section stays.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from benchmarks.all import NAMES
from benchmarks.measure import Series, short
from benchmarks.plot import Curves, draw

PAGE = Path("docs/benchmarks.md")
MARKER = "<!-- what follows is written by benchmarks.page -->\n"


def main() -> None:
    folder = Path(sys.argv[1])
    preface, marker, written = PAGE.read_text().partition(MARKER)
    assert marker, f"{PAGE} has lost its marker"
    sections = {part.partition("\n")[0]: part for part in written.split("\n## ")[1:]}
    for name in NAMES:
        if new := "\n\n".join(_section(folder, name)):
            sections[name] = new
    found = [f"## {sections[name].strip()}\n" for name in NAMES if name in sections]
    PAGE.write_text(preface + marker + "\n" + "\n".join(found))


def _section(folder: Path, name: str) -> Iterator[str]:
    path = folder / f"{name}.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if "tables" not in report:
        return
    machine = report["machine"]
    yield name
    asked = f"benchmarks.{name} {report['asked']}".rstrip()
    yield f"{report['question']} Printed by `uv run python -m {asked}`."
    yield f"*{', '.join(f'{key} {value}' for key, value in machine.items())}.*"
    for table in report["tables"]:
        yield f"**{table['title']}**"
        yield _table(table["rows"])
    if report["notes"]:
        yield "\n".join(f"- {note}" for note in report["notes"])
    if report["targets"]:
        yield _table(
            [
                {
                    "target": target["text"],
                    "reached": "" if target["reached"] is None else target["reached"],
                    "bound": f"{'≤' if target['at_most'] else '≥'} {short(target['bound'])}",
                    "verdict": target["verdict"],
                }
                for target in report["targets"]
            ]
        )
    if report["plots"]:
        picture = Path("img") / f"benchmark-{name}.svg"
        (PAGE.parent / picture).write_text(draw([Curves(**plot) for plot in report["plots"]]))
        yield f"![{name}, by size]({picture})"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(rows[0])
    lines = [columns, ["---"] + ["--:"] * (len(columns) - 1)]
    lines += [[_cell(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return str(Series(tuple(cast(Mapping[str, Any], value)["values"])))
    return short(value) if isinstance(value, int | float) else str(value)


if __name__ == "__main__":
    main()
