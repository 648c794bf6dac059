"""The command line: `prefect-webapi`. One module per verb, loaded when it is asked for, so that help is quick.

What goes wrong is told in plain words on standard error: exit code 2 for what the user can mend in the command or
in a setting, 1 for everything else.
"""

from __future__ import annotations

import sys
from importlib import metadata

from cyclopts import App

from prefect_webapi.contract.errors import ConfigurationError, WebApiError

__all__ = ["app", "main"]


def _version() -> str:
    return metadata.version("prefect-webapi")


app = App(
    name="prefect-webapi",
    help="Remote jobs of Prefect flows: see them, see the settings, try it all on this machine.",
    version=_version,
)
app.command(
    "prefect_webapi.cli.quickstart:quickstart",
    name="quickstart",
    help="Run 20 remote jobs on this machine, in servers of their own: no account, no configuration.",
)
app.command(
    "prefect_webapi.cli.jobs:app",
    name="jobs",
    help="Look at the jobs in the ledger, end them, settle those that nobody can find out about.",
)
app.command(
    "prefect_webapi.cli.sweep:sweep",
    name="sweep",
    help="End the remote jobs that dead processes and ended flows have left.",
)
app.command("prefect_webapi.cli.config:app", name="config", help="Look at the settings.")


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
