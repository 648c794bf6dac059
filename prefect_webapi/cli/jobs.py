"""`prefect-webapi jobs`: what the ledger knows of jobs; end them, settle those that nobody can find out about.

`list` and `show` read the ledger only; they ask no remote service and no Prefect API.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated
from uuid import UUID

from cyclopts import App, Parameter
from cyclopts.validators import Number

from prefect_webapi.contract.errors import ConfigurationError
from prefect_webapi.ledger.records import JobState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prefect_webapi.ledger.records import Record
    from prefect_webapi.ledger.store import Reader

__all__ = ["app"]

Json = Annotated[bool, Parameter(negative="", help="Print JSON instead of a table.")]

app = App(name="jobs", help="Look at the jobs in the ledger, end them, settle those in doubt.")


@app.command(name="list")
async def list_jobs(
    *,
    state: Annotated[
        list[JobState] | None,
        Parameter(negative="", help="Only jobs in this state of the ledger; may be given again."),
    ] = None,
    flow_run: Annotated[
        UUID | None, Parameter(help="Only jobs of this flow run and of its subflows.")
    ] = None,
    limit: Annotated[
        int, Parameter(validator=Number(gte=1, lte=100_000), help="Most jobs to show.")
    ] = 50,
    json: Json = False,
) -> None:
    """List jobs, newest first: where each is, and why it waits or how it ended; how often live ones are read.

    Reads the ledger only.

    Example: `prefect-webapi jobs list --state CREATED --limit 20`
    """
    from prefect_webapi.cli import screen, views
    from prefect_webapi.cli.ledger import reading

    async with reading() as store:
        records = await _select(store, state, flow_run, limit + 1)
        paces = await store.paces()
        address = store.address
    shown = records[:limit]
    if json:
        screen.say_json([views.job_data(record, paces=paces) for record in shown])
        return
    console = screen.console()
    if not shown:
        console.print(f"No job in the ledger at {address} matches.", highlight=False)
        return
    console.print(views.job_table(shown, columns=console.width))
    if len(records) > limit:
        console.print(f"These are the newest {limit}; --limit shows more.", style="dim")
    for line in views.pace_lines(paces):
        console.print(line, style="dim", highlight=False)


@app.command
async def show(
    key: Annotated[str, Parameter(help="The job's key, as `jobs list` and Prefect's log show it.")],
    /,
    *,
    json: Json = False,
) -> None:
    """Show one job: its phases with times, attempts, handle, link, and how it ended or why not.

    Example: `prefect-webapi jobs show j7eram0kez92w3t4x2bylg67kf`
    """
    from prefect_webapi.cli import screen, views
    from prefect_webapi.cli.ledger import no_such_job, reading
    from prefect_webapi.contract.keys import JobKey

    async with reading() as store:
        record = await store.get(JobKey(key))
        if record is None:
            raise no_such_job(store.address, [key])
        attempts = views.attempts_of(record, await _relatives(store, record))
    if json:
        screen.say_json(views.job_data(record, attempts))
    else:
        page, steps = views.job_page(record, attempts), views.step_table(record)
        screen.console().print(page, "", steps, sep="\n")


@app.command
async def cancel(
    keys: Annotated[list[str], Parameter(help="Keys of the jobs, as `jobs list` shows them.")],
    /,
    *,
    reason: Annotated[
        str, Parameter(help="Why; reaches the remote service, the ledger and the task run.")
    ] = "cancelled by an operator",
    json: Json = False,
) -> int:
    """End jobs at their services, whichever process looks after them.

    Exit code 0: all are over; 1: some have been asked to end and take their time.

    Example: `prefect-webapi jobs cancel j7eram0kez92w3t4x2bylg67kf --reason "wrong table"`
    """
    from prefect_webapi import sweeper
    from prefect_webapi.cli import screen, views
    from prefect_webapi.cli.ledger import acting
    from prefect_webapi.contract.keys import JobKey

    wanted = [JobKey(key) for key in dict.fromkeys(keys)]
    async with acting(*wanted):
        records = await sweeper.cancel_jobs(wanted, reason)
    if json:
        screen.say_json([views.job_data(record) for record in records])
    else:
        console = screen.console()
        console.print(views.job_table(records, columns=console.width))
    return 0 if all(record.state.is_over for record in records) else 1


@app.command
async def resolve(
    key: Annotated[str, Parameter(help="The job's key, as `jobs list` shows it.")],
    /,
    *,
    gone: Annotated[
        bool,
        Parameter(negative="", help="You looked: the service has no such job, or it has ended."),
    ] = False,
    handle: Annotated[
        str | None,
        Parameter(
            help="You looked: there it is. Its handle as JSON, as `jobs show` prints those of others."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Settle a job whose create was sent and never answered, where only the service's own pages can tell.

    With --gone its record is closed and its place in the quota is free. With --handle the next run of its flow, or the
    next sweep, takes the job up.

    Example: `prefect-webapi jobs resolve j7eram0kez92w3t4x2bylg67kf --gone`
    """
    from prefect_webapi import sweeper
    from prefect_webapi.cli import screen, views
    from prefect_webapi.cli.ledger import acting
    from prefect_webapi.contract.keys import JobKey

    if gone == (handle is not None):
        raise ConfigurationError("say either --gone or --handle JSON")
    async with acting(JobKey(key)):
        record = await sweeper.resolve_job(JobKey(key), handle=handle)
    if json:
        screen.say_json(views.job_data(record))
    else:
        screen.console().print(views.job_page(record, views.attempts_of(record, [record])))


async def _select(
    store: Reader, states: Sequence[JobState] | None, flow_run: UUID | None, limit: int
) -> Sequence[Record]:
    if flow_run is None:
        return await store.select(states=states, newest_first=True, limit=limit)
    run = str(flow_run)
    own = await store.select(states=states, flow_run=run, newest_first=True, limit=limit)
    below = await store.select(states=states, root_run=run, newest_first=True, limit=limit)
    both = {record.key: record for record in (*own, *below)}
    return sorted(both.values(), key=lambda r: (r.created_at, r.key), reverse=True)[:limit]


async def _relatives(store: Reader, record: Record) -> Sequence[Record]:
    if not record.root_run:
        return [record]
    return await store.select(root_run=record.root_run)
