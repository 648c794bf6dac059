"""The command line: `prefect-webapi`. One module per verb, which imports slow things when it runs, not for its help.

What goes wrong is told in plain words on standard error: exit code 2 for what the user can mend in the command or
in a setting, 1 for everything else.
"""

from __future__ import annotations

import sys
from importlib import metadata

from cyclopts import App

from prefect_webapi.cli.doctor import doctor
from prefect_webapi.cli.quickstart import quickstart
from prefect_webapi.cli.sweep import sweep
from prefect_webapi.cli.trying import try_plugin
from prefect_webapi.contract.errors import ConfigurationError, WebApiError

__all__ = ["app", "main"]


def _version() -> str:
    return metadata.version("prefect-webapi")


app = App(
    name="prefect-webapi",
    help="Remote jobs of Prefect flows: see them and their quotas, clear up, check what they need, try it all here.",
    version=_version,
)
app.command(quickstart)
app.command(
    "prefect_webapi.cli.jobs:app",
    name="jobs",
    help="Look at the jobs in the ledger, end them, settle those that nobody can find out about.",
)
app.command(sweep)
app.command(
    "prefect_webapi.cli.limits:app",
    name="limits",
    help="See how the quotas are used: who has places, who waits, what has leaked.",
)
app.command(doctor)
app.command(
    "prefect_webapi.cli.plugins:app",
    name="plugins",
    help="See which plugins are installed, and what they serve.",
)
app.command(
    "prefect_webapi.cli.config:app",
    name="config",
    help="Look at the settings; check a file of limits before it is used.",
)
app.command(
    "prefect_webapi.cli.new:app",
    name="new",
    help="Begin a plugin of your own: a package that is green at once.",
)
app.command(try_plugin, name="try")
app.register_install_completion_command(  # pyright: ignore[reportUnknownMemberType] - cyclopts leaves it untyped
    help="Have your shell complete these commands: writes its completion file, and a line in its start file."
)


def main() -> None:
    """Run the command line of this process and exit."""
    try:
        code = app(sys.argv[1:], result_action="return_value")
    except WebApiError as error:
        print(f"prefect-webapi: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigurationError) else 1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    raise SystemExit(code if isinstance(code, int) else 0)
