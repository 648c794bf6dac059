"""BigQuery's `jobs` and `getQueryResults`, and Google's token endpoint.

Source: the discovery document of `bigquery` v2, the reference pages of its REST API, and what its Python client
handles. Unknown fields and parameters, wrong types, a token that was not issued here and a wrong location are refused
as Google refuses them.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast
from urllib.parse import parse_qs

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

EMAIL = "runner@local-project.iam.gserviceaccount.com"
MULTI_REGIONS = ("US", "EU")
REGIONS = ("us-east4", "europe-west3", "asia-northeast1")
COMMON = {"fields", "alt", "prettyPrint", "key", "quotaUser"}
PARTS = {  # of each resource, what `fields` may select
    "bigquery#job": {
        *("kind", "etag", "id", "selfLink", "user_email", "state", "errorResult"),
        *("configuration", "jobReference", "statistics", "status"),
    },
    "bigquery#jobList": {"kind", "etag", "jobs", "nextPageToken", "unreachable"},
    "bigquery#jobCancelResponse": {"kind", "job"},
    "bigquery#getQueryResultsResponse": {
        *("kind", "etag", "schema", "jobReference", "totalRows", "pageToken", "rows", "errors"),
        *("totalBytesProcessed", "jobComplete", "cacheHit", "numDmlAffectedRows"),
    },
}
DYING_SECONDS = 0.1
READS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("STRING", "NUMERIC", "TIMESTAMP", "DATETIME", "DATE", "JSON"), str),
    "INT64": int,
    "FLOAT64": float,
    "BOOL": lambda text: {"true": True, "false": False}[text],
}
STATUS_OF = {"invalidQuery": 400, "notFound": 404, "accessDenied": 403, "stopped": 200}


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Table(Body):
    projectId: str
    datasetId: str = Field(pattern=r"^\w+$", max_length=1024)
    tableId: str


class Dataset(Body):
    projectId: str | None = None
    datasetId: str


class ArrayType(Body):
    type: str


class ParameterType(Body):
    type: str
    arrayType: ArrayType | None = None


class ParameterValue(Body):
    value: str | None = None
    arrayValues: list[ParameterValue] | None = None


class Parameter(Body):
    name: str | None = None
    parameterType: ParameterType
    parameterValue: ParameterValue


class QueryConfiguration(Body):
    query: str
    useLegacySql: bool = True
    parameterMode: Literal["NAMED", "POSITIONAL"] | None = None
    queryParameters: list[Parameter] = []
    destinationTable: Table | None = None
    defaultDataset: Dataset | None = None
    createDisposition: Literal["CREATE_IF_NEEDED", "CREATE_NEVER"] | None = None
    writeDisposition: Literal["WRITE_EMPTY", "WRITE_APPEND", "WRITE_TRUNCATE"] | None = None
    maximumBytesBilled: str | None = Field(default=None, pattern=r"^\d+$")
    priority: Literal["INTERACTIVE", "BATCH"] = "INTERACTIVE"
    useQueryCache: bool = True


class LoadConfiguration(Body):
    sourceUris: list[str]
    destinationTable: Table
    sourceFormat: str = "CSV"
    writeDisposition: str | None = None
    autodetect: bool = False


class CopyConfiguration(Body):
    sourceTable: Table | None = None
    sourceTables: list[Table] = []
    destinationTable: Table


class ExtractConfiguration(Body):
    sourceTable: Table
    destinationUris: list[str]


class Configuration(Body):
    query: QueryConfiguration | None = None
    load: LoadConfiguration | None = None
    copy_: CopyConfiguration | None = Field(default=None, alias="copy")
    extract: ExtractConfiguration | None = None
    labels: dict[str, str] = {}
    dryRun: bool = False
    jobTimeoutMs: str | None = None


class Reference(Body):
    projectId: str | None = None
    jobId: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_-]+$", max_length=1024)
    location: str | None = None


class Inserted(Body):
    jobReference: Reference = Reference()
    configuration: Configuration


class Refused(Exception):
    def __init__(self, status: int, reason: str, message: str, domain: str = "global") -> None:
        self.answer = JSONResponse(
            {
                "error": {
                    "code": status,
                    "message": message,
                    "errors": [{"message": message, "domain": domain, "reason": reason}],
                }
            },
            status_code=status,
        )
        super().__init__(message)


@dataclass(slots=True)
class Job:
    project: str
    location: str
    id: str
    configuration: dict[str, Any]
    ran: Ran
    queued: float
    running: float
    made_at: float
    made_ms: int
    stopped_at: float | None = None

    @property
    def age(self) -> float:
        return time.monotonic() - self.made_at

    @property
    def state(self) -> str:
        if self.stopped_at is not None and time.monotonic() - self.stopped_at > DYING_SECONDS:
            return "DONE"
        if self.age < self.queued:
            return "PENDING"
        return "RUNNING" if self.age < self.queued + self.running else "DONE"

    @property
    def error(self) -> dict[str, str] | None:
        if (
            self.stopped_at is not None
            and self.stopped_at - self.made_at < self.queued + self.running
        ):
            cancelled = "Job execution was cancelled: User requested cancellation"
            return {"reason": "stopped", "message": cancelled}
        if self.ran.failure:
            return {"reason": "invalidQuery", "location": "query", "message": self.ran.failure}
        return None

    def resource(self) -> dict[str, Any]:
        state = self.state
        status: dict[str, Any] = {"state": state}
        times = {"creationTime": self.made_ms}
        if state != "PENDING":
            times["startTime"] = self.made_ms + round(self.queued * 1000)
        if state == "DONE":
            times["endTime"] = self.made_ms + round((self.queued + self.running) * 1000)
            if self.error is not None:
                status |= {"errorResult": self.error, "errors": [self.error]}
        return {
            "kind": "bigquery#job",
            "etag": "etag==",
            "id": f"{self.project}:{self.location}.{self.id}",
            "selfLink": f"https://bigquery.googleapis.com/bigquery/v2/projects/{self.project}/jobs/{self.id}",
            "user_email": EMAIL,
            "jobReference": {
                "projectId": self.project,
                "jobId": self.id,
                "location": self.location,
            },
            "configuration": self.configuration,
            "status": status,
            "statistics": {
                **{name: str(ms) for name, ms in times.items()},
                **statistics_of(self.ran),
            },
        }


def statistics_of(ran: Ran) -> dict[str, Any]:
    query: dict[str, Any] = {"totalBytesProcessed": str(64 * len(ran.rows))}
    if ran.affected is not None:
        query["numDmlAffectedRows"] = str(ran.affected)
    return {"totalBytesProcessed": query["totalBytesProcessed"], "query": query}


class BigQueryServer(Server):
    """BigQuery on this machine. The location of a job may be left out only in the US and the EU.

    Args:
        access: what it hands out as access tokens; `{}` is their number.

    Attributes:
        page_rows: rows in a page of a result. hidden_for: seconds for which `jobs.get` does not see a new job.
        token_lives: seconds. issued: tokens, and until when they are good.
    """

    def __init__(self, *, port: int = 0, access: str = "ya29.local-{}") -> None:
        super().__init__(port=port)
        self._access = access
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.jobs: dict[tuple[str, str, str], Job] = {}
        self.issued: dict[str, float] = {}
        self.reset()

    def reset(self) -> None:
        super().reset()
        self.jobs.clear()
        self.issued.clear()
        self.page_rows = 2
        self.hidden_for = 0.0
        self.token_lives = 3599
        self._made = self._tokens = 0

    def made(self) -> int:
        return self._made

    def live(self) -> int:
        return sum(job.state != "DONE" for job in self.jobs.values())

    def forget(self) -> None:
        self.jobs.clear()

    def key_file(self, **changes: str) -> str:
        """What Google gives whoever makes a key for a service account."""
        pem = self._key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return json.dumps(
            {
                "type": "service_account",
                "project_id": "local-project",
                "private_key_id": "1",
                "private_key": pem.decode(),
                "client_email": EMAIL,
                "client_id": "1",
                "token_uri": f"{self.url}/token",
                **changes,
            }
        )

    def op_of(self, request: Seen) -> str:
        match request.method, request.path.rstrip("/").split("/")[4:]:
            case "POST", [_, "jobs"]:
                return "create"
            case "GET", [_, "jobs"]:
                return "get_many"
            case "GET", [_, "jobs", _]:
                return "get"
            case "GET", [_, "queries", _]:
                return "outputs"
            case "POST", [_, "jobs", _, "cancel"]:
                return "delete"
            case _:
                return "token" if request.path == "/token" else "other"

    @property
    def app(self) -> ASGIApp:
        jobs = "/bigquery/v2/projects/{project}/jobs"
        return Starlette(
            routes=[
                Route("/token", self._token, methods=["POST"]),
                Route("/key.json", self._key_json),
                Route(jobs, self._guarded(self._insert), methods=["POST"]),
                Route(jobs, self._guarded(self._list)),
                Route(jobs + "/{job}", self._guarded(self._get)),
                Route(jobs + "/{job}/cancel", self._guarded(self._cancel), methods=["POST"]),
                Route(
                    "/bigquery/v2/projects/{project}/queries/{job}", self._guarded(self._results)
                ),
            ]
        )

    # --- tokens ------------------------------------------------------------------------------

    async def _key_json(self, request: Request) -> Response:
        """Not Google's: whoever starts this server as a program has no other way to its key."""
        return Response(self.key_file(), media_type="application/json")

    async def _token(self, request: Request) -> Response:
        form = {
            name: values[0] for name, values in parse_qs((await request.body()).decode()).items()
        }
        if form.get("grant_type") != "urn:ietf:params:oauth:grant-type:jwt-bearer":
            return JSONResponse({"error": "unsupported_grant_type"}, status_code=400)
        try:
            claims = jwt.decode(
                form.get("assertion", ""),
                self._key.public_key(),
                algorithms=["RS256"],
                audience="https://oauth2.googleapis.com/token",  # whatever `token_uri` is
                issuer=EMAIL,
                options={"require": ["exp", "iat", "scope"]},
            )
        except jwt.PyJWTError as error:
            told = {"error": "invalid_grant", "error_description": f"Invalid JWT: {error}"}
            return JSONResponse(told, status_code=400)
        if claims["exp"] - claims["iat"] > 3600 or "/auth/" not in claims["scope"]:
            return JSONResponse({"error": "invalid_scope"}, status_code=400)
        self._tokens += 1
        token = self._access.format(self._tokens)
        self.issued[token] = time.monotonic() + self.token_lives
        return JSONResponse(
            {"access_token": token, "expires_in": self.token_lives, "token_type": "Bearer"}
        )

    def _guarded(
        self, endpoint: Callable[[Request], Awaitable[dict[str, Any]]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            try:
                self._let_in(request)
                answer = await endpoint(request)
                return JSONResponse(selected(answer, request.query_params.get("fields")))
            except Refused as refused:
                return refused.answer

        return guarded

    def _let_in(self, request: Request) -> None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if time.monotonic() > self.issued.get(token, 0):
            raise Refused(401, "authError", "Invalid Credentials")

    # --- jobs --------------------------------------------------------------------------------

    async def _insert(self, request: Request) -> dict[str, Any]:
        allow(request)
        project = request.path_params["project"]
        given = body_of(await request.body(), request.headers.get("content-type", ""))
        reference, configuration = given.jobReference, given.configuration
        if reference.projectId not in (None, project):
            raise Refused(400, "invalid", "Project id in the URL and in jobReference differ")
        location = known_location(reference.location or "US")
        check(configuration)
        query = configuration.query
        text = query.query if query else ""
        ran = run(text, values_of(query))[-1] if query else Ran()
        told = configuration.model_dump(exclude_unset=True, by_alias=True)
        told["jobType"] = next(
            k.upper() for k in ("query", "load", "copy", "extract") if told.get(k)
        )
        if query and not query.destinationTable:
            anonymous = {"projectId": project, "datasetId": "_anon", "tableId": f"anon{self._made}"}
            told["query"]["destinationTable"] = anonymous
        if configuration.dryRun:
            if ran.failure:
                raise Refused(400, "invalidQuery", ran.failure)
            statistics = statistics_of(ran)
            statistics["query"]["schema"] = schema_of(ran)
            return {  # no job is made, and the reference has no id
                "kind": "bigquery#job",
                "jobReference": {"projectId": project, "location": location},
                "configuration": told,
                "status": {"state": "DONE"},
                "statistics": statistics,
            }
        job_id = reference.jobId or f"job_{self._made}"
        if (project, location, job_id) in self.jobs:
            raise Refused(409, "duplicate", f"Already Exists: Job {project}:{location}.{job_id}")
        self._made += 1
        queued, running = spans(text)
        now = time.monotonic()
        ms = time.time_ns() // 1_000_000
        job = Job(project, location, job_id, told, ran, queued, running, now, ms)
        self.jobs[project, location, job_id] = job
        return job.resource()

    async def _list(self, request: Request) -> dict[str, Any]:
        allow(
            request,
            *("allUsers", "maxCreationTime", "maxResults", "minCreationTime", "pageToken"),
            *("parentJobId", "projection", "stateFilter"),
        )
        asked, project = request.query_params, request.path_params["project"]
        since, most = number(asked, "minCreationTime", 0), number(asked, "maxResults", 50)
        start = number(asked, "pageToken", 0)
        found = [j for j in self.jobs.values() if j.project == project and j.made_ms >= since]
        found.sort(key=lambda job: job.made_ms, reverse=True)
        rows = [job.resource() for job in found[start : start + most]]
        for row in rows:
            row["state"] = row["status"]["state"]
            if asked.get("projection", "minimal") != "full":
                del row["configuration"]
        answer: dict[str, Any] = {"kind": "bigquery#jobList", "etag": "etag==", "jobs": rows}
        if len(found) > start + most:
            answer["nextPageToken"] = str(start + most)
        return answer

    async def _get(self, request: Request) -> dict[str, Any]:
        allow(
            request, "location", "projection"
        )  # Google's client sends the latter, which no document tells
        return self._job(request).resource()

    async def _cancel(self, request: Request) -> dict[str, Any]:
        allow(request, "location")
        job = self._job(request)
        if job.state != "DONE" and job.stopped_at is None:
            job.stopped_at = time.monotonic()
        return {"kind": "bigquery#jobCancelResponse", "job": job.resource()}

    async def _results(self, request: Request) -> dict[str, Any]:
        allow(
            request,
            *("location", "maxResults", "pageToken", "startIndex", "timeoutMs"),
            "formatOptions.useInt64Timestamp",
        )
        job = self._job(request)
        resource = job.resource()
        answer: dict[str, Any] = {
            "kind": "bigquery#getQueryResultsResponse",
            "jobReference": resource["jobReference"],
            "jobComplete": job.state == "DONE",
        }
        if job.state != "DONE":
            return answer
        if (error := job.error) is not None:
            raise Refused(STATUS_OF.get(error["reason"], 500), error["reason"], error["message"])
        start = number(request.query_params, "pageToken", 0)
        rows = job.ran.rows[start : start + self.page_rows]
        answer |= {
            "schema": schema_of(job.ran),
            "totalRows": str(len(job.ran.rows)),
            "rows": [{"f": [{"v": cell(value)} for value in row]} for row in rows],
            "totalBytesProcessed": resource["statistics"]["totalBytesProcessed"],
            "cacheHit": False,
        }
        if start + self.page_rows < len(job.ran.rows):
            answer["pageToken"] = str(start + self.page_rows)
        return answer

    def _job(self, request: Request) -> Job:
        """The one that is meant. Without a location only those in the US and the EU are found."""
        project, job_id = request.path_params["project"], request.path_params["job"]
        location = request.query_params.get("location")
        places = MULTI_REGIONS if location is None else (known_location(location),)
        for place in places:
            job = self.jobs.get((project, place, job_id))
            if job is not None and job.age >= self.hidden_for:
                return job
        raise Refused(404, "notFound", f"Not found: Job {project}:{location or 'US'}.{job_id}")


def allow(request: Request, *names: str) -> None:
    for name in request.query_params:
        if name not in COMMON.union(names):
            told = f'Invalid JSON payload received. Unknown name "{name}": Cannot bind query parameter.'
            raise Refused(
                400, "badRequest", f"{told} Field '{name}' could not be found in request message."
            )


def body_of(body: bytes, kind: str) -> Inserted:
    if not kind.startswith("application/json"):
        raise Refused(400, "badContent", f"Media type '{kind}' is not supported.")
    try:
        return Inserted.model_validate_json(body)
    except ValidationError as error:
        (first, *_) = error.errors()
        at = ".".join(map(str, first["loc"]))
        raise Refused(
            400, "invalid", f"Invalid JSON payload received. {at}: {first['msg']}"
        ) from error


def check(configuration: Configuration) -> None:
    given = configuration
    if sum(map(bool, (given.query, given.load, given.copy_, given.extract))) != 1:
        raise Refused(
            400,
            "required",
            "Job configuration must contain exactly one job-specific configuration object",
        )
    for name, value in given.labels.items():
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,62}", name) or not re.fullmatch(
            r"[a-z0-9_-]{0,63}", value
        ):
            raise Refused(400, "invalid", f"Label '{name}: {value}' has an invalid format")
    if len(given.labels) > 64:
        raise Refused(400, "invalid", "Too many labels")
    query = given.query
    if query and query.queryParameters and (query.useLegacySql or query.parameterMode != "NAMED"):
        raise Refused(
            400,
            "invalid",
            "Query parameters cannot be used with Legacy SQL or without parameterMode",
        )


def known_location(location: str) -> str:
    for known in (*MULTI_REGIONS, *REGIONS):
        if known.lower() == location.lower():
            return known
    raise Refused(404, "notFound", f"Not found: Location {location}")


def number(asked: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(asked.get(name, default))
    except ValueError:
        raise Refused(400, "invalid", f"Invalid value at '{name}' (TYPE_UINT64)") from None


def values_of(query: QueryConfiguration) -> dict[str, Any]:
    """As SQLite can bind them; arrays go in as JSON."""
    values: dict[str, Any] = {}
    for each in query.queryParameters:
        kind, value = each.parameterType, each.parameterValue
        item = kind.arrayType.type if kind.arrayType else kind.type
        if each.name is None or item not in READS:
            raise Refused(400, "invalid", f"Parameter {each.name} of type {item} is not known")
        if kind.type == "ARRAY" and value.arrayValues:
            values[each.name] = json.dumps(
                [READS[item](one.value or "") for one in value.arrayValues]
            )
        elif kind.type != "ARRAY" and value.value is not None:
            values[each.name] = READS[item](value.value)
        else:
            raise Refused(400, "invalid", f"Parameter {each.name} has a value of another type")
    return values


def type_of(value: Any) -> str:
    kinds = ((int, "INTEGER"), (float, "FLOAT"), (bytes, "BYTES"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "STRING")


def schema_of(ran: Ran) -> dict[str, Any]:
    first = ran.rows[0] if ran.rows else [None] * len(ran.columns)
    return {
        "fields": [
            {"name": name, "type": type_of(value), "mode": "NULLABLE"}
            for name, value in zip(ran.columns, first, strict=True)
        ]
    }


def cell(value: Any) -> str | None:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return None if value is None else str(value)


# --- partial answers: `fields=a,b(c,d/e)` ------------------------------------------------------


def selected(answer: dict[str, Any], fields: str | None) -> dict[str, Any]:
    if fields is None:
        return answer
    tree, rest = parsed(fields)
    if rest:
        raise Refused(400, "invalidParameter", f"Invalid field selection {fields}")
    known, listed = PARTS[answer["kind"]], tree.get("jobs", {})
    if not (tree.keys() <= known and listed.keys() <= PARTS["bigquery#job"]):
        raise Refused(400, "invalidParameter", f"Invalid field selection {fields}")
    return pruned(answer, tree)


def parsed(text: str) -> tuple[dict[str, Any], str]:
    """A selection as a tree of names, and what follows it."""
    tree: dict[str, Any] = {}
    while True:
        name = re.match(r"[\w/]+", text)
        if name is None:
            raise Refused(400, "invalidParameter", f"Invalid field selection {text}")
        *outer, last = name[0].split("/")
        at = tree
        for part in outer:
            at = at.setdefault(part, {})
        text = text[name.end() :]
        at[last] = {}
        if text.startswith("("):
            at[last], text = parsed(text[1:])
            if not text.startswith(")"):
                raise Refused(400, "invalidParameter", f"Invalid field selection {text}")
            text = text[1:]
        if not text.startswith(","):
            return tree, text
        text = text[1:]


def pruned(value: Any, tree: Mapping[str, Any]) -> Any:
    if not tree:
        return value
    if isinstance(value, list):
        return [pruned(item, tree) for item in cast(list[Any], value)]
    if not isinstance(value, dict):
        return value
    known = cast(dict[str, Any], value)
    return {name: pruned(known[name], part) for name, part in tree.items() if name in known}


if __name__ == "__main__":
    serve(BigQueryServer())
