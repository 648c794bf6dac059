"""Snowflake's SQL API, version 2: statements, their handles, cancel and partitions.

Source: Snowflake's OpenAPI description of the SQL API and its guides "Submitting a request", "Handling responses",
"Authenticating to the server". Unknown fields and parameters, wrong types, missing headers and tokens that are not the
user's are refused. A request id that was seen counts only with `retry=true`: without it the statement runs again.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID, uuid4

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from tests.servers.base import Seen, Server, serve
from tests.servers.statements import Ran, run, spans

ACCOUNT, USER = "LOCALORG-LOCAL_ACCOUNT", "RUNNER"
TOKEN = "local-programmatic-access-token"
SESSION_PARAMETERS = {
    *("binary_output_format", "date_output_format", "time_output_format", "timezone"),
    *("timestamp_output_format", "timestamp_ltz_output_format", "timestamp_ntz_output_format"),
    *("timestamp_tz_output_format", "query_tag", "multi_statement_count", "use_cached_result"),
}
DYING_SECONDS = 0.1


class Binding(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["FIXED", "REAL", "TEXT", "BOOLEAN", "DATE", "TIME", "TIMESTAMP_NTZ", "BINARY"]
    value: str


class Submitted(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    statement: str
    timeout: int | None = Field(default=None, ge=0)
    database: str | None = None
    schema_: str | None = Field(default=None, alias="schema")
    warehouse: str | None = None
    role: str | None = None
    bindings: dict[str, Binding] = {}
    parameters: dict[str, str | int] = {}


class Refused(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        self.answer = JSONResponse({"code": code, "message": message}, status_code=status)
        super().__init__(message)


@dataclass(slots=True)
class Statement:
    """`parts`: the handles of each, where several were sent in one request."""

    handle: str
    body: dict[str, Any]
    ran: list[Ran]
    running: float
    made_at: float
    made_ms: int
    parts: list[str]
    limit: float
    cancelled_at: float | None = None

    @property
    def age(self) -> float:
        return time.monotonic() - self.made_at

    @property
    def ended_by(self) -> Literal["cancel", "timeout", "itself"] | None:
        """None: it runs."""
        cancelled = self.cancelled_at
        if cancelled is not None and time.monotonic() - cancelled > DYING_SECONDS:
            return "cancel"
        if self.limit < self.running and self.age > self.limit:
            return "timeout"
        return "itself" if self.age > self.running else None


class SnowflakeServer(Server):
    """A Snowflake account on this machine: one user with a key, and one programmatic access token.

    Args:
        token: the programmatic access token.

    Attributes:
        partition_rows: rows in a partition of a result. too_large: the answer leaves out even the first one.
    """

    def __init__(self, *, port: int = 0, token: str = TOKEN) -> None:
        super().__init__(port=port)
        self.token = token
        self.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.statements: dict[str, Statement] = {}
        self.requests: dict[str, str] = {}
        self.reset()

    def reset(self) -> None:
        super().reset()
        self.statements.clear()
        self.requests.clear()
        self.partition_rows = 2
        self.too_large = False
        self._made = 0

    def made(self) -> int:
        return self._made

    def live(self) -> int:
        return sum(each.ended_by is None for each in self.statements.values())

    def forget(self) -> None:
        self.statements.clear()

    def key_file(self, passphrase: str = "") -> str:
        """The user's private key, as `openssl` writes it."""
        lock: serialization.KeySerializationEncryption = serialization.NoEncryption()
        if passphrase:
            lock = serialization.BestAvailableEncryption(passphrase.encode())
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock
        ).decode()

    def op_of(self, request: Seen) -> str:
        match request.method, request.path.rstrip("/").split("/")[4:]:
            case "POST", []:
                return "create"
            case "POST", [_, "cancel"]:
                return "delete"
            case "GET", [_]:
                return "outputs" if "partition=" in request.query else "get"
            case _:
                return "other"

    @property
    def app(self) -> ASGIApp:
        at = "/api/v2/statements"
        return Starlette(
            routes=[
                Route(at, self._guarded(self._submit), methods=["POST"]),
                Route(at + "/{handle}", self._guarded(self._get)),
                Route(at + "/{handle}/cancel", self._guarded(self._cancel), methods=["POST"]),
            ]
        )

    def _guarded(
        self, endpoint: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            try:
                self._let_in(request)
                return await endpoint(request)
            except Refused as refused:
                return refused.answer

        return guarded

    def _let_in(self, request: Request) -> None:
        headers = request.headers
        if not headers.get("user-agent"):
            raise Refused(400, "391902", "The User-Agent header is missing.")
        if headers.get("accept", "*/*") not in ("application/json", "*/*"):
            raise Refused(400, "391903", "The Accept header asks for another type than JSON.")
        token = headers.get("authorization", "").removeprefix("Bearer ")
        match headers.get("x-snowflake-authorization-token-type", "OAUTH"):
            case "PROGRAMMATIC_ACCESS_TOKEN":
                if token != self.token:
                    raise Refused(401, "394400", "Programmatic access token is invalid.")
            case "KEYPAIR_JWT":
                self._check(token)
            case _:
                raise Refused(401, "390303", "Invalid OAuth access token.")

    def _check(self, token: str) -> None:
        public = self.key.public_key()
        der = public.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        print_ = base64.b64encode(hashlib.sha256(der).digest()).decode()
        try:
            claims = jwt.decode(
                token,
                public,
                algorithms=["RS256"],
                issuer=f"{ACCOUNT}.{USER}.SHA256:{print_}",
                subject=f"{ACCOUNT}.{USER}",
                options={"require": ["exp", "iat", "iss", "sub"]},
            )
        except jwt.PyJWTError as error:
            raise Refused(401, "390144", f"JWT token is invalid. {error}") from error
        if claims["exp"] - claims["iat"] > 3600:
            raise Refused(401, "390144", "JWT token is invalid. It lives too long.")

    # --- statements --------------------------------------------------------------------------

    async def _submit(self, request: Request) -> Response:
        allow(request, "requestId", "async", "nullable", "retry")
        asked = request.query_params
        request_id, again = asked.get("requestId"), flag(asked, "retry")
        if not flag(asked, "async"):
            raise Refused(400, "391905", "This server runs statements asynchronously only.")
        given = body_of(await request.body(), request.headers.get("content-type", ""))
        if request_id is not None:
            try:
                UUID(request_id)
            except ValueError:
                raise Refused(400, "391904", f"Invalid requestId {request_id}.") from None
            if again and request_id in self.requests:
                known = self.statements.get(self.requests[request_id])
                if known is None:
                    raise Refused(404, "391900", "The statement of that request is gone.")
                return self._told(known)
        statement = self._started(given)
        self._made += 1
        self.statements[statement.handle] = statement
        if request_id is not None:
            self.requests[request_id] = statement.handle
        return self._told(statement)

    def _started(self, given: Submitted) -> Statement:
        parameters = {name.lower(): value for name, value in given.parameters.items()}
        if unknown := parameters.keys() - SESSION_PARAMETERS:
            raise Refused(400, "391918", f"Invalid session parameter {sorted(unknown)[0]}.")
        wanted = int(parameters.get("multi_statement_count", 1))
        count = len([each for each in given.statement.split(";") if each.strip()])
        if wanted != 1 and given.bindings:
            raise Refused(
                400, "391911", "Bind variables are not supported in multi-statement requests."
            )
        if wanted not in (0, count):
            told = f"Actual statement count {count} did not match the desired statement count {wanted}."
            ran = [Ran(failure=told)]
        else:
            ran = run(given.statement, values_of(given.bindings))
        _, running = spans(given.statement)
        several = count > 1
        return Statement(
            handle=str(uuid4()),
            body=given.model_dump(by_alias=True, exclude_unset=True),
            ran=ran,
            running=running,
            made_at=time.monotonic(),
            made_ms=time.time_ns() // 1_000_000,
            parts=[str(uuid4()) for _ in ran] if several else [],
            limit=given.timeout or 604_800,
        )

    async def _get(self, request: Request) -> Response:
        allow(request, "requestId", "partition")
        handle, partition = request.path_params["handle"], request.query_params.get("partition")
        statement, ran = self._found(handle)
        if partition is None or statement.ended_by != "itself":
            return self._told(statement, handle)
        pages = self._partitions(ran)
        if not partition.isdigit() or int(partition) >= len(pages):
            raise Refused(400, "391906", f"Invalid partition {partition}.")
        return JSONResponse({"data": cells(pages[int(partition)])})

    async def _cancel(self, request: Request) -> Response:
        allow(request, "requestId")
        statement, _ = self._found(request.path_params["handle"])
        if statement.ended_by is not None:
            told = self._status(statement, "000709", "02000", "The statement is not running.")
            return JSONResponse(told, status_code=422)
        if statement.cancelled_at is None:
            statement.cancelled_at = time.monotonic()
        return JSONResponse(self._status(statement, "000604", "57014", "successfully canceled"))

    def _found(self, handle: str) -> tuple[Statement, Ran]:
        """The statement with this handle, or of which it is a part, and what that one brought."""
        for statement in self.statements.values():
            if handle == statement.handle:
                return statement, statement.ran[-1]
            if handle in statement.parts:
                return statement, statement.ran[statement.parts.index(handle)]
        raise Refused(404, "391900", f"Statement {handle} is not known.")

    def _status(
        self, statement: Statement, code: str, state: str, message: str, handle: str | None = None
    ) -> dict[str, Any]:
        handle = handle or statement.handle
        return {
            "code": code,
            "sqlState": state,
            "message": message,
            "statementHandle": handle,
            "createdOn": statement.made_ms,
            "statementStatusUrl": f"/api/v2/statements/{handle}",
        }

    def _told(self, statement: Statement, handle: str | None = None) -> Response:
        handle = handle or statement.handle

        def told(status: int, code: str, state: str, message: str, **more: Any) -> Response:
            body = self._status(statement, code, state, message, handle) | more
            return JSONResponse(body, status_code=status)

        match statement.ended_by:
            case None:
                return told(202, "333334", "00000", "Asynchronous execution in progress.")
            case "cancel":
                return told(422, "000604", "57014", "SQL execution canceled")
            case "timeout":
                message = f"Statement reached its timeout of {statement.limit} second(s) and was canceled."
                return told(408, "000630", "57014", message)
            case "itself":
                pass
        failure = next((ran.failure for ran in statement.ran if ran.failure), "")
        if failure:
            code, state = ("002003", "42S02") if "no such table" in failure else ("001003", "42000")
            return told(422, code, state, f"SQL compilation error: {failure}")
        if statement.parts and handle == statement.handle:
            message = "Multiple statements executed successfully."
            shape = {
                "rowType": [column_of("multiple statement execution", "")],
                "partitionInfo": [],
            }
            more = {"statementHandles": statement.parts, "data": [[message]]}
            return told(200, "090001", "00000", message, resultSetMetaData=shape, **more)
        _, ran = self._found(handle)
        pages = self._partitions(ran)
        first = ran.rows[0] if ran.rows else [None] * len(ran.columns)
        rows = [column_of(name, value) for name, value in zip(ran.columns, first, strict=True)]
        shape = {
            "numRows": len(ran.rows),
            "format": "jsonv2",
            "rowType": rows,
            "partitionInfo": [{"rowCount": len(page), "uncompressedSize": 1} for page in pages],
        }
        more: dict[str, Any] = {"resultSetMetaData": shape}
        if ran.affected is not None:
            more["stats"] = {"numRowsInserted": ran.affected, "numRowsUpdated": 0}
        if self.too_large:
            return told(200, "391908", "00000", "The result set is too large.", **more)
        ok = "Statement executed successfully."
        return told(200, "090001", "00000", ok, data=cells(pages[0]), **more)

    def _partitions(self, ran: Ran) -> list[list[Any]]:
        step, rows = self.partition_rows, list(ran.rows)
        return [rows[at : at + step] for at in range(0, max(1, len(rows)), step)]


def allow(request: Request, *names: str) -> None:
    for name in request.query_params:
        if name not in names:
            raise Refused(400, "391901", f"Unknown query parameter {name}.")


def flag(asked: Mapping[str, str], name: str) -> bool:
    text = asked.get(name, "false")
    if text not in ("true", "false"):
        raise Refused(400, "391901", f"{name} is no boolean: {text}.")
    return text == "true"


def body_of(body: bytes, kind: str) -> Submitted:
    if kind and not kind.startswith("application/json"):
        raise Refused(415, "391909", f"Unsupported media type {kind}.")
    try:
        return Submitted.model_validate_json(body)
    except ValidationError as error:
        (first, *_) = error.errors()
        at = ".".join(map(str, first["loc"]))
        raise Refused(400, "391917", f"Invalid request body: {at}: {first['msg']}") from error


def values_of(bindings: Mapping[str, Binding]) -> list[Any]:
    """As SQLite can bind them."""
    values: list[Any] = []
    for place in range(1, len(bindings) + 1):
        bound = bindings.get(str(place))
        if bound is None:
            raise Refused(400, "391910", f"Bind variable {place} is missing.")
        reads = {"REAL": float, "BOOLEAN": {"true": 1, "false": 0}.__getitem__}
        fixed = int if "." not in bound.value else float
        try:
            values.append(({"FIXED": fixed} | reads).get(bound.type, str)(bound.value))
        except (ValueError, KeyError):
            told = f"Bind variable {place} is no {bound.type}: {bound.value}."
            raise Refused(400, "391910", told) from None
    return values


def column_of(name: str, value: Any) -> dict[str, Any]:
    kinds = ((int, "fixed"), (float, "real"), (bytes, "binary"))
    kind = next((kind for each, kind in kinds if isinstance(value, each)), "text")
    return {"name": name, "type": kind, "scale": 0 if kind == "fixed" else None, "nullable": True}


def cells(rows: list[Any]) -> list[list[str | None]]:
    return [
        [
            None if value is None else value if isinstance(value, str) else json.dumps(value)
            for value in row
        ]
        for row in rows
    ]


if __name__ == "__main__":
    serve(SnowflakeServer())
