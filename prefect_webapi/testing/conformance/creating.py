"""One job per call, whatever becomes of the answer: the checks of create, of the handle and of find."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from pydantic import TypeAdapter

from prefect_webapi.contract.errors import (
    AlreadyExists,
    ConfigurationError,
    NotFound,
    RemoteError,
)
from prefect_webapi.contract.handles import check_handle_type
from prefect_webapi.contract.phase import Phase
from prefect_webapi.contract.plugin import AsyncPlugin, handle_type, overrides
from prefect_webapi.contract.secrecy import Mask
from prefect_webapi.engine.contexts import GetView, TaskView
from prefect_webapi.testing.conformance.trial import Nonconformity, NotClaimed, Trial
from prefect_webapi.testing.proxy import Reply
from prefect_webapi.testing.watched import handle_of

NOWHERE = "http://127.0.0.1:9"
PROXYS_PAGE = Reply(502, "<html>Bad Gateway</html>", {"Content-Type": "text/html"})


async def create_returns_a_handle_that_can_be_kept(trial: Trial) -> None:
    async with trial.plugin() as plugin:
        config: Any = plugin.get_config()
        try:
            check_handle_type(plugin, config, trial.block().settings)
        except ConfigurationError as error:
            raise Nonconformity(
                service="was not asked yet",
                plugin=f"declares a handle that is not kept: {error}",
                change="give the handle plain fields, and nothing secret",
            ) from None
        handle = handle_of(await plugin.create(trial.view(trial.spec("runs"))))
        kind: TypeAdapter[Any] = TypeAdapter(handle_type(type(plugin), config))
    if handle is None:
        raise Nonconformity(
            service=trial.wire(),
            plugin="returned None from `create`",
            change="return what `get` and `delete` need to name the job",
        )
    try:
        text = kind.dump_json(handle, warnings="error").decode()
        read_back = kind.validate_json(text)
    except ValueError as error:
        raise Nonconformity(
            service=trial.wire(),
            plugin=f"returned a handle that JSON can't hold: {str(error).splitlines()[0]}",
            change="let `create` return the type that the class names: `AsyncPlugin[Handle, Snapshot]`",
        ) from None
    if Mask(trial.secrets).hits(text):
        raise Nonconformity(
            service=trial.wire(),
            plugin=f"put a secret of the connection into the handle {trial.mask(text)}",
            change="handles are stored in plain text: read the secret from the connection where it is used",
        )
    if read_back != handle:
        raise Nonconformity(
            service=trial.wire(),
            plugin=f"returned {handle!r}, which reads back as {read_back!r}",
            change="let each field of the handle survive JSON",
        )
    async with trial.plugin() as another:  # as a process that never saw the task
        try:
            await another.get(GetView(read_back))
        except Exception as error:
            raise Nonconformity(
                service=trial.wire(),
                plugin=f"could not read the job by its handle alone: {type(error).__name__}: {error}",
                change="keep in the handle whatever `get` needs; nothing else survives a restart",
            ) from error


async def a_job_runs_and_its_result_comes_back(trial: Trial) -> str:
    with trial.engine() as engine:
        outcome = await engine.outcome(trial.spec("succeeds"))
    if outcome.info.phase is not Phase.SUCCESS:
        raise Nonconformity(
            service=trial.wire(),
            plugin=f"came to {outcome.info.phase.name}: {told_by(outcome.info)}",
            change=(
                f"let `{trial.judging}` tell SUCCESS of a job that succeeded, and put a result that fits the spec's "
                "type"
            ),
        )
    wanted = trial.service.result
    if wanted is not None and outcome.value != wanted:
        raise Nonconformity(
            service=trial.wire(),
            plugin=f"gave the result {outcome.value!r}, not {wanted!r}",
            change=f"hand the result on: `ctx.output_writer.put(...)` in `{trial.judging}`, or `outputs`",
        )
    return f"the result was {trial.mask(repr(outcome.value))[:80]}"


async def one_call_makes_one_job(trial: Trial) -> None:
    with trial.engine() as engine:
        await engine.outcome(trial.spec("succeeds"))
    expect_one_job(trial, "nothing went wrong")


async def a_repeated_create_makes_no_second_job(trial: Trial) -> None:
    if trial.is_sync:
        await _a_repeated_call_does_nothing_twice(trial)
        return
    async with trial.plugin() as plugin:
        view = trial.view(trial.spec("runs"))
        first = handle_of(await plugin.create(view))
        try:
            second = handle_of(await plugin.create(view.repeated()))
        except AlreadyExists as error:
            second = first if error.handle is None else error.handle
        except RemoteError as error:
            second = error
        claim, made = plugin.guarantee, trial.made
    if claim != "key":
        works = made == 1 and second == first
        raise NotClaimed(
            f"guarantee is {claim!r}"
            + (
                "; yet a repeated create gave the same job: 'key' could be claimed, if the service promises it"
                if works
                else ""
            )
        )
    if made != 1:
        raise Nonconformity(
            service=f"made {made} jobs: {trial.wire()}",
            plugin="sent the same job key twice, and claims guarantee = 'key'",
            change=(
                "send `ctx.task_execution_metadata.generated_name` where the service expects its idempotency key or "
                "the job's name; if it has none, claim 'search' with `find`, or 'at-most-once'"
            ),
        )
    if second != first:
        raise Nonconformity(
            service=trial.wire(),
            plugin=f"returned {first!r} first, and {second!r} for the same job",
            change="let a repeated `create` return the handle of the job that is there, or raise `AlreadyExists`",
        )


async def _a_repeated_call_does_nothing_twice(trial: Trial) -> None:
    view = trial.view(trial.spec("succeeds"))
    async with trial.any_plugin() as plugin:
        for each in (view, view.repeated()):
            with suppress(AlreadyExists):
                await trial.make(plugin, each)
    if trial.subject.guarantee != "key":
        again = "" if trial.made > 1 else "; yet a repeated `do` did nothing: it could be claimed"
        raise NotClaimed(f"`idempotent` is False{again}")
    if trial.made != 1:
        raise Nonconformity(
            service=f"did the work {trial.made} times: {trial.wire()}",
            plugin="sent the same job key twice, and claims `idempotent = True`",
            change=(
                "send `ctx.task_execution_metadata.generated_name` where the service expects its idempotency key; if "
                "it has none, leave `idempotent` at False"
            ),
        )


async def find_finds_the_job_by_its_key(trial: Trial) -> None:
    async with trial.plugin() as plugin:
        if not overrides(plugin, "find"):
            if plugin.guarantee == "search":
                raise Nonconformity(
                    service="was not asked",
                    plugin="claims guarantee = 'search' and has no `find`",
                    change="write `find`, or claim 'at-most-once'",
                )
            raise NotClaimed("there is no `find`")
        mine, other = trial.view(trial.spec("runs")), trial.view(trial.spec("runs"))
        await expect_nothing(trial, plugin, mine, "before it was made")
        handle = handle_of(await plugin.create(mine))
        found = await plugin.find(mine)
        if found is None or found.resource_meta != handle:
            raise Nonconformity(
                service=f"has the job {handle!r}: {trial.wire()}",
                plugin=f"found {found and found.resource_meta!r} by its key",
                change="let `find` look for `ctx.task_execution_metadata.generated_name`, with which the job was made",
            )
        mark = found.fingerprint
        if mark and not mine.task_execution_metadata.fingerprint.startswith(mark):
            raise Nonconformity(
                service=trial.wire(),
                plugin=f"read the fingerprint {mark!r}, which is not what `create` sent",
                change="store the fingerprint, or a beginning of 16 digits or more, and read it back unchanged",
            )
        await expect_nothing(trial, plugin, other, "of another job, which is not there")


async def expect_nothing(
    trial: Trial, plugin: AsyncPlugin[Any, Any], view: TaskView, when: str
) -> None:
    try:
        found = await plugin.find(view)
    except NotFound:
        return
    if found is not None:
        raise Nonconformity(
            service=trial.wire(),
            plugin=f"found {found.resource_meta!r} for the key {when}",
            change="let `find` return None unless the job has exactly this key: searches by prefix bring others",
        )


async def a_lost_answer_makes_no_second_job(trial: Trial) -> str:
    trial.spoil(trial.making, carried_out=True)
    return await once(trial, "the job was made, and the answer never came")


async def a_nonsense_answer_makes_no_second_job(trial: Trial) -> str:
    trial.spoil(trial.making, reply=PROXYS_PAGE, carried_out=True)
    happened = "the job was made, and a proxy answered 502 in the service's place"
    if trial.is_sync and trial.subject.guarantee == "at-most-once":
        return await _told_and_not_repeated(trial, happened)
    return await once(trial, happened)


async def _told_and_not_repeated(trial: Trial, happened: str) -> str:
    """A call was answered, so its task fails and says with what; it is the user's `retries` that repeat it."""
    with trial.engine() as engine:
        outcome = await engine.outcome(trial.spec("succeeds"))
    expect_one_job(trial, happened)
    if not outcome.info.phase.is_failure:
        raise Nonconformity(
            service=f"{happened}: {trial.wire()}",
            plugin=f"came to {outcome.info.phase.name}: {told_by(outcome.info)}",
            change="raise `RemoteSystemError` for an answer that is none (`RemoteClient` does)",
        )
    return "at most once: the task fails with that answer; only `retries` of the task would repeat the call"


async def once(trial: Trial, happened: str) -> str:
    """What a create of unknown outcome must come to, by what the plugin claims."""
    with trial.engine() as engine:
        outcome = await engine.outcome(trial.spec("succeeds"))
    claim = trial.subject.guarantee
    expect_one_job(trial, happened)
    code = outcome.info.err.code if outcome.info.err else ""
    if claim != "at-most-once":
        if outcome.info.phase is not Phase.SUCCESS:
            raise Nonconformity(
                service=f"{happened}: {trial.wire()}",
                plugin=f"came to {outcome.info.phase.name} ({told_by(outcome.info)}), though it claims {claim!r}",
                change=(
                    "raise `RemoteSystemError` for an answer that is none (`RemoteClient` does), so that create is "
                    "repeated; a `RemoteUserError` says that nothing was made"
                ),
            )
        return "the same job was met again"
    if code != ("OutcomeUnknown" if trial.is_sync else "CreateOutcomeUnknown"):
        raise Nonconformity(
            service=f"{happened}: {trial.wire()}",
            plugin=f"came to {outcome.info.phase.name} ({told_by(outcome.info)}), as if it were known what happened",
            change="let errors say `job_may_exist=True` where the request may have arrived (`RemoteClient` does)",
        )
    return f"at most once: the task ends as {code}, and nothing is repeated"


async def a_lost_request_makes_one_job_or_none(trial: Trial) -> str:
    trial.spoil(trial.making)
    with trial.engine() as engine:
        outcome = await engine.outcome(trial.spec("succeeds"))
    wanted = 0 if trial.subject.guarantee == "at-most-once" else 1
    if trial.made != wanted or (outcome.info.phase is Phase.SUCCESS) != bool(wanted):
        raise Nonconformity(
            service=f"made {trial.made} jobs; the connection was closed on the first request: {trial.wire()}",
            plugin=f"came to {outcome.info.phase.name}: {told_by(outcome.info)}",
            change="raise `RemoteSystemError` for a connection that breaks (`RemoteClient` does)",
        )
    return (
        "" if wanted else "at most once: nobody can tell that the request was lost, so none is made"
    )


async def where_nobody_listens_nothing_was_made(trial: Trial) -> None:
    try:
        async with trial.any_plugin(url=NOWHERE) as plugin:
            await trial.make(plugin, trial.view(trial.spec("succeeds")))
    except RemoteError as error:
        if not error.job_may_exist:
            return
        what = f"raised {type(error).__name__}, which says that a job may exist"
    except Exception as error:  # noqa: BLE001 - told below
        what = f"raised {type(error).__name__}: {error}"
    else:
        what = "returned an answer"
    raise Nonconformity(
        service="was not there: the connection was refused",
        plugin=what,
        change=(
            "raise `RemoteSystemError(..., job_may_exist=False)` where nothing can have been sent; `RemoteClient` does "
            "so, and `classify` for a client of your own"
        ),
    )


async def the_next_process_takes_the_job_over(trial: Trial) -> None:
    spec = trial.spec("runs")
    with trial.engine() as engine:
        await engine.running(spec, execution="one")
    with trial.engine() as engine:
        await engine.running(spec, execution="two")
    if trial.made != 1:
        raise Nonconformity(
            service=f"made {trial.made} jobs: {trial.wire()}",
            plugin="did not go on with the job of the process before",
            change="keep in the handle whatever `get` needs; see the check `handle`",
        )


def expect_one_job(trial: Trial, happened: str) -> None:
    if trial.made != 1:
        sent = len(trial.watch.of(trial.making))
        raise Nonconformity(
            service=f"made {trial.made} jobs; {happened}",
            plugin=f"was asked to {trial.making} {sent} times for one task",
            change=(
                f"let one `{trial.making}` send one request that makes a job, under the key that it is given, and "
                "repeat nothing by itself: the engine repeats what may be repeated"
            ),
        )


def told_by(info: Any) -> str:
    return f"{info.err.code}: {info.err.message}" if info.err else info.reason or "no reason"
