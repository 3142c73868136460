"""What users take for a checkpoint, told apart by names alone; the trees are as Ray writes them."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest

from export.legacy import explain_legacy

# As RLlib 2.60 wrote it with config.api_stack(False, False).
OLD_MARKER = {
    "type": "Algorithm",
    "checkpoint_version": "1.1",
    "format": "cloudpickle",
    "state_file": "algorithm_state.pkl",
    "policy_ids": ["default_policy"],
    "ray_version": "2.60.0",
}
NEW_MARKER = {
    "class_and_ctor_args_file": "class_and_ctor_args.pkl",
    "state_file": "algorithm_state",
    "ray_version": "2.60.0",
    "checkpoint_version": "2.1",
}
BOMB = b"cos\nsystem\n(S'touch opened'\ntR."


def tree(root: Path, *names: str, **markers: object) -> Path:
    """Files of hostile bytes, and JSON markers by directory (`_` for the root)."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(BOMB)
    for name, content in markers.items():
        path = root / ("" if name == "_" else name) / "rllib_checkpoint.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    return root


def explained(path: Path) -> str:
    reason = explain_legacy(path)
    assert reason is not None
    assert str(path) in reason
    return reason


def test_an_old_stack_algorithm_is_named_with_its_versions_and_the_way_out(tmp_path: Path) -> None:
    names = ("algorithm_state.pkl", "policies/default_policy/policy_state.pkl")
    reason = explained(tree(tmp_path, *names, _=OLD_MARKER))
    for part in ("an Algorithm", "old API stack", "1.1", "Ray 2.60.0", "new API stack"):
        assert part in reason


def test_an_old_stack_policy_is_named(tmp_path: Path) -> None:
    marker = {**OLD_MARKER, "type": "Policy", "state_file": "policy_state.pkl"}
    assert "a Policy" in explained(tree(tmp_path, "policy_state.pkl", _=marker))


@pytest.mark.parametrize("marker", [{"checkpoint_version": "1.0"}, {"type": "Algorithm"}, []])
def test_an_old_stack_checkpoint_is_known_by_any_of_its_signs(
    tmp_path: Path, marker: object
) -> None:
    assert "old API stack" in explained(tree(tmp_path, "policies/p/policy_state.pkl", _=marker))


def test_an_old_stack_checkpoint_without_its_marker_is_known(tmp_path: Path) -> None:
    assert "old API stack" in explained(tree(tmp_path, "policy_state.pkl"))


def test_a_ray_1_checkpoint_is_known_as_a_directory_and_as_a_file(tmp_path: Path) -> None:
    tree(tmp_path, "checkpoint-40", "checkpoint-40.tune_metadata", ".is_checkpoint")
    for path in (tmp_path, tmp_path / "checkpoint-40"):
        assert "Ray 1" in explained(path)


def test_a_tune_trial_points_to_its_newest_checkpoint(tmp_path: Path) -> None:
    tree(tmp_path, "params.json", "result.json", checkpoint_000000=NEW_MARKER)
    tree(tmp_path, checkpoint_000001=NEW_MARKER)
    reason = explained(tmp_path)
    assert "a trial of Ray Tune" in reason
    assert f"the newest is {tmp_path / 'checkpoint_000001'}" in reason


def test_a_tune_experiment_points_to_the_newest_checkpoint_of_all_trials(tmp_path: Path) -> None:
    experiment = tree(tmp_path, "experiment_state-2026-01-01_00-00-00.json", "tuner.pkl")
    tree(experiment / "PPO_a", "params.json", checkpoint_000009=NEW_MARKER)
    tree(experiment / "PPO_b", "params.json", checkpoint_000001=NEW_MARKER)
    os.utime(experiment / "PPO_a/checkpoint_000009/rllib_checkpoint.json", (1, 1))
    reason = explained(experiment)
    assert "an experiment" in reason
    assert "holds 2" in reason
    assert str(experiment / "PPO_b/checkpoint_000001") in reason


def test_a_tune_trial_without_a_checkpoint_says_how_to_save_one(tmp_path: Path) -> None:
    assert "checkpoint_at_end=True" in explained(tree(tmp_path, "params.json"))


def test_a_tune_trial_of_ray_1_is_refused_as_old(tmp_path: Path) -> None:
    trial = tree(tmp_path, "params.json", "checkpoint_000040/checkpoint-40")
    assert "old API stack" in explained(trial)


def test_an_rl_module_inside_a_checkpoint_points_to_the_whole(tmp_path: Path) -> None:
    tree(tmp_path, _=NEW_MARKER)
    module = tmp_path / "learner_group/learner/rl_module/hunter"
    tree(module, "class_and_ctor_args.pkl", "module_state.pkl", "metadata.json")
    reason = explained(module)
    assert f"the checkpoint that it lies in: {tmp_path}" in reason
    assert "--module-id hunter" in reason


@pytest.mark.parametrize("state", ["module_state.pkl", "module_state.msgpack"])
def test_a_bare_rl_module_says_what_is_missing(tmp_path: Path, state: str) -> None:
    reason = explained(tree(tmp_path, "class_and_ctor_args.pkl", state, "metadata.json"))
    assert "an RLModule alone" in reason
    assert "rllib_checkpoint.json" in reason


def test_another_component_of_a_checkpoint_is_named_a_part(tmp_path: Path) -> None:
    tree(tmp_path, _=NEW_MARKER)
    runner = tree(tmp_path / "env_runner", "class_and_ctor_args.pkl", "state.pkl")
    assert "a part of a checkpoint" in explained(runner)


@pytest.mark.parametrize("names", [("_stable_baselines3_version", "data"), ("data", "policy.pth")])
def test_a_stable_baselines_model_is_named(tmp_path: Path, names: tuple[str, ...]) -> None:
    path = tmp_path / "ppo_cartpole.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, BOMB)
    assert "Stable-Baselines3" in explained(path)


def test_what_may_be_exported_is_not_explained_away(tmp_path: Path) -> None:
    names = ("class_and_ctor_args.pkl", "algorithm_state.pkl")
    assert explain_legacy(tree(tmp_path / "new", *names, _=NEW_MARKER)) is None
    assert explain_legacy(tree(tmp_path / "run", "run.json", "config.yaml")) is None
    assert explain_legacy(tree(tmp_path / "damaged", _="{")) is None


def test_what_is_nothing_at_all_is_left_to_others(tmp_path: Path) -> None:
    tree(tmp_path, "notes.txt", "weights.zip")
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "weights.zip", tmp_path / "none"):
        assert explain_legacy(path) is None
