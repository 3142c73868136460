"""The web server of a replica: the application and the fast lane, on the public port itself.

With `--ingress direct` each replica listens there (`SO_REUSEPORT`), and the kernel gives a
connection to one of them. With `--ingress haproxy` Serve starts the web server, and only takes its
protocol class from here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
from typing import Any

import uvicorn
import uvicorn.config

from serving.hot_protocol import HotProtocol, bound
from serving.hot_routes import HotRoutes
from serving.uvicorn_fit import fits

_BACKLOG = 4096
_GRACE_S = 5
# libuv takes one new connection for each listener in a turn of the loop, which may be as long as
# all the connections before it have requests: a thousand would wait for seconds.
_LISTENERS = 16

logger = logging.getLogger("policyserve")


def protocol_class(routes: HotRoutes) -> type[HotProtocol] | str:
    """What `uvicorn.Config(http=...)` gets: the fast lane, or uvicorn's own where that is unlike.

    A protocol that does not fit costs speed alone: the application answers the same.
    """
    reason = fits()
    if reason is None:
        return bound(routes)
    logger.warning("no fast lane: %s; requests go the ordinary way", reason)
    return "httptools"


def install_in_serve(routes: HotRoutes) -> None:
    """Make the web server that Serve is about to start in this process use the fast lane."""
    chosen = protocol_class(routes)
    if not isinstance(chosen, str):
        # uvicorn imports what stands here if it is a string, and takes a class as it is.
        uvicorn.config.HTTP_PROTOCOLS["auto"] = chosen  # type: ignore[assignment]


class PublicServer:
    """A listener on the public port, shared with the other replicas of this machine."""

    def __init__(self, app: Any, routes: HotRoutes, host: str, port: int) -> None:
        self._address = (host, port)
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=protocol_class(routes),
                lifespan="off",
                access_log=False,
                log_config=None,
                log_level="critical",
                backlog=_BACKLOG,
                # Whole seconds, and 0 would close at once; `sweep` keeps the time exactly.
                timeout_keep_alive=math.ceil(routes.keep_alive_s),
                timeout_graceful_shutdown=_GRACE_S,
            )
        )
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: The port is somebody else's.
        """
        listener = shared_socket(*self._address)
        listeners = [listener, *(listener.dup() for _ in range(_LISTENERS - 1))]
        self._task = asyncio.create_task(self._server.serve(sockets=listeners))
        while not self._server.started:
            if self._task.done():
                self._task.result()
                raise OSError(f"the web server on {self._address} ended at its start")
            await asyncio.sleep(1e-3)

    async def stop(self) -> None:
        """Answer what has arrived, close every connection, stop listening."""
        self._server.should_exit = True
        if self._task is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._task


def shared_socket(host: str, port: int) -> socket.socket:
    """A bound socket that other processes of this user may bind as well.

    Raises:
        OSError: The port is taken by a process that does not share it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        # The second is for a port whose last connections are only winding down.
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except OSError:
        found.close()
        raise
    return found
