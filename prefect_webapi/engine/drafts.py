"""From a call to the record it wants: identity, quotas, first state. Of all this only constraints are written."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from prefect_webapi.contract.errors import ConfigurationError, QuotaNotConfigured
from prefect_webapi.contract.keys import (
    base_of,
    fingerprint_of,
    idempotent_base,
    job_key,
)
from prefect_webapi.contract.task import JobSpec, ResourceRequirements
from prefect_webapi.engine.calls import Calls, guarantee
from prefect_webapi.engine.channels import Channel, Channels, limit_name
from prefect_webapi.engine.job import view_of
from prefect_webapi.engine.request import Caller, JobRequest
from prefect_webapi.engine.services import Services
from prefect_webapi.ledger.records import Details, Draft, JobState, Record
from prefect_webapi.registry import Loaded

__all__ = ["conflict", "draft_for"]

KEPT_SPEC_BYTES = 64 * 1024


async def draft_for(
    services: Services,
    calls: Calls,
    channels: Channels,
    channel: Channel,
    request: JobRequest,
    heir_of: Collection[str],
) -> Draft:
    """What the ledger is asked for.

    Args:
        heir_of: ids of processes that have ended, whose jobs the call may take over.

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
    quotas: tuple[str, ...] = ()
    weight, namespace = 1, None
    if channel.quotas:
        probe = view_of(
            services, loaded, request, job_key(base, 0, 1), fingerprint, request.attempt
        )
        needs = await calls.requirements(loaded, probe)
        namespace, weight = needs.namespace, needs.places
        if namespace not in channel.quotas:
            raise QuotaNotConfigured(namespace, channel.quotas)
        constraints = _constraints(loaded, needs, caller)
        await channels.constrain(channel, constraints)
        quotas = tuple(sorted([limit_name(loaded, namespace), *constraints]))
    now = services.clock.now()
    deadline = request.options.deadline or loaded.settings.deadline
    reuse = request.options.reuse_results
    return Draft(
        base=base,
        task_run=caller.task_run,
        nth=request.nth,
        execution=caller.execution,
        levels=caller.levels,
        is_retry=request.attempt > 1,
        reuse_results=loaded.settings.reuse_results if reuse is None else reuse,
        pinned=pinned is not None,
        state=_first_state(loaded, quotas),
        runtime=services.runtime_id,
        plugin=loaded.entry.id,
        task_type=request.task_type,
        connection=loaded.connection.name,
        fingerprint=fingerprint,
        quotas=quotas,
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
            home=services.runs.home,
            labels=caller.labels,
            namespace=caller.namespace,
            resource_namespace=namespace,
            on_exit=request.options.on_exit,
            spec=_kept(request.spec),
        ),
        heir_of=heir_of,
    )


def _kept(spec: JobSpec[Any]) -> str | None:
    text = spec.model_dump_json()
    return text if len(text) <= KEPT_SPEC_BYTES else None


def conflict(record: Record) -> ConfigurationError:
    """A user's idempotency key that names another job already."""
    return ConfigurationError(
        f"IdempotencyConflict: idempotency_key of this call already belongs to job {record.key}, which was made from "
        f"another spec (task {record.details.task_name!r}). Use another key, or the same spec"
    )


def _constraints(loaded: Loaded, needs: ResourceRequirements, caller: Caller) -> dict[str, int]:
    """Limits inside the namespace: names and places.

    A project is what the block names so, else the tag ``project:…`` of the task, else the deployment; what has none
    of them counts together. A namespace scope is a project's part in one work pool, or what the block names so.
    """
    settings, wanted = loaded.settings, needs.constraints
    project = settings.project or caller.labels.get("project") or caller.deployment
    pool = settings.pool or caller.namespace
    limits: dict[str, int] = {}
    if wanted.project_scope is not None:
        limits[limit_name(loaded, needs.namespace, project=project)] = wanted.project_scope
    if wanted.namespace_scope is not None:
        name = limit_name(loaded, needs.namespace, project=project, pool=pool)
        limits[name] = wanted.namespace_scope
    return limits


def _first_state(loaded: Loaded, quotas: tuple[str, ...]) -> JobState:
    """Neighbouring states share one write where nothing leaves the process between them."""
    if quotas:
        return JobState.SLOT_REQUESTED
    if guarantee(loaded) == "at-most-once":
        return JobState.INTENT  # create counts as sent only when its permit is there
    return JobState.CREATING
