"""Wrong exports are caught: each mutation of the graph is refused with the output's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.processes import succeed

pytestmark = [
    pytest.mark.slow,
    # Ray's and torch's own, while they are imported.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def pendulum(pendulum_run: Path) -> Any:
    from export.checkpoint import load_checkpoint

    return load_checkpoint(pendulum_run)


@pytest.fixture(scope="module")
def cartpole(cartpole_run: Path) -> Any:
    from export.checkpoint import load_checkpoint

    return load_checkpoint(cartpole_run)


def gate(checkpoint: Any, graph: Any) -> dict[str, Any]:
    """The parity gate on a torch graph itself, without a file."""
    import torch

    from export.graph import distribution_spec
    from export.parity import check_parity, parity_vectors

    distribution = distribution_spec(checkpoint.rl_module, checkpoint.action_space)
    vectors = parity_vectors(checkpoint, distribution)

    def run(names: Any, observation: Any, noise: Any) -> dict[str, Any]:
        with torch.no_grad():
            results = graph(torch.from_numpy(observation), torch.from_numpy(noise))
        return {
            name: value.numpy()
            for name, value in zip(graph.output_names, results, strict=True)
            if name in names
        }

    return check_parity("mutated", run, graph.output_names, vectors)


def graph_of(checkpoint: Any, **changes: Any) -> Any:
    from export.connectors import action_bounding
    from export.graph import PolicyGraph, distribution_spec

    graph = PolicyGraph(
        checkpoint.rl_module,
        checkpoint.action_space,
        distribution_spec(checkpoint.rl_module, checkpoint.action_space),
        changes.get("bounding", action_bounding(checkpoint.module_to_env)),
    )
    graph.eval().requires_grad_(False)
    return graph


def test_the_unchanged_graph_passes(pendulum: Any, cartpole: Any) -> None:
    for checkpoint in (pendulum, cartpole):
        assert gate(checkpoint, graph_of(checkpoint))["n_mismatched_actions"] == 0


def test_actions_that_are_clipped_instead_of_unsquashed_are_caught(pendulum: Any) -> None:
    from export.errors import ParityError

    with pytest.raises(ParityError, match=r"\baction differs"):
        gate(pendulum, graph_of(pendulum, bounding="clip"))


def test_weights_rounded_to_float16_are_caught(cartpole: Any) -> None:
    from export.errors import ParityError

    graph = graph_of(cartpole)
    for parameter in graph.parameters():
        parameter.copy_(parameter.half().float())
    with pytest.raises(ParityError, match="action_dist_inputs differs"):
        gate(cartpole, graph)


def test_two_swapped_logits_are_caught(cartpole: Any) -> None:
    import torch

    from export.errors import ParityError

    graph = graph_of(cartpole)
    head = [part for part in graph.module.pi.modules() if isinstance(part, torch.nn.Linear)][-1]
    head.weight.copy_(head.weight.flip(0))
    head.bias.copy_(head.bias.flip(0))
    with pytest.raises(ParityError, match=r"\baction differs"):
        gate(cartpole, graph)


def test_a_dropped_critic_weight_is_caught_in_value_alone(cartpole: Any) -> None:
    from export.errors import ParityError

    graph = graph_of(cartpole)
    next(graph.module.vf.parameters()).mul_(1.01)
    with pytest.raises(ParityError) as caught:
        gate(cartpole, graph)
    assert "value differs" in caught.value.message
    assert "action differs" not in caught.value.message


def test_an_unknown_connector_is_refused_by_name(cartpole: Any) -> None:
    from ray.rllib.connectors.env_to_module import FlattenObservations

    from export.connectors import check_connectors
    from export.errors import UnsupportedPolicyError

    pipeline = cartpole.env_to_module
    pipeline.connectors.insert(0, FlattenObservations())
    try:
        with pytest.raises(UnsupportedPolicyError, match="FlattenObservations"):
            check_connectors(pipeline, cartpole.module_to_env)
    finally:
        pipeline.connectors.pop(0)


def test_a_network_that_fixes_the_batch_size_is_refused(cartpole: Any, tmp_path: Path) -> None:
    from export.errors import ConversionError
    from export.formats import write_onnx

    graph = graph_of(cartpole)
    inner = graph.module.pi.forward
    # 3 is the batch of the exporter's example, so the traced code runs.
    graph.module.pi.forward = lambda inputs, **_: inner(inputs.reshape(3, -1))
    with pytest.raises(ConversionError, match=r"batch|convert"):
        write_onnx(graph, tmp_path / "policy.onnx", (4,))


def test_python_that_depends_on_data_is_refused(cartpole: Any, tmp_path: Path) -> None:
    from export.errors import ConversionError
    from export.formats import write_onnx

    graph = graph_of(cartpole)
    inner = graph.module.pi.forward
    graph.module.pi.forward = lambda inputs, **_: (
        inner(inputs) if float(inputs.sum()) > 0 else -inner(inputs)
    )
    with pytest.raises(ConversionError, match="data"):
        write_onnx(graph, tmp_path / "policy.onnx", (4,))


def test_a_policy_with_a_free_log_std_and_clipped_actions_exports_with_parity(
    tmp_path: Path,
) -> None:
    run, bundle = tmp_path / "run", tmp_path / "bundle"
    settings = ("--set", "model.free_log_std=true", "--set", "normalize_actions=false")
    settings += ("--set", "clip_actions=true")
    succeed(
        "train", "--env", "Pendulum-v1", "--stop-timesteps", "1000", "--run-dir", run, *settings
    )
    succeed("export", run, "-o", bundle, "--format", "onnx,torchscript")
    assert json.loads((bundle / "manifest.json").read_text())["action_bounding"] == "clip"
    with np.load(bundle / "golden.npz") as golden:
        log_std = golden["action_dist_inputs"][:, 1]
    assert np.ptp(log_std) == 0  # one free parameter, whatever the observation
