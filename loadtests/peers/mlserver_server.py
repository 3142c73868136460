"""MLServer. Run: FILE MODEL PORT GRPC_PORT METRICS_PORT.

A custom runtime as MLServer's own documents show it, asked in the Open Inference Protocol, which
is what it speaks. Inference in the server's own process (`parallel_workers: 0`) is its fastest
setting for a small model, and without adaptive batching: with it every request waits.
"""

import asyncio
import sys
from typing import Any

import numpy as np
import onnxruntime
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput
from mlserver.utils import install_uvloop_event_loop


class PolicyRuntime(MLModel):  # type: ignore[misc]  # its library has no types
    """The policy as MLServer's runtime."""

    async def load(self) -> bool:
        """Load the model."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(self.settings.parameters.uri, options)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Actions for the observations of one request."""
        entry = payload.inputs[0]
        batch = np.array(entry.data.root, dtype=np.float32).reshape(entry.shape)
        actions: Any = self._session.run(["action"], {"observation": batch})[0]
        output = ResponseOutput(
            name="action", shape=[len(actions)], datatype="INT64", data=actions.tolist()
        )
        return InferenceResponse(model_name=self.name, outputs=[output])


async def serve(model: str, port: int, grpc_port: int, metrics_port: int) -> None:
    """What `mlserver start` does with a settings.json and a model-settings.json."""
    settings = Settings(
        debug=False,
        gzip_enabled=False,
        host="127.0.0.1",
        http_port=port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        parallel_workers=0,
        load_models_at_startup=False,
    )
    policy = ModelSettings(
        name="policy",
        implementation=PolicyRuntime,
        parameters=ModelParameters(uri=model),
    )
    await MLServer(settings).start([policy])


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    install_uvloop_event_loop()
    asyncio.run(serve(sys.argv[1], *map(int, sys.argv[2:5])))


if __name__ == "__main__":
    main()
