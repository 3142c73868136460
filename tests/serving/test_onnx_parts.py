"""The smaller graphs that serve most steps: without a mask, without the critic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from serving.bundle import read_bundle
from serving.engines.graph import GraphPolicy, load_graph, unmasked
from serving.engines.onnx_model import graph_inputs, without_mask
from serving.errors import BundleError, VerificationError
from serving.manifest import step_outputs
from serving.verification import verify_graph
from tests.tiny_policies import TINY_POLICIES, TinyPolicy, dict_policy, memory_policy

# The image policy's graph splits its mask first, so there the mask stays.
MASKED = ["dict", "memory"]


def inputs_of(policy: TinyPolicy, n: int = 9) -> dict[str, Any]:
    found = policy.random_inputs(np.random.default_rng(5), n) | policy.initial_state(n)
    if "action_mask" in found:
        found["action_mask"][:] = True
    return found


@pytest.mark.parametrize("name", MASKED)
def test_a_step_without_a_mask_is_answered_as_with_one_that_allows_all(
    name: str, tmp_path: Path
) -> None:
    policy = TINY_POLICIES[name]()
    graph = unmasked(load_graph(read_bundle(policy.save(tmp_path / "bundle"))))
    inputs = inputs_of(policy)
    expected = policy.answers(inputs)
    del inputs["action_mask"]
    for names in step_outputs(policy.outputs):
        found = graph.run(names, inputs)
        assert list(found) == list(names)
        for output in names:
            np.testing.assert_allclose(found[output], expected[output], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TINY_POLICIES)
def test_all_outputs_are_there_without_a_mask_too(name: str, tmp_path: Path) -> None:
    policy = TINY_POLICIES[name]()
    graph = unmasked(load_graph(read_bundle(policy.save(tmp_path / "bundle"))))
    inputs = inputs_of(policy)
    expected = policy.answers(inputs)
    found = graph.run(policy.outputs, inputs)
    for output in policy.outputs:
        np.testing.assert_allclose(found[output], expected[output], rtol=1e-5, atol=1e-6)


def test_a_mask_that_is_given_forbids(tmp_path: Path) -> None:
    policy = dict_policy()
    bundle = read_bundle(policy.save(tmp_path / "bundle"))
    player = GraphPolicy(bundle.manifest, load_graph(bundle))
    observations = policy.observations(30)
    free = player.compute_actions(observations).actions
    masks = np.arange(3) != free[:, None]
    held = player.compute_actions(observations, action_mask=masks).actions
    assert (held != free).all()


def test_a_policy_that_takes_no_mask_has_one_graph(tmp_path: Path) -> None:
    graph = load_graph(read_bundle(TINY_POLICIES["nested"]().save(tmp_path / "bundle")))
    assert unmasked(graph) is graph


def masked_model(*further: onnx.NodeProto, output: str = "action") -> bytes:
    """action = argmax(observation where the mask allows it)."""
    nodes = [
        helper.make_node("Where", ["action_mask", "observation", "floor"], ["allowed"]),
        *further,
        helper.make_node("ArgMax", ["allowed"], ["action"], axis=1, keepdims=0),
    ]
    types = {"action": (TensorProto.INT64, ["B"]), "allowed": (TensorProto.FLOAT, ["B", 3])}
    graph = helper.make_graph(
        nodes,
        "masked",
        [
            helper.make_tensor_value_info("observation", TensorProto.FLOAT, ["B", 3]),
            helper.make_tensor_value_info("action_mask", TensorProto.BOOL, ["B", 3]),
        ],
        [helper.make_tensor_value_info(output, *types[output])],
        [helper.make_tensor("floor", TensorProto.FLOAT, [], [-1e9])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


def test_the_mask_goes_together_with_the_node_that_reads_it() -> None:
    free = without_mask(masked_model(), "action_mask")
    assert free is not None
    assert list(graph_inputs(free)) == ["observation"]
    onnx.checker.check_model(onnx.load_from_string(free))
    session = onnxruntime.InferenceSession(free, providers=["CPUExecutionProvider"])
    observation = np.array([[1.0, 3.0, 2.0], [-2e9, -3e9, -4e9]], np.float32)
    assert session.run(None, {"observation": observation})[0].tolist() == [1, 0]


@pytest.mark.parametrize(
    "model",
    [
        masked_model(helper.make_node("Cast", ["action_mask"], ["other"], to=TensorProto.FLOAT)),
        masked_model(helper.make_node("Where", ["same", "action_mask", "same"], ["other"])),
        masked_model(output="allowed"),
        TINY_POLICIES["image"]().model().SerializeToString(),
        TINY_POLICIES["nested"]().model().SerializeToString(),
    ],
    ids=["cast", "other place", "an output", "split", "no mask"],
)
def test_a_mask_with_any_other_use_stays(model: bytes) -> None:
    assert without_mask(model, "action_mask") is None


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(BundleError):
        without_mask(b"garbage", "action_mask")


class Wrong:
    """A graph that is right but for one way of asking."""

    name = "odd"
    device = "cpu"

    def __init__(self, graph: Any, names: Sequence[str]) -> None:
        self._graph = graph
        self._names = tuple(names)

    def run(self, names: Sequence[str], inputs: Any) -> dict[str, Any]:
        found = dict(self._graph.run(names, inputs))
        if tuple(names) == self._names:
            found["action"] = 1 - found["action"]
        return found


@pytest.mark.parametrize("has_mask", [True, False])
@pytest.mark.parametrize("choice", [0, 2])
def test_a_load_replays_every_way_in_which_a_step_is_served(
    tmp_path: Path, choice: int, has_mask: bool
) -> None:
    bundle = read_bundle(memory_policy().save(tmp_path / "bundle"))
    graph = load_graph(bundle)
    verify_graph(bundle, graph)
    wrong: Any = Wrong(graph, step_outputs(bundle.manifest.outputs)[choice])
    if not has_mask:
        right_with_masks: Any = Wrong(graph, ())
        right_with_masks.unmasked = wrong
        wrong = right_with_masks
    with pytest.raises(VerificationError, match="action differs"):
        verify_graph(bundle, wrong)


def test_a_batch_needs_what_its_steps_need() -> None:
    outputs = (
        *("action/a", "action_logp", "sampled_action/a", "value"),
        *("next_state/h", "next_state/previous", "sampled_next_state/previous"),
    )
    assert step_outputs(outputs) == [
        ("action/a", "next_state/h", "next_state/previous"),
        ("sampled_action/a", "next_state/h", "sampled_next_state/previous"),
        (
            *("action/a", "sampled_action/a"),
            *("next_state/h", "next_state/previous", "sampled_next_state/previous"),
        ),
    ]
    assert step_outputs(("action", "q_values", "next_state/h")) == [("action", "next_state/h")]


def test_a_bundle_whose_mask_stays_is_served_with_it(tmp_path: Path) -> None:
    def also_read(model: Any) -> None:
        model.graph.node.append(
            helper.make_node("Cast", ["action_mask"], ["as_number"], to=TensorProto.FLOAT)
        )

    path = dict_policy().save(tmp_path / "bundle", damage_model=also_read)
    graph = load_graph(read_bundle(path))
    assert unmasked(graph) is graph
