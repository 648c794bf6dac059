"""`prefect-webapi sweep`: one pass of the sweeper, and what it did."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

if TYPE_CHECKING:
    from prefect_webapi.sweeper import SweepReport

__all__ = ["sweep"]


async def sweep(
    *,
    dry_run: Annotated[
        bool, Parameter(negative="", help="Only say what would be done; nothing is touched.")
    ] = False,
    connection: Annotated[
        str | None,
        Parameter(
            help="Name of a saved block that reaches the service of jobs whose own block was never saved."
        ),
    ] = None,
    json: Annotated[bool, Parameter(negative="", help="Print JSON instead of a table.")] = False,
) -> int:
    """End the remote jobs that dead processes and ended flows have left, and give their places back.

    Looks once at every job in the ledger that is not over. Safe at any time, beside running flows and other sweepers.
    Exit code 0: all was done that can be; 1: something could not be, it is listed.

    Example: `prefect-webapi sweep --dry-run`
    """
    from prefect_webapi import sweeper
    from prefect_webapi.cli import screen
    from prefect_webapi.cli.ledger import acting

    async with acting():
        report = await sweeper.sweep(dry_run=dry_run, connection=connection)
    if json:
        screen.say_json(report.model_dump(mode="json"))
    else:
        _say(report)
    return 1 if report.troubles else 0


def _say(report: SweepReport) -> None:
    from rich.table import Table
    from rich.text import Text

    from prefect_webapi.cli import screen

    console = screen.console()
    if report.jobs:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("job", "task", "found", "to do" if report.dry_run else "done", "why"):
            table.add_column(name, no_wrap=name == "job", overflow="fold")
        if not report.dry_run:
            table.add_column("came to")
        for job in report.jobs:
            cells = [job.job_key, job.task, job.state.value, job.action.value, job.reason]
            table.add_row(
                *(Text(cell) for cell in (*cells, *([job.came_to] * (not report.dry_run))))
            )
        console.print(table)
    for limit, slots in report.slots.items():
        console.print(f"{limit}: {slots} leaked slots given back", highlight=False)
    for trouble in report.troubles:
        console.print(Text(f"not done: {trouble}", style="red"))
    console.print(
        f"{report.looked_at} jobs not over, {report.driven} of them looked after by a living process, "
        f"{len(report.jobs)} for the sweeper; {report.pruned} old records removed.",
        highlight=False,
    )
