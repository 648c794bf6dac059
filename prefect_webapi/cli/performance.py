"""One performance of the quickstart: start, watch, kill if asked to, run again, and tell what happened."""

from __future__ import annotations

import asyncio
import shutil
import signal
import tempfile
import time
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.live import Live

from prefect_webapi.cli import board, screen
from prefect_webapi.cli.ledger import reading
from prefect_webapi.cli.processes import Processes
from prefect_webapi.cli.screen import pairs
from prefect_webapi.cli.stage import QUOTA, Stage
from prefect_webapi.cli.verdict import DESIGN, Call, Seen, differences, gather_calls
from prefect_webapi.contract.errors import NoLedger
from prefect_webapi.ledger.records import Record
from prefect_webapi.ledger.store import Reader

__all__ = ["perform"]

FLOW_SECONDS = 240.0
PREFECT_SECONDS = 60.0
"""How long Prefect's server may take to store the last states: it is seconds behind, more when the machine is busy."""
_LOOK_SECONDS = 0.4
_TELL_SECONDS = 2.0
_WIDE_COLUMNS = 180


def perform(*, keep: bool, kill_after: float | None) -> int:
    """Run it all; the exit code."""
    folder = Path(tempfile.mkdtemp(prefix="prefect-webapi-quickstart-"))
    console = screen.console(pipe_columns=_WIDE_COLUMNS)
    keeps_logs = True
    try:
        with _ending_on(signal.SIGTERM, signal.SIGHUP), Processes(folder) as processes:
            code = asyncio.run(_perform(Performance(console, processes, folder), keep, kill_after))
        keeps_logs = code != 0
    except (KeyboardInterrupt, SystemExit):
        keeps_logs = False
        console.print("Broken off; all processes have ended.", style="yellow")
        raise
    finally:
        if keeps_logs:
            console.print(f"The logs of all processes are in {folder}", style="dim")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return code


async def _perform(performance: Performance, keep: bool, kill_after: float | None) -> int:
    async with performance:
        return await performance.run(keep, kill_after)


@contextmanager
def _ending_on(*signals: signal.Signals) -> Generator[None]:
    """Let these signals end the command in order, as Ctrl-C does."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {each: signal.signal(each, leave) for each in signals}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


class Performance:
    """The quickstart, from the first process to the last line. A context manager: it may hold the ledger open."""

    def __init__(self, console: Console, processes: Processes, folder: Path) -> None:
        self._console = console
        self._processes = processes
        self._folder = folder
        self._began = time.monotonic()
        self._store: Reader | None = None
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._open.aclose()

    async def run(self, keep: bool, kill_after: float | None) -> int:
        say = self._console.print
        with self._console.status(
            "Starting a job server, a Prefect server and a flow (20 to 40 s) …"
        ):
            stage = Stage(self._processes, self._folder)
            await stage.ready()
        say(f"Both servers are up after {self._seconds():.0f} s. The flow runs; in Prefect's UI:")
        say(f"  {stage.ui_url}", style="bold", soft_wrap=True)
        was_killed = kill_after is not None and await self._kill_and_run_again(stage, kill_after)
        await self._watch(stage, FLOW_SECONDS)
        if stage.flow.code is None:
            raise stage.failure(stage.flow, f"has not ended after {FLOW_SECONDS:.0f} s")
        seen = await self._seen(stage, was_killed=was_killed)
        found = differences(seen)
        if kill_after is not None and not was_killed:
            found.append(f"the flow was over before it could be killed after {kill_after:g} s")
        self._tell(stage, seen)
        if found:
            say("\nNot everything went as designed:", style="bold red")
            for each in found:
                say(f"- {each}", highlight=False, markup=False)
            if stage.flow.code != 0:
                say(f"\nThe flow process's last words:\n{stage.flow.last_words}", markup=False)
        else:
            say(
                f"\nEverything ended as designed, after {self._seconds():.0f} s.",
                style="bold green",
            )
        if keep:
            await self._stay(stage)
        return 1 if found else 0

    def _seconds(self) -> float:
        return time.monotonic() - self._began

    async def _kill_and_run_again(self, stage: Stage, seconds: float) -> bool:
        """Whether there was something to kill."""
        await self._watch(stage, FLOW_SECONDS, until_first_job=True)
        await self._watch(stage, seconds)
        if stage.flow.code is not None:
            return False
        await asyncio.to_thread(stage.flow.kill)
        stats = await stage.ask_job_server("stats")
        self._console.print(
            f"Killed the flow process, {seconds:g} s after its first job: {stats['created']} jobs had been made, "
            f"{stats['live']} of them are alive at the job server. Now the same flow run again, in a new process."
        )
        with self._console.status("Starting the second flow process …"):
            await stage.run_again()
        return True

    # --- while it runs -----------------------------------------------------------------------

    async def _watch(self, stage: Stage, seconds: float, *, until_first_job: bool = False) -> None:
        """Show the jobs until the flow process has ended, or for so many seconds."""
        end = time.monotonic() + seconds
        told_at, told = 0.0, ""
        with Live(console=self._console, transient=True, auto_refresh=False) as live:
            while stage.flow.code is None and (left := end - time.monotonic()) > 0:
                await asyncio.sleep(min(_LOOK_SECONDS, left))
                calls, states, counts = await self._look(stage)
                if self._console.is_terminal:
                    live.update(board.progress(calls, states, counts), refresh=True)
                elif counts != told and time.monotonic() - told_at >= _TELL_SECONDS:
                    told_at, told = time.monotonic(), counts
                    self._console.print(f"{self._seconds():4.0f} s  {counts}", highlight=False)
                if until_first_job and calls:
                    return

    async def _look(self, stage: Stage) -> tuple[list[Call], dict[str, str], str]:
        """The calls whose jobs were sent, the server's word for each job, and one line about all."""
        records = await self._records(stage)
        calls = gather_calls(await stage.ask_job_server("log"), records)
        states = {job["name"]: str(job["state"]) for job in await stage.ask_job_server("jobs")}
        return calls, states, board.counts_of(records, states)

    async def _records(self, stage: Stage) -> Sequence[Record]:
        if self._store is None:
            try:
                self._store = await self._open.enter_async_context(reading(stage.ledger_url))
            except NoLedger:  # it comes with the first job
                return []
        return await self._store.select()

    # --- at the end --------------------------------------------------------------------------

    async def _seen(self, stage: Stage, *, was_killed: bool) -> Seen:
        calls = gather_calls(await stage.ask_job_server("log"), await self._records(stage))
        end = time.monotonic() + PREFECT_SECONDS
        while True:
            prefect: defaultdict[str, set[str]] = defaultdict(set)
            for run in await stage.task_runs():
                prefect[run["name"]].add(run["state_type"])
            shown = all(
                DESIGN[call.kind].prefect in prefect[call.label]
                for call in calls
                if call.kind in DESIGN
            )
            if shown or time.monotonic() > end:
                break
            await asyncio.sleep(0.3)
        return Seen(
            calls=calls,
            stats=await stage.ask_job_server("stats"),
            prefect=dict(prefect),
            flow_state=await stage.flow_run_state(),
            quota=QUOTA,
            was_killed=was_killed,
            links={job["name"]: job["link"] for job in await stage.ask_job_server("jobs")},
        )

    def _tell(self, stage: Stage, seen: Seen) -> None:
        console = self._console
        console.print(
            board.outcome_table(
                seen, with_address=not console.is_terminal or console.width >= _WIDE_COLUMNS
            )
        )
        retried = [call.label for call in seen.calls if len(call.made) > 1]
        requests: Mapping[str, int] = seen.stats["requests"]
        by_op = ", ".join(f"{count} {op}" for op, count in sorted(requests.items()))
        creates = sum(call.creates for call in seen.calls)
        made = seen.stats["created"]
        console.print(
            "",
            pairs(
                [
                    ("requests made", f"{sum(requests.values())}: {by_op}"),
                    (
                        "jobs made",
                        f"{made} by {creates} creates, expected {seen.attempts}: {len(seen.calls)} calls"
                        f" and further attempts of {', '.join(retried) or 'none'}",
                    ),
                    ("jobs made twice", ", ".join(seen.made_twice) or "none"),
                    ("most live at once", f"{seen.stats['peak_live']}, quota {seen.quota}"),
                ]
            ),
            sep="\n",
        )

    async def _stay(self, stage: Stage) -> None:
        loop = asyncio.get_running_loop()
        leave = asyncio.Event()
        loop.add_signal_handler(signal.SIGINT, leave.set)
        self._console.print(
            f"\nBoth servers stay up until Ctrl-C. The flow run in Prefect's UI:\n  {stage.ui_url}\n\n"
            "To use them from another terminal:",
            soft_wrap=True,
        )
        for name, value in stage.for_others.items():
            self._console.print(f"  export {name}={value}", soft_wrap=True, highlight=False)
        try:
            await leave.wait()
        finally:
            loop.remove_signal_handler(signal.SIGINT)
