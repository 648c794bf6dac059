"""`prefect-webapi doctor`: is everything in place, and if not, what to do."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

if TYPE_CHECKING:
    from prefect_webapi.cli.checks import Finding

__all__ = ["doctor"]


async def doctor(
    *,
    json: Annotated[bool, Parameter(negative="", help="Print JSON instead of a table.")] = False,
) -> int:
    """Look whether all that remote jobs need is in place, and say what to do where it is not.

    Settings; plugins and their libraries; Prefect's API, its version, where it keeps leases, and its clock; block
    types and saved blocks against the installed code; the ledger, its schema and its locks; jobs that nobody looks
    after; limits that are off, and slots that have leaked. Reads only: nothing is made, upgraded or given back, and no
    remote service is asked. Run it where flows run, as the same user.

    Exit code 0: nothing is wrong (notes may be there); 1: something is, its line says what to do.

    Example: `prefect-webapi doctor`
    """
    from prefect_webapi.cli.checks import Mark, examine
    from prefect_webapi.cli.screen import say_json

    found: list[Finding] = []
    async for finding in examine():
        found.append(finding)
        if not json:
            _say(finding)
    is_well = all(finding.mark is not Mark.WRONG for finding in found)
    if json:
        say_json({"ok": is_well, "findings": [asdict(finding) for finding in found]})
    return 0 if is_well else 1


def _say(finding: Finding) -> None:
    from rich.table import Table
    from rich.text import Text

    from prefect_webapi.cli.checks import Mark
    from prefect_webapi.cli.screen import console

    styles = {Mark.OK: "green", Mark.NOTE: "yellow", Mark.WRONG: "bold red"}
    table = Table.grid(padding=(0, 1))
    table.add_column(width=5)
    table.add_column(overflow="fold")
    table.add_row(Text(finding.mark, styles[finding.mark]), f"{finding.subject}: {finding.told}")
    if finding.remedy:
        table.add_row("", Text(f"→ {finding.remedy}", "bold"))
    console().print(table)
