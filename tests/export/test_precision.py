from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.checkpoint import load_checkpoint
from export.convert import ExportOptions, write_bundle
from export.errors import ConversionError, ParityError
from export.policy import Checkpoint
from export.precision import convert_precision
from export.reduced import measure_return
from serving.bundle import MANIFEST, ONNX, read_bundle
from serving.engines.onnx_engine import OnnxGraph
from serving.engines.onnx_model import check_safety
from serving.errors import UsageError
from serving.interface import PolicyOutput
from serving.play_loop import EnvironmentFailedError
from serving.verification import load_verified_policy
from tests.export.checkpoints import Case, write_checkpoint

pytestmark = pytest.mark.slow

OUTPUTS = ("action", "action_dist_inputs")
Weights = Mapping[str, NDArray[np.float32]]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def drawn_weights(n_inputs: int = 5, width: int = 64, n_actions: int = 3) -> Weights:
    rng = np.random.default_rng(3)
    shapes = {"w1": (width, n_inputs), "w2": (width, width), "w3": (n_actions, width)}
    found = {
        name: rng.normal(size=shape, scale=shape[1] ** -0.5).astype(np.float32)
        for name, shape in shapes.items()
    }
    return found | {f"b{i}": np.full(len(found[f"w{i}"]), 0.1 * i, np.float32) for i in (1, 2, 3)}


def write_network(path: Path, weights: Weights, middle: str = "Relu") -> Path:
    """A float64 filter, three layers, an argmax."""
    gemm = [
        helper.make_node("Gemm", [x, f"w{i}", f"b{i}"], [y], transB=1)
        for i, x, y in ((1, "x", "y1"), (2, "h1", "y2"), (3, "h2", "action_dist_inputs"))
    ]
    nodes = [
        helper.make_node("Cast", ["observation"], ["wide"], to=TensorProto.DOUBLE),
        helper.make_node("Sub", ["wide", "mean"], ["centred"]),
        helper.make_node("Cast", ["centred"], ["x"], to=TensorProto.FLOAT),
        gemm[0],
        helper.make_node(middle, ["y1"], ["h1"]),
        gemm[1],
        helper.make_node("Tanh", ["y2"], ["h2"]),
        gemm[2],
        helper.make_node("ArgMax", ["action_dist_inputs"], ["action"], axis=1, keepdims=0),
    ]
    n_inputs = weights["w1"].shape[1]
    constants = {**weights, "mean": np.full(n_inputs, 1 / 3, np.float64)}
    graph = helper.make_graph(
        nodes,
        "policy",
        [helper.make_tensor_value_info("observation", TensorProto.FLOAT, ["B", n_inputs])],
        [
            helper.make_tensor_value_info("action", TensorProto.INT64, ["B"]),
            helper.make_tensor_value_info("action_dist_inputs", TensorProto.FLOAT, ["B", None]),
        ],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save_model(model, str(path))
    return path


def answer(weights: Weights, observations: NDArray[Any], middle: str = "Relu") -> NDArray[Any]:
    """The same network in NumPy, in float64."""
    wide = {name: values.astype(np.float64) for name, values in weights.items()}
    h1 = (observations.astype(np.float64) - 1 / 3) @ wide["w1"].T + wide["b1"]
    h1 = np.maximum(h1, 0.0) if middle == "Relu" else np.tanh(h1)
    return np.tanh(h1 @ wide["w2"].T + wide["b2"]) @ wide["w3"].T + wide["b3"]


def converted(path: Path, precision: Any) -> Path:
    target = path.with_name(f"{precision}.onnx")
    convert_precision(path, target, precision)
    return target


def run(path: Path, observations: NDArray[Any]) -> NDArray[Any]:
    found = OnnxGraph(path, OUTPUTS).run(OUTPUTS, {"observation": observations})
    return found["action_dist_inputs"]


def stored(path: Path) -> dict[str, NDArray[Any]]:
    model = onnx.load_model(str(path))
    return {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load_model(str(path)).graph.node]


@pytest.mark.parametrize("middle", ["Relu", "Tanh"])
@pytest.mark.parametrize(("precision", "tolerance"), [("float16", 2e-3), ("int8", 5e-2)])
def test_the_answers_stay_near_the_float32_networks(
    tmp_path: Path, rng: np.random.Generator, precision: str, tolerance: float, middle: str
) -> None:
    weights = drawn_weights()
    path = converted(write_network(tmp_path / "float32.onnx", weights, middle), precision)
    for n in (1, 7, 64):
        observations = rng.normal(size=(n, 5), scale=2.0).astype(np.float32)
        expected = answer(weights, observations, middle)
        found = run(path, observations)
        assert found.dtype == np.float32
        assert np.abs(found - expected).max() < tolerance
        assert not np.array_equal(found, expected.astype(np.float32))


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_inputs_outputs_and_the_filter_are_as_before_and_operators_are_onnx_own(
    tmp_path: Path, precision: str
) -> None:
    before = write_network(tmp_path / "float32.onnx", drawn_weights())
    after = converted(before, precision)
    models = [onnx.load_model(str(path)) for path in (before, after)]
    for part in ("input", "output"):
        assert getattr(models[1].graph, part) == getattr(models[0].graph, part)
    check_safety(after.read_bytes())
    assert stored(after)["mean"].dtype == np.float64
    kept = [node for node in models[0].graph.node if node.op_type in ("Cast", "Sub", "ArgMax")]
    assert all(node in models[1].graph.node for node in kept)


def test_float16_stores_the_weights_of_every_layer_in_half_the_bytes(tmp_path: Path) -> None:
    weights = drawn_weights(width=128, n_actions=8)
    before = write_network(tmp_path / "float32.onnx", weights)
    after = converted(before, "float16")
    halves = {name for name, values in stored(after).items() if values.dtype == np.float16}
    assert halves == {"w1/float16", "w2/float16", "w3/float16"}
    assert stored(after)["b2"].dtype == np.float32
    assert after.stat().st_size < 0.55 * before.stat().st_size


def test_float16_reaches_recurrent_weights_that_other_nodes_rearrange(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Unsqueeze", ["w", "zero"], ["w3"]),
        helper.make_node("Unsqueeze", ["r", "zero"], ["r3"]),
        helper.make_node("Unsqueeze", ["observation", "zero"], ["x"]),
        helper.make_node("LSTM", ["x", "w3", "r3"], ["", "h"], hidden_size=16),
        helper.make_node("Squeeze", ["h", "zero"], ["action"]),
    ]
    constants = {
        "w": rng.normal(size=(64, 4)).astype(np.float32),
        "r": rng.normal(size=(64, 16)).astype(np.float32),
        "zero": np.array([0]),
    }
    graph = helper.make_graph(
        nodes,
        "policy",
        [helper.make_tensor_value_info("observation", TensorProto.FLOAT, ["B", 4])],
        [helper.make_tensor_value_info("action", TensorProto.FLOAT, ["B", 16])],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save_model(model, str(tmp_path / "float32.onnx"))
    after = converted(tmp_path / "float32.onnx", "float16")
    assert stored(after).keys() == {"w/float16", "r/float16", "zero"}
    inputs = {"observation": np.ones((3, 4), np.float32)}
    found, expected = (
        OnnxGraph(path, ("action",)).run(("action",), inputs)["action"]
        for path in (after, tmp_path / "float32.onnx")
    )
    assert np.abs(found - expected).max() < 1e-3


def test_int8_is_exact_where_the_numbers_are_whole(tmp_path: Path) -> None:
    # The first layer passes the observation plus 1/3, the second is the identity: 127/127.
    weights = {
        "w1": np.eye(64, dtype=np.float32),
        "b1": np.full(64, 1 / 3, np.float32),
        "w2": np.eye(64, dtype=np.float32),
        "b2": np.zeros(64, np.float32),
        "w3": np.eye(64, dtype=np.float32)[:2],
        "b3": np.zeros(2, np.float32),
    }
    path = converted(write_network(tmp_path / "float32.onnx", weights), "int8")
    observations = np.zeros((2, 64), np.float32)
    observations[:, 2] = 127.0  # the largest of its row: the steps are whole numbers
    observations[0, :2] = 1.0, 0.0
    observations[1, :2] = 2.0, 3.0
    assert run(path, observations) == pytest.approx(
        np.tanh([[1.0, 0.0], [2.0, 3.0]]), abs=1e-6, rel=0
    )


def test_int8_answers_a_row_alike_in_any_company(tmp_path: Path, rng: np.random.Generator) -> None:
    path = converted(write_network(tmp_path / "float32.onnx", drawn_weights()), "int8")
    observations = rng.normal(size=(8, 5)).astype(np.float32)
    observations[3] *= 1e4
    alone = np.concatenate([run(path, row[None]) for row in observations])
    assert run(path, observations) == pytest.approx(alone, abs=1e-6)


def test_int8_leaves_the_first_and_the_last_layer_alone(tmp_path: Path) -> None:
    weights = drawn_weights(n_inputs=80, n_actions=8)
    after = converted(write_network(tmp_path / "float32.onnx", weights), "int8")
    found = stored(after)
    for name in ("w1", "w3"):
        assert np.array_equal(found[name], weights[name])
    assert "w2" not in found
    assert operators(after).count("MatMulInteger") == 1


def test_a_network_with_nothing_to_convert_is_refused(tmp_path: Path) -> None:
    tiny = write_network(tmp_path / "float32.onnx", drawn_weights(width=8))
    for precision, reason in (("float16", "256 numbers"), ("int8", "64 x 64")):
        with pytest.raises(ConversionError, match=f"{precision} gains nothing here.*{reason}"):
            converted(tiny, precision)
        assert not (tmp_path / f"{precision}.onnx").exists()


def test_a_weight_beyond_float16_is_refused_by_name(tmp_path: Path) -> None:
    weights = dict(drawn_weights())
    weights["w2"] = weights["w2"] * 1e7
    with pytest.raises(ConversionError, match="w2 has a weight beyond float16's 65504"):
        converted(write_network(tmp_path / "float32.onnx", weights), "float16")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"precision": "int8", "formats": ("onnx", "pt2")}, "is for ONNX"),
        ({"tolerance": 0.1}, "float32 is held to 1e-05"),
        ({"precision": "int8", "tolerance": 0.0}, "between 0 and 1"),
        ({"precision": "int8", "tolerance": float("nan")}, "between 0 and 1"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        ExportOptions(**options)


# From a checkpoint to a bundle.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    case = Case(
        gym.spaces.Box(-2, 2, (4,), np.float32),
        gym.spaces.Discrete(3),
        connectors=("mean_std",),
        model_config={"fcnet_hiddens": [64, 64]},
    )
    path = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), case)
    return load_checkpoint(path, trust=True)


def test_an_int8_bundle_carries_both_reports_and_the_return_and_verifies(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    target = tmp_path / "bundle"
    manifest = write_bundle(checkpoint, target, ExportOptions(precision="int8"))
    raw = manifest.raw
    assert json.loads((target / MANIFEST).read_text())["return"] == raw["return"]
    assert (raw["precision"], raw["tolerance"]) == ("int8", 0.1)
    reports = raw["parity"]
    assert reports["onnx"]["precision"] == "int8"
    assert 1e-4 < reports["onnx"]["max_error"] < 0.1
    assert reports["onnx_float32"]["max_error"] < 1e-5
    assert raw["return"]["is_measured"]
    # Twelve rewards of cos(action + step), each at most 1.
    assert abs(raw["return"]["float32"]["mean_return"]) < 12
    assert "MatMulInteger" in operators(target / ONNX)
    assert sorted(read_bundle(target).manifest.files) == ["golden.npz", "policy.onnx"]
    assert load_verified_policy(target).manifest.tolerance == 0.1


def test_an_exceeded_tolerance_is_refused_with_the_largest_error_and_the_way_out(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    target = tmp_path / "bundle"
    with pytest.raises(ParityError, match=r"int8 is not within.*0\.001.*--tolerance") as caught:
        write_bundle(checkpoint, target, ExportOptions(precision="int8", tolerance=1e-3))
    assert "the largest error is 0.0" in caught.value.message
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_without_its_environment_says_that_no_return_was_measured(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    nowhere = dataclasses.replace(checkpoint, env_id=None, env_class=None)
    manifest = write_bundle(nowhere, tmp_path / "bundle", ExportOptions(precision="float16"))
    assert manifest.raw["return"] == {
        "is_measured": False,
        "reason": "the checkpoint names no environment for a single agent",
    }
    assert manifest.tolerance == 0.01


class Constant:
    """A policy with one action."""

    def __init__(self, action: float) -> None:
        self.action = action

    def compute_actions(self, observations: Any, **_: Any) -> PolicyOutput:
        return PolicyOutput(actions=np.full(len(observations), self.action))


class Echo(gym.Env[Any, Any]):
    """Rewards the action, twice as much in episodes with an odd seed; two steps."""

    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Box(-9, 9, ())

    def reset(self, *, seed: int | None = None, **_: Any) -> tuple[Any, dict[str, Any]]:
        self.factor, self.n = 1 + (seed or 0) % 2, 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.n += 1
        return np.zeros(1, np.float32), float(action) * self.factor, self.n == 2, False, {}


def test_the_return_is_compared_episode_by_episode() -> None:
    report = measure_return(Constant(1.0), Constant(1.5), Echo, n_episodes=4)
    # Returns 2, 4, 2, 4 and 3, 6, 3, 6; the differences are 1, 2, 1, 2.
    assert report["float32"]["mean_return"] == 3.0
    assert report["converted"]["mean_return"] == 4.5
    assert report["difference"]["mean_return"] == 1.5
    # t(3) = 3.1824 times 0.57735 / 2
    assert report["difference"]["ci95_return"] == pytest.approx(0.9187, rel=1e-2)
    assert report["n_episodes"] == 4


def test_an_environment_that_fails_is_a_reason_and_no_error() -> None:
    def fail() -> Any:
        raise EnvironmentFailedError("no such game")

    report = measure_return(Constant(1.0), Constant(1.0), fail)
    assert report == {
        "is_measured": False,
        "reason": "the environment fails here: no such game",
    }
