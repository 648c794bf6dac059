"""An ASGI application on a socket of this machine, in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import uvicorn

__all__ = ["serve_app"]

START_SECONDS = 20.0


@contextmanager
def serve_app(app: Any, *, port: int = 0) -> Generator[str]:
    """Answer requests on 127.0.0.1 while the block lasts; gives the URL, without a slash at the end.

    Args:
        app: an ASGI 3 application: FastAPI's, Starlette's, or a function.
        port: 0 takes a free one.

    Raises:
        RuntimeError: it did not start.
    """
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host="127.0.0.1",
            port=port,
            log_config=None,
            lifespan="off",
            interface="asgi3",
            proxy_headers=False,
        )
    )
    failures: list[BaseException] = []

    def run() -> None:
        try:
            server.run()
        except BaseException as error:  # noqa: BLE001 - uvicorn leaves by SystemExit; told below
            failures.append(error)

    thread = threading.Thread(target=run, name="serve_app", daemon=True)
    thread.start()
    deadline = time.monotonic() + START_SECONDS
    try:
        while not server.started:
            if failures or time.monotonic() > deadline:
                raise RuntimeError("the server did not start") from next(iter(failures), None)
            time.sleep(0.005)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(START_SECONDS)
