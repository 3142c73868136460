"""The barest server: an asyncio protocol on httptools, no web server. Run: FILE MODEL PORT MODE.

MODE `inference` computes what arrived in one turn of the event loop as one batch, `constant`
answers the same bytes to everybody: what HTTP alone costs in Python on this machine. No
validation, no metrics, no request ids, no limits, no errors, no other routes.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import httptools
import numpy as np
import onnxruntime
import orjson
import uvloop

_ANSWERS = [
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 12\r\n\r\n"
    b'{"action":%d}' % action
    for action in range(2)
]


class Batch:
    """What has arrived in this turn of the event loop."""

    def __init__(self, model: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(model, options)
        self._rows: list[list[float]] = []
        self._connections: list[Any] = []

    def add(self, body: bytes, connection: Any) -> None:
        """Queue one request; it is answered on the next turn."""
        if not self._rows:
            asyncio.get_running_loop().call_soon(self._run)
        self._rows.append(orjson.loads(body)["observation"])
        self._connections.append(connection)

    def _run(self) -> None:
        rows, connections = self._rows, self._connections
        self._rows, self._connections = [], []
        batch = np.array(rows, dtype=np.float32)
        actions = self._session.run(["action"], {"observation": batch})[0].tolist()
        for connection, action in zip(connections, actions, strict=True):
            connection.answer(_ANSWERS[action])


class Connection(asyncio.Protocol):
    """One connection; `batch` is None where every answer is the same."""

    def __init__(self, batch: Batch | None) -> None:
        self._batch = batch
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""

    def connection_made(self, transport: Any) -> None:
        """Keep the transport."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Parse."""
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        """A part of a body."""
        self._body += body

    def on_message_complete(self) -> None:
        """A whole request."""
        if self._batch is None:
            self.answer(_ANSWERS[0])
        else:
            self._batch.add(self._body, self)
        self._body = b""

    def answer(self, response: bytes) -> None:
        """Write, unless the caller is gone."""
        if not self._transport.is_closing():
            self._transport.write(response)


async def serve(model: str, port: int, mode: str) -> None:
    """Serve for ever."""
    batch = Batch(model) if mode == "inference" else None
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(batch), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
