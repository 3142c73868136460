"""TrainingConfig to an RLlib algorithm, and RLlib's nested results to plain numbers."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME
from ray.tune.trainable import trainable

from training.algorithm_builders import training_settings
from training.config import TrainingConfig
from training.connectors import env_to_module, learner_connector
from training.episodes import PlayedEpisode
from training.errors import CheckpointDamagedError
from training.fast_replay.training_step import accelerate_replay
from training.fast_sampling import FastEnvRunner
from training.filter_merging import mend_filter_merging
from training.losses import LOSSES
from training.rllib_env import evaluation_environment, rllib_environment
from training.rllib_module import rllib_module

_EPISODES = "policyserve_episodes"
_NEVER = 2**31 - 1


@dataclass(frozen=True)
class IterationResult:
    """One training iteration in plain numbers.

    Attributes:
        iteration: Counted from 1 over the whole run, resumed parts included.
        env_steps: Environment steps so far, over the whole run.
        episodes: Those that ended in this iteration.
        losses: The names of `LOSSES` to their values; nan where RLlib gave none.
    """

    iteration: int
    env_steps: int
    episodes: list[PlayedEpisode]
    losses: dict[str, float]


def build_algorithm(config: TrainingConfig) -> Algorithm:
    """Build the algorithm; Ray must be running."""
    with _no_results_directory():
        algorithm = rllib_config(config).build_algo()
    mend_filter_merging(algorithm)
    accelerate_replay(algorithm)
    return algorithm


def rllib_config(config: TrainingConfig) -> AlgorithmConfig:
    """Translate a config into RLlib's, on the new API stack with torch; needs no running Ray."""
    rllib: AlgorithmConfig = training_settings(config)
    (
        rllib.api_stack(enable_rl_module_and_learner=True, enable_env_runner_and_connector_v2=True)
        .framework("torch")
        .environment(
            rllib_environment(config),
            env_config=dict(config.env_config),
            normalize_actions=config.normalize_actions,
            clip_actions=config.clip_actions,
        )
        .env_runners(
            env_runner_cls=FastEnvRunner,
            num_env_runners=config.num_env_runners,
            num_envs_per_env_runner=config.num_envs_per_env_runner,
            gym_env_vectorize_mode=config.vectorize_mode,
            rollout_fragment_length=config.rollout_fragment_length,
            env_to_module_connector=env_to_module(config),
            episode_lookback_horizon=_lookback(config),
        )
        .learners(
            num_learners=0,
            num_gpus_per_learner=config.num_gpus,
            learner_connector=learner_connector(config),
        )
        .rl_module(**rllib_module(config))
        .callbacks(on_episode_end=_episode_recorder())
        .debugging(seed=config.seed, log_level="WARN")
        .reporting(log_gradients=True)
        # A broken environment ends the run; RLlib would otherwise restart its runner for ever.
        .fault_tolerance(restart_failed_env_runners=False)
    )
    if config.evaluation.interval:
        _add_evaluation(rllib, config)
    return rllib


def restore_algorithm(config: TrainingConfig, checkpoint: Path) -> Algorithm:
    """Build the algorithm from the config in force and load a checkpoint's state into it.

    The checkpoint is unpickled: verify it first. Weights, optimizer, filters and counters come from
    the checkpoint; settings from `config`, so that a resumed run may change them.

    Raises:
        CheckpointDamagedError: RLlib can't restore it.
    """
    algorithm = build_algorithm(config)
    path = str(checkpoint.absolute())  # RLlib fails on a relative one
    try:
        algorithm.restore_from_path(path)
    except Exception as exc:  # whatever unpickling raises
        algorithm.stop()
        cause = f"{type(exc).__name__}: {exc}".splitlines()[0][:300]
        raise CheckpointDamagedError(f"RLlib can't restore it: {cause}") from exc
    _set_learning_rates(algorithm)
    return algorithm


def run_iteration(algorithm: Algorithm, losses: str) -> IterationResult:
    """Gather and learn for one iteration, and say what happened.

    Args:
        algorithm: As `build_algorithm` made it.
        losses: The algorithm whose `LOSSES` are read.
    """
    result = algorithm.train()
    runners = result.get("env_runners", {})
    learner = result.get("learners", {}).get(DEFAULT_MODULE_ID, {})
    return IterationResult(
        iteration=int(result["training_iteration"]),
        env_steps=int(runners.get("num_env_steps_sampled_lifetime", 0)),
        episodes=_episodes(runners.get(_EPISODES)),
        losses={name: _number(learner.get(key)) for name, key in LOSSES[losses].items()},
    )


def _set_learning_rates(algorithm: Algorithm) -> None:
    # A restored optimizer has the checkpoint's rates. RLlib's learners put the config's in their
    # place after the first update, which for PPO is a whole iteration of the old rate; the quick
    # one of DQN and SAC only where they follow a schedule.
    key = (ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME)
    metrics: Any = algorithm.metrics
    env_steps = int(metrics.peek(key, default=0))

    def set_rates(learner: Any) -> None:
        for optimizer, schedule in learner._optimizer_lr_schedules.items():
            learner._set_optimizer_lr(optimizer, lr=schedule.update(timestep=env_steps))

    group: Any = algorithm.learner_group
    group.foreach_learner(set_rates)


@contextmanager
def _no_results_directory() -> Iterator[None]:
    # RLlib makes a directory in the user's ~/ray_results for each algorithm, and writes nothing
    # into it: a run has a directory of its own.
    ray_tune: Any = trainable
    before = ray_tune.DEFAULT_STORAGE_PATH
    with tempfile.TemporaryDirectory(prefix="psv-results-") as directory:
        ray_tune.DEFAULT_STORAGE_PATH = directory
        try:
            yield
        finally:
            ray_tune.DEFAULT_STORAGE_PATH = before


def _add_evaluation(rllib: AlgorithmConfig, config: TrainingConfig) -> None:
    evaluation = config.evaluation
    n_players = max(1, evaluation.num_env_runners)
    rllib.evaluation(
        # RLlib makes the runners where there is an interval; `train` says when they play.
        evaluation_interval=_NEVER,
        evaluation_num_env_runners=evaluation.num_env_runners,
        evaluation_config=AlgorithmConfig.overrides(
            env=evaluation_environment(config),
            explore=not evaluation.deterministic,
            env_config={**config.env_config, **evaluation.env_config},
            num_envs_per_env_runner=-(-evaluation.episodes // n_players),
            gym_env_vectorize_mode="sync",
        ),
    )


def _lookback(config: TrainingConfig) -> int:
    # Steps that RLlib keeps of an episode when it cuts it into chunks. With fewer than a connector
    # looks back, the first steps of every chunk would be shown zeros.
    return max(1, config.prev_actions, config.prev_rewards, config.frame_stack)


def _episodes(value: Any) -> list[PlayedEpisode]:
    # Once a series was logged, RLlib reports nan for an iteration that adds nothing to it, alone or
    # in a list.
    if not isinstance(value, (list, tuple)):
        return []
    return [PlayedEpisode(*item) for item in value if isinstance(item, (list, tuple))]


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _episode_recorder() -> Callable[..., None]:
    # RLlib's own `episode_return_mean` is a mean over however many episodes ended in an iteration,
    # and its lengths count one step too many per chunk of an episode, since the learner lengthens
    # the chunks in place. So each episode is written down exactly, as it ends. A function made here
    # is pickled whole, so that a checkpoint doesn't name a module of ours.
    key = _EPISODES

    def record(*, episode: Any, prev_episode_chunks: Any, metrics_logger: Any, **_: Any) -> None:
        chunks = [*(prev_episode_chunks or ()), episode]
        episode_return = sum(float(chunk.get_return()) for chunk in chunks)
        ended = (bool(episode.is_terminated), bool(episode.is_truncated))
        found = (episode_return, int(episode.t), *ended)
        metrics_logger.log_value(key, found, reduce="item_series")

    return record
