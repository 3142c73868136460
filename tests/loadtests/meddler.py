"""A server in front of a real one that meddles with its answers, once it is told to."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

# From status and body of the real answer to what the caller gets; None: hang up.
Meddle = Callable[[int, bytes], tuple[int, bytes] | None]


@dataclass
class Meddler:
    """Its own port, and how many answers it leaves alone before it meddles."""

    port: int
    meddle: Meddle
    n_honest: int

    def url(self, policy: str) -> str:
        return f"http://127.0.0.1:{self.port}/v1/policies/{policy}"


@contextlib.contextmanager
def meddling(port: int, meddle: Meddle, *, n_honest: int) -> Iterator[Meddler]:
    """Forward to a port of this machine."""
    meddler = Meddler(0, meddle, n_honest)
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self._answer(*self._forward(None))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            answer: tuple[int, bytes] | None = self._forward(body)
            with lock:
                meddler.n_honest -= 1
                is_honest = meddler.n_honest >= 0
            if not is_honest:
                answer = meddler.meddle(*answer)
            if answer is None:
                self.close_connection = True
                return
            self._answer(*answer)

        def _forward(self, body: bytes | None) -> tuple[int, bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            try:
                headers = {"content-type": self.headers.get("content-type", "application/json")}
                connection.request(self.command, self.path, body, headers)
                response = connection.getresponse()
                return response.status, response.read()
            finally:
                connection.close()

        def _answer(self, status: int, body: bytes) -> None:
            head = f"HTTP/1.1 {status} Meddled\r\ncontent-length: {len(body)}\r\n\r\n"
            self.wfile.write(head.encode() + body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    meddler.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield meddler
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def problem(status: int, code: str) -> tuple[int, bytes]:
    return status, json.dumps({"status": status, "code": code, "detail": "meddled"}).encode()
