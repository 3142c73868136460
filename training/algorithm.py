"""TrainingConfig to an RLlib algorithm, and RLlib's nested results to plain numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

from training.config import TrainingConfig
from training.connectors import env_to_module, learner_connector
from training.filter_merging import mend_filter_merging
from training.reward_scaling import ScaledRewardPPOLearner

FIRST_LR, LAST_LR, CONSTANT_LR = 1e-3, 0.0, 3e-4
"""The default learning rates; docs/training.md says what was measured."""

LOSSES = {
    # progress.csv's column to RLlib's learner metric
    "policy_loss": "policy_loss",
    "vf_loss": "vf_loss",
    "entropy": "entropy",
    "vf_explained_var": "vf_explained_var",
    "gradient_norm": "gradients_default_optimizer_global_norm",
    "lr": "default_optimizer_learning_rate",
}

_RETURNS, _LENGTHS = "policyserve_episode_returns", "policyserve_episode_lengths"


@dataclass(frozen=True)
class IterationResult:
    """One training iteration in plain numbers.

    Attributes:
        iteration: Counted from 1 over the whole run, resumed parts included.
        env_steps: Environment steps so far, over the whole run.
        episode_returns: Of the episodes that ended in this iteration, undiscounted.
        episode_lengths: Of the same episodes, in steps.
        losses: The names of `LOSSES` to their values; nan where RLlib gave none.
    """

    iteration: int
    env_steps: int
    episode_returns: list[float]
    episode_lengths: list[int]
    losses: dict[str, float]


def build_algorithm(config: TrainingConfig) -> Algorithm:
    """Build the algorithm; Ray must be running."""
    algorithm = rllib_config(config).build_algo()
    mend_filter_merging(algorithm)
    return algorithm


def rllib_config(config: TrainingConfig) -> PPOConfig:
    """Translate a config into RLlib's, on the new API stack with torch; needs no running Ray."""
    settings = config.algo_config.model_dump()
    settings["lr"] = learning_rate(config)
    settings["entropy_coeff"] = _as_lists(settings["entropy_coeff"])
    model = {name: _as_lists(value) for name, value in config.model.model_dump().items()}
    return (
        PPOConfig()
        .api_stack(enable_rl_module_and_learner=True, enable_env_runner_and_connector_v2=True)
        .framework("torch")
        .environment(
            config.env,
            env_config=dict(config.env_config),
            normalize_actions=config.normalize_actions,
            clip_actions=config.clip_actions,
        )
        .env_runners(
            num_env_runners=config.num_env_runners,
            num_envs_per_env_runner=config.num_envs_per_env_runner,
            rollout_fragment_length=config.rollout_fragment_length,
            env_to_module_connector=env_to_module(config),
            episode_lookback_horizon=_lookback(config),
        )
        .learners(
            num_learners=0,
            num_gpus_per_learner=config.num_gpus,
            learner_connector=learner_connector(config),
        )
        .training(**settings, learner_class=_learner_class(config))
        .rl_module(model_config=DefaultModelConfig(**model))
        .callbacks(on_episode_end=_episode_recorder())
        .debugging(seed=config.seed, log_level="WARN")
        # A broken environment ends the run; RLlib would otherwise restart its runner for ever.
        .fault_tolerance(restart_failed_env_runners=False)
    )


def restore_algorithm(config: TrainingConfig, checkpoint: Path) -> Algorithm:
    """Build the algorithm from the config in force and load a checkpoint's state into it.

    The checkpoint is unpickled: verify it first. Weights, optimizer, filters and counters come from
    the checkpoint; settings from `config`, so that a resumed run may change them.
    """
    algorithm = build_algorithm(config)
    path = str(checkpoint.absolute())  # RLlib fails on a relative one
    algorithm.restore_from_path(path)
    return algorithm


def run_iteration(algorithm: Algorithm) -> IterationResult:
    """Gather one batch, learn from it, and say what happened."""
    result = algorithm.train()
    runners = result.get("env_runners", {})
    learner = result.get("learners", {}).get(DEFAULT_MODULE_ID, {})
    return IterationResult(
        iteration=int(result["training_iteration"]),
        env_steps=int(runners.get("num_env_steps_sampled_lifetime", 0)),
        episode_returns=_series(runners.get(_RETURNS)),
        episode_lengths=[int(length) for length in _series(runners.get(_LENGTHS))],
        losses={name: float(learner.get(key, math.nan)) for name, key in LOSSES.items()},
    )


def learning_rate(config: TrainingConfig) -> float | list[list[float]]:
    """The learning rate in RLlib's form: a number, or [[timestep, rate], ...]."""
    given = config.algo_config.lr
    if given is not None:
        return given if isinstance(given, float) else [list(point) for point in given]
    if config.stop.timesteps is None:
        return CONSTANT_LR
    return [[0, FIRST_LR], [config.stop.timesteps, LAST_LR]]


def _lookback(config: TrainingConfig) -> int:
    # Steps that RLlib keeps of an episode when it cuts it into chunks. With fewer than a connector
    # looks back, the first steps of every chunk would be shown zeros.
    return max(1, config.prev_actions, config.prev_rewards, config.frame_stack)


def _learner_class(config: TrainingConfig) -> type[PPOTorchLearner]:
    return ScaledRewardPPOLearner if config.scale_rewards else PPOTorchLearner


def _series(value: Any) -> list[float]:
    # Once a series was logged, RLlib reports nan for an iteration that adds nothing to it.
    return [float(item) for item in value] if isinstance(value, (list, tuple)) else []


def _as_lists(value: Any) -> Any:
    # RLlib compares and concatenates its settings with lists.
    return [_as_lists(item) for item in value] if isinstance(value, tuple) else value


def _episode_recorder() -> Callable[..., None]:
    # RLlib's own `episode_return_mean` is a mean over however many episodes ended in an iteration,
    # and its lengths count one step too many per chunk of an episode, since the learner lengthens
    # the chunks in place. So each episode is written down exactly, as it ends. A function made here
    # is pickled whole, so that a checkpoint doesn't name a module of ours.
    returns_key, lengths_key = _RETURNS, _LENGTHS

    def record(*, episode: Any, prev_episode_chunks: Any, metrics_logger: Any, **_: Any) -> None:
        chunks = [*(prev_episode_chunks or ()), episode]
        episode_return = sum(float(chunk.get_return()) for chunk in chunks)
        metrics_logger.log_value(returns_key, episode_return, reduce="item_series")
        metrics_logger.log_value(lengths_key, int(episode.t), reduce="item_series")

    return record
