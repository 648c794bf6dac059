"""Who calls: root, execution and levels, in this process and in others."""

import asyncio
from typing import Any, cast
from uuid import uuid4

import pytest
from prefect import flow, task
from prefect.client.schemas.objects import State, StateType, TaskRun
from prefect.context import ContextModel, FlowRunContext, TagsContext, TaskRunContext, tags

from prefect_webapi._prefect.identity import (
    Chain,
    attempt_of,
    caller,
    chain_here,
    enclosing,
    own_task_run,
    run_key,
    running_state_of,
)
from tests.support.prefect import PrefectServer, Scripts, prefect_leaks


@task
def where() -> Chain:
    """The chain of this task run, as a remote task finds it."""
    run = own_task_run()
    assert run is not None
    return chain_here(own=run.id)


def flow_here() -> tuple[str, str]:
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    assert context.flow_run.state is not None
    return str(context.flow_run.id), str(context.flow_run.state.id)


# --- private names ----------------------------------------------------------------------------------


def test_prefect_contexts_keep_the_token_that_knows_the_outer_one() -> None:
    """The private name `ContextModel._token`."""
    assert "_token" in ContextModel.__private_attributes__
    with tags("outer"):
        outer = TagsContext.get()
        with tags("inner"):
            assert enclosing(TagsContext.get()) is outer
    assert enclosing(TagsContext(current_tags=set())) is None


# --- in one process -----------------------------------------------------------------------------------


def test_outside_a_flow_an_execution_is_the_process() -> None:
    """CASE-266."""
    first, second = chain_here(), chain_here()
    assert first == second
    assert (first.root_run, first.levels) == ("", ())
    assert first.execution


def test_in_a_flow_the_root_is_its_run_and_the_task_itself_is_no_level(
    prefect_api: PrefectServer,
) -> None:
    @flow(name="root flow")
    def root() -> tuple[Chain, tuple[str, str]]:
        return where(), flow_here()

    chain, (run, state) = root()
    assert (chain.root_run, chain.flow_run, chain.execution) == (run, run, state)
    assert (chain.root_name, chain.levels) == ("root flow", ())


def test_subflows_and_enclosing_tasks_are_levels(prefect_api: PrefectServer) -> None:
    """CASE-280."""
    seen: dict[str, Any] = {}

    @task
    def enclosing_task() -> Chain:
        run = own_task_run()
        assert run is not None
        assert run.state is not None
        seen["task"] = (str(run.id), str(run.state.id))
        return where()

    @flow
    def inner() -> Chain:
        seen["inner"] = flow_here()
        return enclosing_task()

    @flow
    def middle() -> Chain:
        seen["middle"] = flow_here()
        return inner()

    @flow(name="root of three")
    def root() -> Chain:
        seen["root"] = flow_here()
        return middle()

    chain = root()
    assert (chain.root_run, chain.execution) == seen["root"]
    assert chain.root_name == "root of three"
    assert chain.flow_run == seen["inner"][0]
    assert dict(chain.levels) == dict([seen["task"], seen["inner"], seen["middle"]])


@prefect_leaks
def test_threads_and_gathered_tasks_see_the_same_chain(prefect_api: PrefectServer) -> None:
    """CASE-265."""

    @task
    async def where_async() -> Chain:
        run = own_task_run()
        assert run is not None
        return chain_here(own=run.id)

    @flow
    async def root() -> list[Any]:
        gathered = await asyncio.gather(where_async(), where_async())
        submit = [cast(Any, each).submit for each in (where, where_async)]
        futures = [run() for run in submit]
        return [*gathered, *(future.result() for future in futures)]

    chains = asyncio.run(root())
    assert len(set(chains)) == 1


def test_a_retried_enclosing_task_is_another_level(prefect_api: PrefectServer) -> None:
    seen: list[Chain] = []

    @task(retries=1)
    def twice() -> None:
        seen.append(where())
        if len(seen) < 2:
            raise ValueError("again")

    @flow
    def root() -> None:
        twice()

    root()
    first, second = (dict(chain.levels) for chain in seen)
    assert first.keys() == second.keys()
    assert first != second
    assert seen[0].execution == seen[1].execution


def test_a_retried_flow_is_another_execution(prefect_api: PrefectServer) -> None:
    seen: list[Chain] = []

    @flow(retries=1)
    def twice() -> None:
        seen.append(where())
        if len(seen) < 2:
            raise ValueError("again")

    twice()
    assert seen[0].root_run == seen[1].root_run
    assert seen[0].execution != seen[1].execution


# --- the run key ------------------------------------------------------------------------------------------


def second_run(**more: Any) -> TaskRun:
    return TaskRun(task_key="t", dynamic_key="0", id=uuid4(), run_count=2, **more)


def make_caller(chain: Chain, setting: str | None = None, **more: Any) -> Any:
    return caller(second_run(**more), chain=chain, run_key=setting, retries=3)


def test_the_run_key_is_the_root_run_or_outside_a_flow_the_task_run() -> None:
    """CASE-266."""
    assert make_caller(Chain(execution="e", root_run="r")).run_key == "r"
    outside = make_caller(Chain(execution="e"))
    assert outside.run_key == outside.task_run
    assert (attempt_of(second_run()), outside.max_attempts) == (2, 4)


def test_a_given_run_key_names_the_root_flow_and_wins_over_the_setting() -> None:
    """CASE-282."""
    with run_key("monday"):
        chain = chain_here()
    assert chain.run_key == "monday"
    assert chain_here().run_key is None
    key = make_caller(Chain(execution="e", root_run="r", root_name="f", run_key="monday"), "set")
    assert key.run_key == '["run_key", "monday", "f"]'
    other = make_caller(Chain(execution="e", root_run="r", root_name="g"), "monday")
    assert other.run_key == '["run_key", "monday", "g"]'


def test_an_empty_run_key_is_refused() -> None:
    with pytest.raises(ValueError, match="run_key is empty"), run_key(""):
        pass


def test_tags_become_labels() -> None:
    """CASE-271."""
    made = make_caller(Chain(execution="e"), tags=["team:data", "cost=high", "nightly"])
    assert made.labels == {"team": "data", "cost": "high", "nightly": "true"}


# --- the way through the API ---------------------------------------------------------------------------------


def states_of(*kinds: StateType) -> list[State[Any]]:
    return [State(type=kind) for kind in kinds]


def test_the_last_running_state_began_the_execution() -> None:
    history = states_of(
        StateType.PENDING, StateType.RUNNING, StateType.SCHEDULED, StateType.RUNNING
    )
    assert running_state_of(history) == str(history[3].id)


def test_a_running_right_after_a_pause_is_the_same_execution() -> None:
    history = states_of(StateType.RUNNING, StateType.PAUSED, StateType.RUNNING)
    assert running_state_of(history) == str(history[0].id)


POOL = """
    from prefect import flow, task
    from prefect.task_runners import ProcessPoolTaskRunner
    from prefect_webapi._prefect.identity import chain_here, own_task_run

    @task
    def where():
        chain = chain_here(own=own_task_run().id)
        return chain.root_run, chain.root_name, chain.execution, chain.levels

    @flow(task_runner=ProcessPoolTaskRunner(max_workers=1))
    def inner():
        return where(), where.submit().result()

    @flow(name="root of a pool")
    def root():
        return inner()

    if __name__ == "__main__":
        here, there = root()
        assert here == there, (here, there)
        assert here[1] == "root of a pool"
        assert len(here[3]) == 1  # the subflow
        print("SAME")
"""


def test_a_pool_process_finds_the_same_chain_through_the_api(scripts: Scripts) -> None:
    """CASE-284."""
    assert "SAME" in scripts.run(POOL, within=90)


def test_a_task_context_is_found_by_its_own_run(prefect_api: PrefectServer) -> None:
    @task
    def mine() -> bool:
        context = TaskRunContext.get()
        return context is not None and context.task_run is own_task_run()

    assert mine()
    assert own_task_run() is None
