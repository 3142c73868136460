"""Ray Serve with its defaults: FastAPI, `@serve.batch`, ONNX Runtime. Run: FILE MODEL PORT.

Written as Ray Serve's guides on FastAPI and dynamic request batching show it, with the settings
they start from, and only the environment that a user's shell has. No postponed annotations:
FastAPI has to see the request's model where Ray has pickled this script's classes.
"""

import logging
import signal
import sys
import threading
from typing import Any

import numpy as np
import ray
from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve

app = FastAPI()


class Request(BaseModel):
    """One observation."""

    observation: list[float]


@serve.deployment
@serve.ingress(app)
class BatchedPolicy:
    """The policy behind a batch handler."""

    def __init__(self, model: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(model, options)

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.001)
    async def compute(self, observations: list[list[float]]) -> list[Any]:
        """One batch."""
        batch = np.array(observations, dtype=np.float32)
        actions: list[Any] = self._session.run(["action"], {"observation": batch})[0].tolist()
        return actions

    @app.post("/compute_action")
    async def compute_action(self, request: Request) -> dict[str, Any]:
        """One action."""
        return {"action": await self.compute(request.observation)}


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    model, port = sys.argv[1], int(sys.argv[2])
    stopped = threading.Event()
    ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    deployment: Any = BatchedPolicy
    serve.run(deployment.bind(model))
    stopped.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
