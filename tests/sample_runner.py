"""Runs samples of the documents side by side, each as a program: `sample_runner.py ARGUMENTS FILE…`.

What a sample does not start by itself, its flows, is started here; ARGUMENTS, a JSON object, has the values for
parameters without a default.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

from prefect import Flow

AT_ONCE = 4
_parse, _parsing = ast.parse, threading.Lock()


def _parse_alone(*arguments: Any, **options: Any) -> ast.AST:
    """Python 3.11.7 fails now and then when two threads parse at one time, and Prefect parses each task."""
    with _parsing:
        return _parse(*arguments, **options)


def run(file: Path, arguments: dict[str, Any]) -> int:
    """How many flows it has."""
    code = file.read_text()
    names: dict[str, Any] = {"__name__": "__main__", "__file__": str(file)}
    exec(compile(code, str(file), "exec"), names)
    flows: list[Flow[..., Any]] = [each for each in names.values() if isinstance(each, Flow)]
    for flow in [] if "__main__" in code else flows:
        parameters = inspect.signature(flow.fn).parameters.values()
        given = {p.name: arguments[p.name] for p in parameters if p.default is p.empty}
        if flow.isasync:
            asyncio.run(flow(**given))
        else:
            flow(**given)
    return len(flows)


def main(arguments: str, *files: str) -> None:
    ast.parse = _parse_alone
    values = json.loads(arguments)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        flows = sum(pool.map(run, map(Path, files), repeat(values)))
    sys.stdout.write(f"{len(files)} samples with {flows} flows ran\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
