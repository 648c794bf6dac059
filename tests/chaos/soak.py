"""Runs a flow of many jobs on a service that often fails, kills its process again and again, and counts at the end.

    uv run python tests/chaos/soak.py --jobs 500 --kills 30 --seed 1 [--mood search] [--ledger postgres]

The same flow run is executed again after each kill until it is done. Exit code 0: no job was made twice, none lives
on, no result is lost, no request came inside a Retry-After, and never were more jobs alive than the quota allows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # it runs as a script, and needs the tests' support

from prefect_webapi.ledger.records import JobState  # noqa: E402
from prefect_webapi.testing import EmbeddedJobServer  # noqa: E402
from tests.support.jobserver import TOKEN  # noqa: E402
from tests.support.ledger import another_store, postgres  # noqa: E402
from tests.support.prefect import PrefectServer, free_port, pointed_at  # noqa: E402

__all__ = ["Soak", "Verdict", "run"]

FLIGHT_SECONDS = 0.25
"""A request that arrives so soon after a 429 was under way before the 429 could be read."""
RETRY_AFTER_SECONDS = 1.0
SHARE_BEFORE_KILLS = 0.8
"""So many of all jobs are made, about, before the last kill."""
PATIENCE_SECONDS = 20.0
"""A process that gets nowhere, as its requests go wrong, is killed then."""
FINAL_SECONDS = 900.0
LEASE_SECONDS = 150.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Soak:
    """What to do.

    Attributes:
        seconds: of the longest job; the shortest takes a twentieth of that.
        quota: most live jobs.
    """

    jobs: int
    kills: int
    seed: int
    mood: str = "keys"
    seconds: float = 20.0
    quota: int = 20
    ledger_url: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the witnesses say: job server, ledger, Prefect's limit, and the results themselves."""

    jobs: int
    made: int
    kills: int
    requests: int
    spoiled: int
    seconds: float
    duplicates: int
    leaks: int
    lost_results: int
    inside_retry_after: int
    peak: int
    quota: int
    places_left: int
    records_open: int

    @property
    def is_good(self) -> bool:
        wrong = (
            self.duplicates,
            self.leaks,
            self.lost_results,
            self.inside_retry_after,
            self.places_left,
            self.records_open,
        )
        return not any(wrong) and self.peak <= self.quota and self.made == self.jobs


def run(soak: Soak, server: EmbeddedJobServer, prefect: PrefectServer, folder: Path) -> Verdict:
    """Do it, with servers that are up."""
    began = time.monotonic()
    dice = random.Random(soak.seed)
    url = soak.ledger_url or f"sqlite+aiosqlite:///{folder / 'webapi.db'}"
    server.behave(cast(Any, soak.mood))
    with pointed_at(prefect):
        flow_run = asyncio.run(_prepare(soak, server))
    _spoil(server, soak.seed)
    env = prefect.environment(
        PREFECT_INTEGRATIONS_WEBAPI_LEDGER_URL=url,
        PREFECT_LOGGING_LEVEL="ERROR",
        PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "plugins")]),
    )
    results, log = folder / "results.json", folder / "soak.log"
    kills = 0
    while True:
        seen = len(server.log())
        with log.open("ab") as told:
            process = subprocess.Popen(
                [
                    sys.executable,
                    str(Path(__file__).with_name("soak_flow.py")),
                    flow_run,
                    str(results),
                ],
                env=env,
                stdout=told,
                stderr=told,
            )
        share = min(2 * SHARE_BEFORE_KILLS / soak.kills, SHARE_BEFORE_KILLS) if soak.kills else 0
        more = dice.randint(0, int(share * soak.jobs))
        if kills < soak.kills and _lives(process, server, seen, more, dice.uniform(0.0, 1.0)):
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            print(
                f"{time.monotonic() - began:6.1f} s, kill {kills}: {_progress(server)}", flush=True
            )
            continue
        code = process.wait(FINAL_SECONDS)
        if code != 0:
            raise SystemExit(f"the flow ended badly ({code}):\n{log.read_text()[-60000:]}")
        break
    server.clear_faults()
    return asyncio.run(_judge(soak, server, prefect, url, kills, results, time.monotonic() - began))


def _lives(
    process: subprocess.Popen[bytes],
    server: EmbeddedJobServer,
    seen: int,
    more: int,
    life: float,
) -> bool:
    """Wait until it has said something to the service and made that many jobs more, and then for so long.

    One that makes no headway is not waited for. False: it ended first.
    """
    wanted = server.stats().created + more
    while process.poll() is None and len(server.log(since=seen)) == 0:
        time.sleep(0.05)
    patience = time.monotonic() + PATIENCE_SECONDS
    while process.poll() is None and server.stats().created < wanted:
        if time.monotonic() > patience:
            break
        time.sleep(0.1)
    end = time.monotonic() + life
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    return process.poll() is None


def _progress(server: EmbeddedJobServer) -> str:
    stats = server.stats()
    return f"{stats.created} jobs made, {stats.live} live, {sum(stats.requests.values())} requests"


def _spoil(server: EmbeddedJobServer, seed: int) -> None:
    """Some 30 of 100 answers are no good."""
    wait = f"{RETRY_AFTER_SECONDS:g}"
    always: dict[str, Any] = {"times": None}
    server.fault(probability=0.03, status=429, retry_after=wait, seed=seed, **always)
    server.fault(probability=0.05, status=429, seed=seed + 1, **always)
    server.fault(probability=0.07, status=503, seed=seed + 2, **always)
    server.fault(probability=0.05, drop=True, seed=seed + 3, **always)
    server.fault(probability=0.05, drop=True, after_acceptance=True, seed=seed + 4, **always)
    server.fault(probability=0.03, status=500, after_acceptance=True, seed=seed + 5, **always)
    server.fault(probability=0.05, delay=1.0, seed=seed + 6, **always)


async def _prepare(soak: Soak, server: EmbeddedJobServer) -> str:
    from prefect.client.orchestration import get_client

    from tests.chaos import soak_flow
    from tests.support.engine import block

    config = {"resourceQuotas": {"default": soak.quota}, "caching": {"resyncInterval": "5s"}}
    settings = {
        "retryBase": "100ms",
        "retryCap": "2s",
        "visibilityDelay": "2s",
        "createTimeout": "10s",
    }
    await cast(Any, block(server, config, **settings)).asave(soak_flow.CONNECTION, overwrite=True)
    async with get_client() as client:
        parameters = {
            "mood": soak.mood,
            "jobs": soak.jobs,
            "seconds": soak.seconds,
            "seed": soak.seed,
        }
        made = await client.create_flow_run(soak_flow.soak, parameters=parameters)
        return str(made.id)


async def _judge(
    soak: Soak,
    server: EmbeddedJobServer,
    prefect: PrefectServer,
    url: str,
    kills: int,
    results: Path,
    seconds: float,
) -> Verdict:
    log, stats = server.log(), server.stats()
    wanted = [f"report {n}" for n in range(soak.jobs)]
    got = json.loads(results.read_text())
    async with another_store(url) as store:
        open_records = [r for r in await store.select() if r.state is not JobState.CLOSED]
        places = sum(row.live for row in await store.quotas())
    return Verdict(
        jobs=soak.jobs,
        made=stats.created,
        kills=kills,
        requests=len(log),
        spoiled=sum(entry.status is None or entry.status >= 429 for entry in log),
        seconds=round(seconds, 1),
        duplicates=sum(count - 1 for count in stats.jobs_by_key.values()),
        leaks=stats.live,
        lost_results=sum(a != b for a, b in zip(wanted, got, strict=True)),
        inside_retry_after=_inside(log),
        peak=stats.peak_live,
        quota=soak.quota,
        places_left=places,
        records_open=len(open_records),
    )


def _inside(log: list[Any]) -> int:
    """Requests that were sent although a Retry-After of their kind was known."""
    told = {"read": -1e9, "write": -1e9}
    count = 0
    for entry in log:
        kind = "read" if entry.op in ("get", "batch", "find") else "write"
        since = entry.mono - told[kind]
        if entry.inside_retry_after and since > FLIGHT_SECONDS:
            count += 1
        if entry.status == 429 and not entry.inside_retry_after:
            told[kind] = entry.mono + entry.seconds
    return count


@contextmanager
def _sites(ledger: str) -> Generator[tuple[EmbeddedJobServer, PrefectServer, Path, str | None]]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="webapi-soak-")))
        url = None
        if ledger == "postgres":
            uri = stack.enter_context(postgres()).get_uri()
            url = uri.replace("postgresql://", "postgresql+asyncpg://", 1)
        (folder / "prefect").mkdir()
        prefect = PrefectServer(folder / "prefect", free_port())
        prefect.start()
        stack.callback(prefect.stop)
        yield stack.enter_context(EmbeddedJobServer(token=TOKEN)), prefect, folder, url


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mood", choices=["keys", "search"], default="keys")
    parser.add_argument("--seconds", type=float, default=20.0, help="of the longest job")
    parser.add_argument("--quota", type=int, default=20)
    parser.add_argument("--ledger", choices=["sqlite", "postgres"], default="sqlite")
    given = parser.parse_args()
    with _sites(given.ledger) as (server, prefect, folder, url):
        soak = Soak(
            jobs=given.jobs,
            kills=given.kills,
            seed=given.seed,
            mood=given.mood,
            seconds=given.seconds,
            quota=given.quota,
            ledger_url=url,
        )
        verdict = run(soak, server, prefect, folder)
    for name, value in asdict(verdict).items():
        print(f"{name.replace('_', ' '):20} {value}")
    print("PASS" if verdict.is_good else "FAIL")
    return 0 if verdict.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
