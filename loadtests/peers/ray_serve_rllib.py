"""Ray Serve as its RLlib tutorial does it. Run: FILE CHECKPOINT PORT.

The RLModule is restored from the checkpoint in the replica and computes one action a request, with
torch, as in the tutorial "Serve RLlib models" of Ray's documents, and with their settings.
"""

import logging
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray import serve
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModule
from starlette.requests import Request


@serve.deployment
class RLModulePolicy:
    """The policy as RLlib holds it."""

    def __init__(self, checkpoint: str) -> None:
        path = Path(checkpoint) / "learner_group" / "learner" / "rl_module" / DEFAULT_MODULE_ID
        self._rl_module: Any = RLModule.from_checkpoint(path)

    async def __call__(self, request: Request) -> dict[str, int]:
        """One action."""
        observation = (await request.json())["observation"]
        batch = torch.from_numpy(np.array([observation], dtype=np.float32))
        with torch.no_grad():
            found = self._rl_module.forward_inference({Columns.OBS: batch})
        logits = found[Columns.ACTION_DIST_INPUTS][0].numpy()
        return {"action": int(np.argmax(logits))}


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    checkpoint, port = sys.argv[1], int(sys.argv[2])
    stopped = threading.Event()
    ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    deployment: Any = RLModulePolicy
    serve.run(deployment.bind(checkpoint), route_prefix="/compute_action")
    stopped.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
