"""`prefect-webapi quickstart`: the whole way of a job, on this machine, in about a minute.

The command owns three processes (see `stage.py`) and ends them on every way out. What happened is judged by the
witnesses (see `verdict.py`), and the exit code says whether all was as designed.
"""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

__all__ = ["quickstart"]


def quickstart(
    *,
    keep: Annotated[
        bool,
        Parameter(negative="", help="Leave both servers up until Ctrl-C, to look at the UI."),
    ] = False,
    kill_after: Annotated[
        float | None,
        Parameter(
            validator=Number(gt=0, lte=600),
            help="Kill the flow process (SIGKILL) so many seconds after its first job; run the same flow run again.",
        ),
    ] = None,
) -> int:
    """Run 20 remote jobs on this machine, in servers of their own: no account, no configuration.

    It starts a job server, a Prefect server and a flow. At most five jobs are live at once; one fails for good, one
    needs a second attempt, one is cancelled. Exit code 0: everything ended as designed.

    Example: `prefect-webapi quickstart --kill-after 3`
    """
    from prefect_webapi.cli.performance import perform

    return perform(keep=keep, kill_after=kill_after)
