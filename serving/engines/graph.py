"""What an engine is: the bundle's graph, run on arrays; the policy around it is the same."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from serving.bundle import ONNX, TORCHSCRIPT, Bundle, PolicyManifest
from serving.errors import InferenceError, InvalidRequestError, ServingConfigError
from serving.interface import OutputName, PolicyOutput
from serving.spaces import conform_observations

EngineName = Literal["onnx", "torchscript"]
DeviceName = Literal["cpu", "cuda"]


class Graph(Protocol):
    """A bundle's graph in one runtime."""

    name: str
    device: str

    def run(
        self,
        names: Sequence[str],
        observation: NDArray[np.float32],
        noise: NDArray[np.float32],
    ) -> Mapping[str, NDArray[Any]]:
        """Compute the named outputs for (B, *shape) observations and (B, D) noise."""
        ...


class GraphPolicy:
    """A bundle as a `Policy`: conforming, drawing noise, choosing the outputs to compute."""

    def __init__(self, manifest: PolicyManifest, graph: Graph) -> None:
        self.manifest = manifest
        self.graph = graph
        self._unseeded = np.random.default_rng()
        self._no_noise = np.zeros((0, manifest.noise.size), dtype=np.float32)

    def compute_actions(
        self,
        observations: NDArray[Any],
        *,
        deterministic: bool = True,
        seed: int | None = None,
        outputs: Collection[OutputName] = (),
    ) -> PolicyOutput:
        """See `serving.interface.Policy`."""
        self.check_outputs(outputs)
        batch = conform_observations(observations, self.manifest.observation_space)
        noise = None if deterministic else self.draw_noise(len(batch), seed)
        return self.compute_conformed(batch, noise=noise, outputs=outputs)

    def draw_noise(self, n: int, seed: int | None) -> NDArray[np.float32]:
        """The noise of n sampled actions, (n, D) float32; the same for the same seed."""
        generator = self._unseeded if seed is None else np.random.default_rng(seed)
        return self.manifest.noise.draw(generator, n)

    def compute_conformed(
        self,
        observations: NDArray[np.float32],
        *,
        noise: NDArray[np.float32] | None = None,
        is_sampled: NDArray[np.bool_] | None = None,
        outputs: Collection[OutputName] = (),
    ) -> PolicyOutput:
        """Compute actions for observations that already conform; a batch may mix both modes.

        Args:
            observations: (B, *shape) float32.
            noise: (B, D) float32, or None when every row is deterministic.
            is_sampled: (B,), which rows are sampled; None means all, if there is noise.
            outputs: What to compute beside the actions, for every row; `check_outputs` has
                accepted them.

        Raises:
            InferenceError: The runtime failed.
        """
        names = self._names(noise is not None, is_sampled is not None, outputs)
        if noise is None:
            noise = self._noise_of_zeros(len(observations))
            sampled = False
        else:
            sampled = True
        try:
            found = self.graph.run(names, observations, noise)
        except Exception as exc:  # the runtimes' own exceptions share no public base
            raise InferenceError(f"{self.graph.name} failed on a valid batch: {exc}") from exc
        return self._output(found, sampled, is_sampled, outputs)

    def check_outputs(self, outputs: Collection[OutputName]) -> None:
        """Refuse outputs that this policy does not have.

        Raises:
            InvalidRequestError: `value` is asked of a policy without a critic.
        """
        if "value" in outputs and not self.manifest.has_value:
            raise InvalidRequestError(
                "this policy has no critic, so it answers no `value`", pointer="/outputs"
            )

    def _names(self, sampled: bool, mixed: bool, outputs: Collection[OutputName]) -> list[str]:
        modes = ["sampled_"] * sampled + [""] * (mixed or not sampled)
        names = [f"{mode}action" for mode in modes]
        if "action_logp" in outputs:
            names += [f"{mode}action_logp" for mode in modes]
        return names + [name for name in ("value", "action_dist_inputs") if name in outputs]

    def _output(
        self,
        found: Mapping[str, NDArray[Any]],
        sampled: bool,
        is_sampled: NDArray[np.bool_] | None,
        outputs: Collection[OutputName],
    ) -> PolicyOutput:
        def choose(name: str) -> NDArray[Any]:
            if not sampled:
                return found[name]
            if is_sampled is None:
                return found[f"sampled_{name}"]
            both = found[f"sampled_{name}"]
            rows = is_sampled.reshape(-1, *[1] * (both.ndim - 1))
            return np.where(rows, both, found[name])

        return PolicyOutput(
            actions=choose("action"),
            action_logp=choose("action_logp") if "action_logp" in outputs else None,
            value=found.get("value"),
            action_dist_inputs=found.get("action_dist_inputs"),
        )

    def _noise_of_zeros(self, n: int) -> NDArray[np.float32]:
        if len(self._no_noise) < n:
            self._no_noise = np.zeros((2 ** math.ceil(math.log2(n)), self.manifest.noise.size), "f")
        return self._no_noise[:n]


def engine_has_cuda(engine: EngineName) -> bool:
    """Whether an engine finds a CUDA device on this machine."""
    if not Path("/dev/nvidiactl").exists():
        return False
    if engine == "onnx":
        from serving.engines.onnx_engine import has_cuda
    else:
        from serving.engines.torchscript_engine import has_cuda
    return has_cuda()


def load_graph(bundle: Bundle, engine: EngineName = "onnx", device: DeviceName = "cpu") -> Graph:
    """Load a bundle's graph into a runtime. The runtime is imported here, when it is chosen.

    Raises:
        BundleError: The bundle has no file for this engine, or the runtime refuses it.
        ServingConfigError: The device is not there, or the runtime is not installed.
    """
    names = bundle.manifest.outputs
    try:
        if engine == "onnx":
            from serving.engines.onnx_engine import OnnxGraph

            return OnnxGraph(bundle.file(ONNX), names, device=device)
        from serving.engines.torchscript_engine import TorchScriptGraph

        return TorchScriptGraph(bundle.file(TORCHSCRIPT), names, device=device)
    except ModuleNotFoundError as exc:
        raise ServingConfigError(
            f"the engine {engine!r} needs the package {exc.name!r}, which is not installed"
        ) from exc
