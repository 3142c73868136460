"""LitServe. Run: FILE MODEL PORT BATCH_SIZE.

Written as LitServe's own documents show it, with one API server and one worker. BATCH_SIZE above 1
uses its dynamic batching with a wait of 1 ms.
"""

import sys
from typing import Any

import litserve
import numpy as np
import onnxruntime


class PolicyAPI(litserve.LitAPI):  # type: ignore[misc]  # its library has no types
    """The policy in LitServe's worker process; LitServe calls these methods by name."""

    def __init__(self, model: str, **options: Any) -> None:
        super().__init__(**options)
        self._model = model

    def setup(self, device: str) -> None:  # noqa: ARG002  # LitServe's own signature
        """Load the model."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(self._model, options)

    def decode_request(self, request: dict[str, Any]) -> Any:
        """A request's observation."""
        return request["observation"]

    def predict(self, inputs: Any) -> Any:
        """One action, or a batch of them."""
        is_single = np.ndim(inputs) == 1
        batch = np.array([inputs] if is_single else inputs, dtype=np.float32)
        actions = self._session.run(["action"], {"observation": batch})[0]
        return actions[0] if is_single else actions

    def encode_response(self, output: Any) -> dict[str, int]:
        """An answer's body."""
        return {"action": int(output)}


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    model, port, batch_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    options = {} if batch_size == 1 else {"max_batch_size": batch_size, "batch_timeout": 0.001}
    api = PolicyAPI(model, api_path="/compute_action", **options)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1",
        port=port,
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
    )


if __name__ == "__main__":
    main()
