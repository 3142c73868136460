"""Streams as an ASGI endpoint, for where `serving.stream_protocol` cannot take the connection."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from starlette.routing import Route, WebSocketRoute

from serving.compute_action import Receive, Scope, Send
from serving.errors import NotFoundError, PolicyServingError
from serving.service import problem_answer
from serving.stream import (
    GOING_AWAY,
    MESSAGE_TOO_BIG,
    PREFIX,
    SHUTTING_DOWN,
    SUBPROTOCOL,
    SUFFIX,
    StreamRegistry,
    StreamSession,
)

logger = logging.getLogger("policyserve")

_REFUSED = 1008  # before the handshake a server makes HTTP 403 of it


def stream_routes(registry: StreamRegistry) -> list[Any]:
    """The routes of an application that streams."""
    path = f"{PREFIX}{{policy}}{SUFFIX}"
    return [WebSocketRoute(path, StreamEndpoint(registry)), Route(path, _no_upgrade)]


async def _no_upgrade(request: Any) -> None:
    raise NotFoundError(
        f"{request.url.path} is a WebSocket, found a plain {request.method}; open it with ws:// or "
        "wss://"
    )


class StreamEndpoint:
    """The endpoint of `/v1/policies/{policy}/stream`."""

    def __init__(self, registry: StreamRegistry) -> None:
        self._registry = registry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        await receive()  # websocket.connect
        try:
            service = self._registry.require(scope["path"])
        except PolicyServingError as exc:
            await _refuse(exc, scope, send)
            return
        offered = SUBPROTOCOL in scope.get("subprotocols", ())
        await send({"type": "websocket.accept", "subprotocol": SUBPROTOCOL if offered else None})
        connection = _Connection(self._registry, send)
        session = StreamSession(
            service,
            self._registry.settings,
            send=connection.queue,
            has_room=connection.wake,
        )
        await connection.run(session, receive)


async def _refuse(error: PolicyServingError, scope: Scope, send: Send) -> None:
    """Answer with problem+json where the server can, else close (the client sees HTTP 403)."""
    if "websocket.http.response" not in (scope.get("extensions") or {}):
        await send({"type": "websocket.close", "code": _REFUSED, "reason": error.code})
        return
    answer = problem_answer(error)
    headers = [
        (b"content-type", answer.content_type),
        (b"content-length", b"%d" % len(answer.body)),
        *answer.headers,
    ]
    start = "websocket.http.response.start"
    await send({"type": start, "status": answer.status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": answer.body})


class _Connection:
    """One accepted connection: a task that reads, and one that writes."""

    def __init__(self, registry: StreamRegistry, send: Send) -> None:
        self._registry = registry
        self._send = send
        self._outgoing: asyncio.Queue[bytes | tuple[int, str]] = asyncio.Queue()
        self._may_go_on = asyncio.Event()
        self._session: StreamSession | None = None
        self._reader: asyncio.Task[None] | None = None
        self._is_draining = False
        self._is_closing = False

    def queue(self, message: bytes) -> None:
        """Send an answer, later."""
        self._outgoing.put_nowait(message)

    def wake(self) -> None:
        """The session has room, or has answered everything."""
        self._may_go_on.set()
        if self._is_draining and self._session is not None and not self._session.n_unanswered:
            self._close(GOING_AWAY, SHUTTING_DOWN)

    def drain(self) -> None:
        """Answer what has been received, then say farewell."""
        self._is_draining = True
        if self._session is not None:
            self._session.drain()
            self.wake()

    def abort(self) -> None:
        """Close now."""
        if self._reader is not None:
            self._reader.cancel()

    def _close(self, code: int, reason: str) -> None:
        if not self._is_closing:
            self._is_closing = True
            self._outgoing.put_nowait((code, reason))

    async def run(self, session: StreamSession, receive: Receive) -> None:
        """Serve the connection until it ends."""
        self._session = session
        self.queue(session.greeting())
        self._registry.add(self)
        writer = asyncio.create_task(self._write())
        self._reader = asyncio.create_task(self._read(session, receive))
        try:
            await asyncio.wait([writer, self._reader], return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._registry.discard(self)
            session.leave()
            writer.cancel()
            self._reader.cancel()
            ended = await asyncio.gather(writer, self._reader, return_exceptions=True)
            for error in ended:
                # A client that is gone is an OSError.
                if isinstance(error, Exception) and not isinstance(error, OSError):
                    logger.error("a stream failed", exc_info=error)

    async def _read(self, session: StreamSession, receive: Receive) -> None:
        settings = self._registry.settings
        while True:
            while session.is_full or self._outgoing.qsize() > settings.max_unanswered:
                self._may_go_on.clear()
                await self._may_go_on.wait()
            message = await receive()
            if message["type"] != "websocket.receive":
                return
            if self._is_draining or self._is_closing:
                continue  # a farewell is on its way
            data = message.get("bytes")
            if data is None:
                session.receive_text()
            elif len(data) <= settings.max_message_bytes:
                session.receive(data)
            else:
                session.leave()
                self._close(MESSAGE_TOO_BIG, f"over {settings.max_message_bytes} bytes")

    async def _write(self) -> None:
        while True:
            message = await self._outgoing.get()
            if isinstance(message, tuple):
                code, reason = message
                await self._send({"type": "websocket.close", "code": code, "reason": reason})
                return
            await self._send({"type": "websocket.send", "bytes": message})
            self._may_go_on.set()
