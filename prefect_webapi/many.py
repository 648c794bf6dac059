"""`run_many`: as many jobs as you like from one task run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, cast

from prefect import Task
from prefect.cache_policies import NO_CACHE

from prefect_webapi._prefect.many import run_jobs
from prefect_webapi.contract.errors import ConfigurationError, JobFailed
from prefect_webapi.contract.task import JobSpec
from prefect_webapi.tasks import OwnRun, RemoteTask, load_settings, unwrap

__all__ = ["run_many"]

O = TypeVar("O")


async def run_many(
    task: RemoteTask[..., Any], specs: Iterable[JobSpec[O]], *, raise_on_failure: bool = True
) -> list[O | JobFailed]:
    """Run a job for each spec, all of them in one task run of Prefect.

    Quotas and rate limits hold as for any job, and so does re-attachment: the jobs are those that calls of `task` with
    these specs would have, so a flow run that is run again after a crash meets them. The task's `retries` and
    `retry_delay_seconds` count for each job by itself; `tags` and `timeout_seconds` for the one task run. Cancelling
    the flow deletes all of them.

    Args:
        specs: what the jobs shall do; equal ones get a job each.
        raise_on_failure: False: a job that failed is a `JobFailed` in the list.

    Returns:
        The results in the order of the specs.

    Raises:
        JobFailed: the first of those that failed, after all are over.
        ConfigurationError: a spec is none, or the task has an `idempotency_key`, which names one job only.
    """
    wanted = _checked(task, specs)
    if not wanted:
        return []

    async def many() -> Any:
        return await run_jobs(
            task.job,
            task.name,
            load_settings,
            wanted,
            retries=task.retries,
            delays=_delays(task.retry_delay_seconds),
            raise_on_failure=raise_on_failure,
        )

    one: Task[..., Any] = Task(
        many,
        name=f"{task.name} x {len(wanted)}",
        tags=task.tags,
        cache_policy=NO_CACHE,  # given another one, Prefect would store results that nobody asked to be stored
        persist_result=task.persist_result,
        timeout_seconds=task.timeout_seconds,
        retries=0,  # not Prefect's default: each job has its own
    )
    one.cache_policy = OwnRun()
    ended: Any = await cast(Any, one)(return_state=True)
    return unwrap(ended)


def _checked(task: RemoteTask[..., Any], specs: Iterable[JobSpec[Any]]) -> Sequence[JobSpec[Any]]:
    if task.job.idempotency_key is not None:
        raise ConfigurationError(
            f"task {task.name!r} has idempotency_key={task.job.idempotency_key!r}, which names one job: run_many would "
            "hand out its result for every spec. Leave it out; the specs tell the jobs apart"
        )
    wanted = list(cast(Iterable[Any], specs))
    for nth, spec in enumerate(wanted):
        if not isinstance(spec, JobSpec):
            raise ConfigurationError(
                f"specs[{nth}] is of {type(spec).__name__}, not a JobSpec: give run_many what the task's own function "
                f"describes, for example [ReportJob(day=1), ReportJob(day=2)]"
            )
    return wanted


def _delays(given: float | list[float] | None) -> list[float]:
    return (given if isinstance(given, list) else [given or 0.0]) or [0.0]
