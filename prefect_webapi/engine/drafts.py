"""From a call to the record it wants: identity, quota, first state. Nothing is written here."""

from __future__ import annotations

import json
from typing import Any

from prefect_webapi.contract.errors import ConfigurationError, QuotaNotConfigured
from prefect_webapi.contract.keys import (
    Fingerprint,
    JobKey,
    base_of,
    fingerprint_of,
    idempotent_base,
    job_key,
)
from prefect_webapi.contract.task import JobSpec
from prefect_webapi.engine.calls import Calls, guarantee
from prefect_webapi.engine.channels import Channel, limit_name
from prefect_webapi.engine.contexts import TaskView, task_view
from prefect_webapi.engine.request import JobRequest
from prefect_webapi.engine.services import Services
from prefect_webapi.ledger.records import Details, Draft, JobState, Record
from prefect_webapi.registry import Loaded

__all__ = ["conflict", "draft_for", "view_for"]

KEPT_SPEC_BYTES = 64 * 1024


async def draft_for(
    services: Services, calls: Calls, channel: Channel, request: JobRequest
) -> Draft:
    """What the ledger is asked for.

    Raises:
        QuotaNotConfigured: the plugin wants a namespace that has no quota.
        RemoteError: `resource_requirements` failed.
    """
    caller, loaded = request.caller, channel.loaded
    fingerprint = fingerprint_of(request.task_type, loaded.connection.name, request.spec)
    pinned = caller.idempotency_key
    base = (
        idempotent_base(pinned)
        if pinned is not None
        else base_of(caller.run_key, request.task_key, fingerprint)
    )
    quota, weight, namespace = None, 1, None
    if channel.quotas:
        probe = _view(services, loaded, request, job_key(base, 0, 1), fingerprint, caller.attempt)
        namespace = (await calls.requirements(loaded, probe)).namespace
        if namespace not in channel.quotas:
            raise QuotaNotConfigured(namespace, channel.quotas)
        quota = limit_name(loaded, namespace)
    now = services.clock.now()
    deadline = request.options.deadline or loaded.settings.deadline
    reuse = request.options.reuse_results
    return Draft(
        base=base,
        task_run=caller.task_run,
        nth=caller.nth,
        execution=caller.execution,
        levels=caller.levels,
        is_retry=caller.attempt > 1,
        reuse_results=loaded.settings.reuse_results if reuse is None else reuse,
        pinned=pinned is not None,
        state=_first_state(loaded, quota),
        runtime=services.runtime_id,
        plugin=loaded.entry.id,
        task_type=request.task_type,
        connection=loaded.connection.name,
        fingerprint=fingerprint,
        quota=quota,
        weight=weight,
        flow_run=caller.flow_run,
        root_run=caller.root_run,
        owner_task_run=caller.task_run,
        deadline=now + deadline if deadline is not None else None,
        at=now,
        details=Details(
            task_name=request.task_name,
            task_key=request.task_key,
            deployment=caller.deployment,
            labels=dict(caller.labels),
            namespace=caller.namespace,
            resource_namespace=namespace,
            on_exit=request.options.on_exit,
            spec=_kept(request.spec),
        ),
    )


def _kept(spec: JobSpec[Any]) -> dict[str, Any] | None:
    data = spec.model_dump_json()
    return json.loads(data) if len(data) <= KEPT_SPEC_BYTES else None


def view_for(services: Services, loaded: Loaded, request: JobRequest, record: Record) -> TaskView:
    """What the plugin's methods see of a job."""
    return _view(services, loaded, request, record.key, record.fingerprint, record.attempt)


def conflict(record: Record) -> ConfigurationError:
    """A user's idempotency key that names another job already."""
    return ConfigurationError(
        f"IdempotencyConflict: idempotency_key of this call already belongs to job {record.key}, which was made from "
        f"another spec (task {record.details.task_name!r}). Use another key, or the same spec"
    )


def _first_state(loaded: Loaded, quota: str | None) -> JobState:
    """Neighbouring states share one write where nothing leaves the process between them."""
    if quota is not None:
        return JobState.SLOT_REQUESTED
    if guarantee(loaded) == "at-most-once":
        return JobState.INTENT  # create counts as sent only when its permit is there
    return JobState.CREATING


def _view(
    services: Services,
    loaded: Loaded,
    request: JobRequest,
    key: JobKey,
    fingerprint: Fingerprint,
    attempt: int,
) -> TaskView:
    return task_view(
        request,
        key=key,
        fingerprint=fingerprint,
        attempt=attempt,
        secrets=services.secrets,
        connection=loaded.connection.value,
        max_dataset_size_bytes=loaded.settings.max_dataset_size_bytes,
    )
