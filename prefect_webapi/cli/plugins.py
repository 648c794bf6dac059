"""`prefect-webapi plugins`: which are installed, what they serve, and what those lack that can't be used."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

if TYPE_CHECKING:
    from prefect_webapi.cli.installed import Installed

__all__ = ["app"]

app = App(name="plugins", help="See which plugins are installed, and what they serve.")


@app.command(name="list")
def list_plugins(
    *,
    json: Annotated[bool, Parameter(negative="", help="Print JSON instead of a table.")] = False,
) -> int:
    """List the installed plugins: id, task types, the block that connects them, their package, and what they lack.

    The id goes into a task's `plugin` and into DISABLED_PLUGINS, the task type into `webapi_task("…")`. Imports the
    plugins; asks no remote service.

    Exit code 0: every plugin loads; 1: one is broken, its line says why. A plugin whose library is not installed is
    not broken: its line says what to install.

    Example: `prefect-webapi plugins list`
    """
    from prefect_webapi.cli.installed import installed_plugins
    from prefect_webapi.cli.screen import quiet, say_json
    from prefect_webapi.registry import default_registry
    from prefect_webapi.settings import WebApiSettings

    with quiet("prefect_webapi.registry"):  # what it warns of is in the table
        found = installed_plugins(default_registry, WebApiSettings.load().disabled_plugins)
    if json:
        say_json([{**asdict(each), "is_usable": each.is_usable} for each in found])
    else:
        _say(found)
    return 1 if any(each.is_broken for each in found) else 0


def _say(found: list[Installed]) -> None:
    from rich.table import Table
    from rich.text import Text

    from prefect_webapi.cli.screen import console

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("plugin", "task types", "block", "package", "state"):
        table.add_column(name, overflow="fold", no_wrap=name == "plugin")
    for each in found:
        state = Text("ok", "green")
        if each.is_disabled:
            state = Text("disabled by DISABLED_PLUGINS", "yellow")
        elif each.problem:
            remedy = f": {each.remedy}" if each.remedy else ""
            state = Text(f"{each.problem}{remedy}", "red" if each.is_broken else "yellow")
        table.add_row(
            each.id,
            ", ".join(each.task_types),
            each.connection.rpartition(".")[2],
            f"{each.package} {each.version}",
            state,
        )
    console().print(table)
