"""The job service under test: the job server's wire, lean enough not to be what is measured. A process of its own.

The jobs are those of `prefect_webapi.testing` (time decides, nothing runs); the HTTP around them is 60 lines, where the
job server's framework would use more CPU per request than the clients that are compared.

Run by `Service`, or by hand: `uv run python -m benchmarks.service` (prints `READY <url>`).
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import urllib.request
from typing import Any, Self
from urllib.parse import parse_qs, unquote

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import RequestReceived
from h2.settings import SettingCodes

from prefect_webapi.testing.jobserver.jobs import Job, JobSpecification, JobTable, NewJob

__all__ = ["Service"]

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Service:
    """The service as a process beside a benchmark. A context manager; the process ends with the block, or with ours."""

    def __init__(self, url: str = "", *, http2: bool = False) -> None:
        self.url = url  # of one that runs already, to ask it
        self._arguments = ["--http2"] if http2 else []

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.service", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().split()[1]
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.terminate()
        self._process.communicate()

    def stats(self) -> dict[str, float]:
        """Requests by kind, jobs `read`, `connections` opened, jobs `made`; the service's own `cpu` seconds."""
        with _direct.open(f"{self.url}/control/stats", timeout=20) as answer:
            return json.load(answer)

    def ends(self) -> dict[str, float]:
        """When each job ended or will end, in seconds since 1970, by name."""
        return {name: ends for name, (_, ends) in self._times().items()}

    def made(self) -> list[float]:
        """When each job was made, in seconds since 1970."""
        return [made for made, _ in self._times().values()]

    def _times(self) -> dict[str, tuple[float, float]]:
        with _direct.open(f"{self.url}/control/times", timeout=60) as answer:
            return json.load(answer)

    def reset(self) -> None:
        with _direct.open(f"{self.url}/control/reset", timeout=20):
            pass


class _Jobs:
    """What the service knows."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.table = JobTable()
        self.count = dict.fromkeys(("create", "get", "batch", "read", "delete", "connections"), 0)

    def answer(self, method: str, target: str, body: bytes) -> tuple[int, Any]:
        where, _, query = target.partition("?")
        name = unquote(where.removeprefix("/jobs/"))
        if where.startswith("/control/"):
            return 200, self._control(where)
        if where == "/jobs":
            self.count["batch"] += 1
            wanted = parse_qs(query)["names"][0].split(",")
            self.count["read"] += len(wanted)
            found = (self.table.named(each) for each in wanted)
            return 200, [self._view(job) for job in found if job is not None]
        job = self.table.named(name)
        if method == "PUT":
            self.count["create"] += 1
            status = 201 if job is None else 200
            return status, self._view(job or self.table.add(name, NewJob.model_validate_json(body)))
        if job is None:
            return 404, {"message": f"there is no job {name!r}"}
        if method == "DELETE":
            self.count["delete"] += 1
            self.table.cancel(job, "")
            return 202, self._view(job)
        self.count["get"] += 1
        self.count["read"] += 1
        return 200, self._view(job)

    def _control(self, where: str) -> Any:
        if where == "/control/reset":
            self.reset()
        if where == "/control/times":
            epoch = time.time() - self.table.now()
            return {job.name: (epoch + job.created, epoch + job.ends) for job in self.table.all()}
        return {**self.count, "made": len(self.table), "cpu": time.process_time()}

    def _view(self, job: Job) -> dict[str, Any]:
        state = job.state(self.table.now())
        return {
            "name": job.name,
            "state": state,
            "message": job.new.spec.message,
            "result": job.new.spec.result if state == "succeeded" else None,
            "fingerprint": job.new.fingerprint,
            "labels": job.new.labels,
            "link": f"http://127.0.0.1/ui/jobs/{job.name}",
            "key": job.new.key,
        }


class _Http2(asyncio.Protocol):
    """GET over HTTP/2 in the clear, by prior knowledge."""

    def __init__(self, jobs: _Jobs) -> None:
        self._jobs = jobs
        self._h2 = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._h2.initiate_connection()
        self._h2.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: 10_000})
        self._transport.write(self._h2.data_to_send())

    def data_received(self, data: bytes) -> None:
        for event in self._h2.receive_data(data):
            if isinstance(event, RequestReceived):
                asked = {str(name): str(value) for name, value in event.headers}
                status, told = self._jobs.answer(asked[":method"], asked[":path"], b"")
                self._h2.send_headers(event.stream_id, [(":status", str(status))])
                self._h2.send_data(event.stream_id, json.dumps(told).encode(), end_stream=True)
        self._transport.write(self._h2.data_to_send())


class _Http(asyncio.Protocol):
    """HTTP/1.1 with `Content-Length` and connections that stay open: what the clients here speak."""

    def __init__(self, jobs: _Jobs) -> None:
        self._jobs = jobs
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._jobs.count["connections"] += 1

    def data_received(self, data: bytes) -> None:
        self._received += data
        while b"\r\n\r\n" in self._received:
            head, _, rest = self._received.partition(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").split("\r\n")
            headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}
            length = int(headers.get("content-length", "0"))
            if len(rest) < length:
                return
            self._received = rest[length:]
            method, target, _ = first.split(" ")
            status, told = self._jobs.answer(method, target, rest[:length])
            body = json.dumps(told).encode()
            head = f"HTTP/1.1 {status} OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            self._transport.write(head.encode() + body)


async def _serve() -> None:
    jobs, loop = _Jobs(), asyncio.get_running_loop()
    jobs.table.add("first", NewJob(spec=JobSpecification(seconds=1e6)))
    speak = _Http2 if "--http2" in sys.argv else _Http
    server = await loop.create_server(lambda: speak(jobs), "127.0.0.1", 0, backlog=4096)
    print(f"READY http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await asyncio.to_thread(sys.stdin.read)  # ends with the parent's pipe


if __name__ == "__main__":
    asyncio.run(_serve())
