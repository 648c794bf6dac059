"""How jobs end: by themselves, at our request, or without a word. The checks of get and delete."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from prefect_webapi.contract.errors import NotFound
from prefect_webapi.contract.phase import Phase
from prefect_webapi.contract.plugin import AsyncPlugin
from prefect_webapi.engine.contexts import DeleteView, GetView
from prefect_webapi.engine.host import Ticket
from prefect_webapi.testing.conformance.creating import told_by
from prefect_webapi.testing.conformance.trial import Nonconformity, NotChecked, Trial
from prefect_webapi.testing.proxy import Reply
from prefect_webapi.testing.waiting import eventually

ALWAYS = 1_000_000
HELD_SECONDS = 0.5


async def a_job_that_fails_fails_in_the_services_words(trial: Trial) -> None:
    with trial.engine() as engine:
        outcome = await engine.outcome(trial.spec("fails"))
    info, words = outcome.info, trial.service.failure
    if not info.phase.is_failure or info.err is None:
        raise Nonconformity(
            service=f"has a job that failed: {trial.wire()}",
            plugin=f"came to {info.phase.name}",
            change=f"let `{trial.judging}` return `PhaseInfo.failure` or `PhaseInfo.retryable_failure` for it",
        )
    if not info.err.message or words not in info.err.message:
        raise Nonconformity(
            service=f"told why: {words or 'see the last answer'}",
            plugin=f"told {info.err.message!r}",
            change="hand the service's own message on in `PhaseInfo.failure(code, message)`",
        )


async def a_running_job_is_over_after_a_cancel(trial: Trial) -> None:
    with trial.engine() as engine:
        await _is_ended(trial, await engine.running(trial.spec("runs")), "ran")


async def a_queued_job_is_over_after_a_cancel(trial: Trial) -> None:
    spec = trial.spec("waits")
    with trial.engine() as engine:
        await _is_ended(trial, await engine.running(spec, "QUEUED"), "was queued")


async def a_job_cancelled_while_it_is_made_is_over(trial: Trial) -> None:
    trial.spoil("create", carried_out=True, seconds=HELD_SECONDS)
    with trial.engine() as engine:
        ticket = engine.admit(trial.spec("runs"))
        await trial.within(eventually(lambda: trial.made, within=60), "a job at the service")
        await _is_ended(trial, ticket, "was being made")


async def _is_ended(trial: Trial, ticket: Ticket, when: str) -> None:
    ticket.cancel("no longer needed")
    outcome = await trial.within(
        ticket.outcome(), f"the end of a job that was cancelled while it {when}"
    )
    if not await trial.until_none_is_live():
        raise Nonconformity(
            service=f"has {trial.live} live job; it {when} when it was cancelled: {trial.wire()}",
            plugin=f"told the engine {outcome.info.phase.name}: {told_by(outcome.info)}",
            change="let `delete` end the job at the service, and raise where that was refused",
        )
    if outcome.info.phase is not Phase.ABORTED:
        raise Nonconformity(
            service=f"has ended the job at our request: {trial.wire()}",
            plugin=f"came to {outcome.info.phase.name} ({told_by(outcome.info)})",
            change="let `status` return `PhaseInfo.aborted` for a job that was cancelled",
        )


async def deleting_a_job_that_is_over_is_no_fault(trial: Trial) -> None:
    with trial.engine() as engine:
        await engine.outcome(trial.spec("succeeds"))
    async with trial.plugin() as plugin:
        for handle in trial.watch.handles()[:1]:
            await _deleted(trial, plugin, handle, "is over already")


async def a_job_that_is_unknown_is_said_to_be(trial: Trial) -> None:
    handle = _unknown(trial)
    async with trial.plugin() as plugin:
        try:
            snapshot = await plugin.get(GetView(handle))
        except NotFound:
            pass
        except Exception as error:
            raise _not_said(trial, f"raised {type(error).__name__}: {error}") from error
        else:
            raise _not_said(trial, f"returned {snapshot!r}")
        await _deleted(trial, plugin, handle, "is unknown")


def _not_said(trial: Trial, what: str) -> Nonconformity:
    return Nonconformity(
        service=f"does not know the job: {trial.wire()}",
        plugin=f"{what} from `get`",
        change="raise `NotFound` for a job that the service does not know, and for nothing else",
    )


async def _deleted(trial: Trial, plugin: AsyncPlugin[Any, Any], handle: Any, why: str) -> None:
    try:
        await plugin.delete(DeleteView(handle, "again"))
    except NotFound:
        pass
    except Exception as error:
        raise Nonconformity(
            service=f"was asked to end a job that {why}: {trial.wire()}",
            plugin=f"raised {type(error).__name__} from `delete`: {error}",
            change="deletes come more than once: return for a job that is over, return or raise `NotFound` for none",
        ) from error


async def a_job_that_vanishes_is_told_and_not_made_anew(trial: Trial) -> None:
    handle = _unknown(trial)
    async with trial.plugin() as plugin:  # what the service says of a job that it does not know
        replies = {
            "get": await _answer(trial, "get", plugin.get, GetView(handle)),
            "delete": await _answer(trial, "delete", plugin.delete, DeleteView(handle, "gone")),
        }
        if plugin.max_batch > 1:
            replies["get_many"] = await _answer(
                trial, "get_many", plugin.get_many, [GetView(handle)]
            )
    with trial.engine(speed=10) as engine:
        ticket = await engine.running(trial.spec("runs"))
        for op, reply in replies.items():
            trial.spoil(op, reply=reply, times=ALWAYS)
        outcome = await trial.within(ticket.outcome(), "the end of a job that vanished")
    creates = len(trial.watch.of("create"))
    if not outcome.info.phase.is_failure or creates != 1:
        raise Nonconformity(
            service="no longer knows the job that it had",
            plugin=f"came to {outcome.info.phase.name} after {creates} creates",
            change="raise `NotFound` from `get`; the engine asks twice and then tells that the job is gone",
        )


async def _answer(trial: Trial, op: str, method: Callable[[Any], Any], argument: Any) -> Reply:
    """The service's own answer to a call of the plugin, whatever the plugin makes of it."""
    before = len(trial.proxy.of(op))
    try:
        found = method(argument)
        if inspect.isawaitable(found):
            await found
    except Exception:  # noqa: BLE001, S110 - an answer is all that is wanted; other checks judge the call
        pass
    last = next((each for each in trial.proxy.of(op)[before:] if each.status), None)
    if last is None or last.status is None:
        raise NotChecked(f"`{op}` of a job that never was made no request")
    kept = {k: v for k, v in last.headers.items() if k in ("content-type", "content-encoding")}
    return Reply(last.status, last.body, kept)


def _unknown(trial: Trial) -> Any:
    handle = trial.service.unknown_handle
    if handle is None:
        raise NotChecked("`Service.unknown_handle` is None")
    return handle
