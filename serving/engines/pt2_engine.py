"""torch.export's own format, the successor of TorchScript.

A .pt2 file is loaded by code that trusts it, so it loads only where the operator chose this
engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from serving.engines.torchscript_engine import TorchProgram, prepare_torch
from serving.errors import BundleError


class Pt2Graph:
    """`policy.pt2` under torch; satisfies `serving.engines.graph.Graph`."""

    name = "pt2"

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
            path: The file that `torch.export.save` wrote.
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
            program = torch.export.load(path)
            if device == "cuda":
                from torch.export.passes import move_to_device_pass

                program = move_to_device_pass(program, device)
            module = program.module()
        except Exception as exc:  # the loader raises whatever the archive's parts raise
            reason = str(exc).strip().splitlines() or [repr(exc)]
            raise BundleError(f"torch cannot load {path}: {reason[0]}") from exc
        self._program = TorchProgram(module, input_names, output_names, device)

    def run(
        self, names: Sequence[str], inputs: Mapping[str, NDArray[Any]]
    ) -> Mapping[str, NDArray[Any]]:
        """Compute the named outputs; see `serving.engines.graph.Graph`."""
        return self._program.run(names, inputs)
