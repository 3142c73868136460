"""A request on its way, and the socket that it goes through, around `StreamWire`."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Any

from serving.endpoint import Endpoint
from serving.errors import PolicyServingError
from serving.stream_wire import StreamWire

_READ_BYTES = 65_536


class Question:
    """A request on its way.

    Attributes:
        body: What is sent.
        read: What reads the answer for the caller.
        n_refusals: How often the server asked to ask again.
        answer: The members of the answer, or why there is none; None until one is known.
    """

    __slots__ = ("answer", "body", "n_refusals", "read")

    def __init__(self, body: bytes, read: Callable[[Mapping[str, Any]], Any]) -> None:
        self.body = body
        self.read = read
        self.n_refusals = 0
        self.answer: Mapping[str, Any] | PolicyServingError | None = None


class BlockingConnection:
    """A stream over a socket that is waited for."""

    def __init__(self, endpoint: Endpoint, timeout_s: float) -> None:
        """Connect, and ask for a stream.

        Raises:
            OSError: No connection.
        """
        self.has_answered = False
        self._timeout_s = timeout_s
        self._wire = StreamWire(endpoint)
        self._socket: socket.socket = socket.create_connection(
            (endpoint.host, endpoint.port), timeout_s
        )
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if endpoint.scheme == "https":
                context = ssl.create_default_context()
                self._socket = context.wrap_socket(self._socket, server_hostname=endpoint.host)
            self._socket.sendall(self._wire.request())
        except BaseException:
            self._socket.close()
            raise

    def send(self, body: bytes) -> None:
        """Send a message; what is wrong with the connection is found when it is read.

        Raises:
            TimeoutError: The server does not take it.
        """
        self._write(self._wire.frame(body))

    def send_reading(self, body: bytes, take: Callable[[list[bytes]], None]) -> None:
        """Send a message, and read what comes meanwhile: a server may wait for that.

        Args:
            body: The message.
            take: Given the messages that came.

        Raises:
            TimeoutError: The server neither takes nor sends.
            PolicyServingError: The connection is over.
        """
        rest = memoryview(self._wire.frame(body))
        while rest:
            readable, writable, _ = select.select(
                [self._socket], [self._socket], [], self._timeout_s
            )
            if readable:
                take(self._read_some())
            elif writable:
                try:
                    n_sent = self._socket.send(rest[:_READ_BYTES])
                except (BrokenPipeError, ConnectionResetError):
                    return
                rest = rest[n_sent:]
            else:
                raise TimeoutError

    def read(self) -> list[bytes]:
        """Wait for messages, at least one.

        Raises:
            TimeoutError: None came.
            PolicyServingError: The connection is over.
        """
        started = time.monotonic()
        messages = self._read_some()
        if messages:
            return messages
        try:
            while not messages:  # a ping, or half a message
                rest_s = started + self._timeout_s - time.monotonic()
                self._socket.settimeout(max(rest_s, 1e-3))
                messages = self._read_some()
        finally:
            self._socket.settimeout(self._timeout_s)
        return messages

    def _read_some(self) -> list[bytes]:
        self._wire.check()
        try:
            data = self._socket.recv(_READ_BYTES)
        except TimeoutError:
            raise
        except OSError:
            data = b""
        messages = self._wire.feed(data)
        if self._wire.has_replies:
            self._write(self._wire.to_send())
        if not messages:
            self._wire.check()
        return messages

    def _write(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(data)

    def close(self) -> None:
        """Say farewell and close."""
        with contextlib.suppress(OSError):
            self._socket.sendall(self._wire.close_frame())
        self._socket.close()
