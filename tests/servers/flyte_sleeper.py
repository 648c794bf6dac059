"""A connector made with flytekit: the far side of `flyte_connector`, as a process of its own.

Task types: `sleeper` runs jobs, each a file of the folder; `adder` and `echo` are calls.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import uuid
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import grpc.aio
from flyteidl.core.execution_pb2 import TaskExecution, TaskLog

# none of these has types
flytekit: Any = import_module("flytekit.extend.backend.base_connector")
served: Any = import_module("flytekit.extend.backend.connector_service")
services: Any = import_module("flyteidl.service.agent_pb2_grpc")

FAILURES = {
    "user": TaskExecution.FAILED,
    "retryable": TaskExecution.RETRYABLE_FAILED,
    "aborted": TaskExecution.ABORTED,
}


@dataclass
class SleepMeta(flytekit.ResourceMeta):
    """As flytekit's own connectors do: with a token in it."""

    job_id: str
    auth_token: str


class Sleeper(flytekit.AsyncConnectorBase):
    """Of `custom`: seconds, queue_s, result, fail, message, create_error, create_delay_s, delete_error."""

    name = "Sleeper"

    def __init__(self, folder: Path) -> None:
        flytekit.AsyncConnectorBase.__init__(
            self, task_type_name="sleeper", metadata_type=SleepMeta
        )
        self._folder = folder

    async def create(
        self,
        task_template: Any,
        output_prefix: str = "",
        inputs: Any = None,
        task_execution_metadata: Any = None,
        **_: Any,
    ) -> SleepMeta:
        custom: dict[str, Any] = dict(task_template.custom)
        if custom.get("create_error"):
            raise RuntimeError(custom["create_error"])
        meta = SleepMeta(uuid.uuid4().hex, f"token-{uuid.uuid4().hex}")
        labels = dict(task_execution_metadata.labels)
        self._write(
            meta,
            {
                **custom,
                "at": time.time(),
                "token": meta.auth_token,
                "labels": labels,
                "output_prefix": output_prefix,
            },
        )
        await asyncio.sleep(custom.get("create_delay_s", 0))
        return meta

    async def get(self, resource_meta: SleepMeta, **_: Any) -> Any:
        job = self._read(resource_meta)
        log = TaskLog(uri=f"https://logs.example.com/{resource_meta.job_id}", name="Sleeper")
        age, queued = time.time() - job["at"], job.get("queue_s", 0)
        if "deleted" in job:
            return flytekit.Resource(
                phase=TaskExecution.ABORTED, message="deleted", log_links=[log]
            )
        if age < queued:
            return flytekit.Resource(phase=TaskExecution.QUEUED, message="in the queue")
        if age < queued + job.get("seconds", 0):
            custom = {"seconds": job["seconds"]}
            return flytekit.Resource(
                phase=TaskExecution.RUNNING, log_links=[log], custom_info=custom
            )
        if job.get("fail"):
            phase = FAILURES[job["fail"]]
            return flytekit.Resource(phase=phase, message=job.get("message"), log_links=[log])
        outputs: dict[str, Any] = {"result": job.get("result", ""), "slept": job.get("seconds", 0)}
        return flytekit.Resource(phase=TaskExecution.SUCCEEDED, outputs=outputs, log_links=[log])

    async def delete(self, resource_meta: SleepMeta, **_: Any) -> None:
        if not self._path(resource_meta).exists():
            return
        job = self._read(resource_meta)
        if job.get("delete_error"):
            raise RuntimeError("delete fails on request")
        self._write(resource_meta, {**job, "deleted": time.time()})

    def _path(self, meta: SleepMeta) -> Path:
        return self._folder / f"{meta.job_id}.json"

    def _read(self, meta: SleepMeta) -> dict[str, Any]:
        job = json.loads(self._path(meta).read_text())
        if meta.auth_token != job["token"]:
            raise PermissionError("another token made this job")
        return job

    def _write(self, meta: SleepMeta, job: dict[str, Any]) -> None:
        draft = self._path(meta).with_suffix(".draft")
        draft.write_text(json.dumps(job))
        draft.rename(self._path(meta))


class Adder(flytekit.SyncConnectorBase):
    """Of `custom`: a, b, fail, error, seconds."""

    name = "Adder"

    def __init__(self) -> None:
        flytekit.SyncConnectorBase.__init__(self, task_type_name="adder")

    async def do(self, task_template: Any, **_: Any) -> Any:
        custom: dict[str, Any] = dict(task_template.custom)
        await asyncio.sleep(custom.get("seconds", 0))
        if custom.get("error"):
            raise RuntimeError(custom["error"])
        if custom.get("fail"):
            return flytekit.Resource(phase=TaskExecution.FAILED, message=custom["fail"])
        outputs = {"sum": int(custom["a"] + custom["b"])}
        return flytekit.Resource(phase=TaskExecution.SUCCEEDED, outputs=outputs)


class Echo(flytekit.SyncConnectorBase):
    """Gives its inputs back, as flytekit understood them."""

    name = "Echo"

    def __init__(self) -> None:
        flytekit.SyncConnectorBase.__init__(self, task_type_name="echo")

    async def do(self, task_template: Any, inputs: Any = None, **_: Any) -> Any:
        return flytekit.Resource(phase=TaskExecution.SUCCEEDED, outputs=inputs)


async def main(folder: Path) -> None:
    """Serve until the input ends."""
    for connector in (Sleeper(folder), Adder(), Echo()):
        flytekit.ConnectorRegistry.register(connector)
    server = grpc.aio.server()
    services.add_AsyncAgentServiceServicer_to_server(served.AsyncConnectorService(), server)
    services.add_SyncAgentServiceServicer_to_server(served.SyncConnectorService(), server)
    services.add_AgentMetadataServiceServicer_to_server(served.ConnectorMetadataService(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(f"READY 127.0.0.1:{port}\n")
    sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # flytekit logs to it, and nobody reads on
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
