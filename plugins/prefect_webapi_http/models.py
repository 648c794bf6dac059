"""What crosses the border: a service's API as data, the spec that users write, the handle.

A description that contradicts itself, or could never work, is refused when it is read, with every fault at its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from jsonpointer import JsonPointer, JsonPointerException
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    HttpUrl,
    StrictInt,
    StrictStr,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import InitErrorDetails, PydanticCustomError

from prefect_webapi import GoDuration, Guarantee, JobSpec, OptionalMethod, read_mapping
from prefect_webapi.contract.secrecy import secrets_in
from prefect_webapi.template import STORAGE, as_text, names_in

KEY = "{{ .perRetryUniqueKey }}"
OF_JOB = ("inputs", "perRetryUniqueKey", "fingerprint", "labels")
"""What `job_values` gives."""
OPEN = ("inputs", "labels")
"""Those of them that have names of their own below."""

Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]


def _pointer(text: str) -> str:
    try:
        JsonPointer(text)
    except JsonPointerException as error:
        raise ValueError(f"no JSON pointer (RFC 6901), such as /job/id: {error}") from None
    return text


def _template(value: Any) -> Any:
    list(names_in(value))
    return value


def _path(text: str) -> str:
    if not text.startswith("/") or set("?#") & set(text):
        raise ValueError("a path begins with / and has no ? or #; parameters belong in `query`")
    return _template(text)


def _pointer_or_template(text: str) -> str:
    return _template(text) if "{{" in text else _pointer(text)


Pointer = Annotated[str, AfterValidator(_pointer)]
Template = Annotated[Any, AfterValidator(_template)]
TextTemplate = Annotated[str, AfterValidator(_template)]
PointerOrTemplate = Annotated[str, AfterValidator(_pointer_or_template)]


class Part(BaseModel):
    model_config = ConfigDict(
        alias_generator=to_camel,
        extra="forbid",
        frozen=True,
        validate_by_alias=True,
        validate_by_name=True,
    )


def _shape(value: Any) -> Literal["text", "keys"]:
    """Which of two shapes a key takes, so that faults are told of the one that was written."""
    return "text" if isinstance(value, str) else "keys"


def _one_of(part: BaseModel, *names: str) -> None:
    if sum(bool(getattr(part, name)) for name in names) != 1:
        raise ValueError(f"give exactly one of {', '.join(to_camel(name) for name in names)}")


# --- requests --------------------------------------------------------------------------------


class Request(Part):
    """A request; all of it may hold templates. `body` is data and is sent as JSON."""

    method: Method = "GET"
    path: Annotated[str, AfterValidator(_path)]
    query: dict[str, Template] = {}
    headers: dict[str, TextTemplate] = {}
    body: Template = None

    @property
    def templates(self) -> Sequence[Any]:
        return (self.path, self.query, self.headers, self.body)


class Paging(Part):
    """How the next page is asked for; exactly one of three.

    Attributes:
        next: pointer to the next page's address or, with `param`, to the value of that query parameter.
        link_header: the address is in the header `Link` (RFC 8288).
        offset: query parameter that counts the items before the page; an empty page is the last.
    """

    next: Pointer | None = None
    param: str | None = None
    link_header: bool = False
    offset: str | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        _one_of(self, "next", "link_header", "offset")
        if self.param and not self.next:
            raise ValueError("param belongs to next")
        return self


class FromHeader(Part):
    """A value in an answer's header: group 1 of `pattern`. Of `Location`, an address, it is decoded."""

    header: str
    pattern: re.Pattern[str] = re.compile("(.+)")

    @field_validator("pattern")
    @classmethod
    def _has_a_group(cls, pattern: re.Pattern[str]) -> re.Pattern[str]:
        if pattern.groups != 1:
            raise ValueError("needs one group in parentheses: the value")
        return pattern


Source = Annotated[
    Annotated[FromHeader, Tag("keys")] | Annotated[PointerOrTemplate, Tag("text")],
    Discriminator(_shape),
]
Sources = Annotated[dict[str, Source], Field(min_length=1)]


class KeyPlace(Part):
    """Where the job key goes; exactly one of three."""

    header: str | None = None
    body: Pointer | None = None
    query: str | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        _one_of(self, "header", "body", "query")
        return self


class Create(Request):
    """Makes a job.

    Attributes:
        idempotency: where the job key goes; `path`: a template in the path has it; `none`: nowhere.
        honours_key: the service makes one job per key, however often it is asked.
        handle: what names the job later: pointers into the answer, headers, or templates.
        snapshot_in_answer: the answer is the job as `get` would read it.
    """

    method: Method = "POST"
    idempotency: Annotated[
        Annotated[KeyPlace, Tag("keys")] | Annotated[Literal["path", "none"], Tag("text")],
        Discriminator(_shape),
    ] = KeyPlace(header="Idempotency-Key")
    honours_key: bool = False
    handle: Sources
    snapshot_in_answer: bool = False

    @model_validator(mode="after")
    def _has_room_for_the_key(self) -> Self:
        try:
            _ = self.keyed
        except JsonPointerException:
            raise ValueError("body has no such place for the key; write its parent there") from None
        return self

    @property
    def handle_is_key(self) -> bool:
        """Whether the handle of a job that has our key is known without an answer: inputs alone name anybody's job."""
        sources = [*self.handle.values()]
        return all(isinstance(s, str) and "{{" in s for s in sources) and _has_key(sources)

    @property
    def keyed(self) -> Request:
        """The request with the key's template in its place."""
        match self.idempotency:
            case KeyPlace(header=str(name)):
                return self.model_copy(update={"headers": {**self.headers, name: KEY}})
            case KeyPlace(query=str(name)):
                return self.model_copy(update={"query": {**self.query, name: KEY}})
            case KeyPlace(body=str(pointer)):
                body = JsonPointer(pointer).set(self.body, KEY, inplace=False)
                return self.model_copy(update={"body": body})
            case _:
                return self


class Find(Request):
    """Looks for a job by its key.

    Attributes:
        items: where the jobs are in the answer: a list, or one job.
        key: where an item has its job key.
        handle: as in `create`, from an item; absent: the same.
    """

    items: Pointer = ""
    key: Pointer
    handle: Annotated[dict[str, PointerOrTemplate], Field(min_length=1)] | None = None
    paging: Paging | None = None


class Batch(Request):
    """Reads many jobs; `{{ .ids }}` are their handles' `id`.

    Attributes:
        size: most jobs per request.
        separator: between ids; empty: they are a list, for a body.
        items: where the jobs are; each is as `get` reads it.
        id: where an item has its id.
    """

    size: int = Field(ge=2, le=10_000)
    separator: str = ","
    items: Pointer = ""
    id: Pointer


class Get(Request):
    """Reads a job; `item` is where the answer has it."""

    item: Pointer = ""
    batch: Batch | None = None


class Delete(Request):
    """Asks a job to end. An answer with one of `gone_codes` says that it is over."""

    method: Method = "DELETE"
    gone_codes: tuple[int, ...] = (404, 410, 409)


class Outputs(Part):
    """The result: at `pointer` in the job as read or, with `request`, in its answer; all pages' lists joined."""

    pointer: Pointer = ""
    request: Request | None = None
    paging: Paging | None = None


# --- what answers mean -----------------------------------------------------------------------


class Meaning(Part):
    """What a state means; `kind` and `code` are for failures. `code` is the service's word if absent."""

    phase: Literal[
        "undefined",
        "notReady",
        "waitingForResources",
        "queued",
        "initializing",
        "running",
        "success",
        "retryableFailure",
        "permanentFailure",
        "aborted",
    ]
    kind: Literal["user", "system"] = "user"
    code: str | None = None


def _phase_alone(value: Any) -> Any:
    return {"phase": value} if isinstance(value, str) else value


class Condition(Part):
    """What else must hold."""

    pointer: Pointer
    equals: Any

    def holds(self, value: Any) -> bool:
        return as_text(value) == as_text(self.equals)  # 0 is not false


class Status(Part):
    """What the job as read says.

    Attributes:
        map: the service's words for states, each as a phase, or as phase, kind and code.
        default: what any other word means; it can't end a job.
        success: what must hold besides a word of success; otherwise the job has failed.
        links: name to address, as a pointer or a template.
    """

    pointer: Pointer
    map: dict[str, Annotated[Meaning, BeforeValidator(_phase_alone)]]
    default: Literal["undefined", "queued", "initializing", "running"] = "undefined"
    success: Condition | None = None
    message: Pointer | None = None
    progress: Pointer | None = None
    occurred_at: Pointer | None = None
    links: dict[str, PointerOrTemplate] = {}

    @field_validator("map")
    @classmethod
    def _can_end(cls, meanings: dict[str, Meaning]) -> dict[str, Meaning]:
        if all(meaning.phase != "success" for meaning in meanings.values()):
            raise ValueError("no word means success: a job would never end. Map one to `success`")
        return meanings


class Rule(Part):
    """Which answers it is about: all that is given must fit. Answers with 2xx count too.

    Attributes:
        status: HTTP codes; none given: any.
        pattern: found in the value at `pointer`, or in the body as it is.
        message: where the service's words are; absent: the beginning of the body.
    """

    status: tuple[int, ...] = ()
    pointer: Pointer | None = None
    pattern: re.Pattern[str] | None = None
    message: Pointer | None = None

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if not self.status and self.pattern is None:
            raise ValueError("fits every answer; give status or pattern")
        if self.pointer is not None and self.pattern is None:
            raise ValueError("pointer needs a pattern")
        return self


class ErrorRule(Rule):
    """An error. `notFound` in the answer to a delete: the job is over."""

    means: Literal["system", "user", "auth", "notFound", "exists"]
    code: str | None = None
    job_may_exist: bool | None = None

    @model_validator(mode="after")
    def _makes_no_second_job(self) -> Self:
        if self.means == "auth" and self.job_may_exist:
            raise ValueError(
                "a create whose credential was refused is sent again with a new one: if a job may exist all the "
                "same, it means `system`"
            )
        return self


class Wait(Part):
    """Where an answer says how long to wait. `s` may be a date too, as in `Retry-After`; `date`: ISO 8601 or Unix."""

    header: str | None = None
    pointer: Pointer | None = None
    unit: Literal["s", "ms", "date"] = "s"

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        _one_of(self, "header", "pointer")
        return self


class ThrottleRule(Rule):
    """The service asks for less."""

    wait: Wait = Wait(header="Retry-After")


# --- credentials -----------------------------------------------------------------------------


class NoAuth(Part):
    type: Literal["none"]


class BearerAuth(Part):
    type: Literal["bearer"]


class BasicAuth(Part):
    type: Literal["basic"]
    user: str


class HeaderAuth(Part):
    type: Literal["header"]
    name: str


class OAuth2(Part):
    """A token from `token_url` (RFC 6749, 4.4)."""

    type: Literal["oauth2ClientCredentials"]
    token_url: HttpUrl
    client_id: str
    scope: str | None = None


Auth = Annotated[NoAuth | BearerAuth | BasicAuth | HeaderAuth | OAuth2, Field(discriminator="type")]


def _type_alone(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


# --- the whole -------------------------------------------------------------------------------


class JobApi(Part):
    """How a service runs jobs. Secrets are no part of it.

    Attributes:
        fingerprint: where a job as read, and an item of `find`, keeps the `{{ .fingerprint }}` that `create` sent.
        visibility_delay: how long a new job may be unreadable; absent: the connection's setting.
    """

    auth: Annotated[Auth, BeforeValidator(_type_alone)]
    headers: dict[str, str] = {}
    create: Create
    get: Get
    status: Status
    delete: Delete
    find: Find | None = None
    outputs: Outputs | None = None
    errors: tuple[ErrorRule, ...] = ()
    throttle: tuple[ThrottleRule, ...] = ()
    fingerprint: Pointer | None = None
    visibility_delay: GoDuration | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, given: Any) -> Any:
        """Text is YAML or JSON; a `Path` is that of a file with it."""
        if isinstance(given, Path):
            given = given.read_text()
        return read_mapping(given, "the description") if isinstance(given, str) else given

    @property
    def guarantee(self) -> Guarantee:
        if self.create.honours_key:
            return "key"
        return "search" if self.find else "at-most-once"

    @property
    def lacks(self) -> frozenset[OptionalMethod]:
        """What the service does not offer."""
        offers: dict[OptionalMethod, object] = {
            "find": self.find,
            "get_many": self.get.batch,
            "outputs": self.outputs and self.outputs.request,
        }
        return frozenset(method for method, offered in offers.items() if offered is None)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        faults = [
            InitErrorDetails(
                type=PydanticCustomError("contradiction", "{told}", {"told": told}),
                loc=tuple(place.split(".")),
                input=None,
            )
            for place, told in (*self._contradictions(), *self._unknown_names())
        ]
        if faults:
            raise ValidationError.from_exception_data(type(self).__name__, faults)
        return self

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        create, find = self.create, self.find
        if {name.lower() for name in self.headers} & {"authorization", "cookie"}:
            yield "headers", "can't hold credentials: these belong in `auth` and the block's secret"
        if create.idempotency == "path" and not _has_key(create.path):
            yield "create.path", f"has no job key; put {KEY} where the job's name goes"
        if create.honours_key and create.idempotency == "none":
            yield "create.honoursKey", "is true, but idempotency says that no key is sent"
        if find and not _has_key(self.create.keyed.templates):
            yield "find", f"looks for a key that create does not send; put {KEY} into create"
        if find and not find.handle and any(map(_is_header, create.handle.values())):
            yield "find.handle", "is missing: an item of a list has no headers to take it from"
        if find and find.handle and find.handle.keys() != create.handle.keys():
            yield "find.handle", f"needs the fields of create's: {', '.join(create.handle)}"
        if self.get.batch and "id" not in create.handle:
            yield "get.batch", "needs a field `id` in create.handle"
        if self.outputs and self.outputs.paging and not self.outputs.request:
            yield "outputs.paging", "needs a request"

    def _unknown_names(self) -> Iterator[tuple[str, str]]:
        handle = tuple(f"handle.{name}" for name in self.create.handle)
        sources = [source for source in self.create.handle.values() if isinstance(source, str)]
        outputs, batch, find = self.outputs, self.get.batch, self.find
        places: list[tuple[str, Any, tuple[str, ...]]] = [
            ("create", self.create.keyed.templates, (*OF_JOB, *STORAGE)),
            ("create.handle", sources, OF_JOB),
            ("find", find and (*find.templates, find.handle), OF_JOB),
            ("get", self.get.templates, handle),
            ("get.batch", batch and batch.templates, ("ids",)),
            ("delete", self.delete.templates, (*handle, "reason")),
            (
                "outputs",
                outputs and outputs.request and outputs.request.templates,
                (*OF_JOB, *handle),
            ),
            ("status.links", self.status.links, (*OF_JOB, *handle)),
        ]
        for place, templates, known in places:
            for name in sorted({*names_in(templates)}):
                word, _, _ = name.lower().partition(".")
                asked = word if word in OPEN else name.lower()
                if asked not in {each.lower() for each in known}:
                    yield place, f"{{{{ .{name} }}}} means nothing here; known: {', '.join(known)}"


def _has_key(templates: Any) -> bool:
    return any(name.lower() == "perretryuniquekey" for name in names_in(templates))


def _is_header(source: Source) -> bool:
    return isinstance(source, FromHeader)


# --- jobs ------------------------------------------------------------------------------------


def _without_secrets(inputs: dict[str, Any]) -> dict[str, Any]:
    for name, value in inputs.items():
        if any(secrets_in(value)):
            raise ValueError(
                f"input {name!r} holds a secret, which would be sent as asterisks: secrets belong in the block"
            )
    return inputs


class HttpJob(JobSpec[Any]):
    """A job of the described service; the task returns what `outputs` finds.

    Attributes:
        inputs: what its templates name as `{{ .inputs.… }}`.
        quota: the quota of the connection's block that the job counts against.
    """

    inputs: Annotated[dict[str, Any], AfterValidator(_without_secrets)] = Field(
        default_factory=dict
    )
    quota: str = "default"


class JobHandle(BaseModel):
    """What names a job: the fields of `create.handle`. Whole numbers stay exact."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fields: dict[str, StrictInt | StrictStr]
