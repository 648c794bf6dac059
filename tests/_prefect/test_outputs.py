"""The result storage: large results, and what plugins keep there."""

from __future__ import annotations

import hashlib
import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

import anyio
import pytest
from prefect.filesystems import LocalFileSystem, RemoteFileSystem

from prefect_webapi import StatusContext
from prefect_webapi._prefect.outputs import ResultStorage
from prefect_webapi.testing import EmbeddedJobServer
from prefect_webapi_jobserver import ReportJob
from prefect_webapi_jobserver.models import JobHandle, JobView
from tests.support.engine import at, run
from tests.support.plugins import SinglePlugin, entry
from tests.support.prefect import PrefectServer, pointed_at


@pytest.mark.usefixtures("prefect_api")
async def test_a_large_result_is_read_back_from_its_pointer() -> None:
    storage = ResultStorage()
    uri = await storage.write("of/jlarge.json", b"first")
    assert (
        await storage.write("of/jlarge.json", b"second")
        == uri
        == await storage.uri("of/jlarge.json")
    )
    assert await ResultStorage().read(uri) == b"second"


@pytest.mark.usefixtures("prefect_api")
async def test_a_result_that_is_gone_is_none() -> None:
    storage = ResultStorage()
    uri = await storage.write("of/jgone.json", b"x")
    await anyio.Path(uri.removeprefix("file://")).unlink()
    assert await storage.read(uri) is None


async def test_a_saved_storage_block_is_named_in_the_pointer(
    prefect_server: PrefectServer, tmp_path: Path, prefect_api: PrefectServer
) -> None:
    await LocalFileSystem(basepath=str(tmp_path / "kept")).asave("webapi-results", overwrite=True)
    block = "local-file-system/webapi-results"
    with pointed_at(prefect_server, PREFECT_DEFAULT_RESULT_STORAGE_BLOCK=block):
        uri = await ResultStorage().write("of/j kept.json", b"x")
    assert uri.startswith("prefect-block://")
    assert list((tmp_path / "kept").rglob("j kept.json"))
    assert await ResultStorage().read(uri) == b"x"


async def test_a_remote_storage_tells_services_its_own_address(
    prefect_server: PrefectServer, prefect_api: PrefectServer
) -> None:
    """REQ-66, REQ-68: what Prefect alone understands is no use to a remote job."""
    where = "memory://far"
    await RemoteFileSystem(basepath=where).asave("webapi-remote", overwrite=True)
    block = "remote-file-system/webapi-remote"
    with pointed_at(prefect_server, PREFECT_DEFAULT_RESULT_STORAGE_BLOCK=block):
        lasting = await ResultStorage().write("of/jfar.json", b"x")
        address = await ResultStorage().uri("of/jfar.json")
        assert address == f"{where}/of/jfar.json"
        assert await ResultStorage().read(address) == b"x"
    assert await ResultStorage().read(lasting) == b"x"


DIGEST = """
import asyncio, hashlib, sys
from prefect_webapi._prefect.outputs import ResultStorage
print(hashlib.sha256(asyncio.run(ResultStorage().read(sys.argv[1]))).hexdigest())
"""


class StoringPlugin(SinglePlugin):
    """Keeps a megabyte of its own, and the task as data; tells where."""

    async def outputs(self, ctx: StatusContext[JobHandle, JobView]) -> Any:
        name = f"{ctx.output_writer.raw_output_prefix}/figures"
        kept = await ctx.data_store.write(name, MEGABYTE)
        paths = [await ctx.task_reader.path(), await ctx.input_reader.path()]
        return {"uri": kept, "data": paths}


MEGABYTE = bytes(range(256)) * 4096


async def test_what_a_plugin_stores_is_read_by_other_processes(
    job_server: EmbeddedJobServer, tmp_path: Path, prefect_api: PrefectServer
) -> None:
    """CASE-272, CASE-277: under the job's own prefix; the task and its arguments as files that need no Prefect."""
    spec, entries = ReportJob(seconds=0.1, day=7), [entry(StoringPlugin, "keys")]
    storage = ResultStorage()
    with at(tmp_path, job_server, entries=entries, outputs=storage) as host:
        outcome = await run(host, spec, inputs={"since": date(2026, 11, 1)})
    assert f"/prefect-webapi/{outcome.job_key}/raw/figures" in outcome.value.uri
    command = [sys.executable, "-c", DIGEST, outcome.value.uri]
    told = await anyio.run_process(command, env=prefect_api.environment())
    assert told.stdout.decode().split() == [hashlib.sha256(MEGABYTE).hexdigest()]
    files = [anyio.Path(uri.removeprefix("file://")) for uri in outcome.value.data]
    task, inputs = [json.loads(await file.read_text()) for file in files]
    assert (task["type"], task["custom"]["day"]) == ("keys", 7)
    assert inputs == {"since": "2026-11-01"}


async def test_nothing_is_stored_for_who_does_not_ask(
    job_server: EmbeddedJobServer, tmp_path: Path
) -> None:
    """CASE-277."""
    with at(tmp_path, job_server) as host:
        await run(host, ReportJob(seconds=0.1))
    assert not (tmp_path / "outputs").exists()
