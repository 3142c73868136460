"""HTTP on bytes: requests as clients write them, answers as the standard library reads them.

`converse` gives a protocol class exactly the segments that a test chose, which no real socket can
promise; `Caller` is a client on a real socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import itertools
import json
import re
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from tests.serving.deadline import DEADLINE_S

_FINAL = re.compile(rb"HTTP/1\.1 [2-5]\d\d ")
_QUIET_TURNS = 4
# What the same request has to bring whichever way it goes; dates and ids are its own.
_COMPARED = ("content-type", "content-length", "allow", "retry-after", "connection")


@dataclass(frozen=True)
class Reply:
    """An answer without its date; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def comparable(self) -> tuple[Any, ...]:
        return (self.status, [self.headers.get(name) for name in _COMPARED], self.body)


def path_of(policy: str) -> str:
    return f"/v1/policies/{policy}/compute_action"


def post(
    body: bytes | str, policy: str = "box", *, headers: Sequence[str] = (), path: str | None = None
) -> bytes:
    """A whole POST; `headers` come before its length."""
    content = body.encode() if isinstance(body, str) else body
    lines = [
        f"POST {path or path_of(policy)} HTTP/1.1",
        "host: x",
        "content-type: application/json",
        *headers,
        f"content-length: {len(content)}",
    ]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + content


def get(path: str, method: str = "GET", *, headers: Sequence[str] = ()) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "host: x", *headers]).encode() + b"\r\n\r\n"


def chunked(*parts: bytes, policy: str = "box") -> bytes:
    head = f"POST {path_of(policy)} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    return head.encode() + b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in (*parts, b""))


class _Open:
    """A file that whoever reads an answer from it cannot close."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def close(self) -> None:
        pass


class _Source:
    """What `http.client` takes for a socket."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def makefile(self, _: str) -> Any:
        return _Open(self._file)


def read_reply(file: Any, method: str = "POST") -> Reply:
    """The next answer in a file of answers; an interim 100 is read over."""
    response = http.client.HTTPResponse(_Source(file), method=method)  # type: ignore[arg-type]
    response.begin()
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Reply(response.status, headers, response.read())


def read_replies(data: bytes, methods: Sequence[str]) -> list[Reply]:
    """The answers to requests with these methods; nothing else may be there."""
    file = io.BufferedReader(io.BytesIO(data))  # type: ignore[type-var]
    replies = [read_reply(file, method) for method in methods]
    assert file.read() == b"", "more than one answer to a request"
    return replies


class Caller:
    """A client's connection."""

    def __init__(self, port: int, *, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(DEADLINE_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.connect(("127.0.0.1", port))
        self._file = self.socket.makefile("rb")

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self, method: str = "POST") -> Reply:
        return read_reply(self._file, method)

    def read_all(self, pattern: re.Pattern[bytes], n: int) -> list[bytes]:
        """The first n matches in what the server sends from here on."""
        found: list[bytes] = []
        rest = b""
        while len(found) < n:
            received = self._file.read1(1 << 20)
            assert received, "the server closed the connection"
            rest += received
            matches = list(pattern.finditer(rest))
            found += [match[1] for match in matches]
            rest = rest[matches[-1].end() :] if matches else rest
        return found

    def ask(self, data: bytes, method: str = "POST") -> Reply:
        self.send(data)
        return self.read(method)

    def is_closed_by_server(self) -> bool:
        """Wait for the end of the connection; False if there are further bytes."""
        with contextlib.suppress(ConnectionResetError):
            return self._file.read(1) == b""
        return True

    def vanish(self) -> None:
        """Go without a goodbye: the server meets a reset, not an end."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._file.close()
        self.socket.close()


class MemoryTransport(asyncio.Transport):
    """A connection in memory whose other end the test is."""

    def __init__(self, *, is_read: bool = True) -> None:
        super().__init__()
        self.written = bytearray()
        self.is_closed = False
        self.is_paused = False
        self.protocol: asyncio.BaseProtocol | None = None
        self._is_read = is_read

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"sockname": ("127.0.0.1", 1), "peername": ("127.0.0.1", 2)}.get(name, default)

    def write(self, data: Any) -> None:
        assert not self.is_closed, "written after the end"
        self.written += data

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            assert self.protocol is not None
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    def abort(self) -> None:
        self.close()

    def is_closing(self) -> bool:
        return self.is_closed

    def pause_reading(self) -> None:
        assert not self.is_paused, "paused twice"
        self.is_paused = True

    def resume_reading(self) -> None:
        assert self.is_paused, "not paused"
        self.is_paused = False

    def get_write_buffer_size(self) -> int:
        return 0

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol


async def converse(
    app: Any,
    protocol_class: type[HttpToolsProtocol],
    segments: Sequence[bytes],
    n_answers: int,
    *,
    breaks: Sequence[bool] | None = None,
) -> bytes:
    """Everything that a connection answers to segments that arrive as they are.

    Args:
        app: The ASGI application.
        protocol_class: Of the connection.
        segments: What the client sends, piece by piece.
        n_answers: How many answers there have to be, unless the server closes before.
        breaks: Whether the server gets to do something else after each of them; None: never.
    """
    config = uvicorn.Config(app, http=protocol_class, lifespan="off", log_config=None)
    config.load()
    protocol = protocol_class(config, ServerState(), {})
    transport = MemoryTransport()
    transport.protocol = protocol
    protocol.connection_made(transport)
    async with asyncio.timeout(DEADLINE_S):
        for number, segment in enumerate(segments):
            while transport.is_paused and not transport.is_closed:
                await asyncio.sleep(0)
            if transport.is_closed:
                break
            protocol.data_received(segment)
            if breaks is not None and breaks[number]:
                await asyncio.sleep(0)
        while not transport.is_closed and len(_FINAL.findall(transport.written)) < n_answers:
            await asyncio.sleep(0)
    for _ in range(_QUIET_TURNS):  # whatever comes beside what was asked for
        await asyncio.sleep(0)
    if not transport.is_closed:
        transport.close()
        await asyncio.sleep(0)
    return bytes(transport.written)


def cuts(data: bytes, places: Sequence[int]) -> Iterator[bytes]:
    """The pieces of `data` between places."""
    edges = [0, *sorted({place for place in places if 0 < place < len(data)}), len(data)]
    for start, end in itertools.pairwise(edges):
        yield data[start:end]
