"""What a job returns reaches its task whole, once, within bounds, or not at all."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import tracemalloc
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field

from prefect_webapi import (
    CreateResult,
    JobSpec,
    NotFound,
    Phase,
    PhaseInfo,
    RemoteClient,
    StatusContext,
    TaskExecutionContextReader,
    path,
)
from prefect_webapi.ledger.sql import SqlStore
from prefect_webapi.clock import Clock
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import JobServer, ReportJob
from prefect_webapi_jobserver.models import JobHandle, JobView
from tests.support.engine import at, request, run
from tests.support.plugins import ALL, SinglePlugin, entry
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[2]
BIG = ReportJob(seconds=0.1, result="x" * 100_000)
"""Its result is too large for the record and goes to the result storage."""


class TextJob(JobSpec[str]):
    """A job whose result is a text."""

    seconds: float = 0.0
    outcome: Literal["succeed", "fail"] = "succeed"
    kind: str = ""
    result: Any = None


class QuietJob(JobSpec[None]):
    """A job that promises no result."""

    seconds: float = 0.0


class TextPlugin(SinglePlugin):
    """Puts what the job says, in the way that the spec names."""

    def status(self, ctx: StatusContext[JobHandle, JobView]) -> PhaseInfo:
        usual = super().status(ctx)
        match ctx.task_reader.read().custom.get("kind"):
            case "nothing":
                ctx.output_writer.put("left from an earlier call")
                return PhaseInfo.success() if False else self._forget(ctx, usual)
            case "twice":
                ctx.output_writer.put("first")
                ctx.output_writer.put("last")
            case "prefix":
                ctx.output_writer.put(ctx.output_writer.raw_output_prefix)
            case _:
                ctx.output_writer.put(ctx.resource.result)
        return usual
