"""Time from the call of a task to the first byte of its create, against a bare task's time to its body.

CASE-067: 100 tasks one after the other on an instant service; the median may be 50 ms above the bare task's,
with one ledger write before the request.

Run: `uv run python -m benchmarks.start_to_create [--tasks 100] [--json]` (starts its own Prefect and job server)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ALLOWED_MS = 50


def measure(tasks: int) -> dict[str, Any]:
    from prefect import flow, task
    from pydantic import HttpUrl, SecretStr

    from prefect_webapi import EngineSettings, PluginConfig
    from prefect_webapi.ledger.sql import SqlStore
    from prefect_webapi.testing import EmbeddedJobServer
    from prefect_webapi_jobserver import JobServer, run_job_sync

    writes: list[float] = []

    def counted(name: str) -> None:
        real = getattr(SqlStore, name)

        async def call(self: SqlStore, argument: Any) -> Any:
            writes.append(time.time())
            return await real(self, argument)

        setattr(SqlStore, name, call)

    counted("intent")
    counted("move")
    reached: list[float] = []

    @task
    def bare() -> None:
        reached.append(time.time())

    @flow
    def bare_flow() -> list[float]:
        called: list[float] = []
        for _ in range(tasks):
            called.append(time.time())
            bare()
        return called

    @flow
    def remote_flow() -> list[float]:
        called: list[float] = []
        for day in range(tasks):
            called.append(time.time())
            run_job_sync.with_options(connection="bench")(day=day, seconds=0)
        return called

    with EmbeddedJobServer(token="bench") as server:
        JobServer(
            base_url=HttpUrl(server.url),
            token=SecretStr("bench"),
            engine=PluginConfig(),
            settings=EngineSettings.load({"initialInterval": "10ms"}),
        ).save("bench", overwrite=True)
        run_job_sync.with_options(connection="bench")(day=-1, seconds=0)
        server.reset()
        called = bare_flow()
        base = [1000 * (b - a) for a, b in zip(called, reached, strict=True)]
        called = remote_flow()
        creates = [entry.at.timestamp() for entry in server.log("create")]
        ours = [1000 * (b - a) for a, b in zip(called, creates, strict=True)]
        before = [
            sum(start <= at <= end for at in writes)
            for start, end in zip(called, creates, strict=True)
        ]
    above = statistics.median(ours) - statistics.median(base)
    return {
        "tasks": tasks,
        "bare task: call to body, median ms": round(statistics.median(base), 1),
        "remote task: call to create at the server, median ms": round(statistics.median(ours), 1),
        "above the bare task, ms": round(above, 1),
        f"at most {ALLOWED_MS} ms": "PASS" if above <= ALLOWED_MS else "FAIL",
        "ledger writes before create, most": max(before),
        "at most 1 write": "PASS" if max(before) <= 1 else "FAIL",
    }


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--tasks", type=int, default=100)
    arguments.add_argument("--json", action="store_true")
    chosen = arguments.parse_args()
    from tests.support.prefect import PrefectServer, free_port

    with tempfile.TemporaryDirectory() as folder:
        prefect_server = PrefectServer(home=Path(folder), port=free_port())
        prefect_server.start()
        try:
            os.environ |= {
                "PREFECT_HOME": folder,
                "PREFECT_API_URL": prefect_server.api_url,
                "PREFECT_LOGGING_LEVEL": "ERROR",
            }
            figures = measure(chosen.tasks)
        finally:
            prefect_server.stop()
    if chosen.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:55} {value}")
    return 1 if "FAIL" in figures.values() else 0


if __name__ == "__main__":
    sys.exit(main())
