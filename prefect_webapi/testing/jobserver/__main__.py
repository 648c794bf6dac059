"""Starts the job server as a process of its own. Listens on this machine only."""

from __future__ import annotations

import asyncio
import os
import socket
import sys

import cyclopts
import uvicorn

from prefect_webapi.testing.jobserver.api import job_service

app = cyclopts.App(name="jobserver", help=__doc__, version_flags=[])

BACKLOG = 2048
PARENT_CHECK_SECONDS = 0.5


@app.default
def main(
    *,
    port: int = 0,
    token: str | None = None,
    speed: float = 1.0,
    until_parent_exits: bool = False,
) -> None:
    """Serve until interrupted. Prints `READY <url>` when requests are answered.

    Parameters
    ----------
    port
        0 takes a free one.
    token
        Bearer token that requests to the service must carry.
    speed
        Jobs' time runs this many times faster.
    until_parent_exits
        End when the process that started this one has ended.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        sys.exit(f"port {port} can't be had: {error.strerror}. Take another, or 0 for a free one")
    listener.listen(BACKLOG)  # who connects from now on is answered as soon as the loop runs
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    config = uvicorn.Config(
        job_service(url, speed=speed, token=token),
        log_level="critical",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=1,
    )
    asyncio.run(_serve(uvicorn.Server(config), listener, url, until_parent_exits))


async def _serve(
    server: uvicorn.Server, listener: socket.socket, url: str, until_parent_exits: bool
) -> None:
    parent = os.getppid()
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(server.serve(sockets=[listener]))
        sys.stdout.write(f"READY {url}\n")
        sys.stdout.flush()
        while until_parent_exits and not serving.done():
            if os.getppid() != parent:
                server.should_exit = True
            await asyncio.sleep(PARENT_CHECK_SECONDS)


if __name__ == "__main__":
    app()
