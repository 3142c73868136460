"""Bare uvicorn: a hand-written ASGI application. Run: FILE MODEL PORT.

POST requests are answered with ONNX Runtime inline, one by one; a WebSocket gets its own frames
back, which is the least that a stream can cost in uvicorn.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import onnxruntime
import orjson
import uvicorn


class Application:
    """The ASGI application."""

    def __init__(self, model: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(model, options)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request or one WebSocket."""
        if scope["type"] == "websocket":
            await self._echo(receive, send)
        else:
            await self._compute_action(receive, send)

    async def _compute_action(self, receive: Any, send: Any) -> None:
        body = b""
        has_more = True
        while has_more:
            message = await receive()
            body += message.get("body", b"")
            has_more = message.get("more_body", False)
        batch = np.array([orjson.loads(body)["observation"]], dtype=np.float32)
        action = int(self._session.run(["action"], {"observation": batch})[0][0])
        answer = orjson.dumps({"action": action})
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(answer)),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    async def _echo(self, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while True:
            message = await receive()
            if message["type"] == "websocket.disconnect":
                return
            await send({"type": "websocket.send", "bytes": message["bytes"]})


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    uvicorn.run(
        Application(sys.argv[1]),
        host="127.0.0.1",
        port=int(sys.argv[2]),
        http="httptools",
        loop="uvloop",
        lifespan="off",
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    main()
