"""A Flyte connector over gRPC: flytekit's own server, and before it what logs each call and spoils it on command."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

import grpc
from flyteidl.admin.agent_pb2 import ExecuteTaskSyncResponse
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from tests.servers.base import Fault, Reply, Seen, serve, strike
from tests.support.certificates import self_signed

__all__ = ["NONSENSE", "FlyteConnectorServer", "refusal"]

OPS = {
    "CreateTask": "create",
    "GetTask": "get",
    "DeleteTask": "delete",
    "ExecuteTaskSync": "do",
    "ListAgents": "discover",
}
CODES = {code.value[0]: code for code in grpc.StatusCode}
OF_HTTP = {  # what gRPC's clients make of an answer that isn't gRPC's
    400: grpc.StatusCode.INTERNAL,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.UNIMPLEMENTED,
    **dict.fromkeys((429, 502, 503, 504), grpc.StatusCode.UNAVAILABLE),
}
NONSENSE = Reply(0, b"\xff\xff no message of protobuf")
"""For a `Fault`: OK, and a message that nobody can read."""
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def refusal(code: grpc.StatusCode, details: str, *, retry_after: float | None = None) -> Reply:
    """An answer for a `Fault`; `retry_after`: seconds, as gRPC's servers say them."""
    headers = {} if retry_after is None else {"retry-after": str(retry_after)}
    return Reply(code.value[0], details.encode(), headers)


class FlyteConnectorServer:
    """A context manager; `url` is its address, without a scheme.

    Attributes:
        secure_url, certificate: the same over TLS.
        token: the bearer token that each call must show; empty: none.
        splits: send the outputs of a call after its resource, as the protocol allows and flytekit never does.
        is_endless: answer again and again.
        dropped: ops of the calls that clients dropped before the answer.
        seen: each call; its body is the first message, its headers hold its deadline too, as `deadline`.
    """

    def __init__(self, *, token: str = "") -> None:
        self.token, self.url = token, ""
        self.splits = self.is_endless = False
        self.dropped: list[str] = []
        self.seen: list[Seen] = []
        self.faults: list[Fault] = []
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self._forgotten = self.folder / "forgotten"
            self._forgotten.mkdir()
            self._behind: Any = stack.enter_context(
                grpc.insecure_channel(_connector(stack, self.folder), options=UNLIMITED)
            )
            threads = stack.enter_context(ThreadPoolExecutor(32))
            server: Any = grpc.server(threads, handlers=[_Proxy(self)], options=UNLIMITED)
            port = server.add_insecure_port("127.0.0.1:0")
            key, self.certificate = self_signed()
            trust: Any = grpc.ssl_server_credentials([(key, self.certificate)])
            self.secure_url = f"localhost:{server.add_secure_port('127.0.0.1:0', trust)}"
            server.start()
            stack.callback(lambda: server.stop(0).wait())
            self._line = stack.enter_context(_Line(port))
            self.url = f"127.0.0.1:{self._line.port}"
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._open.close()

    # --- the suite's words -------------------------------------------------------------------

    def reset(self) -> None:
        self.seen.clear()
        self.faults.clear()
        self.dropped.clear()
        self.splits = self.is_endless = False
        for path in self.folder.rglob("*.json"):
            path.unlink()

    def jobs(self) -> list[dict[str, Any]]:
        """Every job that was ever made, forgotten ones too."""
        return [json.loads(path.read_text()) for path in self.folder.rglob("*.json")]

    def made(self) -> int:
        return len(self.jobs())

    def live(self) -> int:
        jobs = [json.loads(path.read_text()) for path in self.folder.glob("*.json")]
        return sum(
            "deleted" not in job
            and time.time() < job["at"] + job.get("queue_s", 0) + job.get("seconds", 0)
            for job in jobs
        )

    def forget(self) -> None:
        for path in self.folder.glob("*.json"):
            shutil.move(path, self._forgotten)

    def ops(self) -> list[str]:
        return [seen.op for seen in self.seen]

    def calls(self, op: str) -> list[Seen]:
        return [seen for seen in self.seen if seen.op == op]

    def times(self, op: str) -> list[float]:
        return [seen.at for seen in self.calls(op)]

    def spoil(self, fault: Fault) -> None:
        self.faults.append(fault)

    # --- calls -------------------------------------------------------------------------------

    def answer(self, method: str, messages: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """Every call is a stream both ways; one with a single message looks the same on the wire."""
        first = next(messages)
        deadline = context.time_remaining()
        headers = {**dict(context.invocation_metadata()), "deadline": f"{deadline:g}"}
        op = OPS.get(method.rpartition("/")[2], "")
        self.seen.append(Seen(op, "POST", method, "", headers, first, time.monotonic()))
        if self.token and headers.get("authorization") != f"Bearer {self.token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no such token")
        fault = strike(self.faults, op)
        answers: list[bytes] = []
        if fault is None or fault.carried_out:
            whole = (message for part in ([first], messages) for message in part)
            call = self._behind.stream_stream(method)(whole)
            context.add_callback(call.cancel)  # with the client's own
            try:
                answers += call
            except grpc.RpcError as error:
                told: Any = error
                if not context.is_active():
                    self.dropped.append(op)
                if fault is None:
                    context.abort(told.code(), told.details())
        if fault is not None and fault.reply is None:
            self._line.cut()
        if fault is not None and fault.reply == NONSENSE:
            yield NONSENSE.content
            return
        if fault is not None:
            _abort(context, fault.reply or refusal(grpc.StatusCode.UNAVAILABLE, "never seen"))
        while self.is_endless and context.is_active():
            yield from answers
        if self.splits and op == "do":
            answers = [part for answer in answers for part in _parted(answer)]
        yield from answers


def _parted(answer: bytes) -> Iterator[bytes]:
    whole = ExecuteTaskSyncResponse.FromString(answer)
    outputs = ExecuteTaskSyncResponse(outputs=whole.header.resource.outputs)
    whole.header.resource.ClearField("outputs")
    yield whole.SerializeToString()
    yield outputs.SerializeToString()


def _abort(context: Any, reply: Reply) -> None:
    code = CODES.get(reply.status) or OF_HTTP.get(reply.status, grpc.StatusCode.UNKNOWN)
    details = reply.content.decode()
    if "retry-after" in reply.headers:
        info = RetryInfo()
        info.retry_delay.FromNanoseconds(int(float(reply.headers["retry-after"]) * 1e9))
        status = Status(code=reply.status, message=details)
        status.details.add().Pack(info)
        context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(code, details)


class _Proxy(grpc.GenericRpcHandler):
    def __init__(self, server: FlyteConnectorServer) -> None:
        self._server = server

    def service(self, handler_call_details: Any) -> Any:
        handler: Any = grpc.stream_stream_rpc_method_handler
        return handler(partial(self._server.answer, handler_call_details.method))


class _Line:
    """The wire between client and server, so that it can be cut. Its loop has a thread of its own."""

    def __init__(self, port: int) -> None:
        self._behind = port
        self._loop = asyncio.new_event_loop()
        self._ends: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="flyte line")

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._do(asyncio.start_server(self._connected, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.close()
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self) -> None:
        """Every connection ends at once, with a reset."""
        self._do(self._close())

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _close(self) -> None:
        for end in self._ends:
            end.transport.abort()
        while self._ends:  # noqa: ASYNC110 - nothing else tells of it
            await asyncio.sleep(0.001)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, thither = await asyncio.open_connection("127.0.0.1", self._behind)
        ends = {writer, thither}
        self._ends |= ends
        try:
            await asyncio.gather(_carry(reader, thither), _carry(there, writer))
        finally:
            self._ends -= ends


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(64 * 1024):
            writer.write(data)
            await writer.drain()
    writer.close()


def _connector(stack: ExitStack, folder: Path) -> str:
    """Start flytekit's server; it takes seconds to import. It ends with the pipe to its input."""
    command = [sys.executable, "-m", "tests.servers.flyte_sleeper", str(folder)]
    process = stack.enter_context(
        subprocess.Popen(
            command,
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    )
    stack.callback(process.send_signal, signal.SIGKILL)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith("READY "):
        raise RuntimeError("the connector did not start")
    return line.split()[1]


if __name__ == "__main__":
    serve(FlyteConnectorServer())
