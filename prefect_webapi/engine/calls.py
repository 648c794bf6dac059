"""Every call of a plugin goes through here: permit, deadline, thread for blocking authors, judged errors."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import anyio
import anyio.to_thread

from prefect_webapi.contract.contexts import GetContext
from prefect_webapi.contract.errors import (
    AuthError,
    BadTaskSpecification,
    ConfigurationError,
    OutcomeUnknown,
    RemoteError,
    RemoteSystemError,
    Throttled,
)
from prefect_webapi.contract.phase import PhaseInfo
from prefect_webapi.contract.plugin import AsyncPlugin, CreateResult, SyncPlugin
from prefect_webapi.contract.secrecy import scrub
from prefect_webapi.contract.task import ResourceRequirements
from prefect_webapi.engine.contexts import DeleteView, GetView, StatusView, TaskView
from prefect_webapi.engine.services import Services
from prefect_webapi.http import classify
from prefect_webapi.limiter import Gate, Op
from prefect_webapi.registry import Loaded

__all__ = ["Calls", "guarantee", "is_sync"]

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


class Calls:
    """The plugin's methods as the engine sees them. Each raises nothing but `RemoteError`s.

    The plugin instance is looked up at each call, so that an edited block takes effect at the next one. A 401 or
    403 loads the plugin anew and repeats the call once.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
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
        await self.gate(loaded).acquire(op)

    async def requirements(self, loaded: Loaded, view: TaskView) -> ResourceRequirements:
        plugin = self._services.plugins.current(loaded).plugin
        return await self._run(loaded, partial(plugin.resource_requirements, view))

    async def create(self, loaded: Loaded, view: TaskView) -> CreateResult[Any, Any]:
        """Send create. The caller has the permit already."""
        answer = await self._call(loaded, "create", view, permitted=True)
        if isinstance(answer, CreateResult):
            return answer  # pyright: ignore[reportUnknownVariableType] - authors' type arguments
        return CreateResult(answer)

    async def find(self, loaded: Loaded, view: TaskView) -> CreateResult[Any, Any] | None:
        return await self._call(loaded, "find", view)

    async def get(self, loaded: Loaded, handle: Any) -> Any:
        return await self._call(loaded, "get", GetView(handle))

    async def get_many(
        self, loaded: Loaded, contexts: Sequence[GetContext[Any]]
    ) -> Sequence[Any | Exception | None]:
        answers = await self._call(loaded, "get_many", contexts)
        if len(answers) != len(contexts):
            raise RemoteSystemError(
                f"get_many returned {len(answers)} answers for {len(contexts)} jobs; "
                "it must return one per job, in the same order"
            )
        return [self._judged(a) if isinstance(a, Exception) else a for a in answers]

    async def delete(self, loaded: Loaded, handle: Any, reason: str) -> None:
        """Send delete. The caller has the permit already."""
        await self._call(loaded, "delete", DeleteView(handle, reason), permitted=True)

    async def do(self, loaded: Loaded, view: TaskView, timeout: timedelta) -> PhaseInfo:
        """Send do. The caller has the permit already."""
        return await self._call(loaded, "do", view, permitted=True, timeout=timeout)

    async def until_ended(self, view: TaskView) -> None:
        """Wait for a blocking call that was dropped: its thread can't be stopped."""
        if (ended := self._in_threads.get(id(view))) is not None:
            await ended.wait()

    async def outputs(self, loaded: Loaded, view: StatusView) -> Any:
        return await self._call(loaded, "outputs", view)

    async def _call(
        self,
        loaded: Loaded,
        name: _Name,
        argument: Any,
        *,
        permitted: bool = False,
        timeout: timedelta | None = None,
    ) -> Any:
        refused = self._services.plugins.current(
            loaded
        )  # a job may hold one that was replaced long ago
        try:
            return await self._once(refused, name, argument, permitted, timeout)
        except AuthError:
            await self._services.plugins.refresh(refused, force=True)
        return await self._once(refused, name, argument, False, timeout)

    async def _once(
        self, loaded: Loaded, name: _Name, argument: Any, permitted: bool, timeout: timedelta | None
    ) -> Any:
        op = _OPS[name]
        gate = self.gate(loaded)
        if not permitted:
            await gate.acquire(op)
        now = self._services.plugins.current(loaded)
        limit = timeout or self._timeout(now, name)
        clock, metrics = self._services.clock, self._services.metrics
        began = clock.monotonic()
        outcome = "ok"
        try:
            async with self._services.plugins.use(loaded) as now:
                with anyio.fail_after(clock.real(limit.total_seconds())):
                    answer = await self._run(now, partial(getattr(now.plugin, name), argument))
        except (Exception, SystemExit) as error:  # whatever an author's code raises is judged
            judged = self._judged(error)
            tells_secrets = _mask(judged, now, argument)
            outcome = type(judged).__name__
            if isinstance(judged, Throttled):
                gate.throttled(op, self._capped(now, judged.retry_after))
                metrics.count("throttled_total", plugin=now.entry.id, op=op)
            if judged is error:
                raise
            if (
                isinstance(error, TimeoutError)
                and clock.monotonic() - began >= 0.95 * limit.total_seconds()
            ):
                judged = OutcomeUnknown(
                    f"no answer to {name} within {limit.total_seconds():g} s", code="Timeout"
                )
            raise judged from (None if tells_secrets else error)
        else:
            gate.succeeded(op)
            return answer
        finally:
            metrics.count("calls_total", plugin=now.entry.id, op=name, outcome=outcome)
            metrics.observe("call_seconds", clock.monotonic() - began, plugin=now.entry.id, op=name)

    async def _run(self, loaded: Loaded, method: partial[Any]) -> Any:
        """Await a coroutine method; give a blocking one a thread of a bounded pool."""
        if inspect.iscoroutinefunction(method.func):
            return await method()
        limiter = self._threads.setdefault(
            loaded.endpoint, anyio.CapacityLimiter(loaded.config.caching.workers)
        )
        loop, key, ended = asyncio.get_running_loop(), id(method.args[0]), asyncio.Event()

        def end() -> None:
            self._in_threads.pop(key, None)
            ended.set()

        def work() -> Any:
            try:
                return method()
            finally:
                with suppress(RuntimeError):  # the engine has closed meanwhile
                    loop.call_soon_threadsafe(end)

        self._in_threads[key] = ended
        answer = await anyio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=limiter)
        return await answer if inspect.isawaitable(answer) else answer

    def _judged(self, error: BaseException) -> RemoteError:
        if isinstance(error, RemoteError):
            return error
        if isinstance(error, ConfigurationError):  # a missing secret, say: nothing was sent
            return BadTaskSpecification(str(error), code=type(error).__name__)
        if isinstance(error, Exception):
            return classify(error)
        return RemoteSystemError(str(error), code=type(error).__name__)

    def _capped(self, loaded: Loaded, retry_after: timedelta | None) -> timedelta | None:
        if retry_after is None:
            return None
        return min(retry_after, loaded.settings.max_retry_after)

    def _timeout(self, loaded: Loaded, name: _Name) -> timedelta:
        settings = loaded.settings
        match name:
            case "create":
                return settings.create_timeout
            case "delete":
                return settings.delete_timeout
            case _:
                return settings.get_timeout


def _mask(error: RemoteError, loaded: Loaded, argument: Any) -> bool:
    """Take secrets out of a text that people will see: authors make mistakes. Whether there were any."""
    given = argument.secret_manager.given if isinstance(argument, TaskView | StatusView) else ()
    masked = scrub(error.message, [loaded.connection.value, *given])
    if masked == error.message:
        return False
    error.message = masked
    error.args = (masked,)
    return True


def is_sync(loaded: Loaded) -> bool:
    return isinstance(loaded.plugin, SyncPlugin)


def guarantee(loaded: Loaded) -> Literal["key", "search", "at-most-once"]:
    """What the service offers against a second job after a lost answer."""
    plugin = loaded.plugin
    if isinstance(plugin, AsyncPlugin):
        return plugin.guarantee
    return "key" if plugin.idempotent else "at-most-once"
