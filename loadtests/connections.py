"""Kept-alive connections of the driver: one request on its way at a time.

HTTP and WebSocket look the same to the loops in `loadtests.open_loop`. An answer that is known
byte for byte, and whole in one read, is recognised without parsing it.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

import httptools
import orjson
from websockets.frames import Frame, Opcode

from loadtests.questions import Questions
from loadtests.recording import REJECTED
from serving.endpoint import Endpoint
from serving.stream_wire import StreamWire

_CLOSED = "the server closed the connection"


class Owner(Protocol):
    """Who hears of what happens on a connection."""

    questions: Questions

    def opened(self, connection: Connection) -> None:
        """It can be asked."""

    def answered(self, connection: Connection, problem: str | None) -> None:
        """The question is answered; None: rightly. Closed afterwards if `is_closing`."""

    def lost(self, connection: Connection, reason: str) -> None:
        """It is closed, with a question on its way if `is_busy`."""


class Connection(asyncio.Protocol):
    """One connection.

    Attributes:
        due: When the question on its way should have been sent.
        sent: When it was.
        since: When it was dialled, and then when it became idle.
        index: Which question it is.
        is_busy: Whether there is one.
        is_ready: Whether the connection was opened.
        is_closing: Whether it takes no further question.
    """

    def __init__(self, owner: Owner, messages: list[bytes]) -> None:
        self.owner = owner
        self.due = self.sent = 0.0
        self.since = perf_counter()
        self.index = 0
        self.is_busy = self.is_ready = self.is_closing = False
        self._is_lost = False
        self._messages = messages
        self._known = owner.questions.known
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """TCP, and TLS, are there."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are of no such class

    def ask(self, index: int, due: float) -> None:
        """Send a question."""
        assert self._transport is not None
        self.index = index
        self.due = due
        self.is_busy = True
        self.sent = perf_counter()
        self._transport.write(self._messages[index])

    def close(self) -> None:
        """End it, whatever is on its way; its owner knows."""
        self._is_lost = self.is_closing = True
        if self._transport is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The other side closed it, or it broke."""
        self._lost(f"the connection was lost ({type(exc).__name__})" if exc else _CLOSED)

    def _ready(self) -> None:
        self.is_ready = True
        self.since = perf_counter()
        self.owner.opened(self)

    def _answered(self, problem: str | None) -> None:
        self.is_busy = False
        self.since = perf_counter()
        self.owner.answered(self, problem)

    def _refused(self, reason: str) -> None:
        """The server will not talk to us on this connection."""
        self._lost(reason)
        self.close()

    def _lost(self, reason: str) -> None:
        if not self._is_lost:
            self._is_lost = self.is_closing = True
            self.owner.lost(self, reason)


class HttpConnection(Connection):
    """HTTP/1.1."""

    def __init__(self, owner: Owner, messages: list[bytes]) -> None:
        super().__init__(owner, messages)
        self._parser: httptools.HttpResponseParser | None = None
        self._parts: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It can be asked at once."""
        super().connection_made(transport)
        self._ready()

    def data_received(self, data: bytes) -> None:
        """An answer, or a part of one."""
        if self._parser is None and self.is_busy:
            end = data.find(b"\r\n\r\n") + 4
            if (
                data[end:] in self._known[self.index]
                and data.startswith(b"HTTP/1.1 200")
                and data.find(b": close", 0, end) < 0
            ):
                self._answered(None)
                return
        self._parse(data)

    def _parse(self, data: bytes) -> None:
        if not self.is_busy:
            self._refused("the server answered what nobody asked")
            return
        if self._parser is None:
            self._parser = httptools.HttpResponseParser(self)
            self._parts = []
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self._refused(f"the answer is no HTTP: {exc}")

    def on_body(self, data: bytes) -> None:
        """The parser's: a part of the body."""
        self._parts.append(data)

    def on_message_complete(self) -> None:
        """The parser's: the answer is whole."""
        assert self._parser is not None
        status, body = self._parser.get_status_code(), b"".join(self._parts)
        self.is_closing = not self._parser.should_keep_alive()
        self._parser = None
        if status == 200:
            self._answered(self.owner.questions.problem(self.index, body))
        else:
            self._answered(REJECTED if status == 503 else f"HTTP {status}: {_code(body)}")


class StreamConnection(Connection):
    """A WebSocket; the client's own protocol, which needs no socket."""

    def __init__(self, owner: Owner, messages: list[bytes], endpoint: Endpoint) -> None:
        super().__init__(owner, messages)
        self._wire = StreamWire(endpoint)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the upgrade; what comes first is the server's greeting."""
        super().connection_made(transport)
        assert self._transport is not None
        self._transport.write(self._wire.request())

    def data_received(self, data: bytes) -> None:
        """Frames, or parts of them."""
        wire = self._wire
        for message in wire.feed(data):
            if not self.is_ready:
                self._ready()
            elif not self.is_busy:
                self._refused("the server answered what nobody asked")
            elif message in self._known[self.index]:
                self._answered(None)
            else:
                self._answered(self.owner.questions.problem(self.index, message))
        reply = wire.to_send()
        if reply and self._transport is not None:
            self._transport.write(reply)
        if wire.error is not None and not self.is_closing:
            self._refused(wire.error.message)


def _code(body: bytes) -> str:
    try:
        return str(orjson.loads(body)["code"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return repr(body[:80])


@dataclass(frozen=True)
class Dialler:
    """Opens connections to one policy.

    Attributes:
        endpoint: Where the policy is.
        messages: What is written for each question.
        is_stream: WebSocket instead of HTTP.
        timeout_s: For opening one.
    """

    endpoint: Endpoint
    messages: list[bytes]
    is_stream: bool
    timeout_s: float

    async def dial(self, owner: Owner) -> Connection:
        """Open one; the owner hears when it can be asked.

        Raises:
            OSError: The reason why not; a time-out is one.
        """
        loop = asyncio.get_running_loop()
        tls = ssl.create_default_context() if self.endpoint.scheme == "https" else None

        def make() -> Connection:
            if self.is_stream:
                return StreamConnection(owner, self.messages, self.endpoint)
            return HttpConnection(owner, self.messages)

        dialled: Any = loop.create_connection(make, self.endpoint.host, self.endpoint.port, ssl=tls)
        _, connection = await asyncio.wait_for(dialled, self.timeout_s)
        assert isinstance(connection, Connection)
        return connection


def dialler(
    endpoint: Endpoint,
    questions: Questions,
    *,
    content_type: str,
    is_stream: bool,
    timeout_s: float,
) -> Dialler:
    """The dialler of a policy, with every message already written."""
    if is_stream:
        messages = [
            bytes(Frame(Opcode.BINARY, body).serialize(mask=True)) for body in questions.bodies
        ]
    else:
        path = endpoint.compute(b"").path
        host = urlsplit(endpoint.origin).netloc
        head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: {content_type}\r\n"
        messages = [
            f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
            for body in questions.bodies
        ]
    return Dialler(endpoint, messages, is_stream, timeout_s)
