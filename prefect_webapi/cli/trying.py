"""`prefect-webapi try`: one job by a plugin, without Prefect; each call and each phase is printed as it happens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

__all__ = ["try_plugin"]


def try_plugin(
    entry: Annotated[
        str, Parameter(help="The plugin's entry: `my_package:entry`. MODULE may be a path.")
    ],
    /,
    *,
    spec: Annotated[Path, Parameter(help="The job, as YAML or JSON: the fields of the spec.")],
    connection: Annotated[
        Path | None,
        Parameter(help="The connection, as YAML or JSON: the fields of the block."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        Parameter(
            name="--set",
            help="A field of the connection, `base_url=http://…`; may be repeated, wins over the file.",
        ),
    ] = None,
) -> int:
    """Run one job by a plugin, without Prefect, and print each call and each phase.

    In values of the connection `${NAME}` stands for an environment variable, so that no secret is in a file or on the
    command line. The ledger is a temporary one. Ctrl-C deletes the job. Requests of a client that is not `RemoteClient`
    are not seen, only the calls that made them.

    Exit code 0: the job succeeded; 1: it did not; 2: the input is wrong, and no job was made; 130: it was interrupted.

    Example: `prefect-webapi try my_package:entry --spec job.yaml --connection prod.yaml --set 'token=${TOKEN}'`
    """
    from prefect_webapi.cli.attempt import attempt, block_of, job_of
    from prefect_webapi.testing.conformance.loading import entry_of

    named = entry_of(entry)
    return attempt(named, job_of(named, spec), block_of(named, connection, set_ or []))
