"""Run by test_connectors.py: what training.spaces accepts is really trained on, in one Ray."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from ray.rllib.core import DEFAULT_MODULE_ID

from training.algorithm import build_algorithm, run_iteration
from training.cluster import ray_cluster
from training.config import PPOTrainingConfig
from training.config_files import load_config
from training.envs import check_environment

VECTOR = spaces.Box(-1.0, 1.0, (3,), np.float32)
THREE = spaces.Discrete(3)
MANY = spaces.Dict(b=VECTOR, a=THREE, c=spaces.Tuple([spaces.MultiDiscrete([2, 3]), VECTOR]))
LSTM = ("model.use_lstm=true", "model.lstm_cell_size=8", "model.max_seq_len=5")
FILTER = ("observation_filter=mean_std",)


def image(size: int, channels: int, dtype: Any = np.float32) -> spaces.Box:
    return spaces.Box(0, 1, (size, size, channels), dtype)


CASES: list[tuple[spaces.Space, spaces.Space, tuple[str, ...]]] = [
    (spaces.Box(-1.0, 1.0, (), np.float64), THREE, ()),
    (spaces.Box(-1.0, 1.0, (2, 2), np.float16), THREE, ()),
    (spaces.Tuple([MANY, spaces.MultiBinary((2, 2)), image(3, 3, np.uint8)]), THREE, FILTER),
    (image(10, 1, np.uint8), THREE, ()),
    (image(10, 3, np.float64), THREE, FILTER),
    (image(12, 1), THREE, ("model.conv_filters=[[4,4,2],[8,[3,3],2]]", *LSTM)),
    (image(10, 1), THREE, ("frame_stack=3", *FILTER, *LSTM)),
    (MANY, THREE, ("prev_actions=2", "prev_rewards=3", *FILTER, *LSTM)),
    (VECTOR, THREE, ("model.vf_share_layers=true", *LSTM)),
    (VECTOR, spaces.Box(-2.0, 2.0, (2,), np.float32), LSTM),
    (VECTOR, spaces.MultiDiscrete([2, 3]), ()),
    (VECTOR, spaces.MultiDiscrete([2, 3]), LSTM),
    (VECTOR, MANY, ()),
    (VECTOR, MANY, ("num_envs_per_env_runner=1", *LSTM)),
    (VECTOR, spaces.Tuple([spaces.MultiDiscrete([3]), VECTOR]), LSTM),
]


class Sampled(gymnasium.Env[Any, Any]):
    """Any spaces; says so when an action is not of its space."""

    def __init__(self, case: int) -> None:
        self.observation_space, self.action_space, _ = CASES[case]
        self.n_steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:  # noqa: ARG002
        super().reset(seed=seed)
        self.n_steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.n_steps += 1
        return self.observation_space.sample(), 1.0, self.n_steps == 7, False, {}


class Counting(gymnasium.Env[Any, Any]):
    """Observations are 1, 2, 3, ...; the reward of step t is 100 t plus the action taken."""

    action_space = THREE

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.observation_space = spaces.Box(0.0, 100.0, tuple(shape), np.float32)
        self.n_steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:  # noqa: ARG002
        super().reset(seed=seed)
        self.n_steps = 0
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.n_steps += 1
        reward = float(100 * self.n_steps + action)
        return self._observation(), reward, self.n_steps == 21, False, {}

    def _observation(self) -> np.ndarray:
        return np.full(self.observation_space.shape, self.n_steps + 1, np.float32)


def config(env: str, *sets: str) -> PPOTrainingConfig:
    # Fragments of 8 steps: episodes are cut into chunks.
    small = ("train_batch_size_per_learner=64", "minibatch_size=32", "num_epochs=2")
    sets = (*small, "scale_rewards=false", *sets)
    return load_config(flags={"env": env, "seed": 1}, sets=sets).complete()


def check_that_accepted_spaces_can_be_trained() -> None:
    for case, (_, _, sets) in enumerate(CASES):
        settings = config("Sampled-v0", f"env_config={{case: {case}}}", *sets)
        check_environment(settings)
        algorithm = build_algorithm(settings)
        result = [run_iteration(algorithm, "PPO") for _ in range(2)][-1]
        algorithm.stop()
        assert {episode.episode_return for episode in result.episodes} == {7.0}, case
        assert np.isfinite(result.losses["policy_loss"]), case


def shown(env_config: str, *sets: str) -> tuple[np.ndarray, np.ndarray]:
    """What the networks are given to act on in 8 iterations, and what to learn from."""
    algorithm = build_algorithm(config("Counting-v0", f"env_config={env_config}", *sets))
    acted = _note(algorithm.env_runner.module, "forward_exploration")
    learner = algorithm.learner_group._learner
    learned = _note(learner.module[DEFAULT_MODULE_ID], "forward_train")
    for _ in range(8):
        run_iteration(algorithm, "PPO")
    algorithm.stop()
    return np.unique(acted, axis=0), np.unique(learned, axis=0)


def _note(module: Any, name: str) -> list[np.ndarray]:
    noted: list[np.ndarray] = []
    forward = getattr(module, name)

    def note(batch: Any, **kwargs: Any) -> Any:
        noted.extend(np.array(batch["obs"]))
        return forward(batch, **kwargs)

    setattr(module, name, note)
    return noted


def check_that_stacked_frames_are_the_last_ones() -> None:
    acted, learned = shown("{shape: [10, 10, 1]}", "frame_stack=4")
    last_four = [[max(t - back, 0) for back in (3, 2, 1, 0)] for t in range(1, 23)]
    np.testing.assert_array_equal(acted[:, 0, 0], sorted(last_four))
    assert {*map(bytes, learned)} <= {*map(bytes, acted)}


def check_that_previous_actions_and_rewards_are_the_last_ones() -> None:
    acted, learned = shown("{shape: [1]}", "prev_actions=2", "prev_rewards=3")
    for row in acted:
        t = int(row[0]) - 1  # steps taken; Counting's rewards tell the step and the action
        for back, reward in zip((2, 1, 0), row[7:], strict=True):
            step, action = divmod(int(reward), 100)
            assert step == max(t - back, 0), row
            if back < 2:
                one_hot = np.eye(3)[action] * (step > 0)
                np.testing.assert_array_equal(row[1:7].reshape(2, 3)[1 - back], one_hot)
    assert len(acted) > 100
    assert {*map(bytes, learned)} <= {*map(bytes, acted)}


if __name__ == "__main__":
    gymnasium.register("Sampled-v0", entry_point=Sampled)
    gymnasium.register("Counting-v0", entry_point=Counting)
    with ray_cluster(n_workers=0, n_gpus=0):
        check_that_accepted_spaces_can_be_trained()
        check_that_stacked_frames_are_the_last_ones()
        check_that_previous_actions_and_rewards_are_the_last_ones()
