"""From what a plugin put to what a task returns: fetched once, validated, measured, kept."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from functools import partial
from types import NoneType
from typing import Any

from pydantic import ValidationError
from pydantic_core import to_json

from prefect_webapi.contract.errors import NotFound, RemoteError, RemoteUserError, WebApiError
from prefect_webapi.contract.phase import PhaseInfo
from prefect_webapi.contract.plugin import AsyncPlugin, overrides
from prefect_webapi.contract.task import JobSpec, result_type
from prefect_webapi.engine.adapters import adapter_of
from prefect_webapi.engine.calls import Calls
from prefect_webapi.engine.contexts import NOTHING_PUT, StatusView, storage_prefix
from prefect_webapi.engine.evidence import back_off, failure_of
from prefect_webapi.engine.job import Job
from prefect_webapi.engine.services import Services
from prefect_webapi.http import ANSWER_TOO_LARGE
from prefect_webapi.ledger.records import Outputs

__all__ = ["Collected", "collect", "faults_of", "recall"]

logger = logging.getLogger(__name__)

INLINE_BYTES = 64 * 1024
"""Results up to this size live in the record; larger ones in the result storage."""

FETCH_TRIES = 10


@dataclass(frozen=True, slots=True)
class Collected:
    """How the attempt ends: `info` is the success, or the failure that its result came to."""

    info: PhaseInfo
    outputs: Outputs | None = None
    value: Any = None


async def collect(
    services: Services, calls: Calls, job: Job, info: PhaseInfo, snapshot: Any
) -> Collected:
    """Get the result of a job that succeeded, and keep it.

    A hiccup of the service or the storage is repeated; the job itself never is. Nothing partial is stored.
    """
    declared = result_type(type(job.request.spec))
    if declared is NoneType:
        return Collected(info)
    value = job.view.output_writer.value
    plugin = job.loaded.plugin
    if isinstance(plugin, AsyncPlugin) and overrides(plugin, "outputs"):
        fetched = await _fetch(services, calls, job, snapshot)
        if isinstance(fetched, PhaseInfo):
            return Collected(fetched)
        value = fetched
    if value is NOTHING_PUT:
        if declared is Any or _allows_none(declared):
            return Collected(info)
        return Collected(
            PhaseInfo.retryable_failure(
                "OutputsNotFound",
                f"the job succeeded, but the plugin put no result; its spec promises {declared}",
            )
        )
    try:
        data = to_json(value)
    except ValueError as error:
        return Collected(
            PhaseInfo.failure("OutputsInvalid", f"the result has no JSON form: {error}")
        )
    mask = job.loaded.mask
    if mask.hits(data.decode()):  # the service echoed it
        data = to_json(mask.data(json.loads(data)))
    limit = job.loaded.settings.max_dataset_size_bytes
    if limit >= 0 and len(data) > limit:
        return Collected(
            PhaseInfo.failure(
                "OutputSizeExceeded",
                f"the result has {len(data)} bytes, max_dataset_size_bytes is {limit}",
            )
        )
    try:
        validated = adapter_of(declared).validate_json(data)
    except ValidationError as error:
        return Collected(
            PhaseInfo.failure(
                "OutputsInvalid",
                f"the result is not what the spec promises ({declared}): {faults_of(error)}",
            )
        )
    if len(data) <= INLINE_BYTES:
        return Collected(info, Outputs(value=json.loads(data)), validated)
    pointer = await _store(services, job, data)
    if pointer is None:
        return Collected(
            PhaseInfo.system_failure("ResultNotStored", "the result storage took it not in time")
        )
    return Collected(info, Outputs(pointer=pointer), validated)


async def recall(services: Services, spec: JobSpec[Any], outputs: Outputs | None) -> Any:
    """The value of a result kept earlier.

    Raises:
        LookupError: the result storage has it no more, or it was never fetched.
        ValidationError: it is not what the spec promises; people edit what it promises.
    """
    declared = result_type(type(spec))
    if outputs is None:
        if _allows_none(declared):
            return None
        raise LookupError("nobody fetched it")
    if outputs.pointer is None:
        return adapter_of(declared).validate_json(json.dumps(outputs.value))
    data = await services.outputs.read(outputs.pointer)
    if data is None:
        raise LookupError(outputs.pointer)
    return adapter_of(declared).validate_json(data)


async def _fetch(services: Services, calls: Calls, job: Job, snapshot: Any) -> Any | PhaseInfo:
    settings = job.loaded.settings
    view = StatusView(job, job.handle, snapshot)
    for tries in range(1, FETCH_TRIES + 1):
        try:
            return await calls.outputs(job.loaded, view)
        except RemoteUserError as error:
            return failure_of(error)
        except RemoteError as error:
            if error.code == ANSWER_TOO_LARGE:
                return PhaseInfo.failure("OutputSizeExceeded", error.message)
            logger.warning(
                "fetching the result of job %s failed: %s", job.record.key, error.message
            )
            if tries == FETCH_TRIES and isinstance(error, NotFound):
                return PhaseInfo.system_failure(
                    "ResultExpired",
                    f"the job succeeded, but the service no longer has its result: {error.message}",
                )
            if tries == FETCH_TRIES:
                return failure_of(error)
        await services.clock.sleep(back_off(tries, settings.retry_base, settings.retry_cap))
    raise AssertionError("unreachable")


async def _store(services: Services, job: Job, data: bytes) -> str | None:
    """Repeated until the storage takes it: a finished job is never run again. None: the job was given up first."""
    settings = job.loaded.settings
    tries = 0
    while True:
        try:
            name = f"{storage_prefix(job.record.key)}/result.json"
            return await services.outputs.write(name, data)
        except (OSError, WebApiError) as error:
            tries += 1
            logger.warning("storing the result of job %s failed: %s", job.record.key, error)
        pause = back_off(tries, settings.retry_base, settings.retry_cap)
        if not await job.unless_ending(partial(services.clock.sleep, pause)):
            return None


def _allows_none(declared: Any) -> bool:
    try:
        adapter_of(declared).validate_python(None)
    except ValidationError:
        return False
    return True


def faults_of(error: ValidationError) -> str:
    """What is wrong with a result, for people."""
    return "; ".join(
        f"{'.'.join(str(p) for p in e['loc']) or 'value'}: {e['msg']}" for e in error.errors()[:5]
    )
