"""Cutting an ONNX graph down to what an output needs, and refusing what no policy needs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from serving.engines.onnx_model import Signature, check_safety, graph_inputs, subgraph
from serving.errors import BundleError
from tests.bundles import OUTPUTS, LinearPolicy, box_policy, discrete_policy, onnx_model
from tests.tiny_policies import TINY_POLICIES, image_policy, memory_policy


def run(model: bytes, feeds: dict[str, Any]) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    taken = {entry.name for entry in session.get_inputs()}
    names = [entry.name for entry in session.get_outputs()]
    values = session.run(names, {name: value for name, value in feeds.items() if name in taken})
    return dict(zip(names, values, strict=True))


def feeds(policy: LinearPolicy) -> dict[str, Any]:
    noise = np.random.default_rng(0).normal(size=(9, policy.noise_size)).astype(np.float32)
    mask = np.ones((9, policy.noise_size), dtype=np.bool_)
    return {"observation": policy.observations(9), "noise": noise, "action_mask": mask}


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
    assert [node.op_type for node in part.graph.node] == ["Flatten", "Gemm", "Where", "ArgMax"]
    assert [entry.name for entry in part.graph.initializer] == ["weights", "bias", "floor"]
    assert [entry.name for entry in part.graph.input] == ["observation", "action_mask"]
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
    assert part.graph.node[3].attribute[0].name == "axis"


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


def test_inputs_are_read_with_their_types_and_shapes():
    found = graph_inputs(memory_policy().model().SerializeToString())
    assert found["state/h"] == Signature("float32", (None, 2))
    assert found["reward"] == Signature("float32", (None,))
    assert found["action_mask"] == Signature("bool", (None, 2))
    image = graph_inputs(image_policy().model().SerializeToString())
    assert image["observation"] == Signature("uint8", (None, 2, 2, 3))


def test_a_fixed_batch_is_seen_in_the_signature():
    model = onnx_model(discrete_policy())
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    assert graph_inputs(model.SerializeToString())["observation"] == Signature("float32", (2, 4))


@pytest.mark.parametrize("name", TINY_POLICIES)
def test_sound_models_are_safe(name: str):
    check_safety(TINY_POLICIES[name]().model().SerializeToString())


def test_a_branching_model_is_safe():
    check_safety(branching_model().SerializeToString())


def external(tensor: onnx.TensorProto) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def add_external_initializer(model: onnx.ModelProto) -> None:
    external(model.graph.initializer[0])


def add_location_alone(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].external_data.add(key="location", value="weights.bin")


def add_flag_alone(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL


def add_external_constant(model: onnx.ModelProto) -> None:
    tensor = numpy_helper.from_array(np.zeros(3, np.float32), "secret")
    external(tensor)
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def add_external_in_branch(model: onnx.ModelProto) -> None:
    branch = next(node for node in model.graph.node if node.op_type == "If").attribute[1].g
    tensor = numpy_helper.from_array(np.zeros(3, np.float32), "secret")
    external(tensor)
    branch.initializer.append(tensor)


def add_external_sparse(model: onnx.ModelProto) -> None:
    sparse = model.graph.sparse_initializer.add()
    sparse.values.name = "secret"
    external(sparse.values)


def add_external_sparse_attribute(model: onnx.ModelProto) -> None:
    attribute = model.graph.node[0].attribute.add(name="sparse_value")
    external(attribute.sparse_tensor.indices)


def add_external_in_function(model: onnx.ModelProto) -> None:
    function = model.functions.add(name="f")
    tensor = numpy_helper.from_array(np.zeros(3, np.float32), "secret")
    external(tensor)
    function.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def add_opset(model: onnx.ModelProto) -> None:
    model.opset_import.add(domain="com.microsoft", version=1)


def add_foreign_node(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "com.microsoft"


def add_foreign_node_in_branch(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "If")
    node.attribute[0].g.node[0].domain = "evil"


def add_foreign_function(model: onnx.ModelProto) -> None:
    model.functions.add(name="f", domain="evil")


def add_foreign_node_in_function(model: onnx.ModelProto) -> None:
    model.functions.add(name="f").node.append(helper.make_node("Run", [], ["x"], domain="evil"))


def add_foreign_opset_in_function(model: onnx.ModelProto) -> None:
    model.functions.add(name="f").opset_import.add(domain="evil", version=1)


def add_training(model: onnx.ModelProto) -> None:
    model.training_info.add()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (add_external_initializer, "'a' in another file"),
        (add_location_alone, "'a' in another file"),
        (add_flag_alone, "'a' in another file"),
        (add_external_constant, "'secret' in another file"),
        (add_external_in_branch, "'secret' in another file"),
        (add_external_sparse, "'secret' in another file"),
        (add_external_sparse_attribute, "in another file"),
        (add_external_in_function, "'secret' in another file"),
        (add_opset, "domain 'com.microsoft'"),
        (add_foreign_node, "domain 'com.microsoft' .a node Add"),
        (add_foreign_node_in_branch, "domain 'evil'"),
        (add_foreign_function, "domain 'evil' .the function 'f'"),
        (add_foreign_node_in_function, "domain 'evil' .a node Run"),
        (add_foreign_opset_in_function, "domain 'evil'"),
        (add_training, "training_info"),
    ],
)
def test_what_no_policy_needs_is_refused_wherever_it_hides(damage: Any, reason: str):
    model = branching_model()
    damage(model)
    with pytest.raises(BundleError, match=reason):
        check_safety(model.SerializeToString())


def test_the_standard_domain_has_two_names():
    model = branching_model()
    for node in model.graph.node:
        node.domain = "ai.onnx"
    model.opset_import[0].domain = "ai.onnx"
    model.functions.add(name="f", domain="ai.onnx")
    check_safety(model.SerializeToString())
