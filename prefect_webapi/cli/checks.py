"""What `doctor` looks at, one function per matter: each returns findings, which say what is and what to do about it.

Nothing here changes the ledger, Prefect or a remote service, and no remote service is asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

from packaging.version import InvalidVersion, Version
from prefect.blocks.core import Block

from prefect_webapi._prefect import inspection
from prefect_webapi._prefect.api import Api
from prefect_webapi.cli.installed import installed_plugins
from prefect_webapi.cli.ledger import inspecting
from prefect_webapi.cli.screen import quiet
from prefect_webapi.cli.usage import Usage, usage
from prefect_webapi.clock import Clock
from prefect_webapi.contract.errors import ConfigurationError, NoLedger, WebApiError
from prefect_webapi.engine.liveness import is_alive, this_process
from prefect_webapi.ledger import schema
from prefect_webapi.ledger.inspection import LedgerInspector
from prefect_webapi.ledger.records import JobState
from prefect_webapi.quotas import MARGIN_SECONDS
from prefect_webapi.registry import Registry, default_registry
from prefect_webapi.settings import WebApiSettings

__all__ = ["Finding", "Mark", "clock", "examine"]

OLDEST_PREFECT = Version("3.9.1")
"""As the package requires it here, so the server."""

FILE_STORAGE = "prefect.server.concurrency.lease_storage.filesystem"


class Mark(StrEnum):
    """`note`: nothing is wrong, but somebody may want to do something."""

    OK = "ok"
    NOTE = "note"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one matter, and what to do; `remedy` is empty where nothing is to be done."""

    subject: str
    mark: Mark
    told: str
    remedy: str = ""


async def examine(registry: Registry = default_registry) -> AsyncIterator[Finding]:
    """Look at everything; what can't be looked at is a finding too."""
    try:
        settings = WebApiSettings.load()
    except ConfigurationError as error:
        yield _wrong("settings", str(error))
        return
    yield Finding("settings", Mark.OK, "all are valid")
    for finding in _plugins(registry, settings):
        yield finding
    async with Api() as api:
        is_there = False
        async for finding in _prefect(api):
            is_there = finding.mark is not Mark.WRONG or finding.subject != "Prefect API"
            yield finding
        if is_there:
            async for finding in _blocks(api, registry, settings):
                yield finding
        try:
            async with inspecting() as ledger:
                async for finding in _ledger(ledger):
                    yield finding
                if is_there:
                    async for finding in _limits(api, ledger):
                        yield finding
        except NoLedger as error:
            yield Finding("ledger", Mark.NOTE, str(error))
        except WebApiError as error:
            yield _wrong("ledger", str(error))


def _wrong(subject: str, told: str, remedy: str = "") -> Finding:
    return Finding(subject, Mark.WRONG, told, remedy)


def _plugins(registry: Registry, settings: WebApiSettings) -> Iterator[Finding]:
    with quiet("prefect_webapi.registry"):
        found = installed_plugins(registry, settings.disabled_plugins)
    usable = [each.id for each in found if each.is_usable]
    yield Finding("plugins", Mark.OK, f"{len(usable)} can be used: {', '.join(usable) or 'none'}")
    for each in found:
        if each.is_disabled:
            told = "disabled by DISABLED_PLUGINS"
            yield Finding(f"plugin {each.id}", Mark.NOTE, told)
        elif each.problem:
            mark = Mark.WRONG if each.is_broken else Mark.NOTE
            yield Finding(f"plugin {each.id}", mark, each.problem, each.remedy)
    unknown = settings.disabled_plugins - {each.id for each in found}
    for name in sorted(unknown):
        told = "DISABLED_PLUGINS names it, and no such plugin is installed"
        yield Finding(f"plugin {name}", Mark.NOTE, told, "correct the name, or remove it")


async def _prefect(api: Api) -> AsyncIterator[Finding]:
    subject = "Prefect API"
    try:
        inspection.require_server()
        server = await inspection.look_at_server(api)
    except WebApiError as error:
        yield _wrong(subject, str(error))
        return
    where = f"{server.address}, Prefect {server.version}"
    if server.lease_storage is not None and _is_older(server.version):
        yield _wrong("Prefect version", where, f"upgrade that server to {OLDEST_PREFECT} or newer")
    yield Finding(subject, Mark.OK, where)
    if server.forgets_leases:
        yield Finding(
            "lease storage",
            Mark.NOTE,
            "in the server's memory: a restart forgets who has which slots, which the engine repairs within minutes",
            f"let the server keep leases: PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE={FILE_STORAGE}, where it starts",
        )
    else:
        yield Finding("lease storage", Mark.OK, server.lease_storage or "the server's own business")
    yield clock(server.clock_ahead)


def _is_older(version: str) -> bool:
    try:
        return Version(version) < OLDEST_PREFECT
    except InvalidVersion:
        return False


def clock(ahead: timedelta | None) -> Finding:
    """How far the server's clock is `ahead` of ours; None: it does not tell."""
    if ahead is None:
        return Finding("clock", Mark.NOTE, "the server does not tell its time")
    seconds = ahead.total_seconds()
    told = f"the server's is {abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} this machine's"
    if abs(seconds) <= MARGIN_SECONDS:
        return Finding("clock", Mark.OK, told)
    return _wrong("clock", told, "set both by NTP: leases and deadlines compare their times")


async def _blocks(api: Api, registry: Registry, settings: WebApiSettings) -> AsyncIterator[Finding]:
    kinds = {
        entry.connection
        for entry in registry.entries.values()
        if issubclass(entry.connection, Block) and entry.id not in settings.disabled_plugins
    }
    for kind in sorted(kinds, key=lambda each: each.get_block_type_slug()):
        subject = f"block {kind.get_block_type_slug()}"
        remedy = f"prefect block register -m {kind.__module__}"
        try:
            found = await inspection.look_at_block_type(api, kind)
        except WebApiError as error:
            yield _wrong(subject, str(error))
            return
        for name, told in found.invalid.items():
            told = f"the installed version refuses the saved block {name!r}: {told}"
            yield _wrong(subject, told, "edit it in Prefect's UI, or save it anew")
        match found.schema:
            case inspection.Schema.ABSENT:
                told = "not registered: it can't be made in the UI yet"
                yield Finding(subject, Mark.NOTE, told, remedy)
            case inspection.Schema.OTHER:
                told = (
                    "another version of its package registered it: the UI shows that version's form"
                )
                yield _wrong(subject, told, remedy)
            case inspection.Schema.CURRENT:
                yield Finding(subject, Mark.OK, f"registered, {found.documents} saved")


async def _ledger(ledger: LedgerInspector) -> AsyncIterator[Finding]:
    revision = await ledger.revision()
    told = f"{ledger.address}, schema {revision}"
    if revision != schema.REVISION:
        told += f"; the next job brings it to {schema.REVISION}"
    yield Finding("ledger", Mark.OK, told)
    try:
        locked = await ledger.look_for_locks()
    except WebApiError as error:
        locked = str(error)
    if locked:
        yield _wrong("ledger locks", locked, "end what holds the lock")
    else:
        yield Finding("ledger locks", Mark.OK, "it can be written")
    async for finding in _jobs(ledger):
        yield finding


async def _jobs(ledger: LedgerInspector) -> AsyncIterator[Finding]:
    now = Clock().now()
    me = this_process(now)
    processes = {row.id: row for row in await ledger.runtimes()}
    counts: Counter[str] = Counter()
    for count in await ledger.jobs_not_over():
        alive = is_alive(processes.get(count.runtime), me=me, now=now)
        where = "in doubt" if count.state is JobState.SUSPECT else "driven" if alive else "left"
        counts[where] += count.jobs
    told = f"{counts['driven']} looked after by living processes"
    yield Finding("jobs", Mark.OK, told)
    if counts["left"]:
        told = f"{counts['left']} not over whose process has ended"
        remedy = "if no flow run of theirs goes on: prefect-webapi sweep"
        yield Finding("jobs", Mark.NOTE, told, remedy)
    if counts["in doubt"]:
        told = f"{counts['in doubt']} of which nobody can find out whether they were made"
        remedy = "prefect-webapi jobs list --state SUSPECT, then prefect-webapi jobs resolve"
        yield _wrong("jobs", told, remedy)


async def _limits(api: Api, ledger: LedgerInspector) -> AsyncIterator[Finding]:
    try:
        found = await usage(api, ledger, Clock())
    except WebApiError as error:
        yield _wrong("limits", str(error))
        return
    yield Finding("limits", Mark.OK, f"{len(found)} known")
    for each in found:
        for finding in _limit(each):
            yield finding


def _limit(each: Usage) -> Sequence[Finding]:
    subject = f"limit {each.name}"
    if each.active_slots is None:
        told = "Prefect has no such limit; the next job that needs it makes it"
        return [Finding(subject, Mark.NOTE, told)] if each.places or each.waiters else []
    findings: list[Finding] = []
    if not each.is_on:
        remedy = f'prefect gcl update "{each.name}" --enable'
        findings.append(_wrong(subject, "switched off: it bounds nothing", remedy))
    if each.leaked:
        told = f"{each.leaked} of {each.active_slots} taken slots have leaked: no job has them"
        findings.append(_wrong(subject, told, "prefect-webapi sweep, twice three minutes apart"))
    return findings
