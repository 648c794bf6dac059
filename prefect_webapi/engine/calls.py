"""Every call of a plugin goes through here: permit, deadline, thread for blocking authors, judged errors."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, Literal, cast

import anyio

from prefect_webapi.contract.errors import (
    AuthError,
    BadTaskSpecification,
    ConfigurationError,
    LedgerUnavailable,
    OutcomeUnknown,
    RemoteError,
    RemoteSystemError,
    Throttled,
)
from prefect_webapi.contract.phase import PhaseInfo
from prefect_webapi.contract.plugin import AsyncPlugin, CreateResult, SyncPlugin, overrides
from prefect_webapi.contract.secrecy import Mask, secrets_in
from prefect_webapi.contract.task import ResourceRequirements
from prefect_webapi.engine.contexts import DeleteView, ReadView, StatusView, TaskView, ViewSource
from prefect_webapi.engine.faults import fault_point
from prefect_webapi.engine.services import Services
from prefect_webapi.http import classify
from prefect_webapi.limiter import Gate, Op
from prefect_webapi.metrics import Add, Metrics
from prefect_webapi.registry import Loaded, is_cancelled
from prefect_webapi.tracing import Origin, call_span

__all__ = ["Calls", "can_clear_up", "can_find", "guarantee", "is_sync"]

logger = logging.getLogger(__name__)

AGAIN_SECONDS = 1.0

_Name = Literal["create", "find", "get", "get_many", "delete", "do", "outputs"]
_OPS: dict[_Name, Op] = {
    "create": "write",
    "find": "read",
    "get": "read",
    "get_many": "read",
    "delete": "write",
    "do": "write",
    "outputs": "read",
}


class _Counts:
    """Counters of calls and their latencies, bound to their labels when first used."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._calls: dict[tuple[str, str, str], Add] = {}
        self._seconds: dict[tuple[str, str], Add] = {}

    def count(self, plugin: str, op: str, outcome: str, seconds: float) -> None:
        call, latency = (plugin, op, outcome), (plugin, op)
        if (add := self._calls.get(call)) is None:
            add = self._metrics.counter("calls_total", plugin=plugin, op=op, outcome=outcome)
            self._calls[call] = add
        if (observe := self._seconds.get(latency)) is None:
            observe = self._metrics.histogram("call_seconds", plugin=plugin, op=op)
            self._seconds[latency] = observe
        add(1)
        observe(seconds)


class Calls:
    """The plugin's methods as the engine sees them. Each raises nothing but `RemoteError`s.

    The plugin instance is looked up at each call, so that an edited block takes effect at the next one. A 401 or
    403 loads the plugin anew and repeats the call once.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._counts = _Counts(services.metrics)
        self._threads: dict[str, anyio.CapacityLimiter] = {}
        self._in_threads: dict[int, asyncio.Event] = {}

    def gate(self, loaded: Loaded) -> Gate:
        now = self._services.plugins.current(loaded)
        config = now.config
        return self._services.gates.gate(
            now.endpoint, config.read_rate_limiter, config.write_rate_limiter
        )

    async def permit(self, loaded: Loaded, op: Op) -> None:
        """Wait until a call of this kind may leave."""
        await self._pass(loaded, op)

    async def _pass(self, loaded: Loaded, op: Op) -> Gate:
        gate, now = self.gate(loaded), self._services.plugins.current(loaded)
        turn = None if now.settings.shared_qps is None else partial(self._turn, now)
        await gate.acquire(op, turn=turn)
        return gate

    async def _turn(self, loaded: Loaded) -> None:
        """Wait for the turn of a call among those of all processes on this ledger.

        Without the ledger it waits: nothing could be written down of what the call does, and a limit that somebody
        set is kept.
        """
        name = f"webapi:{loaded.entry.id}:{loaded.connection.name}"
        clock, is_told = self._services.clock, False
        while (qps := self._services.plugins.current(loaded).settings.shared_qps) is not None:
            try:
                wait = await self._services.store.reserve(name, clock.real(1 / qps))
            except LedgerUnavailable as error:
                if not is_told:
                    is_told = True
                    logger.warning(
                        "a call to %s waits for the rate that processes share: %s", name, error
                    )
                await clock.sleep(AGAIN_SECONDS)
            else:
                await clock.sleep(wait * clock.speed)
                return

    async def requirements(self, loaded: Loaded, view: TaskView) -> ResourceRequirements:
        now = self._services.plugins.current(loaded)
        limit = self._timeout(now, "resource_requirements")
        answer = await self._ask(now, "resource_requirements", view, [view], limit)
        if isinstance(answer, ResourceRequirements):
            return answer
        raise _wrong(now, "resource_requirements", answer, "ResourceRequirements")

    async def status(
        self, loaded: Loaded, view: StatusView, *, told: PhaseInfo | None = None
    ) -> PhaseInfo:
        """Judge a snapshot. No secret is in what comes back.

        Args:
            told: what came back before: where nothing has changed, nothing is looked for again.
        """
        now = self._services.plugins.current(loaded)
        plugin = now.plugin
        assert isinstance(plugin, AsyncPlugin)
        try:
            info: Any = plugin.status(view)
            if inspect.isawaitable(info):
                limit = self._timeout(now, "status")
                async with asyncio.timeout(self._services.clock.real(limit.total_seconds())):
                    info = await info
            return _told_of(now, view, info, told)
        except BaseException as error:
            if is_cancelled(error):
                raise
            judged = _judged(error, now, "status", [view.source])
        raise judged  # outside the handler: what an author raised may hold a secret

    async def create(self, loaded: Loaded, view: TaskView) -> CreateResult[Any, Any]:
        """Send create. The caller has the permit already."""
        answer = await self._call(loaded, "create", view, [view], permitted=True)
        if isinstance(answer, CreateResult):
            return answer  # pyright: ignore[reportUnknownVariableType] - authors' type arguments
        return CreateResult(answer)

    async def find(self, loaded: Loaded, view: TaskView) -> CreateResult[Any, Any] | None:
        answer = await self._call(loaded, "find", view, [view])
        if answer is None or isinstance(answer, CreateResult):
            return answer  # pyright: ignore[reportUnknownVariableType] - authors' type arguments
        raise _wrong(loaded, "find", answer, "a CreateResult or None")

    async def get(self, loaded: Loaded, context: ReadView) -> Any:
        return await self._call(loaded, "get", context, [context.source])

    async def get_many(
        self, loaded: Loaded, contexts: Sequence[ReadView]
    ) -> Sequence[Any | Exception | None]:
        tasks = [context.source for context in contexts]
        answers = await self._call(loaded, "get_many", contexts, tasks)
        if not isinstance(answers, Sequence) or isinstance(answers, str | bytes):
            raise _wrong(loaded, "get_many", answers, "a list")
        if len(answers := cast(Sequence[Any], answers)) != len(contexts):
            raise RemoteSystemError(
                f"get_many of plugin {loaded.entry.id!r} returned {len(answers)} answers for {len(contexts)} jobs; "
                "it must return one per job, in the same order"
            )
        return [
            _judged(a, loaded, "get_many", [task]) if isinstance(a, Exception) else a
            for a, task in zip(answers, tasks, strict=True)
        ]

    async def delete(self, loaded: Loaded, handle: Any, reason: str, task: ViewSource) -> None:
        """Send delete. The caller has the permit already."""
        await self._call(loaded, "delete", DeleteView(handle, reason), [task], permitted=True)

    async def do(self, loaded: Loaded, view: TaskView, timeout: timedelta) -> PhaseInfo:
        """Send do. The caller has the permit already."""
        answer = await self._call(loaded, "do", view, [view], permitted=True, timeout=timeout)
        if isinstance(answer, PhaseInfo):
            return answer
        wrong = _wrong(loaded, "do", answer, "a PhaseInfo")  # whatever it did is done
        return PhaseInfo.system_failure(wrong.code, wrong.message)

    async def until_ended(self, view: TaskView) -> None:
        """Wait for a blocking call that was dropped: its thread can't be stopped."""
        if (ended := self._in_threads.get(id(view))) is not None:
            await ended.wait()

    async def outputs(self, loaded: Loaded, view: StatusView) -> Any:
        return await self._call(loaded, "outputs", view, [view.source])

    async def _call(
        self,
        loaded: Loaded,
        name: _Name,
        argument: Any,
        tasks: Sequence[ViewSource],
        *,
        permitted: bool = False,
        timeout: timedelta | None = None,
    ) -> Any:
        refused = self._services.plugins.current(
            loaded
        )  # a job may hold one that was replaced long ago
        try:
            return await self._once(refused, name, argument, tasks, permitted, timeout)
        except AuthError:
            await self._services.plugins.refresh(refused, force=True)
            fault_point("KP-36")
        return await self._once(refused, name, argument, tasks, False, timeout)

    async def _once(
        self,
        loaded: Loaded,
        name: _Name,
        argument: Any,
        tasks: Sequence[ViewSource],
        permitted: bool,
        timeout: timedelta | None,
    ) -> Any:
        op = _OPS[name]
        gate = self.gate(loaded) if permitted else await self._pass(loaded, op)
        now = self._services.plugins.current(loaded)
        limit = timeout or self._timeout(now, name)
        clock, counts = self._services.clock, self._counts
        plugin = now.entry.id
        began = clock.monotonic()
        outcome = "cancelled"
        try:
            with call_span(name, plugin, now.connection.name, map(_origin, tasks)):
                answer = await self._ask(now, name, argument, tasks, limit)
        except RemoteError as error:
            outcome = type(error).__name__
            if isinstance(error, Throttled):
                gate.throttled(op, self._capped(now, error.retry_after))
                self._services.metrics.count("throttled_total", plugin=plugin, op=op)
            raise
        else:
            outcome = "ok"
            gate.succeeded(op)
            return answer
        finally:
            counts.count(plugin, name, outcome, clock.monotonic() - began)

    async def _ask(
        self,
        loaded: Loaded,
        name: str,
        argument: Any,
        tasks: Sequence[ViewSource],
        limit: timedelta,
    ) -> Any:
        """Call a method of the newest instance; whatever an author's code raises is judged."""
        clock = self._services.clock
        began = clock.monotonic()
        try:
            async with self._services.plugins.use(loaded) as loaded:
                async with asyncio.timeout(clock.real(limit.total_seconds())):
                    return await self._run(loaded, partial(getattr(loaded.plugin, name), argument))
        except BaseException as error:
            if is_cancelled(error):
                raise
            waited = clock.monotonic() - began
            if isinstance(error, TimeoutError) and waited >= 0.95 * limit.total_seconds():
                judged = OutcomeUnknown(
                    f"no answer to {name} of plugin {loaded.entry.id!r} within {limit.total_seconds():g} s",
                    code="Timeout",
                )
            else:
                judged = _judged(error, loaded, name, tasks)
        raise judged  # outside the handler: what an author raised may hold a secret

    async def _run(self, loaded: Loaded, method: partial[Any]) -> Any:
        """Await a coroutine method; give a blocking one a thread, of which a bounded number works at once.

        The thread is a daemon: one that never returns keeps neither its job nor the end of the process waiting.
        """
        if inspect.iscoroutinefunction(method.func):
            return await method()
        limiter = self._threads.setdefault(
            loaded.endpoint, anyio.CapacityLimiter(loaded.config.caching.workers)
        )
        loop, key, ended = asyncio.get_running_loop(), id(method.args[0]), asyncio.Event()
        arrived: asyncio.Future[None] = loop.create_future()
        answers: list[Any] = []
        errors: list[BaseException] = []

        def end() -> None:
            self._in_threads.pop(key, None)
            ended.set()
            if not arrived.done():
                arrived.set_result(None)

        def work() -> None:
            try:
                answers.append(context.run(method))
            except BaseException as error:  # noqa: BLE001 - raised where it is awaited
                errors.append(error)
            with suppress(RuntimeError):  # the engine has closed meanwhile
                loop.call_soon_threadsafe(end)

        context = contextvars.copy_context()
        async with limiter:
            self._in_threads[key] = ended
            threading.Thread(target=work, name=f"plugin {loaded.entry.id}", daemon=True).start()
            await arrived
        for error in errors:
            raise error
        return await answers[0] if inspect.isawaitable(answers[0]) else answers[0]

    def _capped(self, loaded: Loaded, retry_after: timedelta | None) -> timedelta | None:
        if retry_after is None:
            return None
        return min(retry_after, loaded.settings.max_retry_after)

    def _timeout(self, loaded: Loaded, name: str) -> timedelta:
        settings = loaded.settings
        match name:
            case "create":
                return settings.create_timeout
            case "delete":
                return settings.delete_timeout
            case _:
                return settings.get_timeout


def _origin(task: ViewSource) -> Origin:
    caller = task.request.caller
    return Origin(task.request.trace, task.key, caller.flow_run, caller.task_run)


def _mask(loaded: Loaded, tasks: Sequence[ViewSource]) -> Mask:
    """Knows the connection's secrets and those that the jobs were given: authors make mistakes."""
    return loaded.mask.with_more(secrets_in([secret for task in tasks for secret in task.given]))


def _judged(
    error: BaseException, loaded: Loaded, name: str, tasks: Sequence[ViewSource]
) -> RemoteError:
    """What an error of an author's method means, without secrets; a foreign one names the method."""
    if isinstance(error, RemoteError):
        judged = error
    elif isinstance(error, ConfigurationError):  # a missing secret, say: nothing was sent
        judged = BadTaskSpecification(str(error), code=type(error).__name__)
    else:
        judged = classify(error) if isinstance(error, Exception) else _no_error(error)
        judged.message = f"{name} of plugin {loaded.entry.id!r}: {judged.message}"
        judged.args = (judged.message,)
    mask = _mask(loaded, tasks)
    if not mask.is_told_by(error):
        if judged is not error:
            judged.__cause__ = error
        return judged
    judged.__cause__ = judged.__context__ = None
    vars(judged).pop("__notes__", None)
    judged.message = mask(judged.message)
    judged.args = (judged.message,)
    return judged


def _no_error(raised: BaseException) -> RemoteError:
    """An author's code may raise what ends a process, or a task; it ends neither."""
    kind = type(raised).__name__
    return RemoteSystemError(f"{kind}: {raised}" if str(raised) else kind, code=kind)


def _told_of(loaded: Loaded, view: StatusView, info: Any, before: PhaseInfo | None) -> PhaseInfo:
    """What `status` said, without secrets: services echo them, and authors pass their words on."""
    if not isinstance(info, PhaseInfo):
        raise _wrong(loaded, "status", info, "a PhaseInfo")
    if not info.has_text or (before is not None and info.same_content(before)):
        return info
    mask = _mask(loaded, [view.source])
    if not mask.hits(info.model_dump_json()):
        return info
    return PhaseInfo.model_validate(mask.data(info.model_dump()))


def _wrong(loaded: Loaded, name: str, answer: Any, wanted: str) -> RemoteSystemError:
    """Whatever the call did, an author's answer of the wrong type tells nothing of it."""
    return RemoteSystemError(
        f"{name} of plugin {loaded.entry.id!r} returned {type(answer).__name__}; it must return {wanted}",
        code="TypeError",
    )


def is_sync(loaded: Loaded) -> bool:
    return isinstance(loaded.plugin, SyncPlugin)


def can_find(loaded: Loaded) -> bool:
    """Whether the plugin can search for a job by its key."""
    return isinstance(loaded.plugin, AsyncPlugin) and overrides(loaded.plugin, "find")


def can_clear_up(loaded: Loaded) -> bool:
    """Whether what came of a create that was sent can be found out: by the key, or by a search."""
    return can_find(loaded) or guarantee(loaded) != "at-most-once"


def guarantee(loaded: Loaded) -> Literal["key", "search", "at-most-once"]:
    """What the service offers against a second job after a lost answer."""
    plugin = loaded.plugin
    if isinstance(plugin, AsyncPlugin):
        return plugin.guarantee
    return "key" if plugin.idempotent else "at-most-once"
