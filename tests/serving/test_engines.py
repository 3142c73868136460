"""ONNX Runtime as an engine, and the policy around any engine."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from serving.bundle import GOLDEN, ONNX, PT2, TORCHSCRIPT, read_bundle, write_manifest
from serving.engines.graph import GraphPolicy, load_graph, unmasked
from serving.engines.onnx_engine import OnnxGraph
from serving.engines.torch_engine import move_constants
from serving.errors import (
    BundleError,
    InferenceError,
    InvalidRequestError,
    ServingConfigError,
)
from serving.spaces import flatten
from serving.verification import load_verified_policy, verify_graph
from tests.bundles import OUTPUTS, box_policy, discrete_policy
from tests.serving.torch_programs import write_pt2, write_torchscript
from tests.tiny_policies import (
    TINY_POLICIES,
    dict_policy,
    image_policy,
    memory_policy,
    nested_policy,
    q_policy,
)


@pytest.mark.parametrize("name", ["discrete", "box"])
@pytest.mark.parametrize("asked", [OUTPUTS, OUTPUTS[::-1], ("action",), ("value", "action")])
def test_any_choice_of_outputs_is_answered_by_name(bundles, discrete, box, name, asked):
    reference = {"discrete": discrete, "box": box}[name]
    graph = load_graph(read_bundle(bundles[name]))
    observations = reference.observations(6)
    noise = np.random.default_rng(1).normal(size=(6, reference.noise_size)).astype(np.float32)
    expected = reference.answers(observations, noise)
    inputs = {"observation": observations, "noise": noise}
    inputs["action_mask"] = np.ones((6, 3), dtype=np.bool_)  # more than a box policy needs
    found = graph.run(asked, inputs)
    assert set(found) == set(asked)
    for output in asked:
        np.testing.assert_allclose(found[output], expected[output], rtol=1e-5, atol=1e-6)


def test_a_file_that_is_no_onnx_model_is_a_bundle_error(tmp_path: Path):
    path = tmp_path / ONNX
    path.write_bytes(b"garbage")
    with pytest.raises(BundleError):
        OnnxGraph(path, OUTPUTS)


def test_a_model_with_a_broken_node_is_a_bundle_error(tmp_path: Path):
    def damage(model: Any) -> None:
        model.graph.node[1].op_type = "NoSuchOperator"

    path = discrete_policy().save(tmp_path / "bundle", damage_model=damage)
    with pytest.raises(BundleError, match="cannot load"):
        load_graph(read_bundle(path))


def test_a_graph_with_other_inputs_is_a_bundle_error(tmp_path: Path):
    def damage(model: Any) -> None:
        model.graph.input[0].name = model.graph.node[0].input[0] = "obs"

    path = discrete_policy().save(tmp_path / "bundle", damage_model=damage)
    with pytest.raises(BundleError, match="'obs'"):
        load_graph(read_bundle(path))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(
            lambda model: model.graph.input[0].type.tensor_type.shape.dim.add(),
            r"observation is float32 \(None, 4, None\)",
            id="rank",
        ),
        pytest.param(
            lambda model: setattr(
                model.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 1
            ),
            r"observation is float32 \(1, 4\)",
            id="batch",
        ),
        pytest.param(
            lambda model: model.graph.input.add().CopyFrom(clock()), "'clock'", id="one more"
        ),
    ],
)
def test_a_graph_that_is_not_what_the_manifest_says_is_a_bundle_error(
    tmp_path: Path, damage: Any, reason: str
):
    path = discrete_policy().save(tmp_path / "bundle")
    model = onnx.load(path / ONNX)
    damage(model)
    (tmp_path / ONNX).write_bytes(model.SerializeToString())
    manifest = read_bundle(path).manifest
    with pytest.raises(BundleError, match=reason):
        signature_of(tmp_path / ONNX, manifest)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda inputs: inputs[:-1], "has the inputs"),
        (
            lambda inputs: [dataclasses.replace(inputs[0], dtype="float64"), *inputs[1:]],
            "observation is float32 .* says float64",
        ),
    ],
)
def test_a_manifest_that_says_another_thing_than_the_graph_is_a_bundle_error(
    bundles, change: Any, reason: str
):
    manifest = read_bundle(bundles["discrete"]).manifest
    changed = dataclasses.replace(manifest, inputs=tuple(change(manifest.inputs)))
    with pytest.raises(BundleError, match=reason):
        signature_of(bundles["discrete"] / ONNX, changed)


def clock() -> Any:
    return onnx.helper.make_tensor_value_info("clock", onnx.TensorProto.FLOAT, ["B"])


def signature_of(path: Path, manifest: Any) -> None:
    OnnxGraph(path, manifest.outputs).check_signature(manifest)


def test_a_graph_with_an_action_of_another_rank_is_a_bundle_error(bundles):
    manifest = read_bundle(bundles["discrete"]).manifest
    other = read_bundle(bundles["box"]).manifest
    graph = OnnxGraph(bundles["discrete"] / ONNX, manifest.outputs)
    graph.check_signature(manifest)
    with pytest.raises(BundleError, match="the output action has the shape"):
        graph.check_signature(dataclasses.replace(manifest, action_space=other.action_space))


def test_an_input_that_the_network_does_not_use_may_stand_in_the_graph(tmp_path: Path):
    def damage(model: Any) -> None:
        rank_1 = onnx.helper.make_tensor_value_info("reward", onnx.TensorProto.FLOAT, ["B"])
        model.graph.input.append(rank_1)

    inputs = [*discrete_policy().facts()["inputs"]]
    inputs.append({"name": "reward", "role": "reward", "dtype": "float32", "shape": [-1]})
    path = discrete_policy().save(
        tmp_path / "bundle",
        damage_model=damage,
        damage_golden=lambda golden: golden.update(reward=np.zeros(70, np.float32)),
        facts={"inputs": inputs},
    )
    policy = load_verified_policy(path)
    assert len(policy.compute_actions(np.zeros((2, 4)), rewards=[1.0, 2.0])) == 2


def test_a_model_that_keeps_its_weights_in_another_file_is_never_loaded(tmp_path: Path):
    def damage(model: Any) -> None:
        tensor = model.graph.initializer[0]
        (tmp_path / "weights").write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=str(tmp_path / "weights"))

    path = discrete_policy().save(tmp_path / "bundle", damage_model=damage)
    with pytest.raises(BundleError, match=r"policy\.onnx: .*another file"):
        load_graph(read_bundle(path))


def test_an_engine_without_its_file_is_a_bundle_error(bundles):
    bundle = read_bundle(bundles["discrete"])
    with pytest.raises(BundleError, match=r"has no policy\.torchscript\.pt"):
        bundle.file("policy.torchscript.pt")


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="CUDA is here"
)
def test_a_device_that_is_not_there_is_a_configuration_error(bundles):
    with pytest.raises(ServingConfigError, match="onnxruntime-gpu"):
        load_graph(read_bundle(bundles["discrete"]), device="cuda")


@pytest.mark.parametrize("n", [1, 2, 3, 64, 65, 1000])
def test_any_batch_size_works_in_any_order(graph_policies, discrete, n: int):
    policy = GraphPolicy(graph_policies["discrete"].manifest, graph_policies["discrete"].graph)
    observations = discrete.observations(n, seed=n)
    found = policy.compute_actions(observations, outputs=("action_logp",))
    np.testing.assert_array_equal(found.actions, discrete.inputs(observations).argmax(axis=1))
    smaller = policy.compute_actions(observations[:1], outputs=("action_logp",))
    np.testing.assert_allclose(smaller.action_logp, found.action_logp[:1], rtol=1e-5)


def test_a_policy_without_a_critic_answers_no_value(graph_policies):
    policy = graph_policies["no-critic"]
    with pytest.raises(InvalidRequestError, match="no critic"):
        policy.compute_actions(np.zeros((1, 4)), outputs=("value",))
    output = policy.compute_actions(np.zeros((1, 4)), outputs=("action_logp",))
    assert output.value is None


def test_an_engine_s_own_exception_becomes_an_inference_error(graph_policies):
    class Broken:
        name = "broken"
        device = "cpu"

        def run(self, *_: Any) -> Any:
            raise OSError("out of memory")

    policy = GraphPolicy(graph_policies["box"].manifest, Broken())
    with pytest.raises(InferenceError, match="broken failed on a valid batch: out of memory"):
        policy.compute_actions(np.zeros((1, 3)))


def test_box_actions_stay_within_their_bounds_however_far_the_mean(graph_policies):
    policy = graph_policies["box"]
    observations = np.array([[1e6] * 3, [-1e6] * 3, [1e30] * 3], np.float32)
    actions = policy.compute_actions(observations).actions
    assert np.all(np.isin(actions, [-2.0, 2.0, -1.0, 3.0]))


@pytest.mark.parametrize("name", ["discrete", "box"])
def test_noise_moves_only_the_rows_that_are_sampled(graph_policies, discrete, box, name: str):
    reference = {"discrete": discrete, "box": box}[name]
    observations = reference.observations(40)
    noise = np.random.default_rng(2).normal(size=(40, reference.noise_size)).astype(np.float32)
    is_sampled = np.arange(40) % 2 == 0
    found = graph_policies[name].compute_conformed(
        {"observation": observations, "noise": noise},
        is_sampled=is_sampled,
        outputs=("action_logp",),
    )
    expected = reference.answers(observations, noise)
    for row in range(40):
        mode = "sampled_" if is_sampled[row] else ""
        np.testing.assert_allclose(
            found.actions[row], expected[f"{mode}action"][row], rtol=1e-5, atol=1e-5
        )
        assert found.action_logp[row] == pytest.approx(
            expected[f"{mode}action_logp"][row], abs=1e-5
        )


def test_a_policy_draws_its_own_noise_distribution(graph_policies):
    for name, width in (("discrete", 3), ("box", 2)):
        noise = graph_policies[name].draw_noise(7, seed=3)
        assert noise.shape == (7, width)
        assert noise.dtype == np.float32
    generator = np.random.default_rng(3)
    np.testing.assert_array_equal(
        graph_policies["box"].draw_noise(7, seed=3),
        generator.standard_normal((7, 2), dtype=np.float32),
    )


def test_an_output_stands_for_its_actions(graph_policies):
    output = graph_policies["box"].compute_actions(box_policy().observations(3))
    np.testing.assert_array_equal(np.asarray(output), output.actions)
    assert np.asarray(output, dtype=np.float64).dtype == np.float64
    assert len(output) == len(list(output)) == 3
    np.testing.assert_array_equal(output[1], output.actions[1])


def test_the_actions_of_a_nested_space_are_given_one_by_one(tiny_policies):
    reference = nested_policy()
    output = tiny_policies["nested"].compute_actions(reference.observations(4, seed=2))
    assert len(output) == 4
    assert [sorted(action) for action in output] == [["gear", "steer"]] * 4
    assert output[2]["gear"] == output.actions["gear"][2]
    np.testing.assert_array_equal(output[2]["steer"], output.actions["steer"][2])
    assert len(output[1:3]["gear"]) == 2
    with pytest.raises(TypeError, match="not one array"):
        np.asarray(output)


def whole_inputs(name: str, n: int) -> dict[str, Any]:
    policy = TINY_POLICIES[name]()
    return {
        **policy.random_inputs(np.random.default_rng(5), n),
        **policy.initial_state(n),
    }


@pytest.mark.parametrize("name", TINY_POLICIES)
def test_every_kind_of_policy_answers_as_its_twin(tiny_policies, name: str):
    reference, policy = TINY_POLICIES[name](), tiny_policies[name]
    inputs = whole_inputs(name, 20)
    expected = reference.answers(inputs)
    for is_sampled in (False, True) if reference.noise_size else (False,):
        prefix = "sampled_" if is_sampled else ""
        found = policy.compute_conformed(
            inputs, is_sampled=is_sampled, outputs=policy.available_outputs
        )
        actions = flatten(policy.manifest.action_space, "action", found.actions)
        for leaf, values in actions.items():
            np.testing.assert_allclose(values, expected[f"{prefix}{leaf}"], rtol=1e-5, atol=1e-5)
        for output in policy.available_outputs:
            source = f"{prefix}{output}" if output == "action_logp" else output
            np.testing.assert_allclose(
                getattr(found, output), expected[source], rtol=1e-5, atol=1e-5
            )


def test_a_batch_may_mix_modes_in_actions_and_in_state(tiny_policies):
    inputs = whole_inputs("memory", 20)
    expected = memory_policy().answers(inputs)
    is_sampled = np.arange(20) % 3 == 0
    found = tiny_policies["memory"].compute_conformed(
        inputs, is_sampled=is_sampled, outputs=("action_logp",)
    )
    differ = expected["action"] != expected["sampled_action"]
    assert differ[is_sampled].any()
    assert differ[~is_sampled].any()

    def chosen(name: str) -> Any:
        rows = is_sampled.reshape(-1, *[1] * (expected[name].ndim - 1))
        return np.where(rows, expected[f"sampled_{name}"], expected[name])

    np.testing.assert_array_equal(found.actions, chosen("action"))
    np.testing.assert_allclose(found.action_logp, chosen("action_logp"), atol=1e-5)
    np.testing.assert_array_equal(found.state["previous"], chosen("next_state/previous"))
    np.testing.assert_allclose(found.state["h"], expected["next_state/h"], rtol=1e-6)


def test_nested_actions_of_a_mixed_batch_are_chosen_leaf_by_leaf(tiny_policies):
    inputs = whole_inputs("nested", 12)
    expected = nested_policy().answers(inputs)
    is_sampled = np.arange(12) % 2 == 0
    found = tiny_policies["nested"].compute_conformed(inputs, is_sampled=is_sampled)
    for leaf, rows in (("gear", is_sampled), ("steer", is_sampled[:, None])):
        values = np.where(rows, expected[f"sampled_action/{leaf}"], expected[f"action/{leaf}"])
        np.testing.assert_allclose(found.actions[leaf], values, rtol=1e-5, atol=1e-6)


def test_an_episode_is_played_with_the_state_that_was_answered(tiny_policies):
    policy, reference = tiny_policies["memory"], memory_policy()
    inputs = {
        "observation": np.random.default_rng(3).normal(size=(2, 8, 2)).astype(np.float32),
        "reward": np.random.default_rng(4).normal(size=(2, 8)).astype(np.float32),
        "noise": np.zeros((2, 8, 2), np.float32),
        "action_mask": np.ones((2, 8, 2), dtype=np.bool_),
        "is_sampled": np.zeros((2, 8), dtype=np.bool_),
    }
    expected = reference.play(inputs)
    state = None
    for step in range(8):
        output = policy.compute_actions(
            inputs["observation"][:, step],
            rewards=inputs["reward"][:, step],
            state=state,
            outputs=("action_dist_inputs",),
        )
        np.testing.assert_array_equal(output.actions, expected["action"][:, step])
        np.testing.assert_allclose(
            output.action_dist_inputs, expected["action_dist_inputs"][:, step], atol=1e-6
        )
        state = output.state


def test_rows_without_a_state_begin_an_episode_beside_rows_that_go_on(tiny_policies):
    policy = tiny_policies["memory"]
    observations = memory_policy().observations(2, seed=7)
    first = policy.compute_actions(observations).state
    rows = [None, {name: values[1] for name, values in first.items()}]
    mixed = policy.compute_actions(observations, state=rows).state
    fresh = policy.compute_actions(observations).state
    later = policy.compute_actions(observations, state=first).state
    np.testing.assert_array_equal(mixed["h"][0], fresh["h"][0])
    np.testing.assert_array_equal(mixed["h"][1], later["h"][1])


def test_a_masked_action_is_never_taken(tiny_policies):
    policy, n = tiny_policies["dict"], 300
    mask = np.random.default_rng(1).random((n, 3)) < 0.5
    mask[np.arange(n), np.arange(n) % 3] = True
    observations = dict_policy().observations(n)
    for deterministic in (True, False):
        actions = policy.compute_actions(
            observations, deterministic=deterministic, action_mask=mask
        ).actions
        assert mask[np.arange(n), actions].all()
        assert set(actions) == {0, 1, 2}


def test_without_a_distribution_nothing_is_sampled(tiny_policies):
    policy = tiny_policies["q"]
    with pytest.raises(InvalidRequestError, match=r"\(DQN\) has no distribution") as caught:
        policy.compute_actions(np.zeros((1, 3)), deterministic=False)
    assert caught.value.details["pointer"] == "/deterministic"


@pytest.mark.parametrize("asked", ["action_logp", "value", "action_dist_inputs"])
def test_an_output_that_a_policy_lacks_is_refused_with_those_it_has(tiny_policies, asked: str):
    with pytest.raises(InvalidRequestError, match=f"`{asked}`; it has q_values") as caught:
        tiny_policies["q"].compute_actions(np.zeros((1, 3)), outputs=(asked,))
    assert caught.value.details["pointer"] == "/outputs"
    observations = q_policy().observations(5)
    found = tiny_policies["q"].compute_actions(observations, outputs=("q_values",))
    np.testing.assert_array_equal(found.actions, found.q_values.argmax(axis=1))


def test_sampling_without_noise_is_a_mistake_of_ours(graph_policies):
    with pytest.raises(ValueError, match="noise"):
        graph_policies["box"].compute_conformed(
            {"observation": np.zeros((1, 3), np.float32)}, is_sampled=True
        )


@pytest.mark.parametrize(
    ("engine", "file", "write"),
    [("torchscript", TORCHSCRIPT, write_torchscript), ("pt2", PT2, write_pt2)],
)
def test_torch_s_own_formats_are_the_same_policy(
    tmp_path: Path, engine: Any, file: str, write: Any
):
    path = memory_policy().save(tmp_path / "bundle")
    write(path / file)
    write_manifest(path, memory_policy().facts(), [ONNX, GOLDEN, file])
    bundle = read_bundle(path)
    graph = load_graph(bundle, engine)
    report = verify_graph(bundle, graph)
    assert report.engine == engine
    assert report.max_error < 1e-5
    policy = GraphPolicy(bundle.manifest, graph)
    output = policy.compute_actions(memory_policy().observations(3), deterministic=False, seed=1)
    assert output.state["h"].shape == (3, 2)
    again = policy.compute_actions(memory_policy().observations(3), state=output.state)
    assert len(again) == 3


@pytest.mark.parametrize("engine", ["torchscript", "pt2"])
def test_a_file_that_torch_cannot_load_is_a_bundle_error(tmp_path: Path, engine: Any):
    path = memory_policy().save(tmp_path / "bundle")
    file = {"torchscript": TORCHSCRIPT, "pt2": PT2}[engine]
    (path / file).write_bytes(b"garbage")
    write_manifest(path, memory_policy().facts(), [ONNX, GOLDEN, file])
    with pytest.raises(BundleError, match="torch cannot load"):
        load_graph(read_bundle(path), engine)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
@pytest.mark.parametrize("engine", ["torchscript", "pt2"])
def test_torch_without_a_gpu_is_a_configuration_error(tmp_path: Path, engine: Any):
    path = memory_policy().save(tmp_path / "bundle")
    file = {"torchscript": TORCHSCRIPT, "pt2": PT2}[engine]
    (path / file).write_bytes(b"never read")
    write_manifest(path, memory_policy().facts(), [ONNX, GOLDEN, file])
    with pytest.raises(ServingConfigError, match="sees no GPU"):
        load_graph(read_bundle(path), engine, "cuda")


@pytest.mark.parametrize("engine", ["onnx", "torchscript", "pt2"])
def test_the_bare_runtime_computes_what_the_engine_computes(tmp_path: Path, engine: Any):
    path = memory_policy().save(tmp_path / "bundle")
    write_torchscript(path / TORCHSCRIPT)
    write_pt2(path / PT2)
    write_manifest(path, memory_policy().facts(), [ONNX, GOLDEN, TORCHSCRIPT, PT2])
    graph = load_graph(read_bundle(path), engine)
    inputs = whole_inputs("memory", 7)
    inputs["observation"] = np.asfortranarray(inputs["observation"])
    for names in (("action",), ("next_state/h", "action"), memory_policy().outputs):
        expected = graph.run(names, inputs)
        call = graph.prepare(names, inputs)
        for _ in range(2):  # it is called again and again
            found: Any = call()
            assert len(found) == len(names)
            for name, values in zip(names, found, strict=True):
                np.testing.assert_array_equal(values, expected[name])


def test_the_bare_runtime_of_a_policy_without_masks_reads_none(tiny_policies):
    graph = unmasked(tiny_policies["memory"].graph)
    inputs = whole_inputs("memory", 5)
    del inputs["action_mask"]
    (action,) = graph.prepare(("action",), inputs)()
    np.testing.assert_array_equal(action, graph.run(("action",), inputs)["action"])


def test_a_traced_program_makes_its_tensors_where_it_runs(tmp_path: Path):
    class Casting(torch.nn.Module):
        def forward(self, x):
            return x.to(device="cpu", dtype=torch.float32) + torch.ones(2)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(Casting(), torch.zeros(3, 2).double()).save(str(tmp_path / "casting.pt"))
        module = torch.jit.load(str(tmp_path / "casting.pt"))
    move_constants(module, "meta")  # a device of every installation
    assert module(torch.zeros(3, 2).double()).device.type == "meta"


def test_an_image_stays_bytes_up_to_the_graph(tiny_policies):
    reference = image_policy()
    arrays = reference.observation_arrays(6, seed=1)
    inputs = {**arrays, "noise": np.zeros((6, 5)), "action_mask": np.ones((6, 5), np.bool_)}
    found = tiny_policies["image"].compute_actions(arrays["observation"])
    np.testing.assert_array_equal(found.actions, reference.answers(inputs)["action"])
    assert found.actions.shape == (6, 2)
