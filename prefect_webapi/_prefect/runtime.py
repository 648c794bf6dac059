"""The engine's parts put together for a process that runs Prefect tasks."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, AsyncExitStack
from functools import partial
from typing import Any

import anyio

from prefect_webapi._prefect.api import Api, server_is_here
from prefect_webapi._prefect.collector import collected_seldom
from prefect_webapi._prefect.connections import BlockConnections
from prefect_webapi._prefect.options import Options
from prefect_webapi._prefect.outputs import ResultStorage
from prefect_webapi._prefect.reports import Display
from prefect_webapi._prefect.runs import PrefectRuns
from prefect_webapi._prefect.secrets import BlockSecrets
from prefect_webapi._prefect.slots import PrefectSlots
from prefect_webapi.clock import process_clock
from prefect_webapi.contract.config import EngineSettings
from prefect_webapi.engine.channels import LedgerCount
from prefect_webapi.engine.liveness import this_process
from prefect_webapi.engine.runtime import Runtime
from prefect_webapi.engine.services import Services
from prefect_webapi.ledger.records import RuntimeRow
from prefect_webapi.ledger.sql import SqlStore
from prefect_webapi.limiter import Gates
from prefect_webapi.metrics import Metrics, served
from prefect_webapi.quotas import Quotas
from prefect_webapi.registry import Plugins, default_registry

__all__ = ["make_runtime"]

Background = Callable[[], Coroutine[Any, Any, None]]


class _Runtime(Runtime):
    """A runtime with work of ours beside it on the same loop: shown states, links, watching."""

    def __init__(
        self,
        services: Services,
        me: RuntimeRow,
        *,
        api: Api,
        slots: PrefectSlots,
        background: Sequence[Background],
        around: Sequence[AbstractContextManager[None]],
    ) -> None:
        super().__init__(services, me)
        self._api = api
        self._slots = slots
        self._background = background
        self._around = around

    async def run(self, ready: Callable[[], None]) -> None:
        failure: Exception | None = None
        async with AsyncExitStack() as stack:
            for each in self._around:
                stack.enter_context(each)
            await stack.enter_async_context(self._api)
            await stack.enter_async_context(self._slots)
            async with anyio.create_task_group() as group:
                for work in self._background:
                    group.start_soon(work)
                try:
                    await super().run(ready)
                except Exception as error:  # noqa: BLE001 - raised below, not as a group of one
                    failure = error
                group.cancel_scope.cancel()
        if failure is not None:
            raise failure


def make_runtime(
    options: Options, display: Display, watch: Callable[[Api], Coroutine[Any, Any, None]]
) -> Runtime:
    """Called on the runtime's loop."""
    clock, metrics = process_clock(), Metrics()
    me, api, slots = this_process(clock.now()), Api(), PrefectSlots(clock)
    store = SqlStore(options.ledger_url.get_secret_value(), clock=clock)
    overrides = options.overrides()
    settings = EngineSettings().overlaid(overrides)
    services = Services(
        runtime_id=me.id,
        clock=clock,
        store=store,
        plugins=Plugins(
            default_registry,
            BlockConnections(api),
            metrics=metrics,
            clock=clock,
            overrides=overrides,
            disabled=options.disabled_plugins,
        ),
        gates=Gates(clock, metrics),
        quotas=Quotas(
            slots,
            clock=clock,
            metrics=metrics,
            lease=settings.slot_lease,
            ledger=LedgerCount(store),
        ),
        secrets=BlockSecrets(api),
        outputs=ResultStorage(),
        metrics=metrics,
        runs=PrefectRuns(api),
        settings=settings,
        owns_limits=store.is_shared or server_is_here(),
    )
    background = [display.run, partial(watch, api)]
    around = [
        served(options.metrics_port, options.metrics_host),
        collected_seldom(options.gc_threshold),
    ]
    return _Runtime(services, me, api=api, slots=slots, background=background, around=around)
