"""Streams below ASGI: an asyncio protocol that takes a connection over from the HTTP server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from websockets.http11 import Request
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.typing import Subprotocol

from serving.errors import MalformedRequestError, PolicyServingError
from serving.service import PolicyService, problem_answer
from serving.stream import (
    GOING_AWAY,
    NO_ANSWER_TO_PINGS,
    PREFIX,
    SHUTTING_DOWN,
    SUBPROTOCOL,
    SUFFIX,
    StreamRegistry,
    StreamSession,
)
from serving.stream_frames import MessageReader, binary_frame

_HEAD_END = b"\r\n\r\n"
_LONGEST_HEAD = 65_536
_REASONS = {400: b"Bad Request", 404: b"Not Found", 503: b"Service Unavailable"}


def stream_opener(registry: StreamRegistry) -> Callable[[bytes], asyncio.Protocol | None]:
    """What makes the protocol of an upgrade request by its target, for `HotRoutes.open_stream`.

    The protocol then gets `connection_made` and the request's bytes. None for a target that is
    no stream's.
    """

    def open_stream(target: bytes) -> asyncio.Protocol | None:
        path = target.partition(b"?")[0].decode("latin-1")
        if not (path.startswith(PREFIX) and path.endswith(SUFFIX)):
            return None
        return StreamProtocol(registry, path)

    return open_stream


class StreamProtocol(asyncio.Protocol):
    """One stream on one connection."""

    def __init__(self, registry: StreamRegistry, path: str) -> None:
        """Store.

        Args:
            registry: Of the process.
            path: What is asked for: `/v1/policies/{policy}/stream`.
        """
        self._registry = registry
        self._settings = registry.settings
        self._path = path
        max_bytes = self._settings.max_message_bytes
        self._websocket = ServerProtocol(max_size=max_bytes, select_subprotocol=_choose)
        self._reader = MessageReader(self._websocket, max_bytes)
        self._session: StreamSession | None = None
        self._transport: Any = None
        self._loop = asyncio.get_running_loop()
        self._last_read = self._loop.time()
        self._keepalive: asyncio.TimerHandle | None = None
        self._farewell: asyncio.TimerHandle | None = None
        self._head = b""  # of a handshake that has not arrived as a whole
        self._is_writing_paused = False
        self._is_draining = False
        self._has_ended = False

    # --- asyncio's side ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection."""
        self._transport = transport
        self._registry.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """The client is gone."""
        self._registry.discard(self)
        self._leave()
        if self._farewell is not None:
            self._farewell.cancel()

    def data_received(self, data: bytes) -> None:
        """Answer the messages that have arrived."""
        self._last_read = self._loop.time()
        if self._session is None:
            self._open(data)
        else:
            self._reader.feed(data)
            self._read(self._session)

    def eof_received(self) -> None:
        """The client sends nothing more: without a farewell that is the end."""
        self._websocket.receive_eof()
        self._flush()

    def pause_writing(self) -> None:
        """A client that does not read is not read from."""
        self._is_writing_paused = True
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        """It reads again."""
        self._is_writing_paused = False
        self._read_on()

    # --- the registry's side ---

    def drain(self) -> None:
        """Answer what has been received, then say farewell."""
        self._is_draining = True
        if self._session is not None and not self._has_ended:
            self._transport.pause_reading()
            self._session.drain()
            self._close_if_drained(self._session)

    def abort(self) -> None:
        """Close now."""
        self._transport.abort()

    # --- opening ---

    def _open(self, data: bytes) -> None:
        data = self._head + data
        end = data.find(_HEAD_END)
        if end < 0:
            self._head = data
            if len(data) > _LONGEST_HEAD:
                self._transport.abort()
            return
        stop = end + len(_HEAD_END)
        self._head = b""
        self._websocket.receive_data(data[:stop])
        for event in self._websocket.events_received():
            assert isinstance(event, Request)
            self._answer(event)
        if self._session is not None and stop < len(data):
            self._reader.feed(data[stop:])
            self._read(self._session)

    def _answer(self, request: Request) -> None:
        """Accept or refuse the upgrade."""
        try:
            service = self._registry.require(self._path)
            response = self._websocket.accept(request)
            if response.status_code != 101:
                text = (response.body or b"").decode().partition("\n")[0]
                raise MalformedRequestError(text)
        except PolicyServingError as exc:
            self._refuse(exc)
            return
        self._websocket.send_response(response)
        self._flush()
        self._begin(service)

    def _begin(self, service: PolicyService) -> None:
        self._session = StreamSession(
            service, self._settings, send=self._send, has_room=self._read_on
        )
        self._send(self._session.greeting())
        self._keepalive = self._loop.call_later(self._settings.ping_interval_s, self._check)
        self._transport.resume_reading()

    def _refuse(self, error: PolicyServingError) -> None:
        """Answer in HTTP, as there is no stream."""
        answer = problem_answer(error)
        headers = [
            (b"content-type", answer.content_type),
            (b"content-length", b"%d" % len(answer.body)),
            (b"connection", b"close"),
            *answer.headers,
        ]
        lines = [b"%b: %b\r\n" % header for header in headers]
        status = b"HTTP/1.1 %d %b\r\n" % (answer.status, _REASONS.get(answer.status, b"Error"))
        self._transport.write(b"".join([status, *lines, b"\r\n", answer.body]))
        self._transport.close()

    # --- reading ---

    def _read(self, session: StreamSession) -> None:
        """Give the session the messages that it has room for."""
        reader = self._reader
        while not session.is_full:
            message = reader.next()
            if message is None:
                break
            if isinstance(message, str):
                session.receive_text()
            else:
                session.receive(message)
        else:
            self._transport.pause_reading()
        if reader.has_news:
            reader.has_news = False
            self._flush()

    def _read_on(self) -> None:
        """There is room again, or nothing left to answer."""
        session = self._session
        if session is None or self._has_ended or self._is_writing_paused or session.is_full:
            return
        self._read(session)
        if self._is_draining:
            self._close_if_drained(session)
        elif not (session.is_full or self._is_writing_paused or self._has_ended):
            self._transport.resume_reading()

    # --- writing ---

    def _send(self, message: bytes) -> None:
        self._transport.write(binary_frame(message))

    def _flush(self) -> None:
        """Write what the library has to say: answers to pings, farewells."""
        for data in self._websocket.data_to_send():
            if data:
                self._transport.write(data)
            else:
                self._end()

    # --- ending ---

    def _close_if_drained(self, session: StreamSession) -> None:
        if session.n_unanswered or self._has_ended or self._reader.has_message:
            return
        if self._websocket.state is State.OPEN:
            self._websocket.send_close(GOING_AWAY, SHUTTING_DOWN)
            self._flush()
            self._await_farewell()
            self._transport.resume_reading()

    def _end(self) -> None:
        """Nothing more will be written; wait for the client to close, but not for long."""
        self._has_ended = True
        self._leave()
        if self._transport.is_closing():
            return
        if self._transport.can_write_eof():
            # Closing at once could lose the farewell: what is unread would reset the connection.
            self._transport.write_eof()
            self._transport.resume_reading()
            self._await_farewell()
        else:
            self._transport.close()

    def _await_farewell(self) -> None:
        if self._farewell is None:
            delay_s = self._settings.close_timeout_s
            self._farewell = self._loop.call_later(delay_s, self._transport.abort)

    def _leave(self) -> None:
        if self._session is not None:
            self._session.leave()
        if self._keepalive is not None:
            self._keepalive.cancel()

    def _check(self) -> None:
        """Ping a connection that is idle; close one that is dead."""
        assert self._session is not None
        delay_s = self._settings.ping_interval_s
        now = self._loop.time()
        if self._session.n_unanswered and not self._is_writing_paused:
            self._last_read = now  # it is the server's turn
        idle_s = now - self._last_read
        if idle_s >= self._settings.dead_after_s:
            self._websocket.fail(NO_ANSWER_TO_PINGS, "no answer to pings")
            self._flush()
            return
        if idle_s < delay_s:
            delay_s -= idle_s
        elif not self._is_writing_paused and self._websocket.state is State.OPEN:
            self._websocket.send_ping(b"")
            self._flush()
        self._keepalive = self._loop.call_later(delay_s, self._check)


def _choose(_: ServerProtocol, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    return Subprotocol(SUBPROTOCOL) if SUBPROTOCOL in offered else None
