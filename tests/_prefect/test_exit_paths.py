"""Ways out of a flow, with a job in every stage: what becomes of the jobs at the service.

One row of `ROWS` is one way out. Each is taken by a real process (`python flow.py`, a worker's child, or `prefect
flow-run execute`) that holds five jobs at that moment, one per stage; the ledger says that they are there before the
end comes:

    waiting     for its place in the quota          SLOT_REQUESTED
    creating    create was sent, no answer yet      CREATING
    queued      at the service                      CREATED
    running     at the service                      CREATED
    deleting    the service refuses its delete      CANCELLING

Who is cancelled, times out or is told to end wants no jobs any more: each is over at the service, and the one that
waited was never made. Who merely dies, or is put off, wants them: the next execution of the flow run meets them, one
create each.

A create that outlasts its process (`Row.is_swept`) has the wish in the ledger: the sweeper's next pass ends its job.

A process worker that gets SIGTERM ends at once and kills its flow processes, which hear nothing before: mere death.
`prefect flow-run execute` (a pod's command) tells its flow process to leave: the eviction.

Not in the table: time-outs of submitted tasks, which Prefect can't interrupt in their threads.
"""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.states import Cancelled, Cancelling, Scheduled
from pydantic import HttpUrl, SecretStr

from prefect_webapi import EngineSettings, PluginConfig
from prefect_webapi.ledger.records import JobState
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import JobServer
from tests.support.jobserver import TOKEN
from tests.support.prefect import Child, PrefectServer, Scripts, save_block
from tests.support.waiting import eventually_blocking
from tests.support.witness import places_taken, records

STAGES = {
    "waiting": JobState.SLOT_REQUESTED,
    "creating": JobState.CREATING,
    "queued": JobState.CREATED,
    "running": JobState.CREATED,
    "deleting": JobState.CANCELLING,
}
DEADLINE = 6
"""Seconds until the job that is to be deleted is over its time."""

Program = Literal["python", "worker", "execute"]


@dataclass(frozen=True)
class Row:
    """One way out.

    Attributes:
        way: what happens to the process or the flow run.
        form: how the flow calls its tasks.
        wanted: whether the jobs are wanted afterwards.
        reason: what the service is told; of the job that was being deleted already it was told the deadline.
        ends: name of the state of the task runs whose job was queued or running.
        flow: name of the flow run's last state.
        program: what runs the flow.
        options: of all tasks.
        is_swept: the process does not last until the create is answered, so the sweeper ends that job.
    """

    way: str
    form: Literal["awaited", "submitted"]
    wanted: bool
    reason: str = ""
    ends: str = "Cancelled"
    flow: str = ""
    program: Program = "python"
    options: str = ""
    is_swept: bool = False

    def __str__(self) -> str:
        return "-".join(
            filter(None, [self.way, self.form, self.program, self.options.partition("=")[0]])
        )


CANCELLED = "the flow run was cancelled"
TERM = "the process was asked to end (SIGTERM)"
INT = "the process was interrupted (SIGINT)"
ROWS = [
    Row("return", "submitted", True, ends="Completed", flow="Completed"),
    Row("exception", "awaited", False, "the task was cancelled", flow="Failed"),
    Row("exception", "submitted", False, "the flow run ended", flow="Failed"),
    Row(
        "task time-out",
        "awaited",
        False,
        "timeout_seconds=",
        "TimedOut",
        "Completed",
        options="timeout_seconds=30",
    ),
    Row("flow time-out", "awaited", False, "timeout_seconds=35", flow="TimedOut", is_swept=True),
    Row("cancel", "awaited", False, CANCELLED, flow="Cancelling"),
    Row("cancel", "submitted", False, CANCELLED, flow="Cancelling"),
    Row("cancel", "awaited", False, CANCELLED, flow="Cancelled", program="worker"),
    Row("cancel", "submitted", False, CANCELLED, flow="Cancelled", program="worker"),
    Row("SIGTERM", "awaited", False, TERM, flow="Crashed"),
    Row("SIGTERM", "submitted", False, TERM, flow="Crashed"),
    Row("SIGINT", "awaited", False, INT, flow="Crashed", is_swept=True),
    Row("SIGINT", "submitted", False, INT, flow="Crashed"),
    Row("SIGTERM", "awaited", True, options="on_exit='leave'"),
    Row("SIGKILL", "awaited", True),
    Row("SIGKILL", "submitted", True),
    Row("SIGTERM", "awaited", True, program="execute"),
    Row("SIGTERM", "submitted", True, program="execute"),
    Row("SIGTERM", "awaited", True, program="worker"),
    Row("SIGTERM", "submitted", True, program="worker"),
]
CHEAP = [
    row for row in ROWS if (row.way, row.form, row.program) == ("SIGTERM", "submitted", "python")
]
"""In the default suite."""

FLOW = """
    import asyncio
    import time
    from contextlib import suppress
    from datetime import timedelta
    from pathlib import Path
    from uuid import UUID

    from prefect import flow, get_client
    from prefect.flow_engine import run_flow
    from prefect.runtime import flow_run

    from prefect_webapi.sweeper import sweep
    from prefect_webapi.testing import EmbeddedJobServer
    from prefect_webapi_jobserver import run_job, run_job_sync

    HERE = Path(__file__).parent
    service = EmbeddedJobServer(token="{token}")
    service.url = "{url}"
    is_first = not (HERE / "again").exists()
    lasts = dict(outcome="never")
    brief = dict(outcome="succeed", seconds=2) if {wanted} else lasts
    specs = dict(
        queued=dict(queued_seconds=300, **lasts),
        running=dict(quota="narrow", **lasts),
        waiting=dict(quota="narrow", **brief),
        deleting=lasts,
        creating=brief,
    )

    def task(kind, stage):
        deadline = dict(deadline=timedelta(seconds={deadline})) if stage == "deleting" else dict()
        given = dict({options})
        if stage == "running" and "timeout_seconds" in given:
            given["timeout_seconds"] += 15  # after the one that waits for its place
        return kind.with_options(
            name=stage, connection="{connection}", tags=["stage:" + stage], **deadline, **given
        )

    def made(stage):
        return [job.name for job in service.jobs() if job.labels["stage"] == stage]

    def until(is_true):
        end = time.monotonic() + 60
        while not is_true():
            assert time.monotonic() < end, "the stages were not reached"
            time.sleep(0.1)

    def prepare(stage):
        "Called before the call of this stage; the stages come one after the other."
        if not is_first:
            return
        if stage == "waiting":
            until(lambda: made("deleting"))  # at once: its deadline runs
            service.fault("delete", name=made("deleting")[0], status=503, times=None)
            until(lambda: made("running"))
        if stage == "creating":
            until(lambda: service.log("delete"))
            service.fault("create", delay={create_takes}, after_acceptance=True)

    ORDER = ["queued", "running", "deleting", "waiting", "creating"]

    def note_run():
        (HERE / "run.tmp").write_text(str(flow_run.id))
        (HERE / "run.tmp").rename(HERE / "run")

    def go():
        until((HERE / "go").exists)
        if "{way}" == "exception":
            raise ValueError("a sibling failed")

    @flow(timeout_seconds={flow_timeout})
    async def awaited():
        note_run()
        calls = []
        for stage in ORDER:
            await asyncio.to_thread(prepare, stage)
            calls.append(asyncio.ensure_future(task(run_job, stage)(kind=stage, **specs[stage])))
            await asyncio.sleep(0)
        if "{way}" == "exception":
            await asyncio.to_thread(go)
        each_for_itself = {wanted} or "{way}" == "task time-out"
        await asyncio.gather(*calls, return_exceptions=each_for_itself)

    @flow(timeout_seconds={flow_timeout})
    def submitted():
        note_run()
        calls = []
        for stage in ORDER:
            prepare(stage)
            calls.append(task(run_job_sync, stage).submit(kind=stage, **specs[stage]))
        if "{way}" in ("exception", "return"):
            go()
            return
        for call in calls:
            call.wait()

    if __name__ == "__main__":
        if "time-out" in "{way}":
            asyncio.run(sweep())  # so that the start of the engine takes none of the flow's time
        again = None
        if not is_first:
            with get_client(sync_client=True) as client:
                again = client.read_flow_run(UUID((HERE / "run").read_text()))
        with suppress(Exception):
            ended = run_flow({form}, flow_run=again)
            if asyncio.iscoroutine(ended):
                asyncio.run(ended)
"""

CLI = """
    import runpy
    runpy.run_module("prefect", run_name="__main__")
"""
SWEEP = """
    from prefect_webapi.cli import main
    main()
"""


@pytest.fixture
def client(prefect_api: PrefectServer) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


class Way:
    """A row under way."""

    def __init__(
        self,
        row: Row,
        service: EmbeddedJobServer,
        client: SyncPrefectClient,
        scripts: Scripts,
        folder: Path,
    ) -> None:
        self.row, self.service, self.client, self.scripts, self.folder = (
            row,
            service,
            client,
            scripts,
            folder,
        )
        self.connection = f"exit-{uuid4().hex[:8]}"
        self.env = {
            "PREFECT_INTEGRATIONS_WEBAPI_LEDGER_URL": f"sqlite+aiosqlite:///{folder / 'webapi.db'}",
            "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR": "reschedule",
            "PREFECT_INTEGRATIONS_WEBAPI_WATCH_CANCEL_SECONDS": "0.5",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
        }
        block = JobServer(
            base_url=HttpUrl(service.url),
            token=SecretStr(TOKEN),
            engine=PluginConfig.load({"resourceQuotas": {"default": 9, "narrow": 1}}),
            settings=EngineSettings.load(
                {
                    "initialInterval": "100ms",
                    "retryBase": "100ms",
                    "retryCap": "1s",
                    "cancelGrace": "60s",  # so that nobody stops waiting for the one that is deleted
                }
            ),
        )
        save_block(block, self.connection)
        self.script = scripts.write(
            FLOW.format(
                token=TOKEN,
                url=service.url,
                connection=self.connection,
                wanted=row.wanted,
                way=row.way,
                form=row.form,
                options=row.options,
                deadline=DEADLINE,
                create_takes=35 if row.is_swept or "time-out" in row.way else 6,
                flow_timeout=35 if row.way == "flow time-out" else None,
            )
        )
        self.deployed = self._deploy() if row.program != "python" else None

    def _deploy(self) -> UUID:
        """A flow run of a deployment, in whose work pool only a worker of this test looks."""
        from prefect.client.schemas.actions import WorkPoolCreate

        self.client.create_work_pool(WorkPoolCreate(name=self.connection, type="process"))
        deployment = self.client.create_deployment(
            flow_id=self.client.create_flow_from_name(self.row.form),
            name=self.connection,
            entrypoint=f"{self.script.name}:{self.row.form}",
            pull_steps=[
                {"prefect.deployments.steps.set_working_directory": {"directory": str(self.folder)}}
            ],
            work_pool_name=self.connection,
        )
        return self.client.create_flow_run_from_deployment(deployment).id

    def start(self) -> Child:
        match self.row.program:
            case "python":
                return self.scripts.start(self.script, **self.env)
            case "worker":
                cli = self.scripts.write(CLI, "cli.py")
                pool = ("--pool", self.connection, "--type", "process")
                return self.scripts.start(cli, "worker", "start", *pool, **self.env)
            case "execute":
                cli = self.scripts.write(CLI, "cli.py")
                return self.scripts.start(cli, "flow-run", "execute", str(self.run), **self.env)

    def run_again(self) -> None:
        """Execute the flow run once more, to its end."""
        if self.row.program != "worker":
            self.start().finish(within=120)
            return
        self.client.set_flow_run_state(self.run, Scheduled(), force=True)
        worker = self.start()
        eventually_blocking(lambda: self.flow_state() == "Completed", within=120, every=0.5)
        worker.send(signal.SIGTERM)
        worker.finish()

    def sweep(self) -> None:
        """One pass of the sweeper."""
        self.scripts.start(self.scripts.write(SWEEP, "cli.py"), "sweep", **self.env).finish(
            within=90
        )

    @property
    def run(self) -> UUID:
        """The flow run."""
        return self.deployed or UUID((self.folder / "run").read_text())

    def stages(self) -> dict[str, JobState]:
        if not (self.folder / "webapi.db").exists():
            return {}
        return {each.details.task_name: each.state for each in asyncio.run(records(self.folder))}

    def end(self, child: Child) -> None:
        """Let it come to its end."""
        match self.row.way:
            case "cancel":
                self.client.set_flow_run_state(self.run, Cancelling())
            case "SIGTERM" | "SIGINT" | "SIGKILL":
                child.send(signal.Signals[self.row.way])
            case _:
                (self.folder / "go").touch()

    def flow_state(self) -> str:
        """The name of the flow run's state."""
        state = self.client.read_flow_run(self.run).state
        return state.name or "" if state is not None else ""

    def let_jobs_end(self) -> None:
        """Those that last until they are stopped succeed now."""
        for job in self.service.jobs():
            if job.labels["stage"] in ("queued", "running"):
                self.service.end(job.name, "succeeded")

    def live(self) -> list[str]:
        """The stages of the jobs that are not over at the service."""
        return [job.labels["stage"] for job in self.service.jobs() if not job.state.is_over]

    def made(self) -> Counter[str]:
        """Jobs that the service ever made, by stage."""
        return Counter(job.labels["stage"] for job in self.service.jobs())

    def reasons(self) -> dict[str, set[str]]:
        """What the service was told when a job was deleted, by stage."""
        stage_of = {job.name: job.labels["stage"] for job in self.service.jobs()}
        told: dict[str, set[str]] = {}
        for request in self.service.log("delete"):
            told.setdefault(stage_of[request.name], set()).update(parse_qs(request.query)["reason"])
        return told

    def task_runs(self) -> dict[str, str]:
        """The names of the states of the task runs, by stage."""
        only = FlowRunFilter(id=FlowRunFilterId(any_=[self.run]))
        runs = self.client.read_task_runs(flow_run_filter=only)
        return {run.name.partition("-")[0]: run.state_name or "" for run in runs}


def take(row: Row, way: Way) -> None:
    """Bring a job into every stage, go the way out, and look what became of them."""
    child = way.start()
    eventually_blocking(lambda: way.stages() == STAGES, within=120, every=0.1)
    way.end(child)
    if "time-out" in row.way or row.way == "cancel":  # the process hears of it within a second
        eventually_blocking(lambda: "running" in way.reasons(), within=60, every=0.2)
    if not row.wanted or row.way == "return":
        way.service.clear_faults()  # only now can the one be deleted that was to be
    if row.program == "worker" and row.flow:
        eventually_blocking(lambda: way.flow_state() == row.flow, within=60, every=0.5)
        child.send(signal.SIGTERM)
    if row.way == "return":
        way.let_jobs_end()
    _, told = child.end(within=90)
    made, reasons = way.made(), way.reasons()

    assert reasons.get("deleting") == {f"deadline of {DEADLINE}s exceeded"}, told
    if row.wanted:
        assert set(reasons) == {"deleting"}
        if row.way != "return":
            assert way.service.stats().live > 0
            if "leave" in row.options:
                assert "waiting" not in made
            way.service.clear_faults()
            way.let_jobs_end()
            (way.folder / "again").touch()
            way.run_again()
            made = way.made()
        # One that ended over its time before the process did has failed: a call of the next execution is a new attempt.
        assert made.pop("deleting") in (1, 2)
        assert made == Counter(STAGES.keys() - {"deleting"})
        assert set(way.reasons()) == {"deleting"}
        assert way.service.stats().live == 0
    else:
        if row.is_swept:
            eventually_blocking(lambda: way.live() == ["creating"], within=10)
            way.sweep()
        eventually_blocking(lambda: not way.live(), within=10)
        assert made == way.made() == Counter(STAGES.keys() - {"waiting"})
        for stage in ("queued", "running", "creating"):
            (reason,) = way.reasons()[stage]
            assert row.reason in reason
        for stage in ("queued", "running"):
            eventually_blocking(
                lambda stage=stage: way.task_runs().get(stage) == row.ends, within=20, every=0.5
            )
    if row.flow:
        assert way.flow_state() == row.flow
    if row.flow == "Cancelling":  # nobody ends it, but anybody may
        way.client.set_flow_run_state(way.run, Cancelled())
        assert way.flow_state() == "Cancelled"
    assert {stage: state.is_over for stage, state in way.stages().items()} == dict.fromkeys(
        STAGES, True
    )
    assert asyncio.run(places_taken(way.folder)) == 0


@pytest.mark.chaos
@pytest.mark.timeout(290)
@pytest.mark.parametrize("row", [row for row in ROWS if row not in CHEAP], ids=str)
def test_each_way_out_with_a_job_in_each_stage(
    row: Row,
    job_server: EmbeddedJobServer,
    client: SyncPrefectClient,
    scripts: Scripts,
    tmp_path: Path,
) -> None:
    """CASE-110, CASE-111, CASE-112, CASE-118, CASE-119, CASE-122, CASE-126; D11."""
    take(row, Way(row, job_server, client, scripts, tmp_path))


@pytest.mark.timeout(290)
@pytest.mark.parametrize("row", CHEAP, ids=str)
def test_a_way_out_of_the_table(
    row: Row,
    job_server: EmbeddedJobServer,
    client: SyncPrefectClient,
    scripts: Scripts,
    tmp_path: Path,
) -> None:
    """CASE-110, CASE-118, CASE-119; D11: the row that needs every part of the watch."""
    take(row, Way(row, job_server, client, scripts, tmp_path))
