"""Cutting an ONNX graph down to what an output needs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from serving.engines.onnx_model import subgraph
from serving.errors import BundleError
from tests.bundles import OUTPUTS, LinearPolicy, box_policy, discrete_policy, onnx_model


def run(model: bytes, feeds: dict[str, Any]) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    taken = {entry.name for entry in session.get_inputs()}
    names = [entry.name for entry in session.get_outputs()]
    values = session.run(names, {name: value for name, value in feeds.items() if name in taken})
    return dict(zip(names, values, strict=True))


def feeds(policy: LinearPolicy) -> dict[str, Any]:
    noise = np.random.default_rng(0).normal(size=(9, policy.noise_size)).astype(np.float32)
    return {"observation": policy.observations(9), "noise": noise}


@pytest.mark.parametrize("make", [discrete_policy, box_policy])
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_part_answers_as_the_whole_does(make: Any, output: str):
    policy = make()
    whole = onnx_model(policy).SerializeToString()
    part = subgraph(whole, [output])
    assert list(run(part, feeds(policy))) == [output]
    np.testing.assert_array_equal(
        run(part, feeds(policy))[output], run(whole, feeds(policy))[output]
    )
    onnx.checker.check_model(onnx.load_from_string(part))


def test_what_no_output_needs_is_really_gone():
    whole = onnx_model(discrete_policy())
    part = onnx.load_from_string(subgraph(whole.SerializeToString(), ["action"]))
    assert [node.op_type for node in part.graph.node] == ["Flatten", "Gemm", "ArgMax"]
    assert [entry.name for entry in part.graph.initializer] == ["weights", "bias"]
    assert [entry.name for entry in part.graph.input] == ["observation"]
    assert [entry.name for entry in part.graph.output] == ["action"]
    critic = onnx.load_from_string(subgraph(whole.SerializeToString(), ["value"]))
    assert {entry.name for entry in critic.graph.initializer} == {
        "value_weights",
        "value_bias",
        "last_axis",
    }


def test_with_all_outputs_nothing_is_lost():
    whole = onnx_model(box_policy())
    assert onnx.load_from_string(subgraph(whole.SerializeToString(), OUTPUTS)) == whole


def test_fields_that_are_not_described_pass_through():
    whole = onnx_model(discrete_policy())
    whole.producer_name = "somebody"
    whole.metadata_props.add(key="key", value="value")
    part = onnx.load_from_string(subgraph(whole.SerializeToString(), ["action"]))
    assert (part.producer_name, part.metadata_props[0].value) == ("somebody", "value")
    assert (part.ir_version, part.opset_import) == (whole.ir_version, whole.opset_import)
    assert part.graph.node[1].attribute == whole.graph.node[1].attribute
    assert part.graph.node[2].attribute[0].name == "axis"


def branching_model() -> onnx.ModelProto:
    """`action` = observation + a where the sum is positive, else observation - b."""

    def branch(operation: str, weight: str) -> onnx.GraphProto:
        return helper.make_graph(
            [helper.make_node(operation, ["doubled", weight], [f"{operation}_result"])],
            operation,
            [],
            [helper.make_tensor_value_info(f"{operation}_result", TensorProto.FLOAT, ["B"])],
        )

    nodes = [
        helper.make_node("Add", ["observation", "observation"], ["doubled"]),
        helper.make_node("ReduceSum", ["observation"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["is_positive"]),
        helper.make_node(
            "If",
            ["is_positive"],
            ["action"],
            then_branch=branch("Add", "a"),
            else_branch=branch("Sub", "b"),
        ),
        helper.make_node("Mul", ["observation", "unused"], ["other"]),
    ]
    constants = {"a": [10.0], "b": [100.0], "zero": 0.0, "unused": [3.0]}
    graph = helper.make_graph(
        nodes,
        "branching",
        [helper.make_tensor_value_info("observation", TensorProto.FLOAT, ["B"])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B"])
            for name in ("action", "other")
        ],
        [
            numpy_helper.from_array(np.asarray(value, np.float32), name)
            for name, value in constants.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    onnx.checker.check_model(model)
    return model


def test_what_a_branch_reads_of_the_graph_around_it_is_kept():
    part = subgraph(branching_model().SerializeToString(), ["action"])
    names = {entry.name for entry in onnx.load_from_string(part).graph.initializer}
    assert names == {"a", "b", "zero"}
    for sign, expected in ((1, [12.0, 14.0]), (-1, [-102.0, -104.0])):
        observation = np.array([1.0, 2.0], np.float32) * sign
        assert run(part, {"observation": observation})["action"].tolist() == expected


@pytest.mark.parametrize(
    "garbage", [b"", b"garbage", b"\xff" * 100, b"\x00" * 100, b"PK\x03\x04"], ids=repr
)
def test_garbage_is_a_bundle_error(garbage: bytes):
    with pytest.raises(BundleError):
        subgraph(garbage, ["action"])


def test_a_model_cut_short_is_a_bundle_error():
    whole = onnx_model(discrete_policy()).SerializeToString()
    for length in range(1, len(whole), 97):
        with pytest.raises(BundleError):
            subgraph(whole[:length], OUTPUTS)


def test_a_missing_output_is_named_with_those_there_are():
    whole = onnx_model(discrete_policy()).SerializeToString()
    with pytest.raises(BundleError, match=r"'action_logp'.*not \['nothing'\]"):
        subgraph(whole, ["nothing"])
