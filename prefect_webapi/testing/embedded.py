"""The job server as a process beside a test, and a hand on its controls."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, Literal, Self
from urllib.parse import quote

from pydantic import TypeAdapter

from prefect_webapi.testing.jobserver.api import Behaviour, JobView, Stats
from prefect_webapi.testing.jobserver.faults import Fault, Garbage, LoggedRequest, Op

__all__ = ["EmbeddedJobServer"]

CALL_SECONDS = 20.0
_direct = urllib.request.build_opener(
    urllib.request.ProxyHandler({})
)  # this machine needs no proxy


class EmbeddedJobServer:
    """A job server in a process of its own. A context manager; the process ends with the block, or with ours.

    Its methods are short blocking calls, for tests of either colour.

    Args:
        token: bearer token that requests must carry.
        speed: jobs' time runs this many times faster.
    """

    def __init__(self, *, token: str | None = "token", speed: float = 1.0, port: int = 0) -> None:
        self.token = token
        self._arguments = ["--port", str(port), "--speed", str(speed), "--until-parent-exits"]
        if token is not None:
            self._arguments += ["--token", token]
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "prefect_webapi.testing.jobserver", *self._arguments],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("READY "):
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()
            raise RuntimeError(f"the job server did not start: {line!r}")
        self.url = line.split()[1]
        return self

    def __exit__(self, *exc_info: object) -> None:
        process = self._process
        if process is None:
            return
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()
        self._process = None

    # --- controls ----------------------------------------------------------------------------

    def behave(
        self,
        mood: Literal["keys", "search", "neither"] = "keys",
        *,
        repeat: Literal["return", "conflict"] = "return",
        token: str | None = None,
    ) -> None:
        """Change how the whole service behaves; `token` None: the one it was started with."""
        behaviour = Behaviour(mood=mood, repeat=repeat, token=token or self.token)
        self._call("POST", "/control/behaviour", behaviour.model_dump())

    def fault(
        self,
        op: Op | Literal["any"] = "any",
        *,
        name: str | None = None,
        skip: int = 0,
        times: int | None = 1,
        probability: float = 1.0,
        seed: int | None = None,
        after_acceptance: bool = False,
        delay: float = 0.0,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
        retry_after: str | None = None,
        body: Any = None,
        patch: Mapping[str, Any] | None = None,
        drop: bool = False,
        garbage: Garbage | None = None,
        echo_authorization: bool = False,
    ) -> None:
        """Let something go wrong with the next requests that fit; `Fault` says what each argument means."""
        fault = Fault(
            op=op,
            name=name,
            skip=skip,
            times=times,
            probability=probability,
            seed=seed,
            after_acceptance=after_acceptance,
            delay=delay,
            status=status,
            headers=dict(headers or {}),
            retry_after=retry_after,
            body=body,
            patch=None if patch is None else dict(patch),
            drop=drop,
            garbage=garbage,
            echo_authorization=echo_authorization,
        )
        self._call("POST", "/control/faults", fault.model_dump())

    def clear_faults(self) -> None:
        self._call("DELETE", "/control/faults")

    def end(
        self,
        name: str,
        state: Literal["succeeded", "failed", "cancelled", "forgotten"],
        message: str = "",
    ) -> None:
        """End a job as a third party would, or make the server forget it."""
        self._call("POST", "/control/end", {"name": name, "state": state, "message": message})

    def reset(self) -> None:
        """Forget all jobs, faults and requests; behave as at the start."""
        self._call("POST", "/control/reset")

    # --- the witness -------------------------------------------------------------------------

    def log(self, op: Op | None = None, *, since: int = 0) -> list[LoggedRequest]:
        """The requests to the service in the order in which they came."""
        entries = TypeAdapter(list[LoggedRequest]).validate_python(
            self._call("GET", f"/control/log?since={since}")
        )
        return [entry for entry in entries if op in (None, entry.op)]

    def jobs(self) -> list[JobView]:
        """Every job ever made."""
        return TypeAdapter(list[JobView]).validate_python(self._call("GET", "/control/jobs"))

    def stats(self) -> Stats:
        return Stats.model_validate(self._call("GET", "/control/stats"))

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + quote(path, safe="/?=&"),
            data=data,
            method=method,
            headers={"Content-Type": "application/json"},
        )
        try:
            with _direct.open(request, timeout=CALL_SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                told = error.read().decode("utf-8", "replace")
            raise RuntimeError(f"the job server refused {method} {path}: {told}") from error
