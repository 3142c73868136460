"""ONNX Runtime as an engine, and the policy around any engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from serving.bundle import ONNX, read_bundle
from serving.engines.graph import GraphPolicy, load_graph
from serving.engines.onnx_engine import OnnxGraph
from serving.errors import (
    BundleError,
    InferenceError,
    InvalidRequestError,
    ServingConfigError,
)
from tests.bundles import OUTPUTS, box_policy, discrete_policy


@pytest.mark.parametrize("name", ["discrete", "box"])
@pytest.mark.parametrize("asked", [OUTPUTS, OUTPUTS[::-1], ("action",), ("value", "action")])
def test_any_choice_of_outputs_is_answered_by_name(bundles, discrete, box, name, asked):
    reference = {"discrete": discrete, "box": box}[name]
    graph = load_graph(read_bundle(bundles[name]))
    observations = reference.observations(6)
    noise = np.random.default_rng(1).normal(size=(6, reference.noise_size)).astype(np.float32)
    expected = reference.answers(observations, noise)
    found = graph.run(asked, observations, noise)
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
        observations, noise=noise, is_sampled=is_sampled, outputs=("action_logp",)
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
