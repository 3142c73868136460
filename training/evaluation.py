"""Evaluations: the policy of now in whole episodes, in environments of their own."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from ray.rllib.algorithms.algorithm import Algorithm

from training.config import EvaluationConfig
from training.episodes import PlayedEpisode
from training.evaluation_episodes import play_episodes


@dataclass(frozen=True)
class Evaluation:
    """The episodes of one evaluation; at least one."""

    episodes: tuple[PlayedEpisode, ...]

    @property
    def returns(self) -> list[float]:
        """Undiscounted returns, one per episode."""
        return [episode.episode_return for episode in self.episodes]

    @property
    def return_mean(self) -> float:
        """Mean return."""
        return statistics.fmean(self.returns)

    @property
    def return_std(self) -> float:
        """The population's standard deviation of the returns."""
        return statistics.pstdev(self.returns)

    @property
    def n_terminated(self) -> int:
        """Episodes that ended by the environment's own rule."""
        return sum(episode.terminated for episode in self.episodes)

    @property
    def n_truncated(self) -> int:
        """Episodes that were cut off."""
        return sum(episode.truncated for episode in self.episodes)

    @property
    def length_mean(self) -> float:
        """Mean episode length, in steps."""
        return statistics.fmean(episode.episode_length for episode in self.episodes)


def evaluate(algorithm: Algorithm, config: EvaluationConfig, *, seed: int) -> Evaluation:
    """Play whole episodes on the algorithm's evaluation runners.

    Neither the training environments nor the random numbers of training are touched, so a run
    learns the same with and without evaluations.

    Args:
        algorithm: Built with evaluation runners.
        config: How many episodes, and which actions.
        seed: Of the environments' resets and of sampled actions.
    """
    group: Any = algorithm.eval_env_runner_group
    _take_over_policy(algorithm, group)
    deterministic = config.deterministic
    if config.num_env_runners == 0:
        runner = algorithm.eval_env_runner
        played = play_episodes(
            runner,
            n_episodes=config.episodes,
            deterministic=deterministic,
            seed=seed,
        )
        return Evaluation(tuple(played))
    shares = _shares(config.episodes, config.num_env_runners)

    def play(runner: Any) -> list[PlayedEpisode]:
        index = runner.worker_index - 1
        return play_episodes(
            runner,
            n_episodes=shares[index],
            deterministic=deterministic,
            seed=seed + sum(shares[:index]),
        )

    played_by = group.foreach_env_runner(play, local_env_runner=False)
    return Evaluation(tuple(episode for played in played_by for episode in played))


def _take_over_policy(algorithm: Algorithm, group: Any) -> None:
    # As Algorithm.evaluate does before it plays: weights from the learner, filters from training.
    group.sync_weights(from_worker_or_learner_group=algorithm.learner_group, inference_only=True)
    group.sync_env_runner_states(
        config=algorithm.evaluation_config,
        from_worker=algorithm.env_runner,
        env_to_module=algorithm.env_to_module_connector,
        module_to_env=algorithm.module_to_env_connector,
    )


def _shares(n_episodes: int, n_runners: int) -> list[int]:
    return [n_episodes // n_runners + (i < n_episodes % n_runners) for i in range(n_runners)]
