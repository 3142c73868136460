"""Odd but real policies and checkpoints: exported exactly, or refused for what they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete

from serving.verification import load_verified_policy

pytestmark = [
    pytest.mark.slow,
    # Ray's and torch's own, while they are imported.
    pytest.mark.filterwarnings("ignore"),
]

FOUR = Box(-1, 1, (4,), np.float32)


def export(directory: Path, case: Any, **options: Any) -> Any:
    from export.convert import export_policy
    from tests.export.checkpoints import write_checkpoint

    checkpoint = write_checkpoint(directory / "checkpoint", case)
    return export_policy(checkpoint, directory / "bundle", trust_checkpoint=True, **options)


def case_of(module_class: str | None = None, **changes: Any) -> Any:
    from tests.export import odd_modules
    from tests.export.checkpoints import Case

    chosen = getattr(odd_modules, module_class) if module_class else None
    spaces = {"observation_space": FOUR, "action_space": Discrete(3), **changes}
    return Case(**spaces, module_class=chosen)


def test_a_module_missing_from_a_multi_agent_checkpoint_is_refused(tmp_path: Path) -> None:
    from export.convert import ExportOptions, SourceOptions, export_policies
    from export.errors import CheckpointError
    from tests.export.checkpoints import write_checkpoint

    checkpoint = write_checkpoint(
        tmp_path / "checkpoint", case_of(agents={"a0": "pA", "a1": "pA", "b": "pB"})
    )
    reading = SourceOptions(trust=True)
    written = export_policies(checkpoint, tmp_path / "all", reading, ExportOptions())
    assert sorted(str(path.relative_to(tmp_path / "all")) for path in written) == ["pA/1", "pB/1"]
    for manifest in written.values():
        assert manifest.agents == {"a0": "pA", "a1": "pA", "b": "pB"}
    shutil.rmtree(checkpoint / "learner_group/learner/rl_module/pB")
    with pytest.raises(CheckpointError, match="pB"):
        export_policies(checkpoint, tmp_path / "none", reading, ExportOptions())
    assert not (tmp_path / "none").exists()


def test_a_filter_whose_state_is_missing_is_refused(tmp_path: Path) -> None:
    from export.convert import export_policy
    from export.errors import CheckpointError
    from tests.export.checkpoints import write_checkpoint

    checkpoint = write_checkpoint(tmp_path / "checkpoint", case_of(connectors=("mean_std",)))
    shutil.rmtree(checkpoint / "env_runner/env_to_module_connector/MeanStdFilter")
    with pytest.raises(CheckpointError, match="MeanStdFilter"):
        export_policy(checkpoint, tmp_path / "bundle", trust_checkpoint=True)


def test_a_module_that_explores_by_actions_of_its_own_is_refused(tmp_path: Path) -> None:
    from export.errors import UnsupportedPolicyError

    with pytest.raises(UnsupportedPolicyError, match="forward_exploration"):
        export(tmp_path, case_of("ExploresAtRandom"))


def test_actions_that_a_module_chose_itself_go_before_its_distribution(tmp_path: Path) -> None:
    manifest = export(tmp_path, case_of("ChoosesLast"))
    assert manifest.distribution == "none"
    actions = load_verified_policy(tmp_path / "bundle").compute_actions(np.zeros((5, 4)))
    assert list(actions) == [2] * 5  # whatever its logits say


def test_states_are_matched_by_name_and_narrowed_as_rllib_does(tmp_path: Path) -> None:
    manifest = export(tmp_path, case_of("TurnedState"))
    assert {name: spec.dtype for name, spec in manifest.state.items()} == {
        "h": "float32",
        "c": "float32",
    }
    policy = load_verified_policy(tmp_path / "bundle")
    state = policy.compute_actions(np.ones((1, 4))).state
    # The module adds 1 to h and 10 to c in every step.
    assert state is not None
    np.testing.assert_allclose(state["h"], 1.0)
    np.testing.assert_allclose(state["c"], 10.0)


def test_an_observation_space_that_does_not_hold_zero_is_probed_within_itself(
    tmp_path: Path,
) -> None:
    export(tmp_path, case_of("Embeds", observation_space=Discrete(5, start=10)))
    load_verified_policy(tmp_path / "bundle").compute_actions(np.array([10, 14]))


def test_rows_without_an_answer_of_rllibs_are_left_out_and_counted(tmp_path: Path) -> None:
    manifest = export(tmp_path, case_of("DividesByNorm"))
    assert manifest.raw["parity"]["onnx"]["n_without_answer"] == 1  # the all-zero edge
    assert any("no number" in warning for warning in manifest.raw["warnings"])


def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path: Path) -> None:
    from export.errors import CheckpointError

    with pytest.raises(CheckpointError, match=r"weight .*NaN"):
        export(tmp_path, case_of(weight_scale=float("nan")))


@pytest.mark.parametrize("fails_in", ["reset", "step"])
def test_an_environment_that_fails_is_no_reason_to_refuse_a_policy_with_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_in: str
) -> None:
    from tests.export.checkpoints import SpacesEnv

    def fail(*_: Any, **__: Any) -> Any:
        raise SystemExit(0)

    monkeypatch.setattr(SpacesEnv, fails_in, fail)
    model_config = {"use_lstm": True, "max_seq_len": 8, "lstm_cell_size": 8}
    manifest = export(tmp_path, case_of(model_config=model_config))
    assert "space_sample" in manifest.raw["parity"]["onnx"]["observations"]


def test_keys_that_look_like_file_names_keep_their_own_golden_vectors(tmp_path: Path) -> None:
    keys = {"x": Box(-1, 1, (2,), np.float32), "x.npy": Box(-1, 1, (3,), np.float32)}
    export(tmp_path, case_of(observation_space=Dict(keys), connectors=("flatten",)))
    load_verified_policy(tmp_path / "bundle")


def test_arguments_of_the_environment_that_no_manifest_can_hold_are_left_out(
    tmp_path: Path,
) -> None:
    from export.checkpoint import load_checkpoint
    from export.convert import ExportOptions, write_bundle
    from tests.export.checkpoints import write_checkpoint

    checkpoint = load_checkpoint(write_checkpoint(tmp_path / "c", case_of()), trust=True)
    checkpoint.env_config["object"] = gym.Env  # type: ignore[index]
    manifest = write_bundle(checkpoint, tmp_path / "bundle", ExportOptions())
    assert manifest.environment is not None
    assert manifest.environment["kwargs"] == {}


def test_a_wide_action_is_held_to_its_own_range(tmp_path: Path) -> None:
    wide = Box(np.array([-3000, -1], np.float32), np.array([1, 1], np.float32))
    export(tmp_path, case_of(action_space=wide))
    actions = load_verified_policy(tmp_path / "bundle").compute_actions(np.zeros((1, 4))).actions
    assert wide.contains(actions[0])


def test_a_filter_keeps_the_digits_of_small_changes_of_large_numbers(tmp_path: Path) -> None:
    # 40,000 ± 0.05 in float64: in float32 only a dozen different values would be left.
    space = Box(40_000 - 0.05, 40_000 + 0.05, (4,), np.float64)
    export(tmp_path, case_of(observation_space=space, connectors=("mean_std",)))
    policy = load_verified_policy(tmp_path / "bundle")
    rows = 40_000 + np.array([[1e-4] * 4, [2e-4] * 4])
    found = policy.compute_actions(rows, outputs=["action_dist_inputs"]).action_dist_inputs
    assert found is not None
    assert np.abs(found[0] - found[1]).max() > 1e-4
