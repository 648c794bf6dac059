"""End a job that may be alive: the duty is written down first and stands until the job is gone."""

from __future__ import annotations

import logging
from collections.abc import Callable

from prefect_webapi.contract.errors import NotFound, RemoteError, Throttled
from prefect_webapi.engine.calls import Calls
from prefect_webapi.engine.evidence import back_off
from prefect_webapi.engine.faults import fault_point
from prefect_webapi.engine.job import Ending, Job, persist
from prefect_webapi.engine.machine import Event
from prefect_webapi.engine.services import Services
from prefect_webapi.ledger.records import JobState

__all__ = ["ask_to_end", "note_duty"]

logger = logging.getLogger(__name__)

LOG_SECONDS = 60.0
"""A delete that goes on failing is told of so often."""


async def note_duty(services: Services, job: Job, ending: Ending) -> None:
    """Write down that the job is to be deleted, unless the record says so already.

    Raises:
        LedgerConflict: another process owns the job now, and with it the duty.
    """
    if job.record.state is JobState.CREATED:
        fault_point("KP-21")
        await persist(
            services,
            job,
            Event.END_ASKED,
            cancel_reason=ending.reason,
            stopped_by_us=True,
            orphaned=job.orphaned is ending,
        )
    job.request.reporter.cancelling(job.shown, ending.reason)


async def ask_to_end(
    services: Services, calls: Calls, job: Job, ending: Ending, permitted: Callable[[], None]
) -> bool:
    """Send delete until the service has taken it or the job is over.

    That the service took it is not the end: the caller goes on reading the job until it is gone. False: the service
    knows no such job, so it is over, or not to be seen yet.

    Args:
        permitted: called, perhaps several times, when it need not wait for others any more.
    """
    settings = job.loaded.settings
    tries, silent_until = 0, float("-inf")
    while job.record.state is JobState.CANCELLING and not job.is_left:
        await calls.permit(job.loaded, "write")
        permitted()
        fault_point("KP-22")
        job.delete_tries += 1
        try:
            await calls.delete(job.loaded, job.handle, ending.reason, job)
        except NotFound:
            return False  # the reads that follow decide
        except RemoteError as error:
            tries += 1
            now = services.clock.monotonic()
            if now >= silent_until:  # each one is in the metrics
                silent_until = now + LOG_SECONDS
                told = f", {tries} times by now" if tries > 1 else ""
                logger.warning(
                    "delete of job %s failed%s, it is repeated: %s",
                    job.record.key,
                    told,
                    error.message,
                )
            if not isinstance(error, Throttled):
                await services.clock.sleep(back_off(tries, settings.retry_base, settings.retry_cap))
        else:
            fault_point("KP-24")
            return True
    return True
