"""OpenTelemetry spans of remote calls, as children of what was current where the job was asked for.

With no tracer provider in the process nothing is made and nothing is kept. No span holds a secret, a header, a body, a
path or a query.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata

from opentelemetry import context, trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode

__all__ = ["Context", "Origin", "call_span", "here", "is_on", "request_span"]

logger = logging.getLogger(__name__)

NAME = "prefect_webapi"

_TRACER = trace.get_tracer(NAME, metadata.version("prefect-webapi"))
_OFF: AbstractContextManager[None] = nullcontext()


@dataclass(frozen=True, slots=True)
class Origin:
    """The job that a call is for: the context in which it was asked for, and its ids."""

    parent: Context
    job_key: str
    flow_run: str = ""
    task_run: str = ""


def here() -> Context:
    """The context of who asks now: Prefect makes the task run's span the current one."""
    return context.get_current()


def is_on() -> bool:
    """Whether somebody has set up a tracer provider."""
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


def call_span(
    op: str, plugin: str, connection: str, origins: Iterable[Origin]
) -> AbstractContextManager[Span | None]:
    """A span for one call of a plugin's method; it is the current one inside the block.

    Args:
        origins: the jobs of the call; looked at only where tracing is on. The span of one job's call is a child of its
            task run's; that of several jobs begins a trace of its own and links to theirs.
    """
    if not is_on():
        return _OFF
    facts: dict[str, str | int] = {
        f"{NAME}.op": op,
        f"{NAME}.plugin": plugin,
        f"{NAME}.connection": connection,
    }
    parent, links, jobs = Context(), list[Link](), list(origins)
    if len(jobs) == 1:
        parent = jobs[0].parent
        facts |= _ids(jobs[0])
    elif jobs:
        facts[f"{NAME}.jobs"] = len(jobs)
        callers = (trace.get_current_span(each.parent).get_span_context() for each in jobs)
        by_id = {caller.span_id: caller for caller in callers if caller.is_valid}
        links = [Link(caller) for caller in by_id.values()]
    return _current(f"{op} {plugin}", parent, facts, links)


def request_span(method: str, scheme: str, host: str) -> AbstractContextManager[Span | None]:
    """A span for one HTTP request, inside that of its call. Its path is left out: it may be long, and hold anything."""
    if not is_on():
        return _OFF
    facts = {"http.request.method": method, "url.scheme": scheme, "server.address": host}
    return _current(method, context.get_current(), facts, ())


def _ids(origin: Origin) -> dict[str, str | int]:
    ids = {
        f"{NAME}.job.key": origin.job_key,
        "prefect.flow_run.id": origin.flow_run,
        "prefect.task_run.id": origin.task_run,
    }
    return {name: value for name, value in ids.items() if value}


@contextmanager
def _current(
    name: str, parent: Context, facts: Mapping[str, str | int], links: Sequence[Link]
) -> Generator[Span | None]:
    try:
        span = _TRACER.start_span(
            name, context=parent, kind=SpanKind.CLIENT, attributes=facts, links=links
        )
    except Exception as error:  # noqa: BLE001 - of a span processor; a call goes on without its span
        _tell_once(type(error).__name__, str(error))
        yield None
        return
    token = context.attach(trace.set_span_in_context(span, parent))
    try:
        yield span
    except BaseException as error:
        span.set_attribute("error.type", type(error).__name__)
        if isinstance(error, Exception):  # its text stays out: it may be a service's own
            span.set_status(Status(StatusCode.ERROR))
        raise
    finally:
        context.detach(token)
        try:
            span.end()
        except Exception as error:  # noqa: BLE001 - it must not take the place of the call's answer
            _tell_once(type(error).__name__, str(error))


@lru_cache(maxsize=16)
def _tell_once(kind: str, told: str) -> None:
    """A broken processor fails at each span; saying it once is enough."""
    logger.warning("a span processor failed, and calls go on without it: %s: %s", kind, told)
