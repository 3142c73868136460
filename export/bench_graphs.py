"""What `make bench-export` compares: the bare network, the bundle's graph, and RLlib itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from ray.rllib.core.models.base import ENCODER_OUT

from export.formats import export_program, write_onnx
from export.graph import OBS, STATE_IN, STATE_OUT, PolicyGraph
from export.policy import Checkpoint
from export.rl_module_policy import RLModulePolicy
from serving.bundle import read_bundle
from serving.engines.graph import GraphPolicy, load_graph, unmasked
from serving.manifest import InputSpec, step_outputs

Call = Callable[[], Any]
_BARE = "bare network"


class BareNetwork(torch.nn.Module):
    """The actor's encoder and head, and nothing around them.

    Attributes:
        inputs: The observation as the module sees it, and the actor's state.
        output_names: The distribution inputs and the next state.
    """

    def __init__(self, graph: PolicyGraph) -> None:
        super().__init__()
        encoder = graph.module.encoder
        self.encoder = getattr(encoder, "actor_encoder", None) or encoder.encoder
        self.head = graph.module.pi
        self._state = [spec for spec in graph.inputs if spec.role == "state"]
        shape = tuple(graph.module.observation_space.shape)
        self.inputs = (InputSpec("observation", "observation", "float32", shape), *self._state)
        self.output_names = ("action_dist_inputs", *(f"next_{spec.name}" for spec in self._state))

    def example(self, n_rows: int) -> tuple[torch.Tensor, ...]:
        """Valid inputs, in the order of `inputs`."""
        return tuple(torch.zeros(n_rows, *spec.shape) for spec in self.inputs)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors of `inputs` (B, *shape) to those of `output_names`."""
        observation, *state = tensors
        if not state:
            return (self.head(self.encoder({OBS: observation})[ENCODER_OUT]),)
        names = [spec.name.rpartition("/")[2] for spec in self._state]
        memory = dict(zip(names, state, strict=True))
        found = self.encoder({OBS: observation.unsqueeze(1), STATE_IN: memory})
        after = [found[STATE_OUT][name] for name in names]
        return (self.head(found[ENCODER_OUT]).squeeze(1), *after)


def write_bare_network(checkpoint: Checkpoint, path: Path) -> Path:
    """Export the actor of a PPO policy as a user without this product would."""
    # It has what the writers ask of a graph, and is none.
    network: Any = BareNetwork(PolicyGraph(checkpoint)).eval()
    write_onnx(export_program(network), network, path)
    return path


def candidates(checkpoint: Checkpoint, bundle: Path, bare: Path, n: int) -> dict[str, Call]:
    """What is compared for a batch of n rows; for one row RLlib's own ways too."""
    manifest = read_bundle(bundle).manifest
    engine = load_graph(read_bundle(bundle))
    free = unmasked(engine)
    policy = GraphPolicy(manifest, engine)
    rng = np.random.default_rng(0)
    space = checkpoint.observation_space
    space.seed(0)
    observations = np.stack([space.sample() for _ in range(n)])
    given = {"observation": observations}
    if manifest.noise.size:
        given["noise"] = manifest.noise.draw(rng, n)
    inputs = policy.inputs.complete(given, n)
    greedy, *further = step_outputs(manifest.outputs)
    sampled = further[0] if further else greedy
    session = _bare_session(bare)
    shape = (n, *checkpoint.rl_module.observation_space.shape)
    seen = {**inputs, "observation": np.resize(observations, shape).astype(np.float32)}
    feeds = {entry.name: seen[entry.name] for entry in session.get_inputs()}
    found: dict[str, Call] = {
        _BARE: lambda: session.run(None, feeds),
        "greedy": lambda: free.run(greedy, inputs),
        "sampled": lambda: free.run(sampled, inputs),
        "greedy, masked": lambda: engine.run(greedy, inputs),
        "all outputs": lambda: engine.run(manifest.outputs, inputs),
        "compute_actions": lambda: policy.compute_actions(observations),
    }
    if free is engine:
        del found["greedy, masked"]
    if n == 1:
        found |= _rllib(checkpoint, observations, feeds)
    return found


def _bare_session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _rllib(
    checkpoint: Checkpoint, observations: NDArray[Any], feeds: Mapping[str, NDArray[Any]]
) -> dict[str, Call]:
    module = checkpoint.rl_module
    observation = torch.from_numpy(feeds["observation"])
    batch: dict[str, Any] = {OBS: observation}
    if module.is_stateful():
        state = torch.utils._pytree.tree_map(
            lambda leaf: torch.as_tensor(leaf).unsqueeze(0), module.get_initial_state()
        )
        batch = {OBS: observation.unsqueeze(1), STATE_IN: state}
    player = RLModulePolicy(checkpoint)

    def forward() -> Any:
        with torch.no_grad():
            return module.forward_inference(dict(batch))

    return {
        "RLModule alone": forward,
        "RLlib's whole path": lambda: player.compute_actions(observations),
    }


def compare_times(calls: Mapping[str, Call], rounds: int) -> dict[str, dict[str, float]]:
    """Time each call in turns, each turn about 10 ms long.

    Measured is this thread's processor time: all of them run on one thread, and what other programs
    do meanwhile does not count.

    Returns:
        Per name `median_us`, and `ratio`: the median over turns of its time by the first one's.
    """
    counts = {name: _count(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(_time_us(call, counts[name]))
    first = next(iter(times.values()))
    return {
        name: {
            "median_us": statistics.median(own),
            "ratio": statistics.median(a / b for a, b in zip(own, first, strict=True)),
        }
        for name, own in times.items()
    }


def _count(call: Call) -> int:
    for _ in range(20):  # warm-up
        call()
    return max(3, int(10_000.0 / _time_us(call, 5)))


def _time_us(call: Call, n: int) -> float:
    started = time.thread_time()
    for _ in range(n):
        call()
    return (time.thread_time() - started) / n * 1e6
