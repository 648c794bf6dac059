"""What every plugin must do, whichever service it talks to: one class of tests, which each plugin's file subclasses.

The plugin runs in the real engine, over a real ledger, against a server on a socket; jobs are counted at the server.
What a service can't do, its plugin does not claim, and the tests then expect what the plugin does instead.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from inspect import isawaitable
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, cast
from urllib.parse import parse_qsl, unquote

import pytest
from PIL import Image
from prefect.blocks.core import Block
from prefect.testing.standard_test_suites.blocks import BlockStandardTestSuite
from pydantic import BaseModel, ValidationError

from prefect_webapi import (
    AsyncPlugin,
    ConfigurationError,
    EngineSettings,
    ErrorKind,
    Guarantee,
    JobSpec,
    NotFound,
    Phase,
    PhaseInfo,
    PluginConfig,
    PluginEntry,
    RemoteError,
    RemoteSystemError,
)
from prefect_webapi.contract.keys import Fingerprint, JobKey
from prefect_webapi.contract.plugin import overrides
from prefect_webapi.engine.contexts import DeleteView, GetView, StatusView, TaskView, task_view
from prefect_webapi.engine.host import Host
from prefect_webapi.engine.request import Outcome as Ended
from tests.servers.base import Fault, Reply, Seen
from tests.support.engine import QUICK, FolderOutputs, NoSecrets, Told, engine, request
from tests.support.waiting import eventually
from tests.support.wire import free_port, garbled
from tests.support.witness import records

__all__ = [
    "CANARY",
    "MESSAGE",
    "WITHIN",
    "BlockSuite",
    "Op",
    "Outcome",
    "OverHttp",
    "PluginSuite",
    "Row",
    "Service",
    "contents",
    "view_of",
]

CANARY = "canary-4b1d-of-the-credentials"
"""Part of every secret that a connection of these tests holds."""
WITHIN = 30.0
HINT = 1.0
NOWHERE = "http://127.0.0.1:9"
REPOSITORY = Path(__file__).parents[2]
MESSAGE = "no such table: sales_of_2031"
NONSENSE = [b"<html>Bad Gateway</html>", b"", b'{"state": "runn', b'{"state": "l\xe4uft"}']
"""A proxy's page, nothing at all, half an answer, another charset."""
TOO_LARGE = b" " * (33 * 1024 * 1024)

Op = Literal["create", "get", "get_many", "find", "delete", "outputs", "token"]
Outcome = Literal["succeed", "fail", "never", "queued"]
Row = tuple[Any, Phase, ErrorKind | None]
"""A snapshot, the phase that it must be judged to be, and whose fault it is (None: nothing failed)."""


def view_of(spec: JobSpec[Any], task_type: str) -> TaskView:
    """What a plugin's methods see of a job, for tests that call them without the engine."""
    return task_view(
        request(spec, task_type=task_type, task_run="t"),
        key=JobKey("jkey" + "0" * 22),
        fingerprint=Fingerprint("f" * 64),
        attempt=1,
        secrets=NoSecrets(),
        store=FolderOutputs(Path("nowhere")),
        connection=None,
        max_dataset_size_bytes=-1,
    )


class BlockSuite(BlockStandardTestSuite):
    """REQ-52: Prefect's own demands on a block, which a fixture `block` gives."""

    def test_has_a_valid_image(self, block: type[Block]) -> None:
        """The address is that of a file here; the file is checked, not the network."""
        url = str(block._logo_url)  # pyright: ignore[reportPrivateUsage] - Prefect's name for it
        with Image.open(REPOSITORY / url.partition("/main/")[2]) as image:
            assert image.width == image.height
            assert 45 < image.width < 1000


class Service(Protocol):
    """How the suite steers and asks a service: what each of them must understand. `tests.servers.base.Server` does."""

    url: str

    @property
    def seen(self) -> Sequence[Seen]:
        """Each request, in the order in which they came."""
        ...

    def reset(self) -> None:
        """No jobs, no faults, an empty log."""
        ...

    def made(self) -> int:
        """How many jobs were ever made."""
        ...

    def live(self) -> int:
        """How many of them are not over."""
        ...

    def ops(self) -> Sequence[str]:
        """What the requests asked for, in the order in which they came."""
        ...

    def times(self, op: Op) -> Sequence[float]:
        """When the requests of an op came, in seconds of a monotonic clock."""
        ...

    def spoil(self, fault: Fault) -> None:
        """Let something go wrong."""
        ...

    def forget(self) -> None:
        """Lose all jobs: they are gone and unknown."""
        ...


class PluginSuite(ABC):
    """Subclass it as `TestSomething`, with a class-wide fixture `service`, and give what is abstract.

    Attributes:
        entry, plugin_class: of the plugin.
        rows: every state that the vendor's enum knows, as snapshots.
        unknown: a snapshot with a state that the vendor may invent.
        has_tokens: whether credentials are first exchanged for a token.
        hints: whether the vendor's throttles say how long to wait.
    """

    entry: ClassVar[PluginEntry[Any]]
    plugin_class: ClassVar[type[AsyncPlugin[Any, Any]]]
    rows: ClassVar[Sequence[Row]]
    unknown: ClassVar[Any]
    has_tokens: ClassVar[bool] = False
    hints: ClassVar[bool] = True

    @property
    def guarantee(self) -> Guarantee:
        """What the plugin promises here; where data describe the service, they say it."""
        return self.plugin_class.guarantee

    # --- what each plugin's file gives -------------------------------------------------------

    @abstractmethod
    def connection(self, service: Any, engine: PluginConfig, settings: EngineSettings) -> Any:
        """A block for the service, whose secrets hold `CANARY`."""

    @abstractmethod
    def job(
        self,
        outcome: Outcome = "succeed",
        *,
        result: str = "done",
    ) -> JobSpec[Any]:
        """A job that soon succeeds and returns `result` somewhere, fails with `MESSAGE`, or runs or waits for ever."""

    @abstractmethod
    def throttled(self, hint: float | None) -> Reply:
        """The vendor's own way to say: less. `hint`: seconds to wait, where the vendor has words for it."""

    @abstractmethod
    def unauthorized(self) -> Reply:
        """The vendor's own way to say that a credential is no longer good."""

    @abstractmethod
    def unknown_handle(self) -> Any:
        """A well-formed handle of a job that never was."""

    # --- the engine around it ----------------------------------------------------------------

    @pytest.fixture(autouse=True)
    def _clean(self, service: Service) -> Iterator[None]:
        service.reset()
        yield
        service.reset()

    @contextmanager
    def host(
        self,
        folder: Path,
        service: Service,
        config: dict[str, Any] | None = None,
        speed: float = 1.0,
        **settings: Any,
    ) -> Generator[Host]:
        fast = {"qps": 1000, "burst": 1000}
        config = {"readRateLimiter": fast, "writeRateLimiter": fast, **(config or {})}
        block = self.connection(
            service,
            PluginConfig.load(config),
            EngineSettings.load({**QUICK, "deadline": "60s", **settings}),
        )
        with engine(folder, [self.entry], {"default": block}, speed=speed) as host:
            yield host

    def asked(self, host: Host, spec: JobSpec[Any], **call: Any) -> Any:
        return host.admit(request(spec, task_type=self.entry.supported_task_types[0], **call))

    async def outcome(self, host: Host, spec: JobSpec[Any], **call: Any) -> Ended:
        async with asyncio.timeout(WITHIN):
            return await self.asked(host, spec, **call).outcome()

    @pytest.fixture
    async def plugin(self, service: Service) -> Any:
        block = self.connection(
            service, PluginConfig(), EngineSettings.load({"allowInsecure": True})
        )
        plugin: Any = self.entry.plugin_loader(_Setup(block))
        if isawaitable(plugin):
            plugin = await plugin
        yield plugin
        await plugin.aclose()

    def view(self, spec: JobSpec[Any]) -> TaskView:
        return view_of(spec, self.entry.supported_task_types[0])

    # --- a job and its result ----------------------------------------------------------------

    async def test_a_job_runs_and_its_result_comes_back(
        self, service: Service, tmp_path: Path
    ) -> None:
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, self.job(result="the figures"))
        assert outcome.info.phase is Phase.SUCCESS, outcome.info
        assert "the figures" in str(outcome.value)
        assert (service.made(), service.live()) == (1, 0)

    async def test_create_is_the_first_call_on_the_wire(
        self, service: Service, tmp_path: Path
    ) -> None:
        """Nothing is looked up before: only a token may be fetched."""
        with self.host(tmp_path, service) as host:
            await self.outcome(host, self.job())
        assert next(op for op in service.ops() if op != "token") == "create"

    async def test_a_job_that_fails_says_the_services_own_words(
        self, service: Service, tmp_path: Path
    ) -> None:
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, self.job("fail"))
        assert outcome.info.phase.is_failure
        assert outcome.info.err is not None
        assert MESSAGE in outcome.info.err.message

    async def test_the_vendors_id_and_page_are_shown_within_a_second(
        self, service: Service, tmp_path: Path
    ) -> None:
        told = Told()
        with self.host(tmp_path, service) as host:
            ticket = self.asked(host, self.job("never"), reporter=told)
            created = await eventually(lambda: service.times("create"), within=WITHIN)
            await eventually(lambda: any(_shown(info) for info in told.infos), within=WITHIN)
            shown = next(
                at for info, at in zip(told.infos, told.times, strict=True) if _shown(info)
            )
            ticket.cancel("seen")
            await ticket.outcome()
        assert shown - created[0] < 1.0

    async def test_a_result_that_is_too_large_is_refused(
        self, service: Service, tmp_path: Path
    ) -> None:
        """CASE-235: the user's fault, and for good: running it again brings no less."""
        with self.host(tmp_path, service, maxDatasetSizeBytes=100) as host:
            outcome = await self.outcome(host, self.job(result="x" * 200))
        assert outcome.info.phase is Phase.PERMANENT_FAILURE
        assert outcome.info.err is not None
        assert outcome.info.err.code == "OutputSizeExceeded"

    # --- the vendor's states -----------------------------------------------------------------

    def test_every_state_of_the_vendor_is_judged(self, plugin: AsyncPlugin[Any, Any]) -> None:
        """REQ-53: total over what the vendor documents."""
        wrong = [
            f"{snapshot!r}: {info.phase.name} of {info.kind}, not {phase.name} of {kind}"
            for snapshot, phase, kind in self.rows
            if (info := self.judged(plugin, snapshot)).phase is not phase
            or (kind is not None and info.kind != kind)
        ]
        assert not wrong, "\n".join(wrong)

    def test_a_state_that_is_new_ends_no_job(self, plugin: AsyncPlugin[Any, Any]) -> None:
        """REQ-56."""
        assert self.judged(plugin, self.unknown).phase is Phase.UNDEFINED

    def judged(self, plugin: AsyncPlugin[Any, Any], snapshot: Any) -> PhaseInfo:
        return plugin.status(StatusView(self.view(self.job()), self.unknown_handle(), snapshot))

    # --- once, whatever happens --------------------------------------------------------------

    async def test_a_create_that_is_throttled_is_repeated(
        self, service: Service, tmp_path: Path
    ) -> None:
        service.spoil(Fault("create", self.throttled(None), times=2))
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, self.job())
        assert outcome.info.phase is Phase.SUCCESS, outcome.info
        assert service.made() == 1
        assert len(service.times("create")) == 3

    async def test_a_lost_answer_makes_no_second_job(
        self, service: Service, tmp_path: Path
    ) -> None:
        """The job is made, and its answer never comes."""
        service.spoil(Fault("create", None, carried_out=True))
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, self.job())
        assert service.made() == 1
        if self.guarantee == "at-most-once":
            assert outcome.info.err is not None
            assert outcome.info.err.code == "CreateOutcomeUnknown"
            assert len(service.times("create")) == 1
        else:
            assert outcome.info.phase is Phase.SUCCESS, outcome.info

    async def test_an_answer_without_sense_makes_no_second_job(
        self, service: Service, tmp_path: Path
    ) -> None:
        """CASE-254: a proxy's page instead of the service's answer, although the job was made."""
        page = Reply(502, b"<html>Bad Gateway</html>", {"Content-Type": "text/html"})
        service.spoil(Fault("create", page, carried_out=True))
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, self.job())
        assert service.made() == 1
        if self.guarantee != "at-most-once":
            assert outcome.info.phase is Phase.SUCCESS, outcome.info

    async def test_a_connection_that_is_lost_before_leaves_one_job_or_none(
        self, service: Service, tmp_path: Path
    ) -> None:
        """Nobody can tell that the request did not arrive: what can't ask makes none."""
        service.spoil(Fault("create", None))
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, self.job())
        succeeds = self.guarantee != "at-most-once"
        assert service.made() == (1 if succeeds else 0)
        assert (outcome.info.phase is Phase.SUCCESS) == succeeds

    async def test_the_next_process_takes_the_job_over(
        self, service: Service, tmp_path: Path
    ) -> None:
        spec = self.job("never")
        with self.host(tmp_path, service) as host:
            self.asked(host, spec, execution="one")
            await eventually(lambda: service.times("create"), within=WITHIN)
            await eventually(lambda: service.made() == 1, within=WITHIN)
        with self.host(tmp_path, service) as host:
            ticket = self.asked(host, spec, execution="two", reporter=(told := Told()))
            await eventually(lambda: "RUNNING" in told.names, within=WITHIN)
            assert service.made() == 1
            ticket.cancel("the test is over")
            await ticket.outcome()
        await eventually(lambda: service.live() == 0, within=WITHIN)
        assert service.made() == 1

    # --- the end of a job --------------------------------------------------------------------

    @pytest.mark.parametrize("phase", ["queued", "never"])
    async def test_a_cancelled_job_is_over_at_the_service(
        self, service: Service, tmp_path: Path, phase: Literal["queued", "never"]
    ) -> None:
        with self.host(tmp_path, service) as host:
            told = Told()
            ticket = self.asked(host, self.job(phase), reporter=told)
            wanted = "QUEUED" if phase == "queued" else "RUNNING"
            await eventually(lambda: wanted in told.names, within=WITHIN)
            ticket.cancel("no longer needed")
            async with asyncio.timeout(WITHIN):
                outcome = await ticket.outcome()
            assert outcome.info.phase is Phase.ABORTED, outcome.info
            await eventually(lambda: service.live() == 0, within=WITHIN)

    async def test_deleting_a_job_that_is_over_is_no_fault(
        self, service: Service, plugin: AsyncPlugin[Any, Any], tmp_path: Path
    ) -> None:
        """REQ-43: deletes come at least once."""
        with self.host(tmp_path, service) as host:
            await self.outcome(host, self.job())
        (record,) = await records(tmp_path)
        assert record.handle is not None
        meta = cast(type[BaseModel], type(self.unknown_handle()))
        handle = meta.model_validate_json(record.handle)
        await plugin.delete(DeleteView(handle, "again"))

    async def test_deleting_a_job_that_never_was_is_no_fault(
        self, service: Service, tmp_path: Path
    ) -> None:
        """The engine sees a success, or that the job is not there."""
        with self.host(tmp_path, service, speed=10) as host:
            ticket = self.asked(host, self.job("never"), reporter=(told := Told()))
            await eventually(lambda: "RUNNING" in told.names, within=WITHIN)
            service.forget()
            ticket.cancel("too late")
            async with asyncio.timeout(WITHIN):
                outcome = await ticket.outcome()
        assert outcome.info.phase in (Phase.ABORTED, Phase.PERMANENT_FAILURE), outcome.info

    async def test_a_job_that_vanishes_is_told(self, service: Service, tmp_path: Path) -> None:
        """REQ-58: not waited for for ever, and no second one is made."""
        with self.host(tmp_path, service, speed=10) as host:
            told = Told()
            ticket = self.asked(host, self.job("never"), reporter=told)
            await eventually(lambda: "RUNNING" in told.names, within=WITHIN)
            service.forget()
            async with asyncio.timeout(WITHIN):
                outcome = await ticket.outcome()
        assert outcome.info.phase.is_failure, outcome.info
        assert len(service.times("create")) == 1

    # --- limits and credentials --------------------------------------------------------------

    async def test_a_hint_to_wait_is_obeyed(self, service: Service, tmp_path: Path) -> None:
        """REQ-15: nothing of the kind is sent before its time."""
        if not self.hints:
            assert self.throttled(HINT) == self.throttled(None)
        service.spoil(Fault("create", self.throttled(HINT)))
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, self.job())
        assert outcome.info.phase is Phase.SUCCESS, outcome.info
        first, second = service.times("create")
        assert second - first >= (HINT if self.hints else 0.0)

    async def test_reads_that_are_throttled_lose_no_job(
        self, service: Service, tmp_path: Path
    ) -> None:
        service.spoil(Fault("get", self.throttled(None), times=2))
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, self.job())
        assert outcome.info.phase is Phase.SUCCESS, outcome.info

    @pytest.mark.parametrize("op", ["create", "get"])
    async def test_a_refused_credential_is_renewed_once(
        self, service: Service, tmp_path: Path, op: Op
    ) -> None:
        """REQ-63."""
        service.spoil(Fault(op, self.unauthorized()))
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, self.job())
        assert outcome.info.phase is Phase.SUCCESS, outcome.info
        assert service.made() == 1
        if self.has_tokens:
            assert len(service.times("token")) == 2

    async def test_a_credential_that_stays_refused_ends_the_task_and_makes_no_job(
        self, service: Service, tmp_path: Path
    ) -> None:
        service.spoil(Fault("create", self.unauthorized(), times=100))
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, self.job())
        assert outcome.info.phase is Phase.PERMANENT_FAILURE
        assert service.made() == 0
        assert len(service.times("create")) == 2

    async def test_many_jobs_share_one_token(self, service: Service, tmp_path: Path) -> None:
        """And all of them are read, in batches where the service has them, each to its own end."""
        count = 20
        with self.host(tmp_path, service) as host:
            tickets = [
                self.asked(host, self.job(result=f"figures {nth};"), nth=nth, task_run=f"t{nth}")
                for nth in range(count)
            ]
            async with asyncio.timeout(WITHIN):
                outcomes = await asyncio.gather(*(ticket.outcome() for ticket in tickets))
        assert service.made() == count
        assert all(f"figures {nth};" in str(outcome.value) for nth, outcome in enumerate(outcomes))
        assert len(service.times("token")) == (1 if self.has_tokens else 0)

    # --- batches -----------------------------------------------------------------------------

    async def test_a_job_that_a_batch_leaves_out_is_read_alone(
        self, plugin: AsyncPlugin[Any, Any]
    ) -> None:
        """REQ-37."""
        if plugin.max_batch == 1:
            assert not overrides(plugin, "get_many")
            return
        made = await plugin.create(self.view(self.job("never")))
        ours = GetView(getattr(made, "resource_meta", made))
        missing, found = await plugin.get_many([GetView(self.unknown_handle()), ours])
        assert missing is None or isinstance(missing, Exception)
        assert found is not None
        assert not isinstance(found, Exception)

    # --- promises ----------------------------------------------------------------------------

    def test_the_guarantee_stands_in_the_docstring(self) -> None:
        words = {
            "key": "Exactly once by key",
            "search": "Exactly once by search",
            "at-most-once": "At most once",
        }
        assert (self.plugin_class.__doc__ or "").startswith(words[self.plugin_class.guarantee])

    async def test_no_secret_gets_out(
        self, service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """REQ-62: through a success, a failure, refused credentials and a service that echoes them."""
        caplog.set_level(logging.DEBUG)
        told = Told()
        echo = Reply(400, {"message": f"bad credential {CANARY}", "error": CANARY})
        with self.host(tmp_path, service) as host:
            await self.outcome(host, self.job(), reporter=told, nth=1, task_run="1")
            await self.outcome(host, self.job("fail"), reporter=told, nth=2, task_run="2")
            service.spoil(Fault("create", self.unauthorized(), times=2))
            refused = await self.outcome(host, self.job(), reporter=told, nth=3, task_run="3")
            service.spoil(Fault("create", echo, times=100))
            echoed = await self.outcome(host, self.job(), reporter=told, nth=4, task_run="4")
        block = self.connection(service, PluginConfig(), EngineSettings())
        texts = [caplog.text, repr(told), repr(refused), repr(echoed), repr(block), str(block)]
        texts += contents(tmp_path)
        assert not [text[:300] for text in texts if CANARY in text]


class OverHttp(PluginSuite):
    """What a plugin must do besides if its service speaks HTTP."""

    def handle_of(self, name: str) -> Any:
        """The handle of a job with this id; refused where the vendor has no such ids."""
        raise NotImplementedError

    async def test_a_thousand_calls_share_one_token(
        self, service: Service, plugin: AsyncPlugin[Any, Any]
    ) -> None:
        """At once, before there is one; where a service has tokens."""
        if not self.has_tokens:
            return
        handle = GetView(self.unknown_handle())
        reads = (plugin.get(handle) for _ in range(1000))
        answers = await asyncio.gather(*reads, return_exceptions=True)
        assert all(isinstance(answer, NotFound) for answer in answers)
        assert (len(service.times("get")), len(service.times("token"))) == (1000, 1)

    async def test_a_redirect_is_not_followed(self, service: Service, tmp_path: Path) -> None:
        """CASE-255: it would carry the credentials along."""
        elsewhere = Reply(307, b"", {"Location": NOWHERE})
        service.spoil(Fault("create", elsewhere, times=100))
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, self.job())
        assert outcome.info.phase is Phase.PERMANENT_FAILURE, outcome.info
        assert (service.made(), len(service.times("create"))) == (0, 1)

    @pytest.mark.parametrize("body", NONSENSE)
    async def test_a_create_whose_answer_has_no_sense_makes_no_second_job(
        self, service: Service, tmp_path: Path, body: bytes
    ) -> None:
        """CASE-254: it is a system failure, after which a job may exist."""
        service.spoil(Fault("create", Reply(200, body), carried_out=True))
        with self.host(tmp_path, service) as host:
            outcome = await self.outcome(host, self.job())
        assert service.made() == 1
        if self.guarantee == "at-most-once":
            assert outcome.info.err is not None
            assert outcome.info.err.code == "CreateOutcomeUnknown"
        else:
            assert outcome.info.phase is Phase.SUCCESS, outcome.info

    @pytest.mark.parametrize("body", [*NONSENSE, TOO_LARGE], ids=lambda body: str(body[:9]))
    async def test_a_read_without_sense_loses_no_job(
        self, service: Service, tmp_path: Path, body: bytes
    ) -> None:
        """CASE-254: nor does more than a client reads."""
        for op in ("get", "get_many"):
            service.spoil(Fault(op, Reply(200, body)))
        with self.host(tmp_path, service, speed=10) as host:
            outcome = await self.outcome(host, self.job(result="the figures"))
        assert outcome.info.phase is Phase.SUCCESS, outcome.info
        assert "the figures" in str(outcome.value)
        assert service.made() == 1

    async def test_where_nobody_listens_nothing_was_made(self, service: Service) -> None:
        """CASE-260: known, so the create is repeated."""
        async with self.plugin_at(service, NOWHERE) as plugin:
            with pytest.raises(RemoteSystemError) as caught:
                await plugin.create(self.view(self.job()))
        assert not caught.value.job_may_exist

    @pytest.mark.parametrize("answers", [True, False])
    async def test_a_service_that_can_not_be_reached_is_asked_again(
        self, service: Service, tmp_path: Path, answers: bool
    ) -> None:
        """CASE-259, CASE-260: no handshake, or nobody there: nothing was sent, so no outcome is unknown."""
        port = free_port()
        url = f"https://127.0.0.1:{port}" if answers else f"http://127.0.0.1:{port}"
        elsewhere = cast(Service, _Elsewhere(service, url))
        async with garbled(port if answers else 0) as heard:
            with self.host(tmp_path, elsewhere, maxCreateAttempts=3) as host:
                outcome = await self.outcome(host, self.job())
        assert outcome.info.phase is Phase.RETRYABLE_FAILURE, outcome.info
        assert outcome.info.err is not None
        assert (outcome.info.err.code, outcome.info.err.kind) == ("ConnectError", "system")
        assert len(heard) >= (3 if answers else 0)
        assert not any(b"HTTP" in hello for hello in heard)

    @pytest.mark.parametrize("name", ["9007199254740993001", "a/b ?#%&\u00fc'\""])
    async def test_an_id_reaches_the_service_as_it_is(
        self, service: Service, plugin: AsyncPlugin[Any, Any], name: str
    ) -> None:
        """CASE-256, CASE-257: after a stay in the ledger; no float, and encoded where it is part of an address."""
        try:
            handle = self.handle_of(name)
        except ValidationError:
            assert not name.isdigit()  # the vendor's ids are numbers
            return
        meta = cast(type[BaseModel], type(handle))
        handle: Any = meta.model_validate_json(handle.model_dump_json())
        for call in (plugin.get(GetView(handle)), plugin.delete(DeleteView(handle, "enough"))):
            before = len(service.seen)
            with suppress(RemoteError):
                await call
            asked = next(seen for seen in service.seen[before:] if seen.op != "token")
            assert any(value.endswith(name) for value in _values(asked)), asked

    async def test_credentials_do_not_travel_in_the_clear(self, service: Service) -> None:
        """CASE-258: unless the connection allows it."""
        with pytest.raises(ConfigurationError, match="allow_insecure"):
            async with self.plugin_at(service, "http://jobs.example.com"):
                pass
        async with self.plugin_at(service, "http://jobs.example.com", allow_insecure=True):
            pass

    @asynccontextmanager
    async def plugin_at(
        self, service: Service, url: str, *, allow_insecure: bool = False
    ) -> AsyncGenerator[AsyncPlugin[Any, Any]]:
        settings = EngineSettings(allow_insecure=allow_insecure)
        block = self.connection(_Elsewhere(service, url), PluginConfig(), settings)
        made: Any = self.entry.plugin_loader(_Setup(block))
        plugin: AsyncPlugin[Any, Any] = await made if isawaitable(made) else made
        try:
            yield plugin
        finally:
            await plugin.aclose()


class _Elsewhere:
    """A service at another address than its own."""

    def __init__(self, service: Service, url: str) -> None:
        self._service = service
        self.url = url

    def __getattr__(self, name: str) -> Any:
        return getattr(self._service, name)


class _Setup:
    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.metrics_scope = _NoMetrics()


class _NoMetrics:
    def count(self, name: str, amount: float = 1, /, **labels: str) -> None: ...

    def observe(self, name: str, value: float, /, **labels: str) -> None: ...


def _values(seen: Seen) -> Iterator[str]:
    """Everything that a request says: parts of its path, parameters, what is in its body."""
    yield from map(unquote, seen.path.split("/"))
    yield from (value for _, value in parse_qsl(seen.query))
    yield from _leaves(seen.json if seen.body else None)


def _leaves(data: Any) -> Iterator[str]:
    match data:
        case dict():
            parts = cast(dict[str, Any], data).values()
        case list():
            parts = cast(list[Any], data)
        case _:
            yield str(data)
            return
    for part in parts:
        yield from _leaves(part)


def _shown(info: PhaseInfo) -> bool:
    """The job's page, or at least its id."""
    return bool(info.info.logs or info.info.external_resources)


def contents(folder: Path) -> list[str]:
    """Of the ledger, its log and the results."""
    return [path.read_bytes().decode("latin-1") for path in folder.rglob("*") if path.is_file()]
