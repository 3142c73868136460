"""The export matrix's diagonal, and answers worked out by hand from a checkpoint's weights.

The parity gate compares the export with RLlib; the tests by hand compare it with formulas, so that
a mistake that the exporter and its reference share cannot hide.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete

from serving.environments import make_env
from serving.verification import load_verified_policy
from training.run_directory import find_checkpoint

pytestmark = [
    pytest.mark.slow,
    # Ray's, torch's and the exporters' own.
    pytest.mark.filterwarnings("ignore"),
]

MODULE = "learner_group/learner/rl_module/default_policy"
N_ROWS = 40


# By name, as the cells themselves load Ray, which no collection of tests should do.
DIAGONAL = (
    "PPO / Box rank 3 / Box / clip",
    "PPO / uint8 image / Box half-bounded / Flatten / clip",
    "PPO shared / Dict / Tuple in Dict / Flatten + MeanStdFilter",
    "PPO LSTM / MultiDiscrete / Discrete / PrevActionsPrevRewards + Flatten",
    "PPO LSTM shared / Box rank 0 / Dict / Flatten / neither",
    "PPO free log std / Box 1-D int32 / Box float64 / Flatten / both",
    "IMPALA / Tuple / MultiDiscrete / Flatten",
    "APPO / Dict in Tuple in Dict / Tuple / Flatten",
    "DQN plain / Discrete / Discrete start 5 / Flatten",
    "DQN dueling double / frames / Discrete / FrameStacking",
    "DQN dueling distributional / Box 1-D float64 / Discrete",
    "DQN LSTM / MultiBinary / Discrete / Flatten",
    "SAC / Box rank 2 / Box / Flatten",
    "SAC discrete / Box 1-D / Discrete",
    "CQL / Box 1-D unbounded / Box",
    "IQL / Box 1-D float16 / Box / Flatten / clip",
    "TQC / Box 1-D / Box unbounded / MeanStdFilter",
    "BC / Box 1-D / Box",
    "MARWIL / Box 1-D / Discrete / PrevActionsPrevRewards + Flatten + MeanStdFilter",
    "custom PlainMlp",
    "custom DirectActions",
    "custom MaskedDict",
    "custom NestedState",
    "agent b's module",
    "agent b's module with MeanStdFilter",
    "agents a0 and a1's module",
    "no environment here and no local env runner",
    "custom UnknownDistribution",
    "custom DataDependent",
    "custom NumpyInside",
    "custom FixedBatch",
    "custom module that is not importable",
    "unknown connector",
    "uint8 image straight into a network",
    "two agents' filters before one module",
)


@pytest.mark.parametrize("name", DIAGONAL)
def test_every_cell_of_the_diagonal_comes_out_as_expected(name: str, tmp_path: Path) -> None:
    from tests.export.cells import diagonal
    from tests.export.matrix import FORMATS, run_cell

    cell = next(cell for cell in diagonal() if cell.name == name)
    # All three formats of every cell would take twice as long.
    formats = FORMATS if DIAGONAL.index(name) % 5 == 0 else FORMATS[:1]
    outcome = run_cell(cell, tmp_path, formats)
    assert outcome.passed, outcome.message


def test_no_cell_of_the_diagonal_is_left_out() -> None:
    from tests.export.cells import diagonal

    assert [cell.name for cell in diagonal()] == list(DIAGONAL)


def test_the_diagonal_holds_every_value_of_every_axis() -> None:
    from tests.export import axes, cells

    chosen = [set(values) for values in zip(*cells.DIAGONAL, strict=True)]
    others = (axes.OBSERVATIONS, axes.ACTIONS, axes.CONNECTORS, axes.SETTINGS)
    for axis, values in zip(others, chosen[1:], strict=True):
        assert set(axis) <= values
    modules = {axes.ALGORITHMS[name].name for name in chosen[0]}
    assert modules == {algorithm.name for algorithm in axes.ALGORITHMS.values()}


def files_below(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_a_factory_checkpoint_has_the_layout_of_a_trained_one(
    cartpole_run: Path, tmp_path: Path
) -> None:
    from tests.export.checkpoints import Case, write_checkpoint

    trained = find_checkpoint(cartpole_run)
    env = gym.make("CartPole-v1")
    made = write_checkpoint(tmp_path / "made", Case(env.observation_space, env.action_space))
    # `train` adds files of its own beside RLlib's, and has runners for evaluations.
    rllibs = {name for name in files_below(trained) if not name.startswith("eval_env_runner/")}
    ours = {name for name in rllibs if "/" not in name} - files_below(made)
    assert files_below(made) == rllibs - ours
    assert not any(name.endswith(".pkl") for name in ours)
    for name in ("rllib_checkpoint.json", f"{MODULE}/metadata.json"):
        assert json.loads((made / name).read_text()) == json.loads((trained / name).read_text())
    for name in files_below(made):
        if name.endswith("class_and_ctor_args.pkl"):
            left, right = (pickle.loads((root / name).read_bytes()) for root in (made, trained))
            # `train` may put a class of its own around one of RLlib's.
            assert issubclass(right["class"], left["class"])
            assert list(left["ctor_args_and_kwargs"][1]) == list(right["ctor_args_and_kwargs"][1])


Export = Callable[..., tuple[Path, Any]]


@pytest.fixture
def export(tmp_path: Path) -> Export:
    """Writes a case's checkpoint and bundle; gives the checkpoint and the verified policy."""
    from export.convert import export_policy
    from tests.export.checkpoints import Case, write_checkpoint

    def make(observation_space: Any, action_space: Any, **settings: Any) -> tuple[Path, Any]:
        case = Case(observation_space, action_space, **settings)
        checkpoint = write_checkpoint(tmp_path / "checkpoint", case)
        export_policy(checkpoint, tmp_path / "bundle", formats=("onnx",), trust_checkpoint=True)
        return checkpoint, load_verified_policy(tmp_path / "bundle")

    return make


def weights_of(checkpoint: Path) -> dict[str, np.ndarray]:
    content = pickle.loads((checkpoint / MODULE / "module_state.pkl").read_bytes())
    return {name: np.asarray(value, np.float64) for name, value in content.items()}


def network(checkpoint: Path, rows: np.ndarray, encoder: str, head: str) -> np.ndarray:
    """RLlib's default network by hand, in float64: two tanh layers and a linear head."""
    weights = weights_of(checkpoint)
    for layer in (f"{encoder}.net.mlp.0", f"{encoder}.net.mlp.2"):
        rows = np.tanh(rows @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"])
    return rows @ weights[f"{head}.net.mlp.0.weight"].T + weights[f"{head}.net.mlp.0.bias"]


def ppo_network(checkpoint: Path, rows: np.ndarray) -> np.ndarray:
    return network(checkpoint, rows, "encoder.actor_encoder", "pi")


def rl_module_of(checkpoint: Path) -> Any:
    from ray.rllib.core.rl_module.rl_module import RLModule

    return RLModule.from_checkpoint(str(checkpoint / MODULE))


def test_box_actions_are_the_mean_moved_into_the_bounds(export: Export) -> None:
    low, high = np.array([-2.0, 0.0, -5.0]), np.array([1.0, 10.0, -4.0])
    action_space = Box(low.astype(np.float32), high.astype(np.float32))
    checkpoint, policy = export(Box(-2, 2, (4,), np.float32), action_space)
    rows = np.random.default_rng(0).uniform(-2, 2, (N_ROWS, 4)).astype(np.float32)
    mean = ppo_network(checkpoint, rows)[:, :3]
    expected = np.clip(low + (mean + 1) * (high - low) / 2, low, high)
    assert (expected == high).any()
    assert (expected == low).any()
    np.testing.assert_allclose(policy.compute_actions(rows).actions, expected, atol=1e-4)


def test_sac_is_greedy_without_a_tanh_as_rllib_is(export: Export) -> None:
    import torch

    action_space = Box(np.array([-2, 1], np.float32), np.array([2, 4], np.float32))
    checkpoint, policy = export(Box(-2, 2, (4,), np.float32), action_space, algorithm="SAC")
    rows = np.random.default_rng(0).uniform(-2, 2, (N_ROWS, 4)).astype(np.float32)
    output = rl_module_of(checkpoint).forward_inference({"obs": torch.from_numpy(rows)})
    mean = output["action_dist_inputs"].detach().numpy()[:, :2].astype(np.float64)
    low, high = np.array([-2.0, 1.0]), np.array([2.0, 4.0])
    expected = np.clip(low + (mean + 1) * (high - low) / 2, low, high)
    with_tanh = low + (np.tanh(mean) + 1) * (high - low) / 2
    assert np.abs(expected - with_tanh).max() > 0.1
    np.testing.assert_allclose(policy.compute_actions(rows).actions, expected, atol=1e-4)


def test_discrete_actions_with_a_start_are_sent_from_zero_as_rllib_sends_them(
    export: Export,
) -> None:
    checkpoint, policy = export(Box(-2, 2, (4,), np.float32), Discrete(3, start=5))
    rows = np.random.default_rng(0).uniform(-2, 2, (N_ROWS, 4)).astype(np.float32)
    expected = ppo_network(checkpoint, rows).argmax(axis=1)
    assert set(expected) == {0, 1, 2}
    np.testing.assert_array_equal(policy.compute_actions(rows).actions, expected)


def test_each_key_of_a_dict_observation_reaches_its_own_inputs(export: Export) -> None:
    space = gym.spaces.Dict(
        {
            "speed": Box(-1, 1, (2,), np.float32),
            "gear": Discrete(4),
            "angle": Box(-1, 1, (2,), np.float32),
        }
    )
    checkpoint, policy = export(space, Discrete(5), connectors=("flatten",))
    rng = np.random.default_rng(0)
    rows = {
        "angle": rng.uniform(-1, 1, (N_ROWS, 2)).astype(np.float32),
        "gear": rng.integers(0, 4, N_ROWS),
        "speed": rng.uniform(-1, 1, (N_ROWS, 2)).astype(np.float32),
    }
    # RLlib flattens a Dict in the order of its sorted keys, and a Discrete to one-hot.
    flat = np.concatenate([rows["angle"], np.eye(4)[rows["gear"]], rows["speed"]], axis=1)
    expected = ppo_network(checkpoint, flat).argmax(axis=1)
    np.testing.assert_array_equal(policy.compute_actions(rows).actions, expected)
    exchanged = rows | {"angle": rows["speed"], "speed": rows["angle"]}
    assert (policy.compute_actions(exchanged).actions != expected).any()


def test_a_mean_std_filter_is_the_formula_of_the_observations_it_has_seen(export: Export) -> None:
    space = Box(np.array([-1, 50, 0], np.float32), np.array([1, 90, 1e-3], np.float32))
    checkpoint, policy = export(space, Discrete(4), connectors=("mean_std",))
    # The factory draws the filter's observations from the space, seeded with 0.
    space.seed(0)
    seen = np.stack([space.sample() for _ in range(50)]).astype(np.float64)
    rows = np.stack([space.sample() for _ in range(N_ROWS)])
    scaled = (rows - seen.mean(axis=0)) / (seen.std(axis=0, ddof=1) + 1e-6)
    logits = ppo_network(checkpoint, np.clip(scaled, -10, 10))
    output = policy.compute_actions(rows, outputs=["action_dist_inputs"])
    np.testing.assert_allclose(output.action_dist_inputs, logits, atol=1e-4)
    np.testing.assert_array_equal(output.actions, logits.argmax(axis=1))


def test_distributional_dqn_takes_the_best_expected_value(export: Export) -> None:
    settings = {"dueling": False, "double_q": False, "num_atoms": 11, "v_min": -5, "v_max": 9}
    checkpoint, policy = export(
        Box(-2, 2, (4,), np.float32), Discrete(3), algorithm="DQN", training=settings
    )
    rows = np.random.default_rng(0).uniform(-2, 2, (N_ROWS, 4)).astype(np.float32)
    scores = network(checkpoint, rows, "encoder", "af")
    atoms = np.exp(scores.reshape(N_ROWS, 3, 11))
    values = (atoms / atoms.sum(axis=-1, keepdims=True)) @ np.linspace(-5, 9, 11)
    expected = values.argmax(axis=1)
    assert len(set(expected)) > 1
    np.testing.assert_array_equal(policy.compute_actions(rows).actions, expected)


def test_an_lstm_bundle_steps_as_the_rl_module_does_with_its_own_states(export: Export) -> None:
    import torch

    model = {"use_lstm": True, "max_seq_len": 8, "lstm_cell_size": 12}
    checkpoint, policy = export(Box(-2, 2, (4,), np.float32), Discrete(4), model_config=model)
    rows = np.random.default_rng(0).uniform(-2, 2, (6, 3, 4)).astype(np.float32)
    rl_module = rl_module_of(checkpoint)
    state_in = _batched(rl_module.get_initial_state(), 3)
    state = None
    for step in rows:
        batch = {"obs": torch.from_numpy(step[:, None]), "state_in": state_in}
        expected = rl_module.forward_inference(batch)
        logits = expected["action_dist_inputs"][:, 0].detach().numpy()
        state_in = expected["state_out"]
        output = policy.compute_actions(step, state=state, outputs=["action_dist_inputs"])
        state = output.state
        np.testing.assert_allclose(output.action_dist_inputs, logits, atol=1e-4)
        np.testing.assert_array_equal(output.actions, logits.argmax(axis=1))
    forgetful = policy.compute_actions(rows[-1], outputs=["action_dist_inputs"])
    assert np.abs(forgetful.action_dist_inputs - logits).max() > 0.01


def _batched(value: Any, n_rows: int) -> Any:
    import torch

    if isinstance(value, dict):
        return {key: _batched(item, n_rows) for key, item in value.items()}
    return torch.as_tensor(value).unsqueeze(0).repeat(n_rows, *[1] * np.ndim(value))


def test_an_action_mask_inside_the_observation_is_obeyed(tmp_path: Path) -> None:
    from export.convert import export_policy
    from tests.export.cells import every_cell
    from tests.export.checkpoints import write_checkpoint

    cell = next(cell for cell in every_cell() if cell.name == "custom MaskedDict")
    checkpoint = write_checkpoint(tmp_path / "checkpoint", cell.case)
    export_policy(checkpoint, tmp_path / "bundle", formats=("onnx",), trust_checkpoint=True)
    policy = load_verified_policy(tmp_path / "bundle")
    rng = np.random.default_rng(0)
    rows = rng.uniform(-2, 2, (N_ROWS, 3)).astype(np.float32)
    allowed = rng.integers(0, 4, N_ROWS)
    mask = np.eye(4, dtype=np.float32)[allowed]
    for deterministic in (True, False):
        output = policy.compute_actions(
            {"action_mask": mask, "observations": rows}, deterministic=deterministic, seed=1
        )
        np.testing.assert_array_equal(output.actions, allowed)


def test_the_factorys_environment_is_made_again_from_what_the_checkpoint_says() -> None:
    from ray.rllib.utils.serialization import gym_space_to_dict

    from tests.export.checkpoints import ENV_ID

    observation_space = gym.spaces.Dict({"a": Discrete(3), "b": Box(0, 1, (2,), np.float32)})
    described = json.loads(json.dumps(gym_space_to_dict(observation_space)))
    kwargs = {"observation_space": described, "action_space": gym_space_to_dict(Discrete(2))}
    rewards = []
    for _ in range(2):
        env = make_env(ENV_ID, **kwargs)
        assert env.observation_space == observation_space
        observation, _ = env.reset(seed=4)
        assert observation in observation_space
        rewards.append([env.step(1)[1] for _ in range(12)])
        env.close()
    assert rewards[0] == rewards[1]
    assert len(set(rewards[0])) > 1
