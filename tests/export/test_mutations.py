"""Wrong exports are caught: each mutation is refused, and the message names what differs.

A mutation is put into the graph between building it and the gate, or around its answers, as a
wrong writer or runtime would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete, MultiDiscrete

pytestmark = [
    pytest.mark.slow,
    # Ray's and torch's own, while they are imported.
    pytest.mark.filterwarnings("ignore"),
]

Arrays = Mapping[str, Any]
Run = Callable[[Sequence[str], Arrays], dict[str, Any]]

FOUR = Box(-2, 2, (4,), np.float32)
THREE_ACTIONS = Box(np.array([-2, 0, -5], np.float32), np.array([1, 10, -4], np.float32))
PAIR = gym.spaces.Dict(
    {"angle": Box(-1, 1, (2,), np.float32), "speed": Box(-1, 1, (2,), np.float32)}
)
LSTM = {"use_lstm": True, "max_seq_len": 8, "lstm_cell_size": 12}
CASES: dict[str, dict[str, Any]] = {
    "box": {"observation_space": FOUR, "action_space": THREE_ACTIONS},
    "multi_discrete": {"observation_space": FOUR, "action_space": MultiDiscrete([3, 3])},
    "filtered": {
        "observation_space": Box(np.array([-1, 50], np.float32), np.array([1, 90], np.float32)),
        "action_space": Discrete(4),
        "connectors": ("mean_std",),
    },
    "dict": {"observation_space": PAIR, "action_space": Discrete(4), "connectors": ("flatten",)},
    "square": {
        "observation_space": Box(-1, 1, (3, 3), np.float32),
        "action_space": Discrete(4),
        "connectors": ("flatten",),
    },
    "start": {"observation_space": FOUR, "action_space": Discrete(3, start=5)},
    "lstm": {"observation_space": FOUR, "action_space": Discrete(4), "model_config": LSTM},
    "frames": {
        "observation_space": Box(-1, 1, (12, 12, 1), np.float32),
        "action_space": Discrete(4),
        "connectors": ("frames",),
        "model_config": {"conv_filters": [[6, 4, 2], [8, 3, 2]]},
    },
    "previous": {
        "observation_space": FOUR,
        "action_space": Discrete(4),
        "connectors": ("prev", "flatten"),
    },
}

Prepared = Callable[[str], tuple[Any, Any, Any]]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Name of a case to its checkpoint, a new graph of it, and the gate's vectors."""
    from export.checkpoint import load_checkpoint
    from export.convert import prepare
    from export.graph import PolicyGraph
    from tests.export.checkpoints import Case, write_checkpoint

    made: dict[str, tuple[Any, Any]] = {}

    def make(name: str) -> tuple[Any, Any, Any]:
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            checkpoint = load_checkpoint(
                write_checkpoint(directory, Case(**CASES[name])), trust=True
            )
            made[name] = checkpoint, _fewer(prepare(checkpoint)[1])
        checkpoint, vectors = made[name]
        return checkpoint, PolicyGraph(checkpoint), vectors

    return make


def _fewer(vectors: Any) -> Any:
    """Every sixth row and some edges: torch at batch size 1 is slow, and mutations are gross."""
    n_rows = len(vectors["source"])
    rows = np.unique([*range(5), *range(5, n_rows, 6)])
    return {name: values[rows] for name, values in vectors.items()}


def runner(graph: Any) -> Run:
    """The torch graph itself as a file in its runtime."""
    import torch

    def run(names: Sequence[str], inputs: Arrays) -> dict[str, Any]:
        tensors = [torch.from_numpy(np.array(inputs[spec.name])) for spec in graph.inputs]
        with torch.no_grad():
            answers = dict(zip(graph.output_names, graph(*tensors), strict=True))
        return {name: answers[name].numpy() for name in names}

    return run


def gate(graph: Any, vectors: Any, run: Run | None = None) -> dict[str, Any]:
    from export.parity import check_parity

    report: dict[str, Any] = check_parity("mutated", run or runner(graph), graph, vectors)
    return report


def refusal(graph: Any, vectors: Any, run: Run | None = None) -> str:
    from export.errors import ParityError

    with pytest.raises(ParityError) as caught:
        gate(graph, vectors, run)
    message: str = caught.value.message
    assert "mutated" in message
    return message


@pytest.mark.parametrize("name", CASES)
def test_the_unchanged_graph_passes(prepared: Prepared, name: str) -> None:
    _, graph, vectors = prepared(name)
    assert gate(graph, vectors)["n_mismatched_actions"] == 0


def swapping(run: Run, first: int, second: int) -> Run:
    """Exchange two components of the greedy action, as a wrong order of outputs would."""

    def mutated(names: Sequence[str], inputs: Arrays) -> dict[str, Any]:
        found = run(names, inputs)
        action = found["action"].copy()
        action[:, [first, second]] = action[:, [second, first]]
        return {**found, "action": action}

    return mutated


@pytest.mark.parametrize("name", ["box", "multi_discrete"])
def test_two_swapped_action_components_are_caught(prepared: Prepared, name: str) -> None:
    _, graph, vectors = prepared(name)
    message = refusal(graph, vectors, swapping(runner(graph), 0, 1))
    assert "action differs" in message
    assert "action_dist_inputs differs" not in message
    assert "sampled_action differs" not in message


def test_two_swapped_logits_are_caught(prepared: Prepared) -> None:
    _, graph, vectors = prepared("start")
    head = graph.module.pi.net.mlp[-1]
    for parameter in (head.weight, head.bias):
        parameter.data[:2] = parameter.data[:2].flip(0)
    message = refusal(graph, vectors)
    assert "action differs" in message
    assert "action_dist_inputs differs" in message
    assert "value differs" not in message


def test_a_dropped_filter_is_caught(prepared: Prepared) -> None:
    from export.twins import ConnectorTwin

    _, graph, vectors = prepared("filtered")
    (index,) = (i for i, twin in enumerate(graph.twins) if type(twin).__name__ == "FrozenMeanStd")
    graph.twins[index] = ConnectorTwin()
    assert "action_dist_inputs differs" in refusal(graph, vectors)


def test_a_filter_that_has_learnt_on_is_caught(prepared: Prepared) -> None:
    _, graph, vectors = prepared("filtered")
    (twin,) = (twin for twin in graph.twins if type(twin).__name__ == "FrozenMeanStd")
    twin.mean += 0.02 * twin.scale  # about what one more observation in fifty does
    assert "action_dist_inputs differs" in refusal(graph, vectors)


def test_two_exchanged_observation_keys_are_caught(prepared: Prepared) -> None:
    _, graph, vectors = prepared("dict")
    run = runner(graph)
    names = ("observation/angle", "observation/speed")

    def mutated(outputs: Sequence[str], inputs: Arrays) -> dict[str, Any]:
        first, second = names
        return run(outputs, {**inputs, first: inputs[second], second: inputs[first]})

    assert "action_dist_inputs differs" in refusal(graph, vectors, mutated)


def test_a_transposed_observation_is_caught(prepared: Prepared) -> None:
    _, graph, vectors = prepared("square")
    run = runner(graph)

    def mutated(outputs: Sequence[str], inputs: Arrays) -> dict[str, Any]:
        return run(outputs, {**inputs, "observation": inputs["observation"].swapaxes(1, 2)})

    assert "action_dist_inputs differs" in refusal(graph, vectors, mutated)


@pytest.mark.parametrize("name", ["box", "start", "lstm"])
def test_weights_rounded_to_float16_are_caught(prepared: Prepared, name: str) -> None:
    _, graph, vectors = prepared(name)
    for parameter in graph.parameters():
        parameter.data.copy_(parameter.data.half().float())
    assert "action_dist_inputs differs" in refusal(graph, vectors)


def test_a_shifted_discrete_start_is_caught(prepared: Prepared) -> None:
    _, graph, vectors = prepared("start")
    run = runner(graph)

    def mutated(outputs: Sequence[str], inputs: Arrays) -> dict[str, Any]:
        found = run(outputs, inputs)
        return {**found, "action": found["action"] + 5}

    message = refusal(graph, vectors, mutated)
    assert "action differs" in message
    assert "sampled_action differs" not in message


def unreset(run: Run) -> Run:
    """Begins an episode with the memory that the last one left behind."""
    left: dict[str, Any] = {}

    def mutated(names: Sequence[str], inputs: Arrays) -> dict[str, Any]:
        is_same = all(left[name].shape == inputs[name].shape for name in left)
        found = run(names, {**inputs, **(left if is_same else {})})
        left.clear()
        left.update(
            {
                name: found[f"next_{name}"]
                for name in inputs
                if name.startswith("state/") and f"next_{name}" in found
            }
        )
        return found

    return mutated


def test_an_lstm_state_that_is_not_reset_is_caught(prepared: Prepared) -> None:
    _, graph, vectors = prepared("lstm")
    message = refusal(graph, vectors, unreset(runner(graph)))
    assert "action_dist_inputs differs" in message
    assert "step 0" in message


def forgetting(graph: Any, run: Run) -> Run:
    """Begins every step with the initial memory."""

    def mutated(names: Sequence[str], inputs: Arrays) -> dict[str, Any]:
        start = {
            f"state/{name}": np.broadcast_to(spec.initial, inputs[f"state/{name}"].shape)
            for name, spec in graph.state.items()
        }
        return run(names, {**inputs, **start})

    return mutated


@pytest.mark.parametrize("name", ["lstm", "frames", "previous"])
def test_a_memory_that_forgets_is_caught_after_the_first_step(
    prepared: Prepared, name: str
) -> None:
    _, graph, vectors = prepared(name)
    message = refusal(graph, vectors, forgetting(graph, runner(graph)))
    assert "action_dist_inputs differs" in message
    assert "step 0" not in message


def test_two_exchanged_lstm_states_are_caught(prepared: Prepared) -> None:
    _, graph, vectors = prepared("lstm")
    first, second = (f"next_state/{name}" for name in graph.state)
    run = runner(graph)

    def mutated(names: Sequence[str], inputs: Arrays) -> dict[str, Any]:
        found = run(names, inputs)
        return {**found, first: found[second], second: found[first]}

    message = refusal(graph, vectors, mutated)
    assert f"{first} differs" in message


def test_a_left_out_unsquash_is_caught(prepared: Prepared) -> None:
    import torch

    from export.bounds import action_bounds

    checkpoint, graph, vectors = prepared("box")
    for other in ("none", "clip"):
        graph.bounds = torch.nn.ModuleList(action_bounds(checkpoint.action_space, other))
        message = refusal(graph, vectors)
        assert "action differs" in message
        assert "sampled_action differs" in message
        assert "action_dist_inputs differs" not in message


def test_noise_of_another_size_is_caught_in_the_sampled_action_alone(prepared: Prepared) -> None:
    _, graph, vectors = prepared("box")
    run = runner(graph)

    def mutated(names: Sequence[str], inputs: Arrays) -> dict[str, Any]:
        return run(names, {**inputs, "noise": inputs["noise"] * np.float32(1.01)})

    message = refusal(graph, vectors, mutated)
    assert "sampled_action differs" in message
    assert "; action differs" not in message
    assert ": action differs" not in message


def test_a_mutation_leaves_no_bundle_and_keeps_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export import convert
    from export.bounds import action_bounds
    from export.checkpoint import load_checkpoint
    from export.errors import ParityError
    from export.graph import PolicyGraph
    from tests.export.checkpoints import Case, write_checkpoint

    path = write_checkpoint(tmp_path / "checkpoint", Case(**CASES["box"]))
    target = tmp_path / "bundle"
    convert.export_policy(path, target, trust_checkpoint=True)
    before = {entry.name: entry.read_bytes() for entry in target.iterdir()}

    class Mutated(PolicyGraph):
        def __init__(self, checkpoint: Any, **settings: Any) -> None:
            super().__init__(checkpoint, **settings)
            self.bounds[0] = action_bounds(checkpoint.action_space, "none")[0]

    monkeypatch.setattr(convert, "PolicyGraph", Mutated)
    for place in (target, tmp_path / "other"):
        with pytest.raises(ParityError, match=r"policy\.onnx.*\baction differs"):
            convert.write_bundle(load_checkpoint(path, trust=True), place, convert.ExportOptions())
    assert {entry.name: entry.read_bytes() for entry in target.iterdir()} == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bundle", "checkpoint"]
