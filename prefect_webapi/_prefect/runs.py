"""How the runs that own jobs stand in Prefect: asked by the sweeper."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    TaskRunFilter,
    TaskRunFilterId,
)
from prefect.client.schemas.objects import FlowRun, StateType, TaskRun
from prefect.settings import PREFECT_API_URL, get_current_settings

from prefect_webapi._prefect.api import Api, api_address
from prefect_webapi._prefect.watch import MOST_RUNS, read_flow_runs
from prefect_webapi.engine.request import Fate, RunState

__all__ = ["PrefectRuns"]

_STANDING = {
    StateType.SCHEDULED: RunState.RESTING,
    StateType.PAUSED: RunState.PAUSED,
    StateType.CANCELLING: RunState.CANCELLED,
    StateType.CANCELLED: RunState.CANCELLED,
    StateType.COMPLETED: RunState.FINAL,
    StateType.FAILED: RunState.FINAL,
    StateType.CRASHED: RunState.FINAL,
}


class PrefectRuns:
    """`engine.request.Runs` on Prefect's API."""

    def __init__(self, api: Api) -> None:
        self._api = api

    @property
    def home(self) -> str:
        if PREFECT_API_URL.value():
            return api_address()
        return str(
            get_current_settings().home
        )  # a server of this process's own, on the data base of its home

    async def fates(self, flows: Collection[str], tasks: Collection[str], /) -> Mapping[str, Fate]:
        found: dict[str, Fate] = {}
        for page in _pages(flows):
            runs = await self._api.ask("read flow runs", partial(read_flow_runs, page))
            found |= {str(run.id): _fate(run) for run in runs}
        for page in _pages(tasks):
            runs = await self._api.ask("read task runs", partial(_task_runs, page))
            found |= {str(run.id): _fate(run) for run in runs}
        missing = Fate(RunState.MISSING, "deleted")
        return {run: found.get(run, missing) for run in (*flows, *tasks)}


def _pages(ids: Collection[str]) -> Iterator[list[UUID]]:
    asked = [uuid for each in sorted(ids) if (uuid := _uuid(each)) is not None]
    for start in range(0, len(asked), MOST_RUNS):
        yield asked[start : start + MOST_RUNS]


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:  # no run of Prefect's has such an id
        return None


async def _task_runs(ids: list[UUID], client: PrefectClient) -> list[TaskRun]:
    wanted = TaskRunFilter(id=TaskRunFilterId(any_=ids))
    return await client.read_task_runs(task_run_filter=wanted, limit=MOST_RUNS)


def _fate(run: FlowRun | TaskRun) -> Fate:
    state = run.state
    if state is None:
        return Fate(RunState.RUNNING, "new")
    standing = _STANDING.get(state.type, RunState.RUNNING)
    return Fate(standing, state.name or state.type.value.title(), state.timestamp)
