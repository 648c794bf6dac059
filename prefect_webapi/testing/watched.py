"""A plugin whose remote calls are seen: one at a time, each with what it came to. The author's code is as it was."""

from __future__ import annotations

import asyncio
import inspect
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, cast

from prefect_webapi.contract.plugin import (
    AsyncPlugin,
    CreateResult,
    Plugin,
    PluginEntry,
    SyncPlugin,
)

__all__ = ["Call", "Watch", "handle_of", "no_network", "watched"]

METHODS = ("create", "get", "get_many", "find", "delete", "outputs", "do")
_TOUCHES = frozenset(
    {
        "socket.connect",
        "socket.getaddrinfo",
        "socket.gethostbyname",
        "socket.sendto",
        "socket.sendmsg",
    }
)


@dataclass(slots=True)
class Call:
    """One call of a plugin's method.

    Attributes:
        answer: what it returned. error: what it raised; both None: it is not over, or was cancelled.
        seconds: how long it took.
    """

    op: str
    at: float
    answer: Any = field(default=None, repr=False)
    error: BaseException | None = None
    seconds: float = 0.0


@dataclass
class Watch:
    """What the calls of a plugin were, in order.

    Calls are made one after the other, so that whoever sees a request knows which call it serves.

    Attributes:
        op: the call at work; "": none. begins, ended: are told.
    """

    begins: Callable[[str], None] = lambda op: None
    ended: Callable[[Call], None] = lambda call: None
    calls: list[Call] = field(default_factory=list[Call])
    op: str = ""
    _turn: dict[asyncio.AbstractEventLoop, asyncio.Lock] = field(default_factory=dict[Any, Any])

    def of(self, *ops: str) -> list[Call]:
        return [call for call in self.calls if call.op in ops]

    def handles(self) -> list[Any]:
        """Every handle that a call returned."""
        found = (handle_of(call.answer) for call in self.of("create", "find"))
        return [handle for handle in found if handle is not None]

    async def call(self, op: str, method: Callable[..., Any], argument: Any) -> Any:
        """Make a call in its turn; a blocking method gets a thread, as in the engine.

        A call that the plugin makes of itself is a part of the one at work.
        """
        if _at_work.get() is self:
            return await _made(method, argument)
        async with self._turn.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
            token = _at_work.set(self)
            try:
                with self.at(op) as call:
                    call.answer = await _made(method, argument)
                    return call.answer
            finally:
                _at_work.reset(token)

    @contextmanager
    def at(self, op: str) -> Generator[Call]:
        call = Call(op, time.monotonic())
        self.calls.append(call)
        self.begins(op)
        before, self.op = self.op, op
        try:
            yield call
        except BaseException as error:
            call.error = error
            raise
        finally:
            self.op = before
            call.seconds = time.monotonic() - call.at
            self.ended(call)


_at_work: ContextVar[Watch | None] = ContextVar("at_work", default=None)


async def _made(method: Callable[..., Any], argument: Any) -> Any:
    if inspect.iscoroutinefunction(method):
        return await method(argument)
    answer = await asyncio.to_thread(method, argument)
    return await answer if inspect.isawaitable(answer) else answer


def watched(entry: PluginEntry[Any], watch: Watch) -> PluginEntry[Any]:
    """The same entry, whose plugins are watched."""

    async def load(setup: Any) -> Plugin:
        made: Any = entry.plugin_loader(setup)
        plugin: Any = await made if inspect.isawaitable(made) else made
        if isinstance(cast(object, plugin), AsyncPlugin | SyncPlugin):
            # Of anything else the engine says what is wrong.
            plugin.__class__ = _subclass(plugin.__class__, watch)
        return plugin

    return replace(entry, plugin_loader=load)


def _subclass(cls: Any, watch: Watch) -> type[Any]:
    members: dict[str, Any] = {"__slots__": (), "__module__": cls.__module__}
    for name in METHODS:
        method = getattr(cls, name, None)
        if method is not None and method is not getattr(AsyncPlugin, name, None):
            members[name] = _watched(name, method, watch)
    return type(cls.__name__, (cls,), members)


def _watched(name: str, method: Callable[..., Any], watch: Watch) -> Callable[..., Any]:
    async def call(self: Any, argument: Any) -> Any:
        return await watch.call(name, method.__get__(self), argument)

    return call


def handle_of(answer: Any) -> Any:
    """What `create` or `find` returned as the handle."""
    return answer.resource_meta if isinstance(answer, CreateResult) else answer  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] - authors' type arguments


# --- no network ------------------------------------------------------------------------------

_touched: ContextVar[list[str] | None] = ContextVar("touched", default=None)
_listens: list[bool] = []


@contextmanager
def no_network() -> Generator[list[str]]:
    """Refuse every socket that code inside would connect, whichever library asks; gives what it tried."""
    if not _listens:  # such a hook can't be taken out again
        _listens.append(True)
        sys.addaudithook(_refuse)
    touched: list[str] = []
    token = _touched.set(touched)
    try:
        yield touched
    finally:
        _touched.reset(token)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _TOUCHES and (touched := _touched.get()) is not None:
        touched.append(f"{event} {arguments[1:] if event == 'socket.connect' else arguments[:2]}")
        raise PermissionError(f"{event} is refused here")
