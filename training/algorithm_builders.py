"""Each algorithm's settings as RLlib takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

from training.config import (
    APPOTrainingConfig,
    DQNTrainingConfig,
    IMPALATrainingConfig,
    PPOTrainingConfig,
    SACTrainingConfig,
    TrainingConfig,
)
from training.fast_learning import FastPPOLearner
from training.reward_scaling import ScaledRewardPPOLearner

FIRST_LR, LAST_LR, CONSTANT_LR = 1e-3, 0.0, 3e-4
"""PPO's default learning rates; docs/training.md says what was measured."""

_FRAGMENT = 50
"""IMPALA's and APPO's steps of each environment per sample: RLlib's default."""


def training_settings(config: TrainingConfig) -> AlgorithmConfig:
    """Start RLlib's config of the algorithm with its `training()` settings."""
    return _BUILDERS[config.algo](config)


def learning_rate(config: PPOTrainingConfig) -> float | list[list[float]]:
    """PPO's learning rate in RLlib's form: a number, or [[timestep, rate], ...]."""
    given = config.algo_config.lr
    if given is not None:
        return given if isinstance(given, float) else [list(point) for point in given]
    if config.stop.timesteps is None:
        return CONSTANT_LR
    return [[0, FIRST_LR], [config.stop.timesteps, LAST_LR]]


def as_lists(value: Any) -> Any:
    """Tuples as lists: RLlib compares and concatenates its settings with lists."""
    return [as_lists(item) for item in value] if isinstance(value, tuple) else value


def _settings(config: TrainingConfig, *left_out: str) -> dict[str, Any]:
    dumped = config.algo_config.model_dump(exclude=set(left_out))
    return {name: as_lists(value) for name, value in dumped.items()}


def _ppo(given: TrainingConfig) -> AlgorithmConfig:
    from ray.rllib.algorithms.ppo import PPOConfig

    config = cast(PPOTrainingConfig, given)
    settings = {**_settings(config), "lr": learning_rate(config)}
    learner = ScaledRewardPPOLearner if config.scale_rewards else FastPPOLearner
    return PPOConfig().training(**settings, learner_class=learner)


def _replay_settings(config: DQNTrainingConfig | SACTrainingConfig) -> dict[str, Any]:
    # `train` keeps the buffer itself, beside the newest checkpoint alone; RLlib's checkpoints of
    # the new API stack leave it out.
    settings = _settings(
        config, "min_sample_timesteps_per_iteration", "store_buffer_in_checkpoints"
    )
    buffer = settings["replay_buffer_config"]
    if buffer["type"] == "EpisodeReplayBuffer":
        del buffer["alpha"], buffer["beta"]
    n_step = config.algo_config.n_step
    return {**settings, "n_step": n_step}  # a tuple, unlike the other settings


def _report(rllib: AlgorithmConfig, n_steps: int) -> AlgorithmConfig:
    # RLlib's own minimum of seconds would make iterations, and so runs, differ by the machine.
    return rllib.reporting(
        min_time_s_per_iteration=None, min_sample_timesteps_per_iteration=n_steps
    )


def _dqn(given: TrainingConfig) -> AlgorithmConfig:
    from ray.rllib.algorithms.dqn import DQNConfig

    config = cast(DQNTrainingConfig, given)
    n_steps = config.algo_config.min_sample_timesteps_per_iteration
    return _report(DQNConfig().training(**_replay_settings(config)), n_steps)


def _sac(given: TrainingConfig) -> AlgorithmConfig:
    from ray.rllib.algorithms.sac import SACConfig

    config = cast(SACTrainingConfig, given)
    n_steps = config.algo_config.min_sample_timesteps_per_iteration
    # SAC has three learning rates of its own and refuses the common one.
    return _report(SACConfig().training(**_replay_settings(config), lr=None), n_steps)


def _asynchronous(rllib: AlgorithmConfig, config: TrainingConfig, n_steps: int) -> AlgorithmConfig:
    if config.rollout_fragment_length == "auto":
        rllib.env_runners(rollout_fragment_length=_FRAGMENT)
    return _report(rllib, n_steps)


def _impala(given: TrainingConfig) -> AlgorithmConfig:
    from ray.rllib.algorithms.impala import IMPALAConfig

    config = cast(IMPALATrainingConfig, given)
    settings = _settings(config, "min_sample_timesteps_per_iteration")
    n_steps = config.algo_config.min_sample_timesteps_per_iteration
    return _asynchronous(IMPALAConfig().training(**settings), config, n_steps)


def _appo(given: TrainingConfig) -> AlgorithmConfig:
    from ray.rllib.algorithms.appo import APPOConfig

    config = cast(APPOTrainingConfig, given)
    settings = _settings(config, "min_sample_timesteps_per_iteration")
    n_steps = config.algo_config.min_sample_timesteps_per_iteration
    return _asynchronous(APPOConfig().training(**settings), config, n_steps)


_BUILDERS: dict[str, Callable[[TrainingConfig], AlgorithmConfig]] = {
    "PPO": _ppo,
    "DQN": _dqn,
    "SAC": _sac,
    "IMPALA": _impala,
    "APPO": _appo,
}
