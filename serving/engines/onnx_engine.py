"""ONNX Runtime: the default engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from serving.engines.onnx_model import subgraph
from serving.errors import BundleError, ServingConfigError

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_ACTION_ONLY = ("action",)


class OnnxGraph:
    """`policy.onnx` in ONNX Runtime; satisfies `serving.engines.graph.Graph`.

    Two sessions of the one file: the whole graph, and what a greedy action needs of it.
    """

    name = "onnxruntime"

    def __init__(self, path: Path, output_names: Sequence[str], *, device: str = "cpu") -> None:
        self.device = device
        model = path.read_bytes()
        self._whole = _session(subgraph(model, output_names), path, device)
        self._action_only = _session(subgraph(model, _ACTION_ONLY), path, device)
        inputs = sorted(entry.name for entry in self._whole.get_inputs())
        if inputs != ["noise", "observation"]:
            raise BundleError(f"{path} has the inputs {inputs}, expected observation and noise")

    def run(
        self,
        names: Sequence[str],
        observation: NDArray[np.float32],
        noise: NDArray[np.float32],
    ) -> Mapping[str, NDArray[Any]]:
        """Compute the named outputs for (B, *shape) observations and (B, D) noise."""
        if tuple(names) == _ACTION_ONLY:
            return {"action": self._action_only.run(None, {"observation": observation})[0]}
        feeds = {"observation": observation, "noise": noise}
        return dict(zip(names, self._whole.run(list(names), feeds), strict=True))


def has_cuda() -> bool:
    """Whether this installation of ONNX Runtime can use CUDA."""
    return _PROVIDERS["cuda"] in onnxruntime.get_available_providers()


def _session(model: bytes, path: Path, device: str) -> onnxruntime.InferenceSession:
    provider = _PROVIDERS[device]
    if provider not in onnxruntime.get_available_providers():
        raise ServingConfigError(
            f"device {device!r} needs ONNX Runtime's {provider}, and this installation has only "
            f"{', '.join(onnxruntime.get_available_providers())}; install onnxruntime-gpu or use "
            "--device cpu"
        )
    options = onnxruntime.SessionOptions()
    # One thread: a small network loses more to waking threads than it wins, and replicas, not
    # threads, use the other cores.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(model, options, providers=[provider])
    except Exception as exc:  # ONNX Runtime's own exceptions share no public base
        raise BundleError(f"ONNX Runtime cannot load {path}: {exc}") from exc
