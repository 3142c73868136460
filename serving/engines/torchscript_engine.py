"""TorchScript: for those who already run torch beside the policy.

A TorchScript file is a program, so it loads only where the operator chose this engine.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from serving.errors import BundleError, ServingConfigError


class TorchScriptGraph:
    """`policy.torchscript.pt` under torch; satisfies `serving.engines.graph.Graph`."""

    name = "torchscript"

    def __init__(self, path: Path, output_names: Sequence[str], *, device: str = "cpu") -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise ServingConfigError(
                "device 'cuda' was asked for and torch sees no GPU; use --device cpu"
            )
        self.device = device
        self._names = tuple(output_names)
        torch.set_num_threads(1)
        try:
            with warnings.catch_warnings():
                # torch deprecates TorchScript as a whole; the bundle's default format is ONNX.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._module = torch.jit.load(str(path), map_location=device)
        except (RuntimeError, ValueError) as exc:
            raise BundleError(f"torch cannot load {path}: {exc}") from exc

    def run(
        self,
        names: Sequence[str],
        observation: NDArray[np.float32],
        noise: NDArray[np.float32],
    ) -> Mapping[str, NDArray[Any]]:
        """Compute the named outputs for (B, *shape) observations and (B, D) noise."""
        with torch.inference_mode():
            results = self._module(
                torch.from_numpy(observation).to(self.device),
                torch.from_numpy(noise).to(self.device),
            )
        answers = dict(zip(self._names, results, strict=True))
        return {name: answers[name].cpu().numpy() for name in names}


def has_cuda() -> bool:
    """Whether torch sees a CUDA device."""
    return torch.cuda.is_available()
