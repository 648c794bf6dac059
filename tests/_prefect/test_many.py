"""Many jobs of one task run as one ticket: cancellation between attempts, errors, ends that come at once."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest

from prefect_webapi._prefect.body import Call, until_stopped
from prefect_webapi._prefect.many import _Jobs  # pyright: ignore[reportPrivateUsage] # its races show nowhere else
from prefect_webapi._prefect.reports import ManyReporter
from prefect_webapi.contract.errors import EngineClosed
from prefect_webapi.contract.keys import Fingerprint, JobKey
from prefect_webapi.contract.phase import PhaseInfo
from prefect_webapi.engine.request import JobRequest, Outcome

LONG = 600.0


class Ticket:
    def __init__(self, index: int, attempt: int) -> None:
        self.index, self.attempt = index, attempt
        self.future: concurrent.futures.Future[Outcome] = concurrent.futures.Future()
        self.told: list[str] = []

    def ends(self, info: PhaseInfo, *, stopped: bool = False) -> None:
        key = JobKey(f"j{self.index}-{self.attempt}")
        self.future.set_result(
            Outcome(job_key=key, fingerprint=Fingerprint("f"), info=info, stopped_by_us=stopped)
        )

    def outcome_blocking(self) -> Outcome:
        return self.future.result(0)

    def when_over(self, tell: Callable[[], None], /) -> None:
        self.future.add_done_callback(lambda _: tell())

    def cancel(self, reason: str) -> None:
        self.told.append(reason)
        if not self.future.done():
            self.ends(PhaseInfo.aborted(reason), stopped=True)

    def pause(self, *, leaves: bool) -> None:
        self.told.append("paused")

    def detach(self) -> None:
        self.told.append("detached")
        if not self.future.done():
            self.future.set_exception(EngineClosed("detached"))


class Host:
    def __init__(self) -> None:
        self.tickets: list[Ticket] = []
        self.is_closed = False

    def admit(self, request: JobRequest) -> Ticket:
        if self.is_closed:
            raise EngineClosed("the process is ending")
        self.tickets.append(Ticket(*cast(tuple[int, int], request)))
        return self.tickets[-1]


class Reporter:
    def __init__(self) -> None:
        self.told: list[str] = []

    def again(self, key: str) -> None:
        self.told.append(f"{key} again")

    def over(self, outcome: Outcome) -> None:
        self.told.append(f"{outcome.job_key} over")

    def ended(self, outcome: Outcome) -> None: ...


def jobs_on(host: Host, count: int, *, retries: int = 0, delay: float = 0.0) -> _Jobs:
    def request(index: int, attempt: int) -> JobRequest:
        return cast(JobRequest, (index, attempt))

    reporter = cast(ManyReporter, Reporter())
    return _Jobs(cast(Any, host), request, count, retries, [delay], reporter)


async def soon(jobs: _Jobs) -> list[Outcome]:
    async with asyncio.timeout(3):
        return await jobs.outcomes()


async def until_it_waits(jobs: _Jobs) -> asyncio.Task[list[Outcome]]:
    waiting = asyncio.ensure_future(soon(jobs))
    for _ in range(5):
        await asyncio.sleep(0)
    return waiting


async def test_a_cancel_ends_who_waits_for_the_next_attempt() -> None:
    """And nothing is handed over after it."""
    host = Host()
    jobs = jobs_on(host, 2, retries=3, delay=LONG)
    await jobs.start()
    host.tickets[0].ends(PhaseInfo.retryable_failure("Broken", "once"))
    waiting = await until_it_waits(jobs)
    jobs.cancel("enough")
    first, second = await waiting
    assert first.info.may_retry
    assert second.stopped_by_us
    assert len(host.tickets) == 2


async def test_who_waits_for_the_next_attempt_is_left_with_the_others() -> None:
    """The next process makes the attempt: the task run has not failed."""
    host = Host()
    jobs = jobs_on(host, 1, retries=3, delay=LONG)
    await jobs.start()
    host.tickets[0].ends(PhaseInfo.retryable_failure("Broken", "once"))
    waiting = await until_it_waits(jobs)
    jobs.detach()
    with pytest.raises(EngineClosed):
        await waiting


async def test_a_pause_takes_no_retries_away() -> None:
    """A flow run that goes on after it gets them as before."""
    host = Host()
    jobs = jobs_on(host, 1, retries=1)
    await jobs.start()
    jobs.pause(leaves=False)
    host.tickets[0].ends(PhaseInfo.retryable_failure("Broken", "once"))
    waiting = await until_it_waits(jobs)
    assert [ticket.attempt for ticket in host.tickets] == [1, 2]
    host.tickets[1].ends(PhaseInfo.success())
    [end] = await waiting
    assert end.job_key == "j0-2"


async def test_an_attempt_that_cannot_be_handed_over_ends_the_wait() -> None:
    """The process is ending: the loop would log the error, and the task would wait for ever."""
    host = Host()
    jobs = jobs_on(host, 1, retries=1)
    await jobs.start()
    host.is_closed = True
    host.tickets[0].ends(PhaseInfo.retryable_failure("Broken", "once"))
    with pytest.raises(EngineClosed):
        await soon(jobs)


async def test_an_error_of_one_is_raised_when_all_are_over() -> None:
    """Of any class: a job that nobody waits for would go on unseen."""
    host = Host()
    jobs = jobs_on(host, 2)
    await jobs.start()
    host.tickets[0].future.set_exception(OSError("no disk"))
    waiting = await until_it_waits(jobs)
    assert not waiting.done()
    host.tickets[1].ends(PhaseInfo.success())
    with pytest.raises(OSError, match="no disk"):
        await waiting


async def test_only_those_handed_over_are_waited_for() -> None:
    """Cancelled while most of them are still to be handed over."""
    host = Host()
    jobs = jobs_on(host, 450)
    starting = asyncio.ensure_future(jobs.start())
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert 0 < len(host.tickets) < 450
    jobs.cancel("enough")
    assert len(await soon(jobs)) == len(host.tickets)


async def test_two_ends_at_once_wake_who_waits() -> None:
    """One of the engine's thread, one of the flow's: each saw the other's and left the waking to it."""

    class Slow(list[int]):
        """A deque on which the second end comes before the first has looked at the length."""

        other: Callable[[], None] | None

        def __init__(self) -> None:
            super().__init__()
            self.other = None

        def append(self, index: int) -> None:
            super().append(index)
            other, self.other = self.other, None
            if other is not None:
                thread = threading.Thread(target=other)
                thread.start()
                thread.join(0.3)

        def popleft(self) -> int:
            return self.pop(0)

    host = Host()
    jobs = jobs_on(host, 2)
    await jobs.start()
    over = Slow()
    jobs._over = cast(Any, over)  # pyright: ignore[reportPrivateUsage]
    waiting = await until_it_waits(jobs)
    over.other = lambda: host.tickets[1].ends(PhaseInfo.success())
    host.tickets[0].ends(PhaseInfo.success())
    assert len(await waiting) == 2


async def test_a_retried_job_is_not_counted_as_running_for_ever() -> None:
    """Its attempts have keys of their own."""
    host = Host()
    jobs = jobs_on(host, 1, retries=1)
    await jobs.start()
    host.tickets[0].ends(PhaseInfo.retryable_failure("Broken", "once"))
    waiting = await until_it_waits(jobs)
    host.tickets[1].ends(PhaseInfo.success())
    await waiting
    reporter = cast(Reporter, jobs._reporter)  # pyright: ignore[reportPrivateUsage]
    assert reporter.told == ["j0-1 again", "j0-2 over"]


async def test_an_error_of_the_engine_does_not_swallow_an_interrupt() -> None:
    """What broke into the body goes on, whatever the job met meanwhile."""
    host = Host()
    jobs = jobs_on(host, 1)
    await jobs.start()
    host.tickets[0].future.set_exception(OSError("no disk"))
    nothing = cast(Any, None)
    call = Call(nothing, jobs, cast(Any, Reporter()), nothing, nothing, nothing)
    assert await until_stopped(call) is None
