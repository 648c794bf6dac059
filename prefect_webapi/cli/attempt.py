"""What `prefect-webapi try` does: reads job and connection, runs the job without Prefect, tells as it goes."""

from __future__ import annotations

import logging
import os
import re
import signal
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, cast

import yaml

from prefect_webapi.contract.errors import ConfigurationError, WebApiError
from prefect_webapi.contract.faults import validate
from prefect_webapi.contract.phase import Phase, PhaseInfo
from prefect_webapi.contract.plugin import PluginEntry
from prefect_webapi.contract.secrecy import Mask, secrets_in
from prefect_webapi.contract.task import JobSpec
from prefect_webapi.engine.host import Ticket
from prefect_webapi.engine.request import Outcome
from prefect_webapi.ledger.records import Record
from prefect_webapi.testing.engine import engine, request
from prefect_webapi.testing.watched import Call, Watch, handle_of, watched

__all__ = ["attempt", "block_of", "job_of"]

INTERRUPTED = 130
_VARIABLE = re.compile(r"\$\{(\w+)\}")


def job_of(entry: PluginEntry[Any], path: Path) -> JobSpec[Any]:
    """The job that a file describes. Raises ConfigurationError."""
    return validate(entry.spec, _read(path), subject=f"{path} (a {entry.spec.__name__})")


def block_of(entry: PluginEntry[Any], path: Path | None, given: Sequence[str]) -> Any:
    """The connection from a file and from `field=value`s. Raises ConfigurationError."""
    fields: dict[str, Any] = {} if path is None else dict(_read(path))
    for each in given:
        name, is_one, value = each.partition("=")
        if not is_one or not name:
            raise ConfigurationError(
                f"--set {name!r}: write FIELD=VALUE, for example base_url=http://127.0.0.1:8000."
            )
        fields[name] = value
    told = f"the connection (a {entry.connection.__name__})"
    return validate(entry.connection, _with_variables(fields), subject=told)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigurationError(f"{path} can't be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is neither YAML nor JSON: {error}.") from None
    if not isinstance(data, dict):
        raise ConfigurationError(
            f"{path} holds no fields. Write `name: value` in each line, or a JSON object."
        )
    return cast(dict[str, Any], data)


def _with_variables(value: Any) -> Any:
    """`value` with the environment's values in place of `${NAME}`."""
    if isinstance(value, Mapping):
        return {k: _with_variables(v) for k, v in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list):
        return [_with_variables(each) for each in cast(list[Any], value)]
    return _VARIABLE.sub(_variable, value) if isinstance(value, str) else value


def _variable(hit: re.Match[str]) -> str:
    value = os.environ.get(hit[1])
    if value is None:
        raise ConfigurationError(
            f"the connection names {hit[0]}, and there is no such environment variable. Set it."
        )
    return value


# --- the run ---------------------------------------------------------------------------------


@dataclass
class _Teller(logging.Handler):
    """Prints what happens, without secrets, with the seconds since the start before it."""

    mask: Mask
    watch: Watch = field(default_factory=Watch)
    began: float = field(default_factory=time.monotonic)
    last: str = ""
    requests: int = 0

    def __post_init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.watch.ended = self.call

    def __hash__(self) -> int:
        return id(self)

    def say(self, what: str, text: str) -> None:
        seconds = time.monotonic() - self.began
        print(f"{seconds:8.2f} s  {what:<9} {self.mask(text)}", flush=True)

    def emit(self, record: logging.LogRecord) -> None:
        """A request of `RemoteClient`."""
        self.requests += 1
        self.say(self.watch.op or "-", record.getMessage())

    def call(self, call: Call) -> None:
        seen, self.requests = self.requests, 0
        if call.error is not None:
            self.say(call.op, f"raised {type(call.error).__name__}: {call.error}")
        elif call.op == "create":
            self.say(call.op, f"returned {handle_of(call.answer)!r}")
        elif not seen:
            self.say(call.op, f"returned in {call.seconds:.3f} s")

    def phase(self, record: Record, info: PhaseInfo, *, waiting_for_quota: bool) -> None:
        told = f"{info.phase.name} {info.reason}".rstrip()
        if told != self.last:
            self.say("phase", told)
        self.last = told

    def cancelling(self, record: Record, reason: str) -> None:
        self.say("cancel", reason)


def attempt(entry: PluginEntry[Any], spec: JobSpec[Any], block: Any) -> int:
    """Run one job and tell of it; the answer is the exit code."""
    teller = _Teller(Mask(secrets_in(block)))
    task_type = entry.supported_task_types[0]
    wanted = request(spec, task_type=task_type, run=f"try-{time.time_ns()}", reporter=teller)
    with (
        tempfile.TemporaryDirectory(prefix="webapi-try-") as folder,
        _requests_go_to(teller),
        _signals_interrupt(),
        engine(Path(folder), [watched(entry, teller.watch)], {"default": block}) as host,
    ):
        ticket = host.admit(wanted)
        try:
            outcome = ticket.outcome_blocking()
        except KeyboardInterrupt:
            return _ended_early(teller, ticket)
        except WebApiError as error:
            if isinstance(error, ConfigurationError):
                raise
            teller.say("failed", str(error))
            return 1
    _tell(teller, outcome)
    return 0 if outcome.info.phase is Phase.SUCCESS else 1


def _ended_early(teller: _Teller, ticket: Ticket) -> int:
    teller.say("Ctrl-C", "the job is deleted; once more leaves it as it is")
    ticket.cancel("`prefect-webapi try` was interrupted")
    try:
        _tell(teller, ticket.outcome_blocking())
    except KeyboardInterrupt:
        handles = teller.watch.handles()
        teller.say(
            "LEFT", f"the job may run on: {handles[-1]!r}" if handles else "the job may run on"
        )
    return INTERRUPTED


def _tell(teller: _Teller, outcome: Outcome) -> None:
    info = outcome.info
    words = f"{info.err.code}: {info.err.message}" if info.err else info.reason
    teller.say("end", f"{info.phase.name} {words}".rstrip())
    if info.phase is Phase.SUCCESS:
        teller.say("result", repr(outcome.value))


@contextmanager
def _requests_go_to(handler: logging.Handler) -> Generator[None]:
    logger = logging.getLogger("prefect_webapi.http")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def _signals_interrupt() -> Generator[None]:
    """SIGTERM deletes the job too, as Ctrl-C does."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
