"""`prefect-webapi limits`: how the quotas are used, and by whom."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

if TYPE_CHECKING:
    from prefect_webapi.cli.usage import Usage

__all__ = ["app", "print_table"]

app = App(
    name="limits", help="See how the quotas are used: who has places, who waits, what has leaked."
)


@app.command
async def show(
    *,
    json: Annotated[bool, Parameter(negative="", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show each quota: its limit, the slots that Prefect counts as taken, the jobs that have them or wait, the leaked.

    Reads Prefect's API and the ledger, and changes nothing. Holders and waiters are the jobs of this ledger. Leaked
    slots are those that nobody has: `prefect-webapi sweep` gives them back.

    Example: `prefect-webapi limits show`
    """
    from prefect_webapi._prefect.api import Api
    from prefect_webapi._prefect.inspection import require_server
    from prefect_webapi.cli.ledger import inspecting
    from prefect_webapi.cli.screen import say_json
    from prefect_webapi.cli.usage import usage
    from prefect_webapi.clock import Clock

    require_server()
    async with inspecting() as ledger, Api() as api:
        found = await usage(api, ledger, Clock())
    if json:
        say_json([_data(each) for each in found])
    else:
        print_table(found)


def _data(each: Usage) -> dict[str, object]:
    since = each.waiting_since
    return {**asdict(each), "waiting_since": None if since is None else since.isoformat()}


def print_table(found: list[Usage]) -> None:
    """A line per limit."""
    from datetime import UTC, datetime

    from rich.table import Table
    from rich.text import Text

    from prefect_webapi.cli.screen import console, span

    out = console()
    if not found:
        out.print(
            "Neither Prefect nor the ledger knows a quota: none is set, or no job has run yet."
        )
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("quota", "limit", "taken", "jobs", "waiting", "longest", "leaked"):
        table.add_column(name, justify="left" if name == "quota" else "right", overflow="fold")
    now = datetime.now(UTC)
    for each in found:
        leaked = "?" if each.leaked is None else str(each.leaked)
        table.add_row(
            Text(each.name),
            str(each.limit) if each.is_on else Text(f"{each.limit} (off)", "yellow"),
            "-" if each.active_slots is None else str(each.active_slots),
            str(each.holders),
            str(each.waiters),
            "" if each.waiting_since is None else span(now - each.waiting_since),
            Text(leaked, "red" if each.leaked else ""),
        )
    out.print(table)
    if any(each.leaked is None for each in found):
        out.print(
            "?: others may use these limits whom this ledger does not know; one Postgres ledger for all knows.",
            style="dim",
            highlight=False,
        )
