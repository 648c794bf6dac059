"""Prints each conformance case with the test or script that proves it.

Run: `uv run python tests/cases.py [--missing]`. Exits 1 when a case that is due has no proof. A proof names its case
as `CASE-041` in its docstring; ranges are written out as `CASE-009 to CASE-013`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SECTIONS = {
    "configuration and flags": range(1, 24),
    "registry and loader": range(24, 41),
    "create": range(41, 69),
    "get, polling, cache": range(69, 91),
    "status and phases": range(91, 110),
    "delete and cancel": range(110, 129),
    "quotas": range(129, 148),
    "rate limits and Retry-After": range(148, 161),
    "crash and re-attach": range(161, 212),
    "sync plugin": range(212, 223),
    "secrets": range(223, 232),
    "outputs and size": range(232, 244),
    "metrics": range(244, 250),
    "deadlines and bad input": range(250, 268),
    "remaining demands": range(268, 287),
}

DUE_SECTIONS = (
    "configuration and flags",
    "registry and loader",
    "create",
    "get, polling, cache",
    "status and phases",
    "delete and cancel",
    "quotas",
    "rate limits and Retry-After",
    "crash and re-attach",
    "sync plugin",
    "secrets",
    "outputs and size",
    "metrics",
    "deadlines and bad input",
    "remaining demands",
)
LATER = {
    "deferral": {88, 89, 192, 208, 209, 210, 211},
}

_NUMBER = re.compile(r"CASE-(\d{3})(?:\s+to\s+CASE-(\d{3}))?")


def due() -> set[int]:
    """The cases that must have a proof now."""
    cases = {case for name in DUE_SECTIONS for case in SECTIONS[name]}
    return cases.difference(*LATER.values())


def proofs() -> dict[int, list[str]]:
    """``case -> places``, each as `file::name`."""
    found: dict[int, list[str]] = {}
    for place, text in _documented():
        for first, last in _NUMBER.findall(text):
            for case in range(int(first), int(last or first) + 1):
                found.setdefault(case, []).append(place)
    return found


def _documented() -> Iterator[tuple[str, str]]:
    """Every test function and benchmark script with its docstring."""
    tests = [*(ROOT / "tests").rglob("test_*.py"), ROOT / "tests/plugins/suite.py"]
    for path in sorted(tests):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                and node.name[:5] == "test_"
            ):
                yield f"{path.relative_to(ROOT)}::{node.name}", ast.get_docstring(node) or ""
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        head = path.read_text().split('"""')
        if len(head) > 1:
            yield str(path.relative_to(ROOT)), head[1]


def main() -> int:
    only_missing = "--missing" in sys.argv[1:]
    known, wanted = proofs(), due()
    missing = sorted(wanted - known.keys())
    for section, cases in SECTIONS.items():
        if not only_missing:
            print(f"\n{section}")
        for case in cases:
            places = known.get(case, [])
            if only_missing and (places or case not in wanted):
                continue
            mark = "  " if places else ("!!" if case in wanted else "--")
            told = ", ".join(places) if places else ("due, no proof" if case in wanted else "later")
            print(f"{mark} CASE-{case:03d}  {told}")
    print(f"\n{len(wanted)} due, {len(wanted) - len(missing)} proved, {len(missing)} missing")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
