"""Triton by way of PyTriton. Run: FILE MODEL PORT GRPC_PORT.

Triton's HTTP front end and dynamic batcher (no queue delay); the model runs in its Python backend,
which is the only one that PyTriton brings. Asked in the Open Inference Protocol as JSON.
"""

import sys
from typing import Any

import numpy as np
import onnxruntime
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    model, port, grpc_port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options)

    @batch  # type: ignore[untyped-decorator]  # its library has no types
    def compute_actions(observation: Any) -> dict[str, Any]:
        return {"action": session.run(["action"], {"observation": observation})[0][:, None]}

    config = TritonConfig(
        http_address="127.0.0.1",
        http_port=port,
        grpc_address="127.0.0.1",
        grpc_port=grpc_port,
        allow_metrics=False,
        log_verbose=0,
    )
    with Triton(config=config) as triton:
        triton.bind(
            model_name="policy",
            infer_func=compute_actions,
            inputs=[Tensor(name="observation", dtype=np.float32, shape=(4,))],
            outputs=[Tensor(name="action", dtype=np.int64, shape=(1,))],
            config=ModelConfig(
                max_batch_size=64, batcher=DynamicBatcher(max_queue_delay_microseconds=0)
            ),
        )
        triton.serve()


if __name__ == "__main__":
    main()
