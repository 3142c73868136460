"""mosec. Run: FILE MODEL PORT BATCH_SIZE.

Written as mosec's own examples show it. BATCH_SIZE 64 uses its dynamic batching with the shortest
wait it takes (1 ms); BATCH_SIZE 1 turns batching off. orjson instead of its default `json`, which
is faster.
"""

import os
import sys
from typing import Any

import numpy as np
import onnxruntime
import orjson
from mosec import Server, Worker


class Policy(Worker):  # type: ignore[misc]  # its library has no types
    """The policy in mosec's worker process."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(os.environ["POLICY_MODEL"], options)

    def deserialize(self, data: bytes) -> Any:
        """A request's body."""
        return orjson.loads(data)

    def serialize(self, data: Any) -> bytes:
        """An answer's body."""
        return orjson.dumps(data)

    def _run(self, observations: list[list[float]]) -> list[int]:
        batch = np.array(observations, dtype=np.float32)
        actions: list[int] = self._session.run(["action"], {"observation": batch})[0].tolist()
        return actions


class SinglePolicy(Policy):
    """One request at a time."""

    def forward(self, data: dict[str, Any]) -> dict[str, int]:
        """One action."""
        return {"action": self._run([data["observation"]])[0]}


class BatchedPolicy(Policy):
    """As many requests at a time as mosec collects."""

    def forward(self, data: list[dict[str, Any]]) -> list[dict[str, int]]:
        """A batch of actions."""
        actions = self._run([request["observation"] for request in data])
        return [{"action": action} for action in actions]


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    # mosec starts its workers anew, so what they need travels in the environment.
    model, port, batch_size = sys.argv[1], sys.argv[2], int(sys.argv[3])
    os.environ |= {
        "POLICY_MODEL": model,
        "MOSEC_ADDRESS": "127.0.0.1",
        "MOSEC_PORT": port,
        "MOSEC_LOG_LEVEL": "warning",
    }
    server = Server()
    if batch_size == 1:
        server.append_worker(SinglePolicy, num=1, route="/compute_action")
    else:
        server.append_worker(
            BatchedPolicy,
            num=1,
            max_batch_size=batch_size,
            max_wait_time=1,
            route="/compute_action",
        )
    server.run()


if __name__ == "__main__":
    main()
