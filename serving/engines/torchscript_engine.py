"""TorchScript: for those who already run torch beside the policy.

A TorchScript file is a program, so it loads only where the operator chose this engine.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from serving.errors import BundleError, ServingConfigError


class TorchScriptGraph:
    """`policy.torchscript.pt` under torch; satisfies `serving.engines.graph.Graph`."""

    name = "torchscript"

    def __init__(
        self,
        path: Path,
        input_names: Sequence[str],
        output_names: Sequence[str],
        *,
        device: str = "cpu",
    ) -> None:
        """Load the file.

        Args:
            path: The TorchScript file.
            input_names: The program's arguments in order.
            output_names: The entries of its answer in order.
            device: `cpu` or `cuda`.

        Raises:
            BundleError: torch cannot load it.
            ServingConfigError: The device is not there.
        """
        prepare_torch(device)
        self.device = device
        try:
            with warnings.catch_warnings():
                # torch deprecates TorchScript as a whole; the bundle's default format is ONNX.
                warnings.simplefilter("ignore", DeprecationWarning)
                module = torch.jit.load(str(path), map_location=device)
        except (RuntimeError, ValueError) as exc:
            raise BundleError(f"torch cannot load {path}: {exc}") from exc
        self._program = TorchProgram(module, input_names, output_names, device)

    def run(
        self, names: Sequence[str], inputs: Mapping[str, NDArray[Any]]
    ) -> Mapping[str, NDArray[Any]]:
        """Compute the named outputs; see `serving.engines.graph.Graph`."""
        return self._program.run(names, inputs)


class TorchProgram:
    """A function from tensors to tensors, called with arrays by name."""

    def __init__(
        self,
        function: Callable[..., Any],
        input_names: Sequence[str],
        output_names: Sequence[str],
        device: str,
    ) -> None:
        self._function = function
        self._input_names = tuple(input_names)
        self._output_names = tuple(output_names)
        self._device = device

    def run(
        self, names: Sequence[str], inputs: Mapping[str, NDArray[Any]]
    ) -> Mapping[str, NDArray[Any]]:
        """Call it and pick the named outputs."""
        with torch.inference_mode():
            tensors = [self._tensor(inputs[name]) for name in self._input_names]
            results = self._function(*tensors)
        answers = dict(zip(self._output_names, results, strict=True))
        return {name: answers[name].cpu().numpy() for name in names}

    def _tensor(self, array: NDArray[Any]) -> torch.Tensor:
        # torch warns of read-only arrays; none of these programs writes to its arguments.
        writable = array if array.flags.writeable else array.copy()
        return torch.from_numpy(writable).to(self._device)


def prepare_torch(device: str) -> None:
    """Set torch up for one small network.

    Raises:
        ServingConfigError: `device` is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ServingConfigError(
            "device 'cuda' was asked for and torch sees no GPU; use --device cpu"
        )
    torch.set_num_threads(1)


def has_cuda() -> bool:
    """Whether torch sees a CUDA device."""
    return torch.cuda.is_available()
