"""What an author says of the service, so that the contract can be tried: one class, all that the kit asks for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any, Literal

from prefect_webapi.contract.config import EngineSettings, PluginConfig
from prefect_webapi.contract.phase import Phase
from prefect_webapi.contract.task import JobSpec
from prefect_webapi.testing.proxy import Reply

__all__ = ["Fate", "Service"]

Fate = Literal["succeeds", "fails", "runs", "waits"]


class Service(ABC):
    """A service that answers as the real one does: the real one's test instance, or a stand-in.

    It needs no faults on command: the kit has a proxy that brings them. It must count its jobs itself.

    Attributes:
        states: every state that the service documents: a snapshot as `get` returns it, and its phase.
        unknown_state: a snapshot with a state that the service does not have yet.
        unknown_handle: a well-formed handle of a job that never was.
        result: what the task of a job that succeeds returns; None: not compared.
        failure: words of the service about a job that fails; they must reach the task's error.
        token_paths: ends of the paths from which tokens are fetched: nothing is spoiled there.
        speaks_http: False: no proxy can stand before it, and what needs one is not checked.
        lacks: checks that make no sense for this service, by name: the reason, which the certificate shows.
        patience: seconds within which a job of `spec` succeeds, fails, or is seen to run.
    """

    states: Sequence[tuple[Any, Phase]] = ()
    unknown_state: Any = None
    unknown_handle: Any = None
    result: Any = None
    failure: str = ""
    token_paths: Sequence[str] = ()
    speaks_http: bool = True
    lacks: Mapping[str, str] = MappingProxyType({})
    patience: float = 20.0

    @abstractmethod
    def start(self) -> AbstractContextManager[str]:
        """Run the server while the block lasts; the value is its root URL. `serve_app` does so for an ASGI app."""

    @abstractmethod
    def connection(self, url: str, engine: PluginConfig, settings: EngineSettings) -> Any:
        """The block for a service at `url`, with credentials of eight characters or more that it accepts.

        `url` is that of the proxy, mostly; `engine` and `settings` go into the block as they are.
        """

    @abstractmethod
    def spec(self, fate: Fate) -> JobSpec[Any] | None:
        """A job that succeeds within a second or so, that fails, that runs until it is deleted, or that is queued.

        None: the service has no such jobs; the certificate says so. Only ``fails`` and ``waits`` may be None. Of a
        `SyncPlugin`, whose one call answers with the result, only ``succeeds`` and ``fails`` are asked for.
        """

    @abstractmethod
    def made(self) -> int:
        """How many jobs the service has ever made, by its own count. Asked from other threads.

        Of a `SyncPlugin`: how often it did the work of a call.
        """

    @abstractmethod
    def live(self) -> int:
        """How many of them are not over, by its own count. Asked from other threads."""

    def throttled(self, seconds: float | None) -> Reply:
        """How the service asks for less; `seconds`: to wait for, where it can say so."""
        hint = {} if seconds is None else {"Retry-After": f"{seconds:g}"}
        return Reply(429, {"message": "too many requests"}, hint)

    def unauthorized(self) -> Reply:
        """How the service says that a credential is no longer good."""
        return Reply(401, {"message": "the credential is not valid"})
