"""Runs that start again meet their own jobs and results; others get jobs of their own."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest

from prefect_webapi import CreateResult, Phase, ResourceRequirements, TaskExecutionContextReader
from prefect_webapi.engine.host import Host, Ticket
from prefect_webapi.engine.request import Overrides
from prefect_webapi.ledger.records import Move, MoveResult
from prefect_webapi.ledger.sql import SqlStore
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import ReportJob
from prefect_webapi_jobserver.models import JobHandle, JobView
from tests.support.engine import at, request, run
from tests.support.ledger import another_store, ledger_of
from tests.support.plugins import SinglePlugin, entry
from tests.support.waiting import eventually

pytestmark = pytest.mark.usefixtures("each_ledger")

SPEC = ReportJob(seconds=0.1, result="once")


async def test_a_restart_takes_its_jobs_over_as_it_asks_for_them(
    job_server: EmbeddedJobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write that finds a job makes it this process's: none of the thousands is asked for twice."""
    specs = [ReportJob(outcome="never", day=n, result="kept") for n in range(20)]

    def calls(host: Host, execution: str) -> list[Ticket]:
        return [
            host.admit(request(spec, task_type="keys", execution=execution, task_run=execution))
            for spec in specs
        ]

    with at(tmp_path, job_server, sweeps=False) as host:
        calls(host, "1")
        await eventually(lambda: job_server.stats().created == 20, within=10)
    moves = list[Move]()
    monkeypatch.setattr(SqlStore, "move", _noted(SqlStore.move, moves))
    with at(tmp_path, job_server, sweeps=False) as host:
        tickets = calls(host, "2")
        for job in job_server.jobs():
            job_server.end(job.name, "succeeded")
        outcomes = await asyncio.gather(*(ticket.outcome() for ticket in tickets))
    assert {outcome.value.data for outcome in outcomes} == {"kept"}
    assert job_server.stats().created == 20
    assert len(moves) == 40  # each job's end, and that it was told
    assert not any(move.take_over for move in moves)


def _noted(move: Any, moves: list[Move]) -> Any:
    async def noted(store: SqlStore, asked: Move) -> MoveResult:
        moves.append(asked)
        return await move(store, asked)

    return noted


@pytest.mark.parametrize(("reuse", "jobs"), [(None, 1), (True, 1), (False, 2)])
async def test_a_flow_that_is_retried_does_not_pay_twice_unless_it_wants_to(
    job_server: EmbeddedJobServer, tmp_path: Path, reuse: bool | None, jobs: int
) -> None:
    """CASE-278: task A was done when task B raised; at the flow's retry A's stored result is handed out."""
    options = Overrides(reuse_results=reuse)
    with at(tmp_path, job_server) as host:
        first = await run(host, SPEC, execution="1", options=options)
        second = await run(host, SPEC, execution="2", options=options)
    assert first.value.data == second.value.data == "once"
    assert (first.job_key == second.job_key) is (jobs == 1)
    assert job_server.stats().created == jobs


async def test_what_the_block_says_of_old_results_holds_without_the_callers_word(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-278: the nearest setting wins."""
    with at(tmp_path, job_server, reuseResults=False) as host:
        for execution, options in (("1", None), ("2", None), ("3", Overrides(reuse_results=True))):
            await run(host, SPEC, execution=execution, options=options)
    assert job_server.stats().created == 2


async def test_a_subflow_of_a_root_run_that_starts_again_meets_its_jobs(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-280: it has a new id then; one job was alive when its process left, one is over."""
    running = ReportJob(outcome="never", day=2, result="kept")

    def call(execution: str, spec: ReportJob, n: int) -> dict[str, Any]:
        return {
            "spec": spec,
            "task_type": "keys",
            "execution": execution,
            "task_run": f"{execution}/{n}",
            "levels": {f"subflow of {execution}": f"running {execution}"},
        }

    with at(tmp_path, job_server) as host:
        await host.admit(request(**call("1", SPEC, 1))).outcome()
        host.admit(request(**call("1", running, 2)))
        await eventually(lambda: job_server.stats().created == 2, within=5)
    with at(tmp_path, job_server) as host:
        tickets = [host.admit(request(**call("2", s, n))) for n, s in ((1, SPEC), (2, running))]
        await eventually(lambda: job_server.stats().live == 1, within=5)
        job_server.end(job_server.jobs()[1].name, "succeeded")
        outcomes = await asyncio.gather(*(ticket.outcome() for ticket in tickets))
    assert [outcome.value.data for outcome in outcomes] == ["once", "kept"]
    assert len(job_server.log("create")) == 2


async def test_a_subflow_of_a_parent_that_is_retried_gets_its_stored_result(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-281: the parent raised after the subflow's job was done."""
    with at(tmp_path, job_server) as host:
        for execution in ("1", "2"):
            outcome = await run(
                host, SPEC, execution=execution, levels={f"subflow {execution}": execution}
            )
            assert outcome.value.data == "once"
    assert [entry.op for entry in job_server.log()].count("create") == 1


@pytest.mark.parametrize(("run_key", "jobs"), [("2026-11-24", 1), (None, 2)])
async def test_two_starts_of_a_script_share_their_jobs_under_one_run_key(
    job_server: EmbeddedJobServer, tmp_path: Path, run_key: str | None, jobs: int
) -> None:
    """CASE-282: the engine's part."""
    with at(tmp_path, job_server) as host:
        outcomes = [
            await run(host, SPEC, run=start, execution=start, run_key=run_key)
            for start in ("first", "second")
        ]
    assert [outcome.value.data for outcome in outcomes] == ["once", "once"]
    assert job_server.stats().created == jobs


async def test_two_tasks_with_equal_inputs_are_two_jobs(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-283: the engine's part."""
    with at(tmp_path, job_server) as host:
        outcomes = [await run(host, SPEC, task=task) for task in ("a", "b")]
    assert len({outcome.job_key for outcome in outcomes}) == 2
    assert job_server.stats().created == 2


async def test_equal_calls_of_two_processes_at_once_are_two_jobs(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-284: two engines on one ledger draw two ordinals."""
    with at(tmp_path, job_server) as one, at(tmp_path, job_server) as two:
        outcomes = await asyncio.gather(
            run(one, SPEC, task_run="in one"), run(two, SPEC, task_run="in two")
        )
    assert all(outcome.info.phase is Phase.SUCCESS for outcome in outcomes)
    assert len({outcome.job_key for outcome in outcomes}) == 2
    assert job_server.stats().created == 2
    async with another_store(ledger_of(tmp_path)) as store:
        assert sorted(record.ordinal for record in await store.select()) == [0, 1]


async def test_labels_and_the_names_of_the_runs_reach_the_service(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-271, REQ-67."""
    labels = {"team": "billing", "deployment": "nightly"}
    with at(tmp_path, job_server) as host:
        outcome = await run(host, SPEC, run="flow-1", task_run="task-1", labels=labels)
    [job] = job_server.jobs()
    assert job.labels == {
        **labels,
        "flow_run_id": "flow-1",
        "task_run_id": "task-1",
        "job_key": outcome.job_key,
    }


class InputsPlugin(SinglePlugin):
    """Looks at the inputs of the call."""

    seen: ClassVar[list[Any]] = []

    async def create(
        self, ctx: TaskExecutionContextReader
    ) -> JobHandle | CreateResult[JobHandle, JobView]:
        self.seen.append(ctx.input_reader.get())
        return await super().create(ctx)


async def test_a_plugin_sees_the_inputs_of_the_call(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-276, REQ-65: the engine's part; it gets them resolved."""
    InputsPlugin.seen.clear()
    inputs = {"table": "sales", "rows": [1, 2]}
    with at(tmp_path, job_server, entries=[entry(InputsPlugin, "inputs")]) as host:
        await run(host, SPEC, "inputs", inputs=inputs)
    assert InputsPlugin.seen == [inputs]


class WaveringPlugin(SinglePlugin):
    """Names another namespace each time it is asked."""

    asked: ClassVar[int] = 0

    async def resource_requirements(self, ctx: TaskExecutionContextReader) -> ResourceRequirements:
        WaveringPlugin.asked += 1
        return ResourceRequirements(namespace="a" if WaveringPlugin.asked % 2 else "b")


async def test_the_place_that_was_taken_is_the_place_that_is_given_back(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-274, REQ-82: whatever the author says later."""
    WaveringPlugin.asked = 0
    config = {"resourceQuotas": {"a": 1, "b": 1}}
    url = ledger_of(tmp_path)
    with at(tmp_path, job_server, config, entries=[entry(WaveringPlugin, "wavering")]) as host:
        tickets = [
            host.admit(request(ReportJob(outcome="never", day=n), task_type="wavering"))
            for n in range(2)
        ]
        await eventually(lambda: job_server.stats().live == 2, within=5)
        async with another_store(url) as store:

            async def taken() -> dict[str, int]:
                rows = await store.quotas()
                return {row.name.rpartition(":")[2]: row.live for row in rows}

            async def is_taken(places: dict[str, int]) -> bool:
                return await taken() == places

            namespaces = {r.key: r.details.resource_namespace for r in await store.select()}
            assert sorted(map(str, namespaces.values())) == ["a", "b"]
            left = await taken()
            assert left == {"a": 1, "b": 1}
            for key, namespace in namespaces.items():
                job_server.end(key, "succeeded")
                left[str(namespace)] = 0
                await eventually(partial(is_taken, left), within=5)
        outcomes = await asyncio.gather(*(ticket.outcome() for ticket in tickets))
    assert all(outcome.info.phase is Phase.SUCCESS for outcome in outcomes)
    assert WaveringPlugin.asked == 2
