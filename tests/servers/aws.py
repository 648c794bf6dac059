"""AWS services: moto's own server as a process, and in front of it, per service, what moto lets pass or lacks.

What a request may hold is read from botocore's description of the service, which AWS publishes.
"""

from __future__ import annotations

import asyncio
import html
import json
import re
import subprocess
import sys
import tempfile
import time
import uuid
from abc import abstractmethod
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, ClassVar, Self
from urllib.parse import urlencode

import httpx
from starlette.types import ASGIApp, Receive, Scope, Send

from prefect_webapi.testing.asgi import answer, whole_body
from tests.servers.base import Reply, Seen, Server

__all__ = ["ACCOUNT", "REGION", "AwsServer", "Moto", "refused"]

REGION = "us-east-1"
ACCOUNT = "123456789012"  # moto's
START_SECONDS = 60.0
_PROGRAM = """
import os, sys, threading
from moto.server import main
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
main(["-H", "127.0.0.1", "-p", "0"])
"""
_SIGNATURE = re.compile(
    r"AWS4-HMAC-SHA256 Credential=[^/]+/[0-9]{8}/([^/]+)/([^/]+)/aws4_request, "
    r"SignedHeaders=([^,]+), Signature=[0-9a-f]{64}"
)


def refused(code: str, message: str, *, status: int = 400, **more: Any) -> Reply:
    """An error as the JSON protocols tell it."""
    return Reply(status, {"__type": code, "message": message, **more})


class Moto:
    """moto's server, which runs state machines. A context manager; the process ends with the block, or with ours."""

    def __init__(self) -> None:
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._client = httpx.Client(timeout=60, trust_env=False)

    def __enter__(self) -> Self:
        with tempfile.NamedTemporaryFile("w+") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=log, stderr=log
            )
            deadline = time.monotonic() + START_SECONDS
            while not self.url:
                log.seek(0)
                found = re.search(r"Running on (http://[0-9.:]+)", text := log.read())
                if found is not None:
                    self.url = found[1]
                elif self._process.poll() is not None or time.monotonic() > deadline:
                    self.__exit__()
                    raise RuntimeError(f"moto did not start: {text}")
                else:
                    time.sleep(0.02)
        self.control("config", {"stepfunctions": {"execute_state_machine": True}})
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._client.close()
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.kill()
            self._process.wait()

    def control(self, path: str, data: Any = None) -> None:
        content = data if isinstance(data, str) else json.dumps(data)
        self._client.post(f"{self.url}/moto-api/{path}", content=content).raise_for_status()

    def new_key(self, action: str) -> tuple[str, str]:
        """An access key and its secret, of a user who may do this."""
        policy = {"Effect": "Allow", "Action": action, "Resource": "*"}
        document = json.dumps({"Version": "2012-10-17", "Statement": [policy]})
        user = {"UserName": f"user-{uuid.uuid4()}"}
        self._iam("CreateUser", **user)
        self._iam("PutUserPolicy", **user, PolicyName="any", PolicyDocument=document)
        told = self._iam("CreateAccessKey", **user)
        found = re.search(r"<AccessKeyId>(.+?)<.+<SecretAccessKey>(.+?)<", told, re.DOTALL)
        assert found is not None, told
        return found[1], html.unescape(found[2])

    def _iam(self, action: str, **fields: str) -> str:
        form = urlencode({"Action": action, "Version": "2010-05-08", **fields}).encode()
        return self.ask("iam", {"Content-Type": "application/x-www-form-urlencoded"}, form).text

    @contextmanager
    def checking_signatures(self) -> Generator[None]:
        self.control("reset-auth", "0")
        try:
            yield
        finally:
            self.control("reset-auth", "inf")

    def send(self, headers: Mapping[str, str], body: bytes) -> Reply:
        """A request as it is."""
        got = self._client.post(self.url, headers=dict(headers), content=body)
        return Reply(got.status_code, got.content, {"Content-Type": got.headers["content-type"]})

    def ask(self, service: str, headers: Mapping[str, str], body: bytes) -> httpx.Response:
        """A request of our own, not really signed."""
        scope = f"Credential=test/20260101/{REGION}/{service}/aws4_request"
        signed = {"Authorization": f"AWS4-HMAC-SHA256 {scope}, SignedHeaders=host, Signature=x"}
        got = self._client.post(self.url, headers={**headers, **signed}, content=body)
        return got.raise_for_status()


class AwsServer(Server):
    """One service of moto, as strict as AWS.

    Attributes:
        service: its name in signatures. model: botocore's name of it.
        target, version: of the JSON protocol.
        kinds: what its operations ask for, in the engine's words.
    """

    service: ClassVar[str]
    model: ClassVar[str]
    target: ClassVar[str]
    version: ClassVar[str]
    kinds: ClassVar[Mapping[str, str]]

    def __init__(self, *, port: int = 0) -> None:
        super().__init__(port=port)
        self.moto = Moto()
        self.lost = 0
        loaders: Any = import_module("botocore.loaders")
        models: Any = import_module("botocore.model")
        described = loaders.Loader().load_service_model(self.model, "service-2")
        self._model: Any = models.ServiceModel(described)
        self._validator: Any = import_module("botocore.validate").ParamValidator()

    def __enter__(self) -> Self:
        self.moto.__enter__()
        self.reset()
        return super().__enter__()

    def __exit__(self, *exc_info: object) -> None:
        super().__exit__()
        self.moto.__exit__()

    @property
    def app(self) -> ASGIApp:
        return self._serve

    def op_of(self, request: Seen) -> str:
        return self.kinds.get(request.headers.get("x-amz-target", "").partition(".")[2], "")

    def reset(self) -> None:
        super().reset()
        self.lost = 0
        self.moto.control("reset")

    def forget(self) -> None:
        self.lost = self.made()
        self.moto.control("reset")

    def ask(self, operation: str, **fields: Any) -> Any:
        """The witness's own question to moto."""
        headers = {
            "X-Amz-Target": f"{self.target}.{operation}",
            "Content-Type": f"application/x-amz-json-{self.version}",
        }
        return self.moto.ask(self.service, headers, json.dumps(fields).encode()).json()

    @abstractmethod
    def answered(self, operation: str, data: Any, forward: Forward) -> Reply:
        """The answer to a request that is well-formed; called in a thread."""

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await whole_body(receive)
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        operation = headers.get("x-amz-target", "").removeprefix(f"{self.target}.")
        reply = self._wrong(scope, headers, operation, body)
        if reply is None:
            forward = Forward(self.moto, headers, body)
            reply = await asyncio.to_thread(self.answered, operation, json.loads(body), forward)
        await answer(
            send,
            reply.status,
            {"Content-Type": f"application/x-amz-json-{self.version}", **reply.headers},
            reply.content,
        )

    def _wrong(
        self, scope: Scope, headers: Mapping[str, str], operation: str, body: bytes
    ) -> Reply | None:
        signed = _SIGNATURE.fullmatch(headers.get("authorization", ""))
        if signed is None or "x-amz-date" not in headers:
            return refused(
                "MissingAuthenticationTokenException", "Missing Authentication Token", status=403
            )
        if (signed[1], signed[2]) != (REGION, self.service):
            told = f"Credential should be scoped to correct service: '{self.service}'."
            return refused("InvalidSignatureException", told, status=403)
        if not {"host", "x-amz-date", "x-amz-target"} <= set(signed[3].split(";")):
            told = "'Host' must be a 'SignedHeader' in the AWS Authorization."
            return refused("InvalidSignatureException", told, status=403)
        if (scope["method"], scope["path"]) != ("POST", "/") or operation not in self.kinds:
            return Reply(400, {"__type": "com.amazon.coral.service#UnknownOperationException"})
        if headers.get("content-type") != f"application/x-amz-json-{self.version}":
            return refused("SerializationException", "the media type is not that of the protocol")
        try:
            data = json.loads(body)
        except ValueError:
            return refused("SerializationException", "the body is not JSON")
        shape = self._model.operation_model(operation).input_shape
        report = self._validator.validate(data, shape)
        told = report.generate_report() if report.has_errors() else _too_long(data, shape)
        return refused("ValidationException", f"1 validation error: {told}") if told else None


class Forward:
    """Hands a request on to moto as it came, signature and all."""

    def __init__(self, moto: Moto, headers: Mapping[str, str], body: bytes) -> None:
        self._moto, self._body = moto, body
        self._headers = {
            k: v for k, v in headers.items() if k not in ("content-length", "connection")
        }

    def __call__(self) -> Reply:
        return self._moto.send(self._headers, self._body)


def _too_long(data: Mapping[str, Any], shape: Any) -> str:
    """botocore looks at the least lengths only."""
    for name, value in data.items():
        most = shape.members[name].metadata.get("max")
        if most is not None and isinstance(value, str | list) and len(value) > most:  # pyright: ignore[reportUnknownArgumentType] - JSON
            return f"{name} must have length less than or equal to {most}"
    return ""
