"""BentoML. Run: FILE MODEL PORT BATCH_SIZE.

A service as BentoML's own documents show it, one worker, without its access log. BATCH_SIZE above
1 uses its adaptive batching, whose API takes and gives lists.
"""

import os
import sys
from pathlib import Path
from typing import Any

import bentoml
import numpy as np
import onnxruntime

_BATCH_SIZE = int(os.environ.get("POLICY_BATCH_SIZE", "1"))
_SETTINGS: dict[str, Any] = {"workers": 1, "logging": {"access": {"enabled": False}}}


class _Policy:
    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(os.environ["POLICY_MODEL"], options)

    def _run(self, observations: Any) -> Any:
        batch = np.array(observations, dtype=np.float32)
        return self._session.run(["action"], {"observation": batch})[0]


@bentoml.service(**_SETTINGS)
class SinglePolicy(_Policy):
    """One request at a time."""

    @bentoml.api(route="/compute_action")  # type: ignore[untyped-decorator]  # its library has no types
    async def compute_action(self, observation: list[float]) -> dict[str, int]:
        """One action."""
        return {"action": int(self._run([observation])[0])}


@bentoml.service(**_SETTINGS)
class BatchedPolicy(_Policy):
    """As many requests at a time as BentoML collects."""

    @bentoml.api(  # type: ignore[untyped-decorator]  # its library has no types
        route="/compute_action",
        batchable=True,
        max_batch_size=max(2, _BATCH_SIZE),
        max_latency_ms=1000,
    )
    async def compute_action(self, observation: list[list[float]]) -> list[int]:
        """A batch of actions."""
        actions: list[int] = self._run(observation).tolist()
        return actions


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    model, port, batch_size = sys.argv[1:4]
    os.environ |= {"POLICY_MODEL": model, "POLICY_BATCH_SIZE": batch_size}
    name = "SinglePolicy" if batch_size == "1" else "BatchedPolicy"
    here = str(Path(__file__).resolve().parent)
    command = [sys.executable, "-m", "bentoml", "serve", f"bentoml_server:{name}"]
    options = ["--working-dir", here, "--host", "127.0.0.1", "--port", port]
    os.execv(sys.executable, [*command, *options])


if __name__ == "__main__":
    main()
