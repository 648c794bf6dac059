"""Every benchmark, one after the other, each in a process of its own; the targets summed up.

The exit code is 0 only if every target was measured and reached.

Run: `uv run python -m benchmarks.all [--quick] [--json] [--repetitions N] [--folder FOLDER]` (`--quick`: some
minutes; `--folder` keeps what each printed as `NAME.json`)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.servers import shared_server

NAMES = ("scale", "polls", "lag", "batch", "ledger", "overhead", "quota", "transport")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    options = ["--json"]
    options += ["--quick"] if asked.quick else []
    options += ["--repetitions", str(asked.repetitions)] if asked.repetitions else []
    if asked.folder:
        asked.folder.mkdir(parents=True, exist_ok=True)
    began, found = time.perf_counter(), dict[str, Any]()
    with shared_server():
        for name in NAMES:
            found[name] = _run(name, options)
            if asked.folder:
                (asked.folder / f"{name}.json").write_text(json.dumps(found[name], indent=1))
    seconds = time.perf_counter() - began
    all_pass = all(_passes(each) for each in found.values())
    if asked.json:
        print(json.dumps({"passes": all_pass, "seconds": seconds, "benchmarks": found}))
    else:
        _show(found, seconds)
    sys.exit(0 if all_pass else 1)


def _run(name: str, options: list[str]) -> dict[str, Any]:
    """What it printed; without any target where it failed."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *options],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    return json.loads(lines[-1]) if lines else {"failed": done.returncode, "targets": []}


def _passes(report: dict[str, Any]) -> bool:
    return "failed" not in report and all(t["verdict"] == "PASS" for t in report["targets"])


def _show(found: dict[str, Any], seconds: float) -> None:
    shown = Table(title=f"all benchmarks, {seconds:.0f} s", title_justify="left")
    for column in ("benchmark", "target", "reached", "bound", "verdict"):
        shown.add_column(column, justify="right" if column in ("reached", "bound") else "left")
    for name, report in found.items():
        if "failed" in report:
            shown.add_row(name, f"failed with {report['failed']}", style="red")
        for target in report["targets"]:
            style = {"PASS": "green", "not measured": "yellow"}.get(target["verdict"], "red")
            reached = "" if target["reached"] is None else f"{target['reached']:.3g}"
            bound = f"{'≤' if target['at_most'] else '≥'} {target['bound']:.6g}"
            shown.add_row(name, target["text"], reached, bound, target["verdict"], style=style)
    Console(width=None if sys.stdout.isatty() else 140).print(shown)


if __name__ == "__main__":
    main()
