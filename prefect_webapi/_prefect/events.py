"""Events of jobs, for automations: `prefect-webapi.job.*`, about the job and related to the runs that own it.

A job has one for each phase that it comes into, and one for its end. They are for display and alerts: like all events
of Prefect they may get lost, and are never asked for the truth.
"""

from __future__ import annotations

import logging
from typing import Any

from prefect.client.schemas.objects import TaskRun
from prefect.events import emit_event

from prefect_webapi._prefect.cards import Story, links_of
from prefect_webapi.contract.phase import Phase, PhaseInfo
from prefect_webapi.contract.secrecy import mask_url

__all__ = ["ENDS", "PHASES", "PREFIX", "emit_job_event", "end_of"]

logger = logging.getLogger(__name__)

PREFIX = "prefect-webapi.job"
PHASES = {
    "NotReady": "not-ready",
    "AwaitingConcurrencySlot": "waiting-for-quota",
    "RemoteWaitingForResources": "waiting-for-resources",
    "RemoteQueued": "queued",
    "RemoteInitializing": "initializing",
    "Running": "running",
    "WaitingForCache": "waiting-for-cache",
    "Cancelling": "cancelling",
}
"""Last part of the event's name, by the name of the state that the task run shows."""
ENDS = ("succeeded", "failed", "cancelled", "aborted")


def end_of(info: PhaseInfo, *, stopped_by_us: bool) -> str:
    """Last part of the name of the event for a job's end."""
    if info.phase is Phase.SUCCESS:
        return "succeeded"
    if info.phase is Phase.ABORTED:
        return "cancelled" if stopped_by_us else "aborted"
    return "failed"


def emit_job_event(
    what: str, story: Story, task_run: TaskRun, *, reason: str, deployment: str = ""
) -> None:
    """Tell Prefect what became of a job. Call it in the context of the task run: its flow is told from there.

    Args:
        what: a value of `PHASES`, or one of `ENDS`.
        deployment: id of the deployment that the root flow run came from.
    """
    record, info = story.record, story.info
    payload: dict[str, Any] = {
        "job_key": story.key,
        "task": story.task,
        "reason": mask_url(reason),
    }
    resource = {"prefect.resource.id": f"{PREFIX}.{story.key}", "prefect.resource.name": story.task}
    if story.attempt:
        payload |= {"attempt": story.attempt, "max_attempts": story.max_attempts}
    if record is not None:
        resource |= {
            "prefect-webapi.plugin": record.plugin,
            "prefect-webapi.connection": record.connection,
            "prefect-webapi.task-type": record.task_type,
        }
        payload["quotas"] = list(record.quotas)
    if info is not None and info.info.logs:
        payload["links"] = links_of(info)
    if info is not None and info.err is not None:
        payload |= {"code": info.err.code, "kind": info.err.kind, "retryable": info.may_retry}
    related = [(f"prefect.task-run.{task_run.id}", "task-run")]
    if task_run.flow_run_id is not None:
        related.append((f"prefect.flow-run.{task_run.flow_run_id}", "flow-run"))
    if deployment:
        related.append((f"prefect.deployment.{deployment}", "deployment"))
    emit_event(
        f"{PREFIX}.{what}",
        resource=resource,
        related=[
            {"prefect.resource.id": each, "prefect.resource.role": role} for each, role in related
        ],
        payload=payload,
    )
