"""An HTTP server that answers what a test says, in raw bytes."""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
from typing import Any

from tests.serving.deadline import DEADLINE_S

REQUEST = {"observation": [0, 0, 0, 0]}
BOX = {"type": "Box", "shape": [4], "dtype": "float32", "low": None, "high": None}
DISCRETE = {"type": "Discrete", "n": 3, "start": 0}
DESCRIPTION = {"policy": "p", "observation_space": BOX, "action_space": DISCRETE}


def answer(status: int, body: Any, *headers: str, content_type: str = "application/json") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"HTTP/1.1 {status} Reason",
        f"content-type: {content_type}",
        f"content-length: {len(data)}",
        *headers,
        "",
        "",
    ]
    return "\r\n".join(lines).encode() + data


OK = answer(200, {"action": 1})
HANG = b"hang"
CLOSE = b""


class ScriptedServer:
    """Answers the n-th request with the n-th step of a script: bytes, CLOSE or HANG."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, bytes]] = []
        self.n_connections = 0
        self._steps: queue.SimpleQueue[tuple[bytes, bool]] = queue.SimpleQueue()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._is_over = threading.Event()
        self._threads[0].start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1/policies/p"

    def script(self, *steps: bytes, close_after: bool = False) -> None:
        for step in steps:
            self._steps.put((step, close_after))

    def close(self) -> None:
        self._is_over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(DEADLINE_S)
        for connection in self._open:
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.n_connections += 1
            self._open.append(connection)
            thread = threading.Thread(target=self._serve, args=[connection], daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as reader:
            while self._serve_one(connection, reader):
                pass
        with contextlib.suppress(OSError):  # the other side was first
            connection.shutdown(socket.SHUT_RDWR)

    def _serve_one(self, connection: socket.socket, reader: Any) -> bool:
        try:
            first = reader.readline()
            if not first:
                return False
            length = 0
            while (line := reader.readline().strip()) != b"":
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
            body = reader.read(length)
        except OSError:
            return False
        method, path, _ = first.decode().split()
        self.requests.append((method, path, body))
        step, close_after = self._steps.get_nowait()
        if step == HANG:
            self._is_over.wait(DEADLINE_S)
            return False
        if step == CLOSE:
            return False
        connection.sendall(step)
        return not close_after


def problem(code: str, status: int, *headers: str) -> bytes:
    body = {"code": code, "status": status, "detail": "a reason"}
    return answer(status, body, *headers, content_type="application/problem+json")
