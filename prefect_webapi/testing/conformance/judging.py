"""What `status` says of snapshots: without asking anybody, of every state, and of states that are new."""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

from prefect_webapi.contract.phase import Phase, PhaseInfo
from prefect_webapi.contract.plugin import AsyncPlugin
from prefect_webapi.engine.contexts import GetView, StatusView
from prefect_webapi.testing.conformance.trial import Nonconformity, NotChecked, Trial
from prefect_webapi.testing.watched import handle_of, no_network


async def status_asks_nobody(trial: Trial) -> str:
    async with trial.plugin() as plugin:
        handle = handle_of(await plugin.create(trial.view(trial.spec("runs"))))
        snapshots = [await plugin.get(GetView(handle))]
        snapshots += [snapshot for snapshot, _ in trial.service.states]
        if trial.service.unknown_state is not None:
            snapshots.append(trial.service.unknown_state)
        for snapshot in snapshots:
            # What it says, or raises, is for other checks.
            with no_network() as touched, trial.watch.at("status"), suppress(Exception):
                await _judged(trial, plugin, handle, snapshot)
            asked = touched or _asked(trial)
            if asked:
                raise Nonconformity(
                    service=f"got the snapshot {snapshot!r} judged",
                    plugin=f"used the network in `status`: {asked[0]}",
                    change=(
                        "judge by `ctx.resource` alone; read more in `get`, or fetch the result in `outputs`. `status` "
                        "runs on the engine's loop, for every job, at each read"
                    ),
                )
    return f"{len(snapshots)} snapshots judged with every socket refused"


def _asked(trial: Trial) -> list[str]:
    """Requests on connections that were open already."""
    return [str(each) for each in trial.proxy.of("status")] if trial.service.speaks_http else []


async def every_documented_state_is_judged(trial: Trial) -> str:
    states = trial.service.states
    if not states:
        raise NotChecked("`Service.states` is empty: nobody knows whether `status` is complete")
    async with trial.plugin() as plugin:
        for snapshot, wanted in states:
            try:
                info = await _judged(trial, plugin, _handle(trial), snapshot)
            except Exception as error:
                raise Nonconformity(
                    service=f"documents the state of {snapshot!r}",
                    plugin=f"raised {type(error).__name__} in `status`: {error}",
                    change=f"return a phase, here {wanted.name}; `status` raises nothing",
                ) from error
            if info.phase is not wanted:
                raise Nonconformity(
                    service=f"documents the state of {snapshot!r}",
                    plugin=f"told {info.phase.name}",
                    change=f"let `status` tell {wanted.name}, or correct `Service.states`",
                )
    left = {Phase.RUNNING, Phase.SUCCESS} - {phase for _, phase in states}
    if left:
        raise NotChecked(f"`Service.states` names no state for {', '.join(p.name for p in left)}")
    return f"{len(states)} states"


async def a_state_that_is_new_ends_no_job(trial: Trial) -> None:
    snapshot = trial.service.unknown_state
    if snapshot is None:
        raise NotChecked("`Service.unknown_state` is None")
    async with trial.plugin() as plugin:
        try:
            told = (await _judged(trial, plugin, _handle(trial), snapshot)).phase
            words = f"told {told.name}"
        except Exception as error:  # noqa: BLE001 - told below
            told, words = None, f"raised {type(error).__name__}: {error}"
    if told is not Phase.UNDEFINED:
        raise Nonconformity(
            service=f"invents a state: {snapshot!r}",
            plugin=f"{words} in `status`",
            change="return `PhaseInfo.undefined` for what the table does not know: the job is read again",
        )


async def _judged(
    trial: Trial, plugin: AsyncPlugin[Any, Any], handle: Any, snapshot: Any
) -> PhaseInfo:
    view = StatusView(trial.view(trial.spec("succeeds")), handle, snapshot)
    info: Any = plugin.status(view)
    return await info if inspect.isawaitable(info) else info


def _handle(trial: Trial) -> Any:
    """Any handle will do: `status` may look at it, and at nothing behind it."""
    return trial.service.unknown_handle
