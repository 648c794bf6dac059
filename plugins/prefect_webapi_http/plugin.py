"""A service's jobs as its description says: templates become requests, pointers find what answers hold."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, cast
from urllib.parse import unquote, urljoin

from jsonpointer import resolve_pointer
from pydantic import TypeAdapter, ValidationError
from pydantic.alias_generators import to_snake
from pydantic_core import to_json

from prefect_webapi import (
    AlreadyExists,
    Answer,
    AsyncPlugin,
    AuthError,
    BadTaskSpecification,
    CreateResult,
    DeleteContext,
    ExecutionError,
    ExternalResource,
    GetContext,
    NotFound,
    Phase,
    PhaseInfo,
    PluginConfig,
    RemoteClient,
    RemoteError,
    RemoteSystemError,
    RemoteUserError,
    ResourceRequirements,
    StatusContext,
    TaskExecutionContextReader,
    TaskInfo,
    TaskLog,
    Throttled,
    error_of_status,
    retry_after,
)
from prefect_webapi.auth import ClientCredentials, TokenAuth, basic
from prefect_webapi.results import SizeLimit
from prefect_webapi.template import (
    as_text,
    encoded,
    job_values,
    render,
    render_path,
    render_text,
    storage_values,
)
from prefect_webapi_http.blocks import HttpJobApi
from prefect_webapi_http.models import (
    BasicAuth,
    ErrorRule,
    FromHeader,
    HeaderAuth,
    HttpJob,
    JobHandle,
    Meaning,
    Method,
    OAuth2,
    Paging,
    Request,
    Rule,
    Source,
    ThrottleRule,
    Wait,
)

Values = Mapping[str, Any]

ERRORS: dict[str, type[RemoteError]] = {
    "system": RemoteSystemError,
    "user": RemoteUserError,
    "auth": AuthError,
    "notFound": NotFound,
    "exists": AlreadyExists,
}
INSTANT = TypeAdapter(datetime)


class HttpJobPlugin(AsyncPlugin[JobHandle, Any]):
    """At most once, unless the description says more: exactly once by key where `create.honoursKey` is true, else by
    search where there is a `find`.
    """

    def __init__(self, connection: HttpJobApi) -> None:
        self._connection = connection
        self._api = api = connection.api
        self._create = api.create.keyed
        self.guarantee = api.guarantee
        self.lacks = api.lacks
        self.max_batch = api.get.batch.size if api.get.batch else 1
        self.visibility_delay = api.visibility_delay
        self._base = str(connection.base_url).rstrip("/")
        self._tokens: ClientCredentials | None = None
        self._client = self._opened()

    def _opened(self) -> RemoteClient:
        secret, insecure = self._connection.secret, self._connection.settings.allow_insecure
        client = partial(RemoteClient, self._base, allow_insecure=insecure)
        headers = self._api.headers
        match self._api.auth:
            case OAuth2() as auth:
                self._tokens = ClientCredentials(
                    str(auth.token_url),
                    auth.client_id,
                    secret,
                    scope=auth.scope,
                    allow_insecure=insecure,
                )
                return client(headers=headers, auth=TokenAuth(self._tokens))
            case BasicAuth(user=user):
                return client(headers={**headers, "Authorization": basic(user, secret)})
            case HeaderAuth(name=name):
                return client(headers={**headers, name: secret})
            case auth:
                return client(headers=headers, token=secret if auth.type == "bearer" else None)

    def get_config(self) -> PluginConfig:
        return self._connection.engine

    async def resource_requirements(self, ctx: TaskExecutionContextReader) -> ResourceRequirements:
        return ResourceRequirements(namespace=ctx.spec(HttpJob).quota)

    async def create(self, ctx: TaskExecutionContextReader) -> CreateResult[JobHandle, Any]:
        create = self._api.create
        values = {**_values(ctx), **await storage_values(ctx, self._create.templates)}
        try:
            answer = await self._ask(self._create, values)
        except AlreadyExists as met:
            if create.handle_is_key:
                met.handle = _handle(create.handle, values)
            raise
        reads = create.snapshot_in_answer or any(map(_is_pointer, create.handle.values()))
        data = answer.json() if answer.body and reads else None
        job = at(data, self._api.get.item) if create.snapshot_in_answer else None
        handle = _handle(create.handle, values, data, answer.headers)
        return CreateResult(handle, job, self._fingerprint(job))

    async def find(self, ctx: TaskExecutionContextReader) -> CreateResult[JobHandle, Any] | None:
        find, values = self._api.find, _values(ctx)
        assert find is not None
        sources = find.handle or self._api.create.handle
        async for page in self._pages(find, values, find.paging, find.items):
            for job in page:
                if as_text(at(job, find.key)) == values["perRetryUniqueKey"]:
                    handle = _handle(sources, values, job)
                    return CreateResult(handle, fingerprint=self._fingerprint(job))
        return None

    async def get(self, ctx: GetContext[JobHandle]) -> Any:
        answer = await self._ask(self._api.get, {"handle": ctx.resource_meta.fields})
        job = at(answer.json(), self._api.get.item)
        if job is None:  # not "no such job": the service would have said so
            told = f"the answer has no job at {self._api.get.item!r}: {answer.beginning!r}"
            raise RemoteSystemError(told, code="UnreadableAnswer")
        return job

    async def get_many(self, ctxs: Sequence[GetContext[JobHandle]]) -> Sequence[Any]:
        batch = self._api.get.batch
        assert batch is not None
        ids = [ctx.resource_meta.fields["id"] for ctx in ctxs]
        parted = batch.separator
        # An id that holds the separator would be read as two: it is not asked for here, and so read alone.
        asked = [each for each in ids if not parted or parted not in str(each)]
        if not asked:
            return [None] * len(ids)
        values = {"ids": parted.join(map(str, asked)) if parted else asked}
        answer = await self._ask(batch, values)
        read = {as_text(at(job, batch.id)): job for job in _items(answer.json(), batch.items)}
        found = [read.get(str(each)) for each in ids]
        # Each job may be an error of its own, told as an answer would tell it.
        judged = [self._judge(replace(answer, body=to_json(job)), batch.method) for job in found]
        return [error or job for error, job in zip(judged, found, strict=True)]

    async def delete(self, ctx: DeleteContext[JobHandle]) -> None:
        values = {"handle": ctx.resource_meta.fields, "reason": ctx.reason}
        with suppress(NotFound):  # by a rule; over, as are the codes of the description
            await self._ask(self._api.delete, values, fine=self._api.delete.gone_codes)

    def status(self, ctx: StatusContext[JobHandle, Any]) -> PhaseInfo:
        job, told = ctx.resource, self._api.status
        word = as_text(at(job, told.pointer))
        meaning = told.map.get(word, Meaning(phase=told.default))
        phase, code = Phase[to_snake(meaning.phase).upper()], meaning.code or word
        wanted = told.success
        if phase is Phase.SUCCESS and wanted and not wanted.holds(at(job, wanted.pointer)):
            phase, code = Phase.RETRYABLE_FAILURE, "JobFailed"
        message = at(job, told.message)
        reason = "" if message is None else as_text(message)
        if not reason and (phase.is_failure or phase is Phase.UNDEFINED):
            reason = f"the state is {word}"
        outputs = self._api.outputs
        if phase is Phase.SUCCESS and outputs and not outputs.request:
            ctx.output_writer.put(at(job, outputs.pointer))
        error = ExecutionError(code=code, message=reason, kind=meaning.kind)
        return PhaseInfo(
            phase=phase,
            reason=reason,
            err=error if phase.is_failure else None,
            info=self._info(ctx, phase),
        )

    async def outputs(self, ctx: StatusContext[JobHandle, Any]) -> Any:
        outputs = self._api.outputs
        assert outputs is not None
        assert outputs.request is not None
        values = {**_values(ctx), "handle": ctx.resource_meta.fields}
        if outputs.paging is None:
            return at((await self._ask(outputs.request, values)).json(), outputs.pointer)
        rows: list[Any] = []
        size = SizeLimit(ctx.max_dataset_size_bytes)
        pages = self._pages(outputs.request, values, outputs.paging, outputs.pointer)
        async for page in pages:
            rows += size.kept(page)
        return rows

    async def aclose(self) -> None:
        await self._client.aclose()
        if self._tokens is not None:
            await self._tokens.aclose()

    # --- requests ----------------------------------------------------------------------------

    async def _ask(self, request: Request, values: Values, **more: Any) -> Answer:
        path, params = render_path(request.path, values), render(request.query, values)
        return await self._send(request, values, path, params, **more)

    async def _send(
        self,
        request: Request,
        values: Values,
        path: str,
        params: Mapping[str, Any],
        fine: Sequence[int] = (),
    ) -> Answer:
        answer = await self._client.request(
            request.method,
            path,
            params={name: _parameter(value) for name, value in params.items()},
            json=render(request.body, values),
            headers={name: render_text(text, values) for name, text in request.headers.items()},
        )
        error = None if answer.status in fine else self._judge(answer, request.method)
        if error is not None:
            raise error
        return answer

    async def _pages(
        self, request: Request, values: Values, paging: Paging | None, pointer: str
    ) -> AsyncIterator[list[Any]]:
        """The items of page after page."""
        path, params = render_path(request.path, values), render(request.query, values)
        seen: set[str] = set()
        passed = 0
        while True:
            answer = await self._send(request, values, path, params)
            data = answer.json()
            page = _items(data, pointer)
            yield page
            passed += len(page)
            if paging is None:
                return
            if paging.offset:
                following: Any = passed if page else None
            else:
                following = answer.next_page if paging.link_header else at(data, paging.next)
            if following in (None, "", False):
                return
            if str(following) in seen:
                told = f"the pages lead in a circle, to {following!r}"
                raise RemoteUserError(told, code="PagesInACircle")
            seen.add(str(following))
            if name := paging.offset or paging.param:
                params = {**params, name: following}
            else:
                path, params = self._within(path, str(following)), {}

    def _within(self, path: str, address: str) -> str:
        """The path of a page's address; credentials go nowhere else."""
        whole = urljoin(self._base + path, address)
        if not whole.startswith(f"{self._base}/"):
            told = f"the next page, {address!r}, is not under {self._base}; it is not asked for"
            raise RemoteUserError(told, code="ForeignPage")
        return whole.removeprefix(self._base)

    # --- answers -----------------------------------------------------------------------------

    def _judge(self, answer: Answer, method: Method) -> RemoteError | None:
        rules: tuple[Rule, ...] = (*self._api.throttle, *self._api.errors)
        data = answer.at() if rules else None
        for rule in rules:
            if _fits(rule, answer, data):
                return _error(rule, answer, data)
        return error_of_status(answer, method)

    def _fingerprint(self, job: Any) -> str | None:
        kept = None if self._api.fingerprint is None else at(job, self._api.fingerprint)
        return kept if isinstance(kept, str) and kept else None

    def _info(self, ctx: StatusContext[JobHandle, Any], phase: Phase) -> TaskInfo:
        told, job, fields = self._api.status, ctx.resource, ctx.resource_meta.fields
        values = {**_values(ctx), "handle": fields}
        links = {name: _link(link, values, job) for name, link in told.links.items()}
        progress = at(job, told.progress)
        name = ", ".join(map(str, fields.values()))
        return TaskInfo(
            logs=tuple(TaskLog(name=name, uri=as_text(uri)) for name, uri in links.items() if uri),
            occurred_at=_instant(at(job, told.occurred_at)),
            custom_info={} if progress is None else {"progress": progress},
            external_resources=(ExternalResource(external_id=name, phase=phase),),
        )


def at(data: Any, pointer: str | None) -> Any:
    """What is there; None: nothing, or no pointer."""
    return None if pointer is None else resolve_pointer(data, pointer, None)


def _items(data: Any, pointer: str) -> list[Any]:
    """A list, or one item."""
    found = at(data, pointer)
    if isinstance(found, list):
        return cast(list[Any], found)
    return [] if found is None else [found]


def _values(ctx: TaskExecutionContextReader) -> dict[str, Any]:
    return job_values(ctx, ctx.spec(HttpJob).model_dump(mode="json")["inputs"])


def _parameter(value: Any) -> Any:
    """Of the query: a list is sent as many, None is left out."""
    if isinstance(value, list):
        return [as_text(each) for each in cast(list[Any], value)]
    return None if value is None else as_text(value)


def _handle(
    sources: Mapping[str, Source],
    values: Values,
    data: Any = None,
    headers: Mapping[str, str] | None = None,
) -> JobHandle:
    fields = {name: _field(source, values, data, headers or {}) for name, source in sources.items()}
    missing = [name for name, value in fields.items() if value in (None, "")]
    if not missing:
        try:
            return JobHandle(fields=fields)
        except ValidationError:
            missing = [name for name, value in fields.items() if type(value) not in (str, int)]
    raise RemoteSystemError(
        f"the answer does not name the job: no text or whole number for {', '.join(missing)}",
        code="UnreadableAnswer",
    )


def _field(source: Source, values: Values, data: Any, headers: Mapping[str, str]) -> Any:
    if isinstance(source, FromHeader):
        found = source.pattern.search(headers.get(source.header.lower(), ""))
        value = found[1] if found else None
        return unquote(value) if value and source.header.lower() == "location" else value
    return render(source, values) if "{{" in source else at(data, source)


def _is_pointer(source: Source) -> bool:
    return isinstance(source, str) and "{{" not in source


def _link(link: str, values: Values, job: Any) -> Any:
    """An address; None: the job has nothing for it, such as an input that is named there."""
    try:
        return render_text(link, values, encoded) if "{{" in link else at(job, link)
    except BadTaskSpecification:
        return None


def _fits(rule: Rule, answer: Answer, data: Any) -> bool:
    if rule.status and answer.status not in rule.status:
        return False
    if rule.pattern is None:
        return True
    value = answer.text if rule.pointer is None else at(data, rule.pointer)
    return value is not None and rule.pattern.search(as_text(value)) is not None


def _error(rule: Rule, answer: Answer, data: Any) -> RemoteError:
    said = at(data, rule.message)
    told = answer.beginning if said is None else answer.mask(as_text(said))
    told = f"HTTP {answer.status}: {told}"
    if isinstance(rule, ThrottleRule):
        return Throttled(told, retry_after=_wait(rule.wait, answer, data))
    assert isinstance(rule, ErrorRule)
    error = ERRORS[rule.means](told)
    error.code = rule.code or error.code
    if rule.job_may_exist is not None:
        error.job_may_exist = rule.job_may_exist
    return error


def _wait(wait: Wait, answer: Answer, data: Any) -> timedelta | None:
    given = answer.headers.get(wait.header.lower()) if wait.header else at(data, wait.pointer)
    if wait.unit == "date":
        when = _instant(given)
        return None if when is None else max(timedelta(0), when - datetime.now(UTC))
    named = {**answer.headers, "retry-after": "" if given is None else as_text(given)}
    found = retry_after(named)
    return found / 1000 if found and wait.unit == "ms" else found


def _instant(value: Any) -> datetime | None:
    """ISO 8601, or seconds or milliseconds since 1970; without a zone it is UTC."""
    if value is None:
        return None
    try:
        when = INSTANT.validate_python(value)
    except ValidationError:
        return None
    return when if when.tzinfo else when.replace(tzinfo=UTC)
