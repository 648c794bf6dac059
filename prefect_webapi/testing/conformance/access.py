"""Limits, credentials, secrets, and answers that are none: the checks of what lies between plugin and service."""

from __future__ import annotations

import logging
from typing import Any

from prefect_webapi.contract.errors import ConfigurationError
from prefect_webapi.contract.phase import Phase
from prefect_webapi.contract.plugin import overrides
from prefect_webapi.contract.secrecy import Mask
from prefect_webapi.engine.contexts import GetView
from prefect_webapi.testing.conformance.creating import expect_one_job, told_by
from prefect_webapi.testing.conformance.ending import ALWAYS
from prefect_webapi.testing.conformance.trial import (
    READS,
    Nonconformity,
    NotChecked,
    NotClaimed,
    Trial,
)
from prefect_webapi.testing.engine import Told
from prefect_webapi.testing.proxy import Reply
from prefect_webapi.testing.watched import handle_of

HINT_SECONDS = 1.0
MANY = 10
ELSEWHERE = Reply(307, b"", {"Location": "http://127.0.0.1:9/"})
NONSENSE = (
    Reply(200, "<html>Bad Gateway</html>", {"Content-Type": "text/html"}),
    Reply(200, b""),
    Reply(200, b'{"state": "runn'),
    Reply(200, b'{"state": "l\xe4uft"}'),
)


async def a_throttled_create_waits_as_long_as_it_is_told(trial: Trial) -> str:
    reply = trial.service.throttled(HINT_SECONDS)
    hints = reply != trial.service.throttled(None)
    trial.spoil(trial.making, reply=reply)
    with trial.engine() as engine:
        outcome = await engine.outcome(trial.spec("succeeds"))
    expect_success(
        trial, outcome.info, f"asked for less ({reply.status})", "raise `Throttled` for it"
    )
    expect_one_job(trial, "the first request was refused: too many")
    at = [call.at for call in trial.watch.of(trial.making)]
    if hints and at[1] - at[0] < HINT_SECONDS:
        raise Nonconformity(
            service=f"asked to wait {HINT_SECONDS:g} s: {reply}",
            plugin=f"sent again after {at[1] - at[0]:.2f} s",
            change="raise `Throttled(..., retry_after=...)` with what the service said; see `retry_after(headers)`",
        )
    return "" if hints else "the service does not say how long to wait"


async def throttled_reads_lose_no_job(trial: Trial) -> None:
    trial.spoil(*READS, reply=trial.service.throttled(None), times=2)
    with trial.engine() as engine:
        outcome = await engine.outcome(trial.spec("succeeds"))
    expect_success(trial, outcome.info, "throttled two reads", "raise `Throttled` for it")


async def a_refused_credential_is_renewed_once(trial: Trial) -> None:
    for ops in ((trial.making,), READS)[: 1 if trial.is_sync else 2]:
        trial.spoil(*ops, reply=trial.service.unauthorized())
        with trial.engine() as engine:
            outcome = await engine.outcome(trial.spec("succeeds"), task_run=ops[0])
        change = "raise `AuthError`: the engine then loads the plugin anew, once, which must fetch fresh credentials"
        expect_success(trial, outcome.info, f"refused the credential once, in `{ops[0]}`", change)


async def a_credential_that_stays_refused_ends_the_task(trial: Trial) -> None:
    trial.spoil(trial.making, reply=trial.service.unauthorized(), times=ALWAYS)
    with trial.engine() as engine:
        outcome = await engine.outcome(trial.spec("succeeds"))
    calls = len(trial.watch.of(trial.making))
    tries = f"{calls} calls of `{trial.making}`"
    if outcome.info.phase is not Phase.PERMANENT_FAILURE or trial.made or calls != 2:
        raise Nonconformity(
            service=f"refused the credential each time, and made {trial.made} jobs",
            plugin=f"came to {outcome.info.phase.name} after {tries}: {told_by(outcome.info)}",
            change="raise `AuthError`: it is tried once more with fresh credentials, and then the task fails for good",
        )


async def a_redirect_is_not_followed(trial: Trial) -> None:
    trial.spoil(trial.making, reply=ELSEWHERE, times=ALWAYS)
    with trial.engine() as engine:
        outcome = await engine.outcome(trial.spec("succeeds"))
    calls = len(trial.watch.of(trial.making))
    tries = f"{calls} calls of `{trial.making}`"
    if outcome.info.phase is not Phase.PERMANENT_FAILURE or calls != 1:
        raise Nonconformity(
            service=f"answered {trial.making} with a redirect to another address",
            plugin=f"came to {outcome.info.phase.name} after {tries}: {told_by(outcome.info)}",
            change="do not follow redirects: they would carry the credentials along; raise `RemoteUserError`",
        )


async def a_read_without_sense_loses_no_job(trial: Trial) -> None:
    for nth, nonsense in enumerate(NONSENSE, 1):
        trial.spoil(*READS, reply=nonsense)
        with trial.engine(speed=20) as engine:
            outcome = await engine.outcome(trial.spec("succeeds"), task_run=f"run {nth}")
        happened = f"answered a read with 200 and {nonsense.content!r}"
        change = "raise `RemoteSystemError` for an answer that can't be read (`RemoteClient` does)"
        expect_success(trial, outcome.info, happened, change)
    if trial.made != len(NONSENSE):
        raise Nonconformity(
            service=f"made {trial.made} jobs for {len(NONSENSE)} tasks; a read of each made no sense",
            plugin="took a job that it could not read for one that is not there",
            change="raise `NotFound` for a job that the service does not know, and for nothing else",
        )


async def many_jobs_each_get_their_own_end(trial: Trial) -> str:
    async with trial.plugin() as plugin:
        if not overrides(plugin, "get_many") or plugin.max_batch == 1:
            if plugin.max_batch > 1:
                raise Nonconformity(
                    service="was not asked",
                    plugin=f"claims max_batch = {plugin.max_batch} and has no `get_many`",
                    change="write `get_many`, or leave max_batch at 1",
                )
            raise NotClaimed("there is no `get_many` (max_batch = 1)")
        views = [trial.view(trial.spec("runs")) for _ in range(min(3, plugin.max_batch))]
        handles = [handle_of(await plugin.create(view)) for view in views]
        alone = [await plugin.get(GetView(handle)) for handle in handles]
        unknown = trial.service.unknown_handle
        asked = list(reversed(handles))
        if unknown is not None and len(asked) < plugin.max_batch:
            asked.insert(1, unknown)
        batch: Any = await plugin.get_many([GetView(handle) for handle in asked])
        phases: list[Any] = []
        if len(batch) == len(asked):
            for handle, snapshot in zip(asked, batch, strict=True):
                by_itself = alone[handles.index(handle)] if handle in handles else None
                is_right = (
                    type(snapshot) is type(by_itself)
                    if by_itself is not None
                    else snapshot is None or isinstance(snapshot, Exception)
                )
                phases.append(is_right)
        if len(batch) != len(asked) or not all(phases):
            raise Nonconformity(
                service=trial.wire(),
                plugin=f"returned {batch!r} for {asked!r}",
                change=(
                    "return one answer per job, in the order in which they were asked for: a snapshot as `get` gives "
                    "it, an error, or None for a job that the answer leaves out"
                ),
            )
    with trial.engine() as engine:
        made = trial.made
        tickets = [
            engine.admit(trial.spec("succeeds"), nth=nth, task_run=f"run {nth}")
            for nth in range(MANY)
        ]
        outcomes = [await trial.within(each.outcome(), "the end of each job") for each in tickets]
    wrong = [each.info for each in outcomes if each.info.phase is not Phase.SUCCESS]
    if wrong or trial.made - made != MANY:
        raise Nonconformity(
            service=f"made {trial.made - made} jobs for {MANY} tasks: {trial.wire()}",
            plugin=f"let {len(wrong)} of them end as {wrong[0].phase.name if wrong else 'they should'}",
            change="see whether `get_many` gives each job its own snapshot",
        )
    calls = trial.watch.of("get_many")
    return f"{MANY} jobs, {len(calls)} batches, {len(trial.watch.of('get'))} single reads"


async def no_secret_gets_out(trial: Trial) -> str:
    secrets = trial.secrets
    if not secrets:
        raise NotChecked("the connection holds no `SecretStr` of eight characters or more")
    told, logs = Told(), _Lines()
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(logs)
    root.setLevel(logging.DEBUG)
    echo = Reply(400, {"message": f"bad credential {secrets[0]}", "error": secrets[0]})
    texts: dict[str, str] = {}
    try:
        with trial.engine() as engine:
            await engine.outcome(trial.spec("succeeds"), reporter=told, nth=1, task_run="1")
            if trial.service.spec("fails") is not None:
                await engine.outcome(trial.spec("fails"), reporter=told, nth=2, task_run="2")
            if trial.service.speaks_http:
                trial.spoil(trial.making, reply=trial.service.unauthorized(), times=2)
                refused = await engine.outcome(trial.spec("succeeds"), nth=3, task_run="3")
                trial.proxy.faults.clear()
                trial.spoil(trial.making, reply=echo, times=ALWAYS)
                echoed = await engine.outcome(trial.spec("succeeds"), nth=4, task_run="4")
                texts["the task's error"] = f"{refused!r} {echoed!r}"
    finally:
        root.removeHandler(logs)
        root.setLevel(level)
    block = trial.block()
    texts["a log line"] = "\n".join(logs.lines)
    texts["what is shown of the job"] = repr(told)
    texts["the block's text"] = f"{block!r} {block}"
    texts["a handle"] = repr(trial.watch.handles())
    for path in sorted(trial.folder.rglob("*")):
        if path.is_file():
            texts[f"the ledger ({path.name})"] = path.read_bytes().decode("latin-1")
    mask = Mask(secrets)
    for place, text in texts.items():
        if mask.hits(text):
            shown = next((line for line in mask(text).splitlines() if "***" in line), "")
            raise Nonconformity(
                service="was used with a secret, refused it, and echoed it",
                plugin=f"let the secret into {place}: {shown[:200]}",
                change="keep it a `SecretStr` from the block to the header, and log neither headers nor bodies",
            )
    return f"{len(secrets)} secrets looked for in {len(texts)} places"


async def credentials_do_not_travel_in_the_clear(trial: Trial) -> None:
    if not trial.secrets:
        raise NotChecked("the connection holds no `SecretStr` of eight characters or more")
    try:
        async with trial.any_plugin(url="http://jobs.example.com"):
            pass
    except ConfigurationError:
        return
    raise Nonconformity(
        service="would be at http://jobs.example.com, without TLS",
        plugin="was loaded, ready to send its credentials there",
        change="build the `RemoteClient` in `__init__`: it refuses, unless `settings.allow_insecure` is set",
    )


def expect_success(trial: Trial, info: Any, happened: str, change: str) -> None:
    if info.phase is not Phase.SUCCESS:
        raise Nonconformity(
            service=f"{happened}: {trial.wire()}",
            plugin=f"came to {info.phase.name}: {told_by(info)}",
            change=change,
        )


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))
