"""The quickstart's flow process, `python -m prefect_webapi.cli.flow_process`: runs one flow run, new or begun before.

Run again with the id of a flow run whose process died, it does what a worker does after a restart: the same flow run,
from the top. Its exit code is 0 when the flow run completed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.schemas.objects import FlowRun

__all__ = ["main"]

_PATIENCE_SECONDS = 240.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="prefect_webapi.cli.flow_process", description=__doc__)
    parser.add_argument("entrypoint", help="file.py:flow")
    parser.add_argument("--job-server", required=True, help="URL of the job server")
    parser.add_argument("--connection", required=True, help="name of the block to save")
    parser.add_argument("--quota", required=True, type=int, help="most live jobs")
    parser.add_argument(
        "--note", required=True, type=Path, help="file to write the flow run's id to"
    )
    parser.add_argument("--flow-run", type=UUID, help="flow run to run again; absent: a new one")
    return asyncio.run(_run(parser.parse_args()))


async def _run(given: argparse.Namespace) -> int:
    # Imports take seconds, in which Prefect's server starts as well.
    from prefect.client.orchestration import get_client
    from prefect.flow_engine import run_flow_async
    from prefect.flows import load_flow_from_entrypoint

    flow: Flow[..., Any] = load_flow_from_entrypoint(given.entrypoint, use_placeholder_flow=False)
    async with get_client() as client:
        await _until_healthy(client.api_healthcheck)
        if given.flow_run is None:
            await _save_connection(given.connection, given.job_server, given.quota)
            flow_run: FlowRun = await client.create_flow_run(flow)
        else:
            flow_run = await client.read_flow_run(given.flow_run)
    given.note.write_text(str(flow_run.id))
    state: Any = await run_flow_async(flow, flow_run=flow_run, return_type="state")
    return 0 if state.is_completed() else 1


async def _until_healthy(check: Any) -> None:
    async with asyncio.timeout(_PATIENCE_SECONDS):
        while await check() is not None:  # noqa: ASYNC110 - the server is another process
            await asyncio.sleep(0.2)


async def _save_connection(name: str, url: str, quota: int) -> None:
    from pydantic import HttpUrl, SecretStr

    from prefect_webapi import PluginConfig
    from prefect_webapi_jobserver import JobServer

    block = JobServer(
        base_url=HttpUrl(url),
        token=SecretStr("this job server asks for none"),
        engine=PluginConfig(resource_quotas={"default": quota}),
    )
    await block.asave(name, overwrite=True)


if __name__ == "__main__":
    sys.exit(main())
