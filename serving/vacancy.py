"""What the public port says while no replica listens on it.

Replicas share the port themselves, so when the last one dies callers would be refused until Serve
has started its successor. Meanwhile the server's own process answers: 503 with `Retry-After`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from serving.errors import PolicyNotReadyError, problem
from serving.public_server import shared_socket

# The kernel walks all its sockets for each look, which takes it some ten milliseconds: seldom while
# all is well, often while somebody waits for a replica.
_LOOK_S = 1.0
_LOOK_SOON_S = 0.1
_READ_S = 1.0
_LISTEN = "0A"  # linux/tcp_states.h
_BODY = json.dumps(problem(PolicyNotReadyError("no replica can answer now; try again"))).encode()
_ANSWER = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/problem+json\r\n"
    b"content-length: %d\r\nretry-after: 1\r\nconnection: close\r\n\r\n%b" % (len(_BODY), _BODY)
)


@contextlib.contextmanager
def held(host: str, port: int, *, look_s: float = _LOOK_S) -> Iterator[threading.Event]:
    """Hold the public port for the block: nobody else can take it, and somebody always answers.

    Args:
        host: The address.
        port: The port.
        look_s: Seconds until it is noticed that no replica listens any more.

    Yields:
        Set when the first replica has been seen to listen: from then on there is somebody to stand
        in for.

    Raises:
        OSError: The port is taken by a process that does not share it.
    """
    stopped, was_served = threading.Event(), threading.Event()
    # Bound and not listening: the kernel gives it no connections, and nobody else the port.
    reserved = shared_socket(host, port)
    thread = threading.Thread(
        target=lambda: asyncio.run(_watch(reserved, (host, port), stopped, was_served, look_s)),
        name="vacancy",
        daemon=True,
    )
    thread.start()
    try:
        yield was_served
    finally:
        stopped.set()
        thread.join()


async def _watch(
    reserved: socket.socket,
    address: tuple[str, int],
    stopped: threading.Event,
    was_served: threading.Event,
    look_s: float,
) -> None:
    stand_in: asyncio.Server | None = None
    try:
        while not stopped.is_set():
            is_well = stand_in is None and was_served.is_set()
            await _until(stopped, look_s if is_well else _LOOK_SOON_S)
            is_served = bool(listeners(address[1]) - _inodes(stand_in))
            if is_served:
                was_served.set()
            if is_served and stand_in is not None:
                reserved = shared_socket(*address)
                stand_in.close()
                stand_in = None
            elif was_served.is_set() and not is_served and stand_in is None:
                stand_in = await asyncio.start_server(_answer, sock=reserved)
    finally:
        if stand_in is not None:
            stand_in.close()  # and the socket with it
        else:
            reserved.close()


async def _until(stopped: threading.Event, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not stopped.is_set() and time.monotonic() < deadline:
        await asyncio.sleep(min(seconds, _LOOK_SOON_S))


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
        # What is not read before the end would make the kernel take the answer back.
        await asyncio.wait_for(reader.read(65536), _READ_S)
        writer.write(_ANSWER)
        await asyncio.wait_for(writer.drain(), _READ_S)
    writer.close()


def listeners(port: int) -> set[int]:
    """The inodes of the sockets that listen on a port of this machine."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                columns = line.split()
                if columns[3] == _LISTEN and int(columns[1].rpartition(":")[2], 16) == port:
                    found.add(int(columns[9]))
    return found


def _inodes(server: asyncio.Server | None) -> set[int]:
    return set() if server is None else {os.fstat(each.fileno()).st_ino for each in server.sockets}
