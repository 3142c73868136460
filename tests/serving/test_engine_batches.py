"""A row's answer does not depend on the batch in which it is computed.

In ONNX Runtime on the CPU bit for bit; in torch up to rounding, with equal actions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import NodeProto, TensorProto, helper

from serving.engines.graph import Graph
from serving.engines.onnx_engine import OnnxGraph
from serving.engines.torch_engine import load_torchscript
from tests.bundles import Arrays, discrete_head, make_model

N_ROWS = 256
# A call's cost grows with these in different kernels: one row, below and above each vector width.
SIZES = (2, 3, 4, 5, 7, 8, 13, 16, 31, 32, 33, 64, 100, 256)
N_ACTIONS = 5
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
OUTPUTS = {
    "action": (INT64, ["B"]),
    "action_logp": (FLOAT, ["B"]),
    "sampled_action": (INT64, ["B"]),
    "sampled_action_logp": (FLOAT, ["B"]),
    "action_dist_inputs": (FLOAT, ["B", N_ACTIONS]),
}


def node(operation: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
    return helper.make_node(operation, inputs, [output], **attributes)


class Weights:
    """Drawn weights, by name, about as large as training leaves them."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)
        self.by_name: Arrays = {}

    def draw(self, name: str, *shape: int, fan_in: int) -> str:
        drawn = self._generator.normal(scale=1.5 / np.sqrt(fan_in), size=shape)
        self.by_name[name] = drawn.astype(np.float32)
        return name

    def dense(self, layer: str, source: str, n_in: int, n_out: int, output: str) -> NodeProto:
        weight = self.draw(f"{layer}/weight", n_out, n_in, fan_in=n_in)
        bias = self.draw(f"{layer}/bias", n_out, fan_in=n_in)
        return node("Gemm", [source, weight, bias], output, transB=1)


def mlp(weights: Weights) -> tuple[list[NodeProto], Mapping[str, Any]]:
    return [
        weights.dense("one", "observation", 4, 64, "a"),
        node("Tanh", ["a"], "b"),
        weights.dense("two", "b", 64, 64, "c"),
        node("Tanh", ["c"], "d"),
        weights.dense("head", "d", 64, N_ACTIONS, "action_dist_inputs"),
    ], {"observation": (FLOAT, ["B", 4])}


def cnn(weights: Weights) -> tuple[list[NodeProto], Mapping[str, Any]]:
    weights.by_name["white"] = np.array(255.0, np.float32)
    first = weights.draw("conv1", 8, 4, 8, 8, fan_in=256)
    second = weights.draw("conv2", 16, 8, 4, 4, fan_in=128)
    return [
        node("Cast", ["observation"], "pixels", to=FLOAT),
        node("Div", ["pixels", "white"], "scaled"),
        node("Transpose", ["scaled"], "image", perm=[0, 3, 1, 2]),
        node("Conv", ["image", first], "a", strides=[4, 4]),
        node("Relu", ["a"], "b"),
        node("Conv", ["b", second], "c", strides=[2, 2]),
        node("Relu", ["c"], "d"),
        node("Flatten", ["d"], "flat"),
        weights.dense("head", "flat", 16 * 2 * 2, N_ACTIONS, "action_dist_inputs"),
    ], {"observation": (TensorProto.UINT8, ["B", 32, 32, 4])}


def lstm(weights: Weights) -> tuple[list[NodeProto], Mapping[str, Any]]:
    weights.by_name["first"] = np.array([0])
    for name, width in (("W", 4), ("R", 64)):
        weights.draw(name, 1, 256, width, fan_in=width)
    weights.draw("bias", 1, 512, fan_in=64)
    return [
        node("Unsqueeze", ["observation", "first"], "steps"),
        node("Unsqueeze", ["state/h", "first"], "h"),
        node("Unsqueeze", ["state/c", "first"], "c"),
        helper.make_node(
            "LSTM",
            ["steps", "W", "R", "bias", "", "h", "c"],
            ["", "later_h", "later_c"],
            hidden_size=64,
        ),
        node("Squeeze", ["later_h", "first"], "next_state/h"),
        node("Squeeze", ["later_c", "first"], "next_state/c"),
        weights.dense("head", "next_state/h", 64, N_ACTIONS, "action_dist_inputs"),
    ], {
        "observation": (FLOAT, ["B", 4]),
        "state/h": (FLOAT, ["B", 64]),
        "state/c": (FLOAT, ["B", 64]),
    }


NETWORKS: Mapping[str, Callable[[Weights], Any]] = {"mlp": mlp, "cnn": cnn, "lstm": lstm}


def onnx_graph(name: str, path: Path) -> OnnxGraph:
    weights = Weights(seed=3)
    nodes, inputs = NETWORKS[name](weights)
    head, constants = discrete_head()
    inputs = {
        **inputs,
        "action_mask": (TensorProto.BOOL, ["B", N_ACTIONS]),
        "noise": (FLOAT, ["B", N_ACTIONS]),
    }
    outputs: dict[str, Any] = dict(OUTPUTS)
    if name == "lstm":
        outputs |= {"next_state/h": (FLOAT, ["B", 64]), "next_state/c": (FLOAT, ["B", 64])}
    model = make_model([*nodes, *head], inputs, outputs, {**weights.by_name, **constants})
    path.write_bytes(model.SerializeToString())
    return OnnxGraph(path, tuple(outputs))


def inputs_of(name: str, generator: np.random.Generator, n: int) -> Arrays:
    found: Arrays = {
        "action_mask": generator.random((n, N_ACTIONS)) < 0.8,
        "noise": generator.gumbel(size=(n, N_ACTIONS)).astype(np.float32),
    }
    found["action_mask"][:, 0] = True
    if name == "cnn":
        found["observation"] = generator.integers(0, 256, (n, 32, 32, 4)).astype(np.uint8)
    else:
        found["observation"] = generator.normal(size=(n, 4)).astype(np.float32)
    if name == "lstm":
        for state in ("h", "c"):
            found[f"state/{state}"] = generator.uniform(-1, 1, (n, 64)).astype(np.float32)
    return found


def in_batches(graph: Graph, names: Any, inputs: Arrays, size: int) -> Arrays:
    n = len(inputs["observation"])
    parts = [
        graph.run(names, {name: rows[start : start + size] for name, rows in inputs.items()})
        for start in range(0, n, size)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_runtime_answers_a_row_bit_for_bit_alike_in_every_batch(
    name: str, tmp_path: Path
) -> None:
    graph = onnx_graph(name, tmp_path / "policy.onnx")
    inputs = inputs_of(name, np.random.default_rng(1), N_ROWS)
    step = ("action", "next_state/h", "next_state/c") if name == "lstm" else ("action",)
    whole = (*OUTPUTS, *step[1:])
    for part, names in ((graph, step), (graph.unmasked, step), (graph, whole)):
        alone = in_batches(part, names, inputs, 1)
        for size in SIZES:
            found = in_batches(part, names, inputs, size)
            for output in names:
                np.testing.assert_array_equal(
                    found[output], alone[output], err_msg=f"{output} at B={size}"
                )
    assert len(np.unique(alone["action"])) == N_ACTIONS  # the network does choose


@pytest.mark.parametrize("name", NETWORKS)
def test_a_row_is_answered_alike_beside_any_neighbours(name: str, tmp_path: Path) -> None:
    graph = onnx_graph(name, tmp_path / "policy.onnx")
    generator = np.random.default_rng(2)
    row = inputs_of(name, generator, 1)
    expected = graph.run(tuple(OUTPUTS), row)
    for n in (2, 17, 64):
        crowd = inputs_of(name, generator, n)
        place = int(generator.integers(n))
        if name != "cnn":
            crowd["observation"] *= 1e6
        for each, values in row.items():
            crowd[each][place] = values[0]
        found = graph.run(tuple(OUTPUTS), crowd)
        for output in OUTPUTS:
            np.testing.assert_array_equal(found[output][place], expected[output][0])


class Twin(torch.nn.Module):
    """The MLP in torch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = torch.nn.Linear
        self.net = torch.nn.Sequential(
            layer(4, 64), torch.nn.Tanh(), layer(64, 64), torch.nn.Tanh(), layer(64, N_ACTIONS)
        )

    def forward(self, observation: Any) -> tuple[torch.Tensor, ...]:
        logits = self.net(observation)
        return logits.argmax(dim=1), logits


def test_torch_answers_a_row_alike_up_to_rounding(tmp_path: Path) -> None:
    path = tmp_path / "policy.torchscript.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(Twin(), torch.zeros(3, 4)).save(str(path))
    names = ("action", "action_dist_inputs")
    graph = load_torchscript(path, ["observation"], names)
    observation = np.random.default_rng(4).normal(size=(N_ROWS, 4)).astype(np.float32)
    alone = in_batches(graph, names, {"observation": observation}, 1)
    for size in SIZES:
        found = in_batches(graph, names, {"observation": observation}, size)
        np.testing.assert_array_equal(found["action"], alone["action"])
        np.testing.assert_allclose(
            found["action_dist_inputs"], alone["action_dist_inputs"], rtol=2e-6, atol=2e-6
        )
