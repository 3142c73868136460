"""`policyserve export`: what it writes, what it refuses, and that wrong exports are caught."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import onnx
import pytest

from serving.bundle import read_bundle
from serving.interface import Policy
from serving.rollout import evaluate_policy
from serving.verification import load_verified_policy
from tests.processes import ROOT, policyserve, refuse, succeed
from training.run_directory import find_checkpoint

pytestmark = pytest.mark.slow


def test_a_bundle_holds_what_the_design_names_and_nothing_of_this_machine(
    cartpole_bundle: Path,
) -> None:
    assert {entry.name for entry in cartpole_bundle.iterdir()} == {
        "manifest.json",
        "policy.onnx",
        "policy.torchscript.pt",
        "policy.pt2",
        "golden.npz",
    }
    for name in ("manifest.json", "policy.onnx", "policy.pt2"):
        assert str(ROOT).encode() not in (cartpole_bundle / name).read_bytes()
        assert str(Path.home()).encode() not in (cartpole_bundle / name).read_bytes()
    size = sum(
        (cartpole_bundle / name).stat().st_size
        for name in ("manifest.json", "policy.onnx", "golden.npz")
    )
    assert size < 100_000


def test_every_input_of_the_onnx_file_has_a_dynamic_batch(cartpole_bundle: Path) -> None:
    model = onnx.load(cartpole_bundle / "policy.onnx")
    onnx.checker.check_model(model, full_check=True)
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param


@pytest.mark.parametrize("name", ["cartpole", "pendulum"])
def test_the_parity_report_covers_real_episodes_and_every_batch_size(
    name: str, request: pytest.FixtureRequest
) -> None:
    manifest = read_bundle(request.getfixturevalue(f"{name}_bundle")).manifest.raw
    report = manifest["parity"]["onnx"]
    assert report["batch_sizes"] == [1, 7, 64]
    assert report["observations"]["on_policy"] > 0
    assert report["max_error"] <= report["tolerance"] == 1e-5
    assert report["n_mismatched_actions"] == 0


def rllib_greedy_actions(run: Path, observations: np.ndarray) -> np.ndarray:
    """RLlib's answer by its own documented way: the RLModule and the connectors' formulas."""
    import torch
    from ray.rllib.core.rl_module.rl_module import RLModule

    path = find_checkpoint(run) / "learner_group/learner/rl_module/default_policy"
    module = RLModule.from_checkpoint(str(path.resolve()))
    # In float64: torch's own float32 answer was once seen 9e-5 off in a long-lived test process.
    module.double()
    with torch.no_grad():
        output = module.forward_inference({"obs": torch.from_numpy(observations).double()})
    return output["action_dist_inputs"].numpy()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # RLlib's own, while it is imported
@pytest.mark.parametrize("engine", ["onnx", "torchscript", "pt2"])
def test_discrete_actions_are_the_argmax_of_the_rl_modules_logits(
    cartpole_run: Path, cartpole_bundle: Path, engine: Any
) -> None:
    observations = np.random.default_rng(3).normal(size=(500, 4)).astype(np.float32)
    logits = rllib_greedy_actions(cartpole_run, observations)
    policy = load_verified_policy(cartpole_bundle, engine=engine)
    output = policy.compute_actions(observations, outputs=["action_dist_inputs"])
    np.testing.assert_allclose(output.action_dist_inputs, logits, atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(output.actions, logits.argmax(axis=1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # RLlib's own, while it is imported
def test_box_actions_are_unsquashed_and_clipped_as_rllib_does(
    pendulum_run: Path, pendulum_bundle: Path
) -> None:
    observations = np.random.default_rng(3).normal(size=(500, 3)).astype(np.float32) * 3
    mean = rllib_greedy_actions(pendulum_run, observations)[:, :1]
    # RLlib `unsquash_action` for Pendulum's bounds -2 and 2.
    expected = np.clip(-2 + (mean + 1) * 4 / 2, -2, 2)
    policy = load_verified_policy(pendulum_bundle)
    np.testing.assert_allclose(policy.compute_actions(observations).actions, expected, atol=1e-5)


def test_the_bundle_reaches_the_return_that_the_checkpoint_reaches(
    cartpole_run: Path, cartpole_bundle: Path
) -> None:
    arguments = ("--env", "CartPole-v1", "--episodes", "3", "--json")
    results = [
        json.loads(succeed("evaluate", path, *arguments).splitlines()[-1])
        for path in (cartpole_run, cartpole_bundle)
    ]
    assert results[0] == results[1]
    assert results[0]["mean_return"] >= 475


def test_inspect_prints_the_manifest_and_verify_replays_it(cartpole_bundle: Path) -> None:
    manifest = json.loads(succeed("inspect", cartpole_bundle, "--json").splitlines()[-1])
    assert manifest == json.loads((cartpole_bundle / "manifest.json").read_text())
    assert manifest["policy_id"] in succeed("inspect", cartpole_bundle)
    for engine in ("onnx", "torchscript", "pt2"):
        report = json.loads(succeed("verify", cartpole_bundle, "--engine", engine, "--json"))
        assert report["max_error"] <= 1e-5


def test_another_format_than_the_known_is_a_usage_error(cartpole_run: Path, tmp_path: Path) -> None:
    line = refuse("export", cartpole_run, "-o", tmp_path / "b", "--format", "onxx", exit_code=2)
    assert "onnx" in line
    assert not (tmp_path / "b").exists()


def test_without_unpickling_the_same_policy_comes_out(
    cartpole_run: Path, cartpole_bundle: Path, tmp_path: Path
) -> None:
    safe = tmp_path / "safe"
    succeed("export", cartpole_run, "-o", safe, "--safe")
    observations = np.random.default_rng(5).normal(size=(50, 4)).astype(np.float32)
    found, expected = (
        load_verified_policy(path).compute_actions(observations, outputs=["action_dist_inputs"])
        for path in (safe, cartpole_bundle)
    )
    np.testing.assert_array_equal(found.action_dist_inputs, expected.action_dist_inputs)
    refuse("export", cartpole_run, "-o", safe, "--safe", "--trust-checkpoint", exit_code=2)
    refuse("export", cartpole_run, "-o", safe, "--config", "x.yaml", exit_code=2)


def copy_of_checkpoint(run: Path, target: Path) -> Path:
    shutil.copytree(run / "checkpoints" / "best", target)
    return target


def test_a_checkpoint_from_elsewhere_is_not_unpickled_unless_it_is_trusted(
    cartpole_run: Path, tmp_path: Path
) -> None:
    checkpoint = copy_of_checkpoint(cartpole_run, tmp_path / "checkpoint")
    touched = tmp_path / "touched"
    code = checkpoint / "class_and_ctor_args.pkl"
    code.write_bytes(pickle.dumps(_Bomb(touched)))
    line = refuse("export", checkpoint, "-o", tmp_path / "bundle", exit_code=2)
    assert "--trust-checkpoint" in line
    assert not touched.exists()
    pickle.loads(code.read_bytes())
    assert touched.exists()  # it would have run


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def _other_ray(path: Path) -> None:
    marker = json.loads(path.read_text())
    path.write_text(json.dumps({**marker, "ray_version": "2.44.1"}))


def _drop_a_weight(path: Path) -> None:
    weights = pickle.loads(path.read_bytes())
    weights.pop(min(weights))
    path.write_bytes(pickle.dumps(weights))


MODULE = "learner_group/learner/rl_module/default_policy"
DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no marker": ("rllib_checkpoint.json", Path.unlink, "rllib_checkpoint.json"),
    "another Ray": ("rllib_checkpoint.json", _other_ray, "2.44.1"),
    "half-written config": ("class_and_ctor_args.pkl", _truncate, "class_and_ctor_args.pkl"),
    "half-written weights": (f"{MODULE}/module_state.pkl", _truncate, "default_policy"),
    "a weight gone": (f"{MODULE}/module_state.pkl", _drop_a_weight, "lacks 1 weights"),
    "no module": (MODULE, shutil.rmtree, "default_policy"),
    "no connectors": ("env_runner/env_to_module_connector", shutil.rmtree, "env_to_module"),
}


@pytest.mark.filterwarnings("ignore")  # RLlib's own, while it is imported
@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_and_an_older_bundle_stays(
    cartpole_run: Path, cartpole_bundle: Path, tmp_path: Path, case: str
) -> None:
    from export.convert import export_policy
    from export.errors import CheckpointError

    name, damage, expected = DAMAGES[case]
    checkpoint = copy_of_checkpoint(cartpole_run, tmp_path / "checkpoint")
    damage(checkpoint / name)
    target = tmp_path / "bundle"
    shutil.copytree(cartpole_bundle, target)
    with pytest.raises(CheckpointError) as caught:
        export_policy(checkpoint, target, trust_checkpoint=True)
    assert expected in caught.value.message
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []
    assert read_bundle(target).manifest.raw == read_bundle(cartpole_bundle).manifest.raw


def test_a_refusal_is_one_line_and_exit_1(cartpole_run: Path, tmp_path: Path) -> None:
    checkpoint = copy_of_checkpoint(cartpole_run, tmp_path / "checkpoint")
    _other_ray(checkpoint / "rllib_checkpoint.json")
    arguments = ("export", checkpoint, "-o", tmp_path / "b", "--trust-checkpoint")
    # RLlib has much to say while it is imported, and none of it may reach the user.
    line = refuse(*arguments, exit_code=1, in_new_interpreter=True)
    assert "2.44.1" in line


@pytest.mark.filterwarnings("ignore")  # RLlib's own, while it is imported
def test_an_algorithm_without_a_policy_module_is_refused_by_name(
    cartpole_run: Path, tmp_path: Path
) -> None:
    from ray.rllib.algorithms.dreamerv3 import DreamerV3

    checkpoint = copy_of_checkpoint(cartpole_run, tmp_path / "checkpoint")
    path = checkpoint / "class_and_ctor_args.pkl"
    content = pickle.loads(path.read_bytes())
    path.write_bytes(cloudpickle.dumps({**content, "class": DreamerV3}))
    line = refuse(
        "export", checkpoint, "-o", tmp_path / "bundle", "--trust-checkpoint", exit_code=1
    )
    assert "DreamerV3" in line


def test_something_that_is_no_bundle_is_never_overwritten(
    cartpole_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    refuse("export", cartpole_run, "-o", tmp_path, exit_code=1)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_evaluate_takes_a_random_policy_and_refuses_what_is_none(tmp_path: Path) -> None:
    arguments = ("--env", "CartPole-v1", "--episodes", "5")
    figures = json.loads(succeed("evaluate", "random", *arguments, "--json").splitlines()[-1])
    assert figures["mean_return"] < 100
    assert figures["n_episodes"] == 5
    refuse("evaluate", tmp_path / "nothing", *arguments, exit_code=2)
    assert "CartPole" in refuse("evaluate", "random", "--env", "CartPool-v1", exit_code=2)


def test_evaluate_refuses_an_environment_of_other_spaces_for_every_form(
    cartpole_run: Path, cartpole_bundle: Path
) -> None:
    for policy in (cartpole_run, cartpole_bundle):
        arguments = ("evaluate", policy, "--env", "Acrobot-v1")
        line = refuse(*arguments, exit_code=2, in_new_interpreter=True)
        assert "Acrobot-v1" in line


def test_help_of_every_command_is_shown_without_loading_ray() -> None:
    for verb in ("export", "evaluate", "inspect", "verify", "serve", "act", "play", "loadtest"):
        done = policyserve(verb, "--help")
        assert done.returncode == 0
        assert "Usage: policyserve" in done.stdout


def test_a_policy_from_a_bundle_satisfies_the_protocol(cartpole_bundle: Path) -> None:
    policy = load_verified_policy(cartpole_bundle)
    assert isinstance(policy, Policy)
    env = gym.make("CartPole-v1")
    assert evaluate_policy(policy, env, n_episodes=1).n_steps > 0
    env.close()
