"""`python -m neuroscope_vllm.server side.json`: run the side process.

Ends on SIGTERM, and when the process that started it is gone.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import shutil
import signal
import socket
import sys
from pathlib import Path
from types import FrameType

import msgspec
import uvicorn
from fastapi import FastAPI
from sse_starlette.sse import AppStatus

from neuroscope_vllm.core.launch import SideConfig, files_wanted
from neuroscope_vllm.server.app import create_app
from neuroscope_vllm.server.connection import impatient
from neuroscope_vllm.server.hub import Hub

logger = logging.getLogger("neuroscope_vllm.server")

POLL_S = 0.1
GRACEFUL_S = 1
GC_THRESHOLDS = 20_000, 10, 5
"""Every reader is some 500 objects, and a full pass over a thousand of them takes 0.25 s. By
Python's own thresholds there would be one each second under load."""


class SideServer(uvicorn.Server):
    """Uvicorn that leaves Ctrl-C to its parent: the terminal sends it to both, and requests
    that the parent still drains should keep their features."""

    def __init__(self, config: uvicorn.Config, parent_pid: int) -> None:
        super().__init__(config)
        self.parent_pid = parent_pid

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGINT and self.parent_pid:
            return
        super().handle_exit(sig, frame)

    def orphaned(self) -> bool:
        return bool(self.parent_pid) and os.getppid() != self.parent_pid


async def serve(
    app: FastAPI, config: SideConfig, listener: socket.socket, runtime_directory: Path | None
) -> str | None:
    """Serve until told to end; returns why it never could, if so."""
    options = uvicorn.Config(
        app,
        http=impatient(app.state.refusals),
        ws="none",
        access_log=False,
        log_level="error",  # it warns of whatever is no HTTP, line by line; `refusals` counts that
        timeout_graceful_shutdown=GRACEFUL_S,
        server_header=False,
    )
    server = SideServer(options, config.parent_pid)
    farewell = asyncio.create_task(_say_goodbye(server, app, runtime_directory))
    await server.serve(sockets=[listener])
    farewell.cancel()
    return app.state.failure


async def _say_goodbye(server: SideServer, app: FastAPI, runtime_directory: Path | None) -> None:
    """Tell the readers as soon as the server is to end: uvicorn waits for their streams."""
    hub: Hub = app.state.hub
    while not server.should_exit:
        await asyncio.sleep(POLL_S)
        if server.orphaned():
            # Nobody is left to start us again, or to clean up.
            if runtime_directory is not None:
                shutil.rmtree(runtime_directory, ignore_errors=True)
            server.should_exit = True
        if app.state.failure and not server.parent_pid:
            server.should_exit = True  # a front process would show it in its /health
    # sse-starlette looks for this only; it gives streams SHUTDOWN_GRACE_S from here.
    AppStatus.should_exit = True
    hub.close("shutdown")


def allow_files(wanted: int) -> None:
    """A reader is an open file; shells often allow 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        logger.warning(
            "neuroscope: this process may open %d files, too few for max_readers; raise the hard"
            " limit (ulimit -Hn) to %d.",
            hard,
            wanted,
        )
        wanted = hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def run(
    config: SideConfig,
    listener: socket.socket,
    runtime_directory: Path | None = None,
    app: FastAPI | None = None,
) -> None:
    """Run the side process in this one. Exits with a sentence when it can not work alone.

    `app` is made from the same config; None: the one that engines connect to.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    allow_files(files_wanted(config.settings))
    host, port = listener.getsockname()[:2]
    logger.info("neuroscope: features of %s on http://%s:%s", config.model, host, port)
    app = app or create_app(config)
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    if failure := asyncio.run(serve(app, config, listener, runtime_directory)):
        sys.exit(f"neuroscope: {failure}")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python -m neuroscope_vllm.server side.json")
    path = Path(sys.argv[1])
    config = msgspec.json.decode(path.read_bytes(), type=SideConfig)
    run(config, socket.socket(fileno=config.listen_fd), path.parent)


if __name__ == "__main__":
    main()
