"""A transaction that is rolled back takes its jobs with it: live ones are deleted, results are handed out no more."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from prefect.context import TaskRunContext
from prefect.transactions import BaseTransaction, get_transaction

from prefect_webapi._prefect.identity import enclosing
from prefect_webapi.contract.keys import JobKey
from prefect_webapi.engine.rollback import take_back

if TYPE_CHECKING:  # the engine itself is loaded by the first job
    from prefect_webapi.engine.host import HostApi, Waiting

__all__ = ["undone_with_transaction"]

logger = logging.getLogger(__name__)

REASON = "its transaction was rolled back"
PATIENCE_SECONDS = 10.0


def undone_with_transaction(
    host: HostApi, ticket: Waiting, ended: Callable[[], Sequence[JobKey]]
) -> None:
    """Let the user's transaction around this task run, if there is one, undo its jobs with itself.

    Args:
        ended: keys of those that are over by now.
    """
    transaction = _users_own()
    if transaction is None:
        return

    def undo(_: Any = None) -> None:
        ticket.cancel(REASON)
        try:
            work = partial(take_back, keys=ended(), reason=REASON)
            host.perform(work).result(PATIENCE_SECONDS)
        except Exception as error:  # noqa: BLE001 - the hooks of other tasks must have their turn
            logger.warning("what was rolled back is still in the ledger: %s", error)

    transaction.on_rollback_hooks.append(undo)
    if transaction.is_rolled_back():
        ticket.cancel(REASON)


def _users_own() -> BaseTransaction | None:
    """The nearest transaction that the user opened.

    That of a task around this one does not count: its next attempt meets the jobs of the one before. Prefect gives a
    task's own transaction a store always, and an opened one only with a key.
    """
    own = get_transaction()
    task = TaskRunContext.get()
    found = enclosing(own) if own is not None else None
    if task is None or enclosing(task) is None:
        return found
    while found is not None and found.store is not None:
        found = enclosing(found)
    return found
