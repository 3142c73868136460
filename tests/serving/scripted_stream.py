"""A stream server that does what a test says: real sockets, a third-party WebSocket and msgpack.

It answers Discrete(1000) actions: the first number of the observation.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import ServerConnection, serve

BOX = {"type": "Box", "shape": [4], "dtype": "float32", "low": None, "high": None}
DESCRIPTION: dict[str, Any] = {
    "policy": "p",
    "version": 1,
    "policy_id": "0123456789ab",
    "observation_space": BOX,
    "action_space": {"type": "Discrete", "n": 1000, "start": 0},
    "inputs": [
        {"name": "observation", "role": "observation", "dtype": "float32", "shape": [-1, 4]}
    ],
    "answers": [{"name": "action", "dtype": "int64", "shape": []}],
    "takes": {"reward": False},
    "state": {},
}


def observation(number: float) -> np.ndarray[Any, Any]:
    """The observation whose action is this number."""
    return np.array([number, 0, 0, 0], np.float32)


def answer_to(frame: Any) -> bytes:
    """The right answer."""
    request = msgpack.unpackb(frame)
    many = "observations" in request
    numbers = np.frombuffer(request["observations" if many else "observation"], "<f4")[::4]
    actions = numbers.astype("<i8").tobytes()
    found: bytes = msgpack.packb({"actions" if many else "action": actions, "policy": "p"})
    return found


def problem(code: str, status: int, **details: Any) -> bytes:
    """A frame that states an error."""
    error = {"code": code, "status": status, "detail": "a reason", **details}
    found: bytes = msgpack.packb({"error": error})
    return found


def answer_all(connection: ServerConnection) -> None:
    """Answer until the client leaves."""
    for frame in connection:
        connection.send(answer_to(frame))


class ScriptedStream:
    """What the server was asked, and what it does next.

    The n-th connection is given to the n-th handler of the script, the rest to the last.
    """

    def __init__(self) -> None:
        self.handlers: list[Callable[[ServerConnection], None]] = [answer_all]
        self.pages: list[tuple[int, dict[str, str], bytes]] = []
        self.description = dict(DESCRIPTION)
        self.n_connections = 0
        self.n_descriptions = 0
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/policies/p"

    def script(self, *handlers: Callable[[ServerConnection], None]) -> None:
        self.handlers = list(handlers)

    def handle(self, connection: ServerConnection) -> None:
        index = min(self.n_connections, len(self.handlers) - 1)
        self.n_connections += 1
        with contextlib.suppress(ConnectionClosed):
            connection.send(msgpack.packb(self.description))
            self.handlers[index](connection)

    def respond(self, connection: ServerConnection, request: Request) -> Response | None:
        """Pages for what is no stream, or where the script says so."""
        if not request.path.endswith("/stream"):
            self.n_descriptions += 1
            return connection.respond(200, json.dumps(self.description))  # type: ignore[arg-type]
        if not self.pages:
            return None
        status, headers, body = self.pages.pop(0)
        response = connection.respond(status, body.decode())  # type: ignore[arg-type]
        for name, value in headers.items():
            response.headers[name] = value
        return response


@contextlib.contextmanager
def scripted_stream(max_size: int = 2**30) -> Iterator[ScriptedStream]:
    """Serve a script on an ephemeral port; stopped at the end.

    Args:
        max_size: The largest message that it takes, in bytes.
    """
    script = ScriptedStream()
    with serve(
        script.handle,
        "127.0.0.1",
        0,
        process_request=script.respond,
        compression=None,
        max_size=max_size,
        close_timeout=1,
    ) as server:
        script.port = server.socket.getsockname()[1]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield script
        finally:
            server.shutdown()
            thread.join(10)
