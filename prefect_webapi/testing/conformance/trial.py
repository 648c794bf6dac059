"""A plugin, a service of its kind, and the proxy between them; runs one check after the other."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from inspect import isawaitable
from pathlib import Path
from typing import Any, Self, cast
from uuid import uuid4

from prefect_webapi.contract.config import EngineSettings, PluginConfig
from prefect_webapi.contract.contexts import MetricsScope
from prefect_webapi.contract.errors import ConfigurationError
from prefect_webapi.contract.keys import base_of, fingerprint_of, job_key
from prefect_webapi.contract.plugin import (
    AsyncPlugin,
    Guarantee,
    Plugin,
    PluginEntry,
    SyncPlugin,
    overrides,
)
from prefect_webapi.contract.secrecy import LEAST_CHARACTERS, Mask, secrets_in
from prefect_webapi.contract.task import JobSpec
from prefect_webapi.engine.contexts import DeleteView, TaskView, task_view
from prefect_webapi.engine.host import Host, Ticket
from prefect_webapi.engine.request import Outcome
from prefect_webapi.metrics import Metrics
from prefect_webapi.registry.entries import ENTRY_POINT_GROUP
from prefect_webapi.testing.conformance.certificate import Certificate, Finding, Subject, Verdict
from prefect_webapi.testing.conformance.service import Fate, Service
from prefect_webapi.testing.engine import (
    QUICK,
    FolderOutputs,
    LocalSecrets,
    Told,
    engine,
    request,
)
from prefect_webapi.testing.proxy import FaultProxy, Reply, WireFault
from prefect_webapi.testing.waiting import eventually
from prefect_webapi.testing.watched import Watch, handle_of, watched

__all__ = ["Check", "Engine", "Nonconformity", "NotChecked", "NotClaimed", "Trial", "certify"]

CHECK_SECONDS = 60.0
_SHOWN = 12
_OPTIONAL = ("find", "get_many", "outputs")
READS = ("get", "get_many")
_NO_JOBS = "a SyncPlugin makes no job that could be read, ended or met again: one call, `do`, and its answer"


class Nonconformity(AssertionError):
    """A check fails.

    Args:
        service: what the service did. plugin: what the plugin did. change: what to change.
    """

    def __init__(self, *, service: str, plugin: str, change: str) -> None:
        super().__init__(f"the service: {service}\nthe plugin:  {plugin}\nchange:      {change}")


class NotClaimed(Exception):
    """The plugin does not implement what the check is about."""


class NotChecked(Exception):
    """The description of the service gives nothing to check it with."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that every plugin must do.

    Attributes:
        promise: what holds then, in one sentence.
        after: checks that this one builds on: it is not reached if one of them fails.
        run: tries it; the answer is what else was seen, "" for nothing.
        on_the_wire: needs the proxy, so a service over HTTP.
        of_calls: is asked of a `SyncPlugin` too, whose one call answers with the result.
    """

    name: str
    promise: str
    run: Callable[[Trial], Awaitable[str | None]]
    after: tuple[str, ...] = ()
    on_the_wire: bool = False
    of_calls: bool = False


@dataclass(frozen=True, slots=True)
class Engine:
    """A running engine without Prefect whose connection is the service, through the proxy."""

    trial: Trial
    host: Host

    def admit(self, spec: JobSpec[Any], **call: Any) -> Ticket:
        task_type = self.trial.entry.supported_task_types[0]
        return self.host.admit(request(spec, task_type=task_type, run=self.trial.run, **call))

    async def outcome(self, spec: JobSpec[Any], **call: Any) -> Outcome:
        return await self.trial.within(self.admit(spec, **call).outcome(), "an outcome of the task")

    async def running(self, spec: JobSpec[Any], phase: str = "RUNNING", **call: Any) -> Ticket:
        """A job that was seen in this phase."""
        told = Told()
        ticket = self.admit(spec, reporter=told, **call)
        try:
            await eventually(lambda: phase in told.names, within=self.trial.service.patience)
        except AssertionError:
            raise Nonconformity(
                service=f"was asked for a job that is soon {phase}: {self.trial.wire()}",
                plugin=f"told the phases {told.changes or 'none'}",
                change=f"let `status` tell {phase}, or let `Service.spec` give such a job",
            ) from None
        return ticket


class Trial:
    """A plugin under trial. A context manager: the server and the proxy run while the block lasts.

    Attributes:
        watch: the plugin's calls. proxy: the requests; both begin anew with each check.
        folder: of the ledger. run: in the place of a flow run's id; both are new for each check.
        subject: what is tried, as the certificate names it.
        making: the plugin's method that has the service work: `create`, or `do` of a `SyncPlugin`.

    Raises:
        ConfigurationError: the description of the service lacks what the kit can't do without.
    """

    def __init__(self, entry: PluginEntry[Any], service: Service, checks: Sequence[Check]) -> None:
        self.entry = entry
        self.service = service
        self.checks = checks
        self.watch = Watch()
        self.folder = Path()
        self.run = ""
        self.url = ""
        self.making = "create"
        self._watched = watched(entry, self.watch)
        self._proxy: FaultProxy | None = None
        self._open = ExitStack()
        self._findings: dict[str, Finding] = {}
        self._made_before = self._live_before = 0

    def __enter__(self) -> Self:
        with ExitStack() as opening:
            self.url = opening.enter_context(self.service.start()).rstrip("/")
            if self.service.speaks_http:
                self._proxy = FaultProxy(
                    self.url,
                    witness=self.service.made,
                    asking=lambda: self.watch.op,
                    token_paths=self.service.token_paths,
                )
                self.watch.begins = self._proxy.begins
                self.url = opening.enter_context(self._proxy.serving())
            self.demand()
            self._open = opening.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._open.close()

    # --- a check -----------------------------------------------------------------------------

    def finding(self, check: Check) -> Finding:
        """Run a check, and before it those that it builds on, unless they were run already."""
        if check.name not in self._findings:
            self._findings[check.name] = self._tried(check)
        return self._findings[check.name]

    def certificate(self) -> Certificate:
        return certificate_of(self.subject, [self.finding(check) for check in self.checks])

    def _tried(self, check: Check) -> Finding:
        def found(verdict: Verdict, told: str, seconds: float = 0.0) -> Finding:
            return Finding(
                check=check.name,
                promise=check.promise,
                verdict=verdict,
                told=told,
                seconds=round(seconds, 3),
            )

        if self.is_sync and not check.of_calls:
            return found(Verdict.NOT_IMPLEMENTED, _NO_JOBS)
        by_name = {each.name: each for each in self.checks}
        for name in check.after:
            if self.finding(by_name[name]).verdict in (Verdict.FAILS, Verdict.NOT_REACHED):
                return found(Verdict.NOT_REACHED, f"it builds on {name!r}")
        if check.name in self.service.lacks:
            return found(Verdict.NOT_CHECKED, self.service.lacks[check.name])
        if check.on_the_wire and not self.service.speaks_http:
            return found(
                Verdict.NOT_CHECKED, "the service does not speak HTTP (speaks_http = False)"
            )
        began = time.monotonic()
        try:
            told = self._run(check)
        except NotClaimed as reason:
            return found(Verdict.NOT_IMPLEMENTED, str(reason), time.monotonic() - began)
        except NotChecked as reason:
            return found(Verdict.NOT_CHECKED, str(reason), time.monotonic() - began)
        except Nonconformity as failure:
            told = f"{failure}\n{self.transcript()}"
            return found(Verdict.FAILS, self.mask(told), time.monotonic() - began)
        except Exception as error:  # noqa: BLE001 - an author's code may raise anything
            told = f"{_unforeseen(error)}\n{self.transcript()}"
            return found(Verdict.FAILS, self.mask(told), time.monotonic() - began)
        return found(Verdict.HOLDS, told or "", time.monotonic() - began)

    def _run(self, check: Check) -> str | None:
        self.folder = Path(tempfile.mkdtemp(prefix="webapi-trial-"))
        self.run = str(uuid4())  # the service may remember the jobs of other checks
        self.watch.calls.clear()
        if self._proxy is not None:
            self._proxy.reset()
        self._made_before, self._live_before = self.service.made(), self.service.live()
        try:
            return asyncio.run(self._bounded(check))
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    async def _bounded(self, check: Check) -> str | None:
        try:
            async with asyncio.timeout(CHECK_SECONDS):
                return await check.run(self)
        finally:
            await self._clean_up()

    async def _clean_up(self) -> None:
        """Leave no job behind at the service, whatever the check came to."""
        handles = self.watch.handles()
        if self.service.live() <= self._live_before or not handles:
            return
        if self._proxy is not None:
            self._proxy.faults.clear()
        with suppress(Exception):
            async with asyncio.timeout(self.service.patience), self.plugin() as plugin:
                for handle in handles:
                    with suppress(Exception):
                        await plugin.delete(DeleteView(handle, "the check is over"))

    async def within(self, work: Awaitable[Any], wanted: str) -> Any:
        try:
            async with asyncio.timeout(self.service.patience):
                return await work
        except TimeoutError:
            raise Nonconformity(
                service=self.wire(),
                plugin=f"came to no end: {wanted} was waited for {self.service.patience:g} s",
                change="see the calls below; raise `Service.patience` if its jobs take longer",
            ) from None

    # --- the parts ---------------------------------------------------------------------------

    @property
    def is_sync(self) -> bool:
        return self.making == "do"

    @property
    def judging(self) -> str:
        """The plugin's method that says how a job ended."""
        return "do" if self.is_sync else "status"

    @property
    def proxy(self) -> FaultProxy:
        assert self._proxy is not None, "checks that use it say so"
        return self._proxy

    def spoil(
        self,
        *ops: str,
        reply: Reply | None = None,
        carried_out: bool = False,
        seconds: float = 0.0,
        times: int = 1,
    ) -> None:
        """Let something go wrong on the wire; see `WireFault`."""
        self.proxy.faults.append(WireFault(ops, reply, carried_out, seconds, times))

    def block(self, config: PluginConfig | None = None, *, url: str = "", **settings: Any) -> Any:
        fast = {"qps": 1000, "burst": 1000}
        config = config or PluginConfig.load({"readRateLimiter": fast, "writeRateLimiter": fast})
        return self.service.connection(
            url or self.url, config, EngineSettings.load({**QUICK, "deadline": "60s", **settings})
        )

    @contextmanager
    def engine(self, *, speed: float = 1.0, **settings: Any) -> Generator[Engine]:
        """An engine on the check's ledger; a second one, after the first has ended, is its successor."""
        blocks = {"default": self.block(**settings)}
        with engine(self.folder, [self._watched], blocks, speed=speed) as host:
            yield Engine(self, host)

    @asynccontextmanager
    async def plugin(
        self, *, url: str = "", **settings: Any
    ) -> AsyncGenerator[AsyncPlugin[Any, Any]]:
        """The plugin by itself, without the engine, for checks of jobs. Raises what its loader raises."""
        async with self.any_plugin(url=url, **settings) as plugin:
            assert isinstance(plugin, AsyncPlugin), "checks of calls use `any_plugin`"
            yield plugin

    @asynccontextmanager
    async def any_plugin(self, *, url: str = "", **settings: Any) -> AsyncGenerator[Plugin]:
        """The same, of either kind."""
        setup = _Setup(self.entry.id, self.block(url=url, **settings))
        made: Any = self._watched.plugin_loader(setup)
        plugin = _checked(self.entry, await made if isawaitable(made) else made)
        try:
            yield plugin
        finally:
            await plugin.aclose()

    async def make(self, plugin: Plugin, view: TaskView) -> Any:
        """Have the service work once: the handle of a job, or the end of a call."""
        if isinstance(plugin, SyncPlugin):
            return await plugin.do(view)
        return handle_of(await plugin.create(view))

    def view(self, spec: JobSpec[Any]) -> TaskView:
        """What a plugin's methods see of a new job, for calls without the engine."""
        task_type = self.entry.supported_task_types[0]
        fingerprint = fingerprint_of(task_type, "default", spec)
        run = str(uuid4())
        return task_view(
            request(spec, task_type=task_type, task_run=run),
            key=job_key(base_of(run, "conformance", fingerprint), 0, 1),
            fingerprint=fingerprint,
            attempt=1,
            secrets=LocalSecrets(),
            store=FolderOutputs(self.folder / "outputs"),
            connection=self._block_once,
            max_dataset_size_bytes=-1,
        )

    def spec(self, fate: Fate) -> JobSpec[Any]:
        found = self.service.spec(fate)
        if found is None:
            raise NotChecked(f"`Service.spec({fate!r})` gives None")
        return found

    # --- the witness -------------------------------------------------------------------------

    @property
    def made(self) -> int:
        """Jobs that the service made since the check began."""
        return self.service.made() - self._made_before

    @property
    def live(self) -> int:
        """Those that are not over, above what was there when the check began."""
        return max(0, self.service.live() - self._live_before)

    async def until_none_is_live(self) -> bool:
        with suppress(AssertionError):
            await eventually(lambda: self.live == 0, within=self.service.patience)
        return self.live == 0

    # --- what is told ------------------------------------------------------------------------

    @cached_property
    def _block_once(self) -> Any:
        return self.block()

    @property
    def secrets(self) -> list[str]:
        return [each for each in secrets_in(self._block_once) if len(each) >= LEAST_CHARACTERS]

    def mask(self, text: str) -> str:
        return Mask(self.secrets)(text)

    def wire(self) -> str:
        """The last answers, in one line."""
        if self._proxy is None or not self._proxy.exchanges:
            return "was asked nothing that was seen"
        return "; ".join(str(each) for each in self._proxy.exchanges[-3:])

    def transcript(self) -> str:
        lines = ["", "The requests, the last ones last:"]
        exchanges = [] if self._proxy is None else self._proxy.exchanges
        lines += [f"  {each}" for each in exchanges[-_SHOWN:]] or ["  none were seen"]
        wrong = [call for call in self.watch.calls if call.error is not None]
        if wrong:
            lines += ["Calls of the plugin that raised:"]
            lines += [
                f"  {call.op}: {type(call.error).__name__}: {call.error}" for call in wrong[-5:]
            ]
        return "\n".join(lines)

    def _seen(self, plugin: Plugin) -> Subject:
        cls = type(plugin).__mro__[1]
        package, version = _distribution(self.entry, cls.__module__)
        return Subject(
            plugin=self.entry.id,
            task_types=tuple(self.entry.supported_task_types),
            plugin_class=f"{cls.__module__}.{cls.__qualname__}",
            package=package,
            version=version,
            guarantee=claim_of(plugin),
            optional=tuple(
                name
                for name in _OPTIONAL
                if isinstance(plugin, AsyncPlugin) and overrides(plugin, name)
            ),
            service=type(self.service).__name__,
        )

    async def _loaded(self) -> Plugin:
        async with self.any_plugin() as plugin:
            return plugin

    def demand(self) -> None:
        """Refuse what can't be tried, before any job is made, and see which kind of plugin it is.

        Raises:
            ConfigurationError: the plugin is none, or the description lacks what the kit can't do without.
        """
        name = type(self.service).__name__
        plugin = asyncio.run(self._loaded())
        self.making = "do" if isinstance(plugin, SyncPlugin) else "create"
        self.subject = self._seen(plugin)
        fates: tuple[Fate, ...] = ("succeeds",) if self.is_sync else ("succeeds", "runs")
        for fate in fates:
            if self.service.spec(fate) is None:
                raise ConfigurationError(
                    f"{name}.spec({fate!r}) is None; the kit can't do without such jobs."
                )
        alien = set(self.service.lacks) - {check.name for check in self.checks}
        if alien:
            known = ", ".join(check.name for check in self.checks)
            raise ConfigurationError(
                f"{name}.lacks names no check: {sorted(alien)} (there are: {known})."
            )


def certify(entry: PluginEntry[Any], service: Service) -> Certificate:
    """Run the whole contract against a plugin. For scripts; tests subclass `PluginConformance`."""
    from prefect_webapi.testing.conformance.contract import CHECKS

    with Trial(entry, service, CHECKS) as trial:
        return trial.certificate()


def certificate_of(subject: Subject, findings: Sequence[Finding]) -> Certificate:
    return Certificate(
        subject=subject,
        kit=metadata.version("prefect-webapi"),
        at=datetime.now(UTC),
        findings=tuple(findings),
    )


def claim_of(plugin: Plugin) -> Guarantee:
    """What it promises for an answer that is lost; of a call it is said by `idempotent`."""
    if isinstance(plugin, SyncPlugin):
        return "key" if plugin.idempotent else "at-most-once"
    return plugin.guarantee


def _checked(entry: PluginEntry[Any], plugin: Any) -> Plugin:
    if not isinstance(plugin, AsyncPlugin | SyncPlugin):
        raise ConfigurationError(
            f"the loader of plugin {entry.id!r} returned {type(plugin).__name__}, not an AsyncPlugin or a SyncPlugin."
        )
    return cast(Plugin, plugin)


def _unforeseen(error: Exception) -> str:
    frames = traceback.format_exception(error)
    return "the check could not be ended:\n" + "".join(frames[-6:]).rstrip()


def _distribution(entry: PluginEntry[Any], module: str) -> tuple[str, str]:
    """Name and version of the distribution that announces the plugin from the package of this module."""
    package = module.partition(".")[0]
    for point in metadata.entry_points(group=ENTRY_POINT_GROUP, name=entry.id):
        if point.module.partition(".")[0] == package and point.dist is not None:
            return point.dist.name, point.dist.version
    return "", ""


@dataclass(frozen=True, slots=True)
class _Setup:
    plugin_id: str
    connection: Any

    @property
    def metrics_scope(self) -> MetricsScope:
        return Metrics().scope(self.plugin_id)
