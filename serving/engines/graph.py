"""What an engine is: the bundle's graph, run on arrays; the policy around it is the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from serving.bundle import ONNX, PT2, TORCHSCRIPT, Bundle
from serving.conforming import conform_observations
from serving.errors import InferenceError, InvalidRequestError, ServingConfigError
from serving.interface import OUTPUT_NAMES, OutputName, PolicyOutput, State
from serving.manifest import ACTION_MASK, PolicyManifest
from serving.policy_inputs import PolicyInputs
from serving.spaces import leaves, unflatten

EngineName = Literal["onnx", "torchscript", "pt2"]
DeviceName = Literal["cpu", "cuda"]
Mode = Literal["greedy", "sampled", "mixed"]
_NO_OUTPUTS: frozenset[OutputName] = frozenset()


class Graph(Protocol):
    """A bundle's graph in one runtime."""

    name: str
    device: str

    def run(
        self, names: Sequence[str], inputs: Mapping[str, NDArray[Any]]
    ) -> Mapping[str, NDArray[Any]]:
        """Compute the named outputs.

        Args:
            names: Outputs of the graph.
            inputs: Arrays (B, *shape) by the graph's input names; there may be more of them than
                these outputs need.
        """
        ...

    def prepare(
        self, names: Sequence[str], inputs: Mapping[str, NDArray[Any]]
    ) -> Callable[[], object]:
        """The bare runtime, to compare with: each call computes these outputs of these inputs.

        As much as possible is done before the first call; the outputs of each are arrays.
        """
        ...


def unmasked(graph: Graph) -> Graph:
    """The graph for batches without an action mask: a faster one where the runtime has one."""
    faster: Graph = getattr(graph, "unmasked", graph)
    return faster


@dataclass(frozen=True)
class _Plan:
    """What one kind of call asks of the graph, and where in the answer its parts stand.

    Attributes:
        names: What to compute.
        parts: Name without a mode (`action/x`, `action_logp`, `next_state/h`) to the graph's
            outputs for it: one, or greedy and sampled for a batch that mixes them.
        is_action_alone: Whether `action` is all there is in the answer.
    """

    names: tuple[str, ...]
    parts: Mapping[str, tuple[str, ...]]
    is_action_alone: bool


class GraphPolicy:
    """A bundle as a `Policy`: conforming, drawing noise, choosing the outputs to compute."""

    def __init__(self, manifest: PolicyManifest, graph: Graph) -> None:
        self.manifest = manifest
        self.graph = graph
        self._unmasked = unmasked(graph)
        self.inputs = PolicyInputs(manifest)
        self.available_outputs = tuple(name for name in OUTPUT_NAMES if name in manifest.outputs)
        self._action_names = tuple(leaves(manifest.action_space, "action"))
        self._has_state = bool(manifest.state)
        self._plans: dict[tuple[Mode, frozenset[OutputName]], _Plan] = {}

    def compute_actions(
        self,
        observations: Any,
        *,
        deterministic: bool = True,
        seed: int | None = None,
        outputs: Collection[OutputName] = (),
        state: State | Sequence[State | None] | None = None,
        rewards: Any = None,
        action_mask: Any = None,
    ) -> PolicyOutput:
        """See `serving.interface.Policy`."""
        self.check_outputs(outputs)
        inputs = conform_observations(observations, self.manifest.observation_space)
        n = len(next(iter(inputs.values())))
        if state is not None:
            inputs |= self.inputs.conform_state(state, n)
        if rewards is not None:
            inputs |= self.inputs.conform_rewards(rewards, n)
        if action_mask is not None:
            inputs |= self.inputs.conform_masks(action_mask, n)
        if not deterministic:
            inputs["noise"] = self.inputs.draw_noise(n, seed)
        return self.compute_conformed(inputs, is_sampled=not deterministic, outputs=outputs)

    def draw_noise(self, n: int, seed: int | None) -> NDArray[np.float32]:
        """See `PolicyInputs.draw_noise`."""
        return self.inputs.draw_noise(n, seed)

    def compute_conformed(
        self,
        inputs: Mapping[str, NDArray[Any]],
        *,
        is_sampled: bool | NDArray[np.bool_] = False,
        outputs: Collection[OutputName] = (),
    ) -> PolicyOutput:
        """Compute actions from inputs that already conform; a batch may mix both modes.

        Args:
            inputs: The graph's inputs by name, (B, *shape); what is missing gets its default.
                Sampling needs `noise`.
            is_sampled: Whether the actions are sampled: all of them, none, or (B,) which rows.
            outputs: What to compute beside the actions, for every row; `check_outputs` has
                accepted them.

        Raises:
            InferenceError: The runtime failed.
        """
        mode: Mode = "greedy"
        if is_sampled is not False:
            mode = "sampled" if is_sampled is True else "mixed"
            if "noise" not in inputs:
                raise ValueError("sampling needs noise")
        plan = self._plan(mode, frozenset(outputs) if outputs else _NO_OUTPUTS)
        complete = self.inputs.complete(inputs, len(next(iter(inputs.values()))))
        graph = self.graph if ACTION_MASK in inputs else self._unmasked
        try:
            found = graph.run(plan.names, complete)
        except Exception as exc:  # the runtimes' own exceptions share no public base
            raise InferenceError(f"{self.graph.name} failed on a valid batch: {exc}") from exc
        if mode == "mixed":
            found = _choose(plan, found, np.asarray(is_sampled))
        elif mode == "sampled":
            found = {name: found[sources[0]] for name, sources in plan.parts.items()}
        # Most answers: what a batch of one takes is counted in microseconds.
        return PolicyOutput(found["action"]) if plan.is_action_alone else self._output(found)

    def check_outputs(self, outputs: Collection[OutputName]) -> None:
        """Refuse outputs that this policy does not have.

        Raises:
            InvalidRequestError: One is asked for that the graph does not compute, such as `value`
                of a policy without a critic.
        """
        for name in outputs:
            if name not in self.available_outputs:
                reason = "has no critic, so it" if name == "value" else "has none: it"
                raise InvalidRequestError(
                    f"this policy {reason} answers no `{name}`; it has "
                    f"{', '.join(self.available_outputs) or 'actions alone'}",
                    pointer="/outputs",
                )

    def _plan(self, mode: Mode, outputs: frozenset[OutputName]) -> _Plan:
        key = (mode, outputs)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._make_plan(*key)
        return plan

    def _make_plan(self, mode: Mode, outputs: frozenset[OutputName]) -> _Plan:
        prefixes = {"greedy": ("",), "sampled": ("sampled_",), "mixed": ("", "sampled_")}[mode]
        by_mode = [*self._action_names, *(["action_logp"] if "action_logp" in outputs else [])]
        by_mode += [f"next_state/{name}" for name in self.manifest.state]
        parts: dict[str, tuple[str, ...]] = {}
        for name in by_mode:
            found = [f"{prefix}{name}" for prefix in prefixes]
            # A state that does not depend on the action taken has one form for both modes.
            parts[name] = tuple(each for each in found if each in self.manifest.outputs) or (name,)
        for name in self.available_outputs:
            if name in outputs and name != "action_logp":
                parts[name] = (name,)
        needed = {each for sources in parts.values() for each in sources}
        names = tuple(name for name in self.manifest.outputs if name in needed)
        return _Plan(names, parts, is_action_alone=list(parts) == ["action"])

    def _output(self, found: Mapping[str, NDArray[Any]]) -> PolicyOutput:
        state = None
        if self._has_state:
            state = {name: found[f"next_state/{name}"] for name in self.manifest.state}
        actions = found.get("action")  # one array, unless the space is nested
        if actions is None:
            actions = unflatten(self.manifest.action_space, "action", found)
        return PolicyOutput(
            actions=actions,
            action_logp=found.get("action_logp"),
            value=found.get("value"),
            action_dist_inputs=found.get("action_dist_inputs"),
            q_values=found.get("q_values"),
            state=state,
        )


def _choose(
    plan: _Plan, found: Mapping[str, NDArray[Any]], is_sampled: NDArray[np.bool_]
) -> dict[str, NDArray[Any]]:
    chosen = {}
    for name, sources in plan.parts.items():
        values = found[sources[0]]
        if len(sources) == 2:
            rows = is_sampled.reshape(-1, *[1] * (values.ndim - 1))
            values = np.where(rows, found[sources[1]], values)
        chosen[name] = values
    return chosen


def cuda_failure(engine: EngineName) -> str | None:
    """Why an engine cannot compute on a CUDA device of this machine, or None: it is tried.

    Raises:
        ServingConfigError: The runtime is not installed.
    """
    with _importing(engine):
        if engine == "onnx":
            from serving.engines import onnx_engine

            return onnx_engine.cuda_failure()
        from serving.engines import torch_engine

        return torch_engine.cuda_failure()


def load_graph(bundle: Bundle, engine: EngineName = "onnx", device: DeviceName = "cpu") -> Graph:
    """Load a bundle's graph into a runtime. The runtime is imported here, when it is chosen.

    Raises:
        BundleError: The bundle has no file for this engine, the runtime refuses it, or it is not
            the graph that the manifest describes.
        ServingConfigError: The device is not there, or the runtime is not installed.
    """
    manifest = bundle.manifest
    with _importing(engine):
        if engine == "onnx":
            from serving.engines.onnx_engine import OnnxGraph

            graph = OnnxGraph(bundle.file(ONNX), manifest.outputs, device=device)
            graph.check_signature(manifest)
            return graph
        from serving.engines.torch_engine import load_pt2, load_torchscript

        names = [spec.name for spec in manifest.inputs]
        if engine == "torchscript":
            path = bundle.file(TORCHSCRIPT)
            return load_torchscript(path, names, manifest.outputs, device=device)
        return load_pt2(bundle.file(PT2), names, manifest.outputs, device=device)


@contextlib.contextmanager
def _importing(engine: EngineName) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as exc:
        raise ServingConfigError(
            f"the engine {engine!r} needs the package {exc.name!r}, which is not installed"
        ) from exc
