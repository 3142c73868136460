"""TorchScript and torch.export's .pt2: for those who already run torch beside the policy.

Both files are programs, loaded by code that trusts them: only where the operator chose one of
these engines.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from serving.errors import BundleError, ServingConfigError

# Smaller arrays reach a GPU sooner by a plain copy than by way of pinned memory.
_PINNED_FROM_BYTES = 64 * 1024


class TorchGraph:
    """A bundle's graph under torch; satisfies `serving.engines.graph.Graph`."""

    def __init__(
        self,
        name: str,
        program: Callable[..., Any],
        input_names: Sequence[str],
        output_names: Sequence[str],
        *,
        device: str = "cpu",
    ) -> None:
        """Store a program that is on its device already.

        Args:
            name: The engine's.
            program: Tensors in, a tuple of tensors out.
            input_names: Its arguments in order.
            output_names: The entries of its answer in order.
            device: `cpu` or `cuda`.
        """
        self.name = name
        self.device = device
        self._program = program
        self._input_names = tuple(input_names)
        self._output_names = tuple(output_names)

    def run(
        self, names: Sequence[str], inputs: Mapping[str, NDArray[Any]]
    ) -> Mapping[str, NDArray[Any]]:
        """Compute the named outputs; see `serving.engines.graph.Graph`."""
        with torch.inference_mode():
            results = self._program(*self._tensors(inputs))
            answers = dict(zip(self._output_names, results, strict=True))
            return _arrays({name: answers[name] for name in names})

    def prepare(
        self, names: Sequence[str], inputs: Mapping[str, NDArray[Any]]
    ) -> Callable[[], object]:
        """The bare program on tensors; see `serving.engines.graph.Graph`."""
        tensors = self._tensors(inputs)
        places = [self._output_names.index(name) for name in names]

        def call() -> list[NDArray[Any]]:
            with torch.inference_mode():
                found = self._program(*tensors)
                return [found[place].cpu().numpy() for place in places]

        return call

    def _tensors(self, inputs: Mapping[str, NDArray[Any]]) -> list[torch.Tensor]:
        return [_tensor(inputs[name], self.device) for name in self._input_names]


def load_torchscript(
    path: Path, input_names: Sequence[str], output_names: Sequence[str], *, device: str = "cpu"
) -> TorchGraph:
    """Load `policy.torchscript.pt`; the program runs as soon as it is asked.

    Args:
        path: The file that `torch.jit.save` wrote.
        input_names: The program's arguments in order.
        output_names: The entries of its answer in order.
        device: `cpu` or `cuda`.

    Raises:
        BundleError: torch cannot load it.
        ServingConfigError: The device is not there.
    """
    _prepare_torch(device)
    try:
        with warnings.catch_warnings():
            # torch deprecates TorchScript as a whole; the bundle's default format is ONNX.
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(str(path), map_location=device)
            if device != "cpu":
                move_constants(module, device)
    except (RuntimeError, ValueError) as exc:
        raise _unloadable(path, exc) from exc
    return TorchGraph("torchscript", module, input_names, output_names, device=device)


def load_pt2(
    path: Path, input_names: Sequence[str], output_names: Sequence[str], *, device: str = "cpu"
) -> TorchGraph:
    """Load `policy.pt2`; see `load_torchscript`.

    Raises:
        BundleError: torch cannot load it.
        ServingConfigError: The device is not there.
    """
    _prepare_torch(device)
    try:
        program = torch.export.load(path)
        if device != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        module = program.module()
    except Exception as exc:  # the loader raises whatever the archive's parts raise
        raise _unloadable(path, exc) from exc
    return TorchGraph("pt2", module, input_names, output_names, device=device)


def move_constants(module: Any, device: str) -> None:
    """Have a traced program make its own tensors on another device.

    `map_location` moves weights. Where the network said `x.to(dtype)`, as RLlib's LSTM does, the
    trace also holds the device on which it was made, and would carry data back there.
    """
    for node in module.graph.findAllNodes("prim::Constant"):
        if "Device" in str(node.output().type()) and node.hasAttribute("value"):
            node.s_("value", device)


def cuda_failure() -> str | None:
    """Why torch cannot use CUDA here, or None; it is tried, as a GPU that is seen may not work."""
    if not torch.cuda.is_available():
        return "it sees no GPU"
    try:
        total = torch.ones(2, device="cuda").sum().item()
    except RuntimeError as exc:  # a driver that does not fit, or a GPU that others have taken
        return _first_line(exc)
    return None if total == 2.0 else f"1 + 1 came to {total:g} on it"


def _prepare_torch(device: str) -> None:
    """Set torch up for one small network.

    Raises:
        ServingConfigError: `device` is not there.
    """
    if device == "cuda":
        failure = cuda_failure()
        if failure is not None:
            raise ServingConfigError(
                f"device 'cuda' was asked for and torch cannot use a GPU here: {failure}; use "
                "--device cpu"
            )
        # Convolutions would round to ten bits by default, too coarse for the golden vectors.
        torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(1)


def _tensor(array: NDArray[Any], device: str) -> torch.Tensor:
    # torch warns of read-only arrays; none of these programs writes to its arguments.
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    if device == "cpu":
        return tensor
    if array.nbytes >= _PINNED_FROM_BYTES:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, NDArray[Any]]:
    """Tensors of any device as arrays: all copies begun, then one wait for all of them."""
    found = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.current_stream().synchronize()
    return {name: np.asarray(tensor.numpy()) for name, tensor in found.items()}


def _unloadable(path: Path, exc: Exception) -> BundleError:
    return BundleError(f"torch cannot load {path}: {_first_line(exc)}")


def _first_line(exc: Exception) -> str:
    lines = str(exc).strip().splitlines()
    return lines[0] if lines else repr(exc)
