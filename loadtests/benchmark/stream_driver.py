"""A closed-loop WebSocket driver on bare sockets: the least that a client in Python can cost.

Each connection sends one masked binary frame again and again, and keeps `depth` of them
unanswered. The first answer of each connection is decoded and compared with ONNX Runtime's own
actions; every later one has to be the same bytes.
"""

from __future__ import annotations

import base64
import json
import select
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from loadtests.benchmark.bodies import msgpack_actions
from loadtests.benchmark.http_driver import percentiles_ms, run_driver
from loadtests.benchmark.results import DriverResult
from loadtests.errors import LoadTestError

_BINARY = 0x82  # the only frame of its message
_MASKED = 0x80
_KEY = b"\x37\xfa\x21\x3d"
_WARM_UP_S = 0.3
_TIMEOUT_S = 10.0
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Messages:
    """What a stream driver sends.

    Attributes:
        url: `http://HOST:PORT/PATH`.
        bodies: Messages; each connection keeps to one.
        actions: What has to be in the answer to each; None: the message itself.
        has_greeting: Whether the server speaks first.
    """

    url: str
    bodies: Sequence[bytes]
    actions: Sequence[Sequence[int]] | None
    has_greeting: bool


def drive_stream(
    messages: Messages, *, connections: int, depth: int, duration_s: float
) -> DriverResult:
    """Load a stream, in a process of its own.

    Args:
        messages: What to send.
        connections: How many.
        depth: Unanswered messages on each.
        duration_s: How long.

    Raises:
        LoadTestError: The server refused, or answered something else.
    """
    order: dict[str, object] = {
        "url": messages.url,
        "bodies": [base64.b64encode(body).decode() for body in messages.bodies],
        "actions": messages.actions,
        "has_greeting": messages.has_greeting,
        "connections": connections,
        "depth": depth,
        "duration_s": duration_s,
    }
    return run_driver("loadtests.benchmark.stream_driver", order)


def masked_frame(payload: bytes) -> bytes:
    """A message as a client sends it (RFC 6455, section 5.2)."""
    n = len(payload)
    if n < 126:
        head = struct.pack("!BB", _BINARY, _MASKED | n)
    elif n < 1 << 16:
        head = struct.pack("!BBH", _BINARY, _MASKED | 126, n)
    else:
        head = struct.pack("!BBQ", _BINARY, _MASKED | 127, n)
    key = np.frombuffer(_KEY * (n // 4 + 1), dtype=np.uint8)[:n]
    return head + _KEY + (np.frombuffer(payload, dtype=np.uint8) ^ key).tobytes()


class _Stream:
    """One connection, after the upgrade and its first answer."""

    def __init__(self, messages: Messages, index: int) -> None:
        parts = urlsplit(messages.url)
        address = (parts.hostname or "127.0.0.1", parts.port or 80)
        self.socket = socket.create_connection(address, timeout=_TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""
        self.sent: deque[float] = deque()
        self._upgrade(parts.path, f"{address[0]}:{address[1]}")
        if messages.has_greeting:
            self._read_frame()
        body = messages.bodies[index % len(messages.bodies)]
        self.frame = masked_frame(body)
        self.socket.sendall(self.frame)
        self.expected, payload = self._read_frame()
        if messages.actions is None:
            _require(payload == body, f"the echo differs: {payload[:80]!r}")
        else:
            _check(payload, list(messages.actions[index % len(messages.actions)]))

    def _upgrade(self, path: str, host: str) -> None:
        self.socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        while b"\r\n\r\n" not in self._buffer:
            self._receive()
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        status = head.split(b"\r\n", 1)[0].decode("latin-1")
        _require(" 101 " in status, f"no stream here: {status}")

    def _receive(self) -> None:
        data = self.socket.recv(_CHUNK)
        _require(bool(data), "the server closed the stream")
        self._buffer += data

    def _read_frame(self) -> tuple[bytes, bytes]:
        """The next frame, whole and its payload."""
        start, length = 2, None
        while length is None or len(self._buffer) < start + length:
            if length is None and len(self._buffer) >= 10:
                start, length = _extent(self._buffer)
            elif length is None and len(self._buffer) >= 2 and self._buffer[1] < 126:
                start, length = 2, self._buffer[1]
            else:
                self._receive()
        frame, self._buffer = self._buffer[: start + length], self._buffer[start + length :]
        _require(frame[0] == _BINARY, f"expected a binary frame, found {frame[:80]!r}")
        return frame, frame[start:]

    def send(self, n: int) -> None:
        """Send the message n times."""
        self.sent.extend([time.perf_counter()] * n)
        self.socket.sendall(self.frame * n)

    def take(self) -> int:
        """Read what is there; how many answers that completes."""
        self._receive()
        size = len(self.expected)
        n = len(self._buffer) // size
        whole = self._buffer[: n * size]
        _require(whole == self.expected * n, f"an answer differs: {self._buffer[:80]!r}")
        self._buffer = self._buffer[n * size :]
        return n


def _extent(head: bytes) -> tuple[int, int]:
    """Where a frame's payload starts and how long it is."""
    if head[1] < 126:
        return 2, head[1]
    if head[1] == 126:
        return 4, struct.unpack("!H", head[2:4])[0]
    return 10, struct.unpack("!Q", head[2:10])[0]


def _check(payload: bytes, expected: list[int]) -> None:
    try:
        found = msgpack_actions(payload, len(expected))
    except ValueError as exc:
        raise LoadTestError(str(exc)) from exc
    _require(found == expected, "the stream's actions are not ONNX Runtime's")


def _require(is_so: bool, problem: str) -> None:
    if not is_so:
        raise LoadTestError(problem)


class _Clock:
    """Latencies after the warm-up."""

    def __init__(self, duration_s: float) -> None:
        self.started = time.perf_counter() + _WARM_UP_S
        self.deadline = self.started + duration_s
        self.latencies: list[float] = []

    def note(self, stream: _Stream, n: int) -> bool:
        """Count n answers; whether there is time for more."""
        now = time.perf_counter()
        for _ in range(n):
            sent = stream.sent.popleft()
            if now > self.started:
                self.latencies.append(now - sent)
        return now < self.deadline

    def result(self) -> DriverResult:
        """What was counted."""
        rate = len(self.latencies) / (time.perf_counter() - self.started)
        return DriverResult(rate, *percentiles_ms(self.latencies), 0)


def _drive_one(stream: _Stream, clock: _Clock) -> None:
    stream.send(1)
    while True:
        n = stream.take()
        if n:
            if not clock.note(stream, n):
                return
            stream.send(n)


def _drive_many(streams: Sequence[_Stream], depth: int, clock: _Clock) -> None:
    poll = select.epoll()
    by_number = {stream.socket.fileno(): stream for stream in streams}
    for number, stream in by_number.items():
        poll.register(number, select.EPOLLIN)
        stream.send(depth)
    has_time = True
    while has_time:
        for number, _ in poll.poll(_TIMEOUT_S):
            stream = by_number[number]
            n = stream.take()
            if n:
                has_time = clock.note(stream, n)
                stream.send(n)
    poll.close()


def drive(order: dict[str, Any]) -> DriverResult:
    """Do what `drive_stream` asks for.

    Raises:
        LoadTestError: The server refused, or answered something else.
    """
    bodies = [base64.b64decode(body) for body in order["bodies"]]
    messages = Messages(order["url"], bodies, order["actions"], order["has_greeting"])
    streams = [_Stream(messages, index) for index in range(order["connections"])]
    try:
        clock = _Clock(order["duration_s"])
        if len(streams) == 1 and order["depth"] == 1:
            _drive_one(streams[0], clock)
        else:
            _drive_many(streams, order["depth"], clock)
        return clock.result()
    finally:
        for stream in streams:
            stream.socket.close()


def main() -> None:
    """The driver as a process of its own: JSON in, JSON out."""
    try:
        print(json.dumps(asdict(drive(json.load(sys.stdin)))))
    except (LoadTestError, OSError) as exc:
        sys.exit(exc.message if isinstance(exc, LoadTestError) else str(exc))


if __name__ == "__main__":
    main()
