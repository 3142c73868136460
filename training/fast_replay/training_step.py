"""RLlib's training step of DQN and SAC, a whole iteration at a time.

RLlib 2.60 spends 25 to 40 ms of CPU on each of their updates, of which the gradient step is one or
two: its replay buffers cut episode objects out of episode objects, its connectors turn those back
into columns, it reduces some hundred metrics, and sends the weights through Ray. Here an iteration
steps the environments and updates by RLlib's own rules (fragments, training intensity, when
learning starts, target updates), with a flat buffer, and reports once.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from gymnasium import spaces
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.dqn import DQN
from ray.rllib.algorithms.dqn.dqn import calculate_rr_weights
from ray.rllib.algorithms.dqn.torch.default_dqn_torch_rl_module import DefaultDQNTorchRLModule
from ray.rllib.algorithms.dqn.torch.dqn_torch_learner import DQNTorchLearner
from ray.rllib.algorithms.sac.torch.default_sac_torch_rl_module import DefaultSACTorchRLModule
from ray.rllib.algorithms.sac.torch.sac_torch_learner import SACTorchLearner
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    LEARNER_RESULTS,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
)

from training.fast_replay.collecting import Collector, EpisodeCollector, LeanCollector
from training.fast_replay.transition_buffer import TransitionBuffer
from training.fast_replay.update import ReplayUpdater
from training.fast_sampling import FastEnvRunner

logger = logging.getLogger("policyserve.training")

_ENV_TO_MODULE = {
    "AddObservationsFromEpisodesToBatch",
    "AddTimeDimToBatchAndZeroPad",
    "AddStatesFromEpisodesToBatch",
    "BatchIndividualItems",
    "NumpyToTensor",
    # These leave what they made in the episodes.
    "FlattenObservations",
    "MeanStdFilter",
}
_LEARNER = {
    "AddObservationsFromEpisodesToBatch",
    "AddNextObservationsFromEpisodesToTrainBatch",
    "AddColumnsFromEpisodesToTrainBatch",
    "AddTimeDimToBatchAndZeroPad",
    "AddStatesFromEpisodesToBatch",
    "BatchIndividualItems",
    "NumpyToTensor",
}
_KNOWN = {DQNTorchLearner: DefaultDQNTorchRLModule, SACTorchLearner: DefaultSACTorchRLModule}
_BUFFERS = ("EpisodeReplayBuffer", "PrioritizedEpisodeReplayBuffer")
_LARGEST_BYTES = 4 * 2**30


def accelerate_replay(algorithm: Algorithm) -> str | None:
    """Give DQN and SAC the quick training step, where it is known to learn the same.

    The instance is changed in place, so that its checkpoints name RLlib's classes and an RLlib
    without this goes on from them. Other algorithms are left alone.

    Returns:
        What the quick step does not know, so that RLlib's own was left; None otherwise.
    """
    if not isinstance(algorithm, DQN):
        return None
    why_not = _why_not(algorithm)
    if why_not:
        logger.info("updates are made RLlib's own way: %s", why_not)
        return why_not
    changed: Any = algorithm
    changed.local_replay_buffer = buffer = _transition_buffer(changed)
    changed.training_step = ReplayTrainingStep(changed, buffer)
    return None


class ReplayTrainingStep:
    """A whole iteration of sampling and updates, in place of `Algorithm.training_step`.

    Args:
        algorithm: RLlib's DQN or SAC.
        buffer: Where its steps go.
    """

    def __init__(self, algorithm: Any, buffer: TransitionBuffer) -> None:
        self._algorithm = algorithm
        self._buffer = buffer
        self._updater = ReplayUpdater(_learner(algorithm), buffer)
        self._n_collects, self._n_updates = map(int, calculate_rr_weights(algorithm.config))
        group = algorithm.env_runner_group
        runner = algorithm.env_runner
        self._has_remotes = group.num_remote_workers() > 0
        self._collector: Collector
        is_lean = isinstance(runner, FastEnvRunner) and not runner.why_not_lean
        if is_lean and not self._has_remotes:
            self._collector = LeanCollector(runner)
        else:
            self._collector = EpisodeCollector(
                group, algorithm.metrics, timeout_s=algorithm.config.sample_timeout_s
            )

    def __call__(self) -> None:
        """Gather and learn until the iteration has its environment steps."""
        config, metrics = self._algorithm.config, self._algorithm.metrics
        key = (ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME)
        start = env_steps = int(metrics.peek(key, default=0))
        wanted = config.min_sample_timesteps_per_iteration or 1
        learns_from = config.num_steps_sampled_before_learning_starts
        # Of a run that was resumed with an empty buffer the steps so far say nothing.
        least = max(learns_from, config.train_batch_size_per_learner)
        least = min(least, config.replay_buffer_config["capacity"])
        while env_steps - start < wanted:
            for _ in range(self._n_collects):
                env_steps += self._collector.collect(self._buffer, env_steps=env_steps)
            if env_steps >= learns_from and len(self._buffer) >= least:
                self._learn(env_steps, is_last=env_steps - start >= wanted)
        self._collector.log(metrics)

    def _learn(self, env_steps: int, *, is_last: bool) -> None:
        for i in range(self._n_updates):
            self._updater.update(
                env_steps=env_steps, is_reported=is_last and i == self._n_updates - 1
            )
        if is_last:
            results = _learner(self._algorithm).metrics.reduce()
            self._algorithm.metrics.aggregate([results], key=LEARNER_RESULTS)
        if self._has_remotes:
            self._algorithm.env_runner_group.sync_weights(
                from_worker_or_learner_group=self._algorithm.learner_group,
                policies=[DEFAULT_MODULE_ID],
                global_vars=None,
                inference_only=True,
            )
        else:
            self._updater.copy_weights(self._algorithm.env_runner)


def _learner(algorithm: Any) -> Any:
    return algorithm.learner_group._learner  # None where learners are in processes of their own


def _why_not(algorithm: Any) -> str | None:
    # RLlib's internals are looked at here, once; a newer RLlib with others keeps its own step.
    learner = _learner(algorithm)
    if learner is None:
        return "learners in processes of their own"
    for look in (_module_reason, _learner_reason, _data_reason):
        reason = look(algorithm, learner)
        if reason:
            return reason
    return None


def _module_reason(algorithm: Any, learner: Any) -> str | None:
    del algorithm
    module = learner.module.get(DEFAULT_MODULE_ID) if len(learner.module) == 1 else None
    if module is None:
        return "several policies"
    if type(module.unwrapped()) is not _KNOWN.get(type(learner)):
        return "a module or a learner of one's own"
    if module.is_stateful():
        return "a policy with memory"
    if not isinstance(module.observation_space, spaces.Box):
        return "observations that are no array"
    if not isinstance(module.action_space, (spaces.Box, spaces.Discrete)):
        return "actions that are no array"
    return None


def _learner_reason(algorithm: Any, learner: Any) -> str | None:
    config = algorithm.config
    reasons = {
        "connectors before the learner": not _names(learner._learner_connector) <= _LEARNER,
        "scaled gradients": learner._grad_scalers is not None,
        "torch's learning rate schedules": learner._lr_scheduler_classes is not None,
        "torch.compile": config.torch_compile_learner,
        "gradients that are not checked": config.torch_skip_nan_gradients,
        "policies that are not trained": config.policies_to_train is not None,
    }
    return _first(reasons)


def _data_reason(algorithm: Any, learner: Any) -> str | None:
    config = algorithm.config
    runner = algorithm.env_runner
    shape, dtype = _observation(learner)
    size_bytes = 2 * config.replay_buffer_config["capacity"] * int(np.prod(shape)) * dtype.itemsize
    reasons = {
        "no environment runner here": runner is None,
        "connectors before the module": runner is not None
        and not _names(runner._env_to_module) <= _ENV_TO_MODULE,
        "whole episodes at a time": config.batch_mode != "truncate_episodes",
        "steps counted by agent": config.count_steps_by != "env_steps",
        "a buffer of one's own": config.replay_buffer_config["type"] not in _BUFFERS,
        "observations that would take gigabytes": size_bytes > _LARGEST_BYTES,
    }
    return _first(reasons)


def _first(reasons: dict[str, bool]) -> str | None:
    return next((reason for reason, holds in reasons.items() if holds), None)


def _names(pipeline: Any) -> set[str]:
    return {type(piece).__name__ for piece in pipeline.connectors}


def _observation(learner: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    # As RLlib's tensors: floats are float32.
    space = learner.module[DEFAULT_MODULE_ID].observation_space
    is_float = np.issubdtype(space.dtype, np.floating)
    return space.shape, np.dtype(np.float32) if is_float else space.dtype


def _transition_buffer(algorithm: Any) -> TransitionBuffer:
    config, learner = algorithm.config, _learner(algorithm)
    given = config.replay_buffer_config
    space = learner.module[DEFAULT_MODULE_ID].action_space
    is_discrete = isinstance(space, spaces.Discrete)
    is_prioritized = given["type"] == "PrioritizedEpisodeReplayBuffer"
    return TransitionBuffer(
        given["capacity"],
        observation=_observation(learner),
        action=((), np.int64) if is_discrete else (space.shape, np.float32),
        seed=config.seed,
        alpha=given["alpha"] if is_prioritized else None,
    )
