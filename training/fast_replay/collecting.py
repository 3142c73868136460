"""Steps of the environments into a transition buffer."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol

import numpy as np
from ray.rllib.core.columns import Columns
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.execution.rollout_ops import synchronous_parallel_sample
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, WEIGHTS_SEQ_NO
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger

from training.fast_policy import Choice
from training.fast_replay.transition_buffer import Array, TransitionBuffer, Transitions
from training.fast_sampling import FastEnvRunner
from training.fast_stepping import Results

_LONGEST_CHUNK = 100
"""Steps of an ongoing episode that are kept."""


class Collector(Protocol):
    """A way to step the environments."""

    def collect(self, buffer: TransitionBuffer, *, env_steps: int) -> int:
        """Step the environments for one rollout fragment.

        Args:
            buffer: Gets each step.
            env_steps: Of the run so far, which exploration may depend on.

        Returns:
            How many steps there were; an environment's reset is none.
        """

    def log(self, metrics: MetricsLogger) -> None:
        """Report what was collected since the last time."""


class EpisodeCollector:
    """RLlib's own sampling: any connectors, and runners in processes of their own.

    Args:
        group: The algorithm's runners.
        metrics: The algorithm's.
        timeout_s: How long runners in other processes may take, as RLlib's `sample_timeout_s`.
    """

    def __init__(self, group: EnvRunnerGroup, metrics: MetricsLogger, *, timeout_s: Any) -> None:
        self._group = group
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._is_local = group.num_remote_workers() == 0

    def collect(self, buffer: TransitionBuffer, *, env_steps: int) -> int:
        """See `Collector`."""
        if self._is_local:
            runner: Any = self._group.local_env_runner
            runner.num_env_steps_sampled_lifetime = env_steps
            episodes = runner.sample()
        else:
            found: Any = synchronous_parallel_sample(
                worker_set=self._group,
                concat=True,
                sample_timeout_s=self._timeout_s,
                _uses_new_env_runners=True,
                _return_metrics=True,
            )
            episodes, results = found
            self._metrics.aggregate(results, key=ENV_RUNNER_RESULTS)
        return sum(add_chunk(buffer, episode) for episode in episodes)

    def log(self, metrics: MetricsLogger) -> None:
        """See `Collector`."""
        if self._is_local:
            runner: Any = self._group.local_env_runner
            metrics.aggregate([runner.get_metrics()], key=ENV_RUNNER_RESULTS)


class Played:
    """The part of an ongoing episode whose steps are forgotten, as a runner's metrics ask for it.

    The same questions as RLlib's chunks of an episode answer, which hold every step of it.
    """

    def __init__(self) -> None:
        self._n_steps = 0
        self._return = self._duration_s = 0.0

    def __len__(self) -> int:
        return self._n_steps

    def add(self, chunk: SingleAgentEpisode) -> None:
        """Count the episode's next chunk."""
        self._n_steps += len(chunk)
        self._return += float(chunk.get_return())
        self._duration_s += chunk.get_duration_s()

    def get_return(self) -> float:
        """The undiscounted sum of its rewards."""
        return self._return

    def get_duration_s(self) -> float:
        """How long it was played."""
        return self._duration_s


class LeanCollector:
    """The training process's own environments, without an episode per fragment.

    Args:
        runner: One whose loop is lean.
    """

    def __init__(self, runner: FastEnvRunner) -> None:
        self._runner = runner
        self._policy = runner.lean_policy()
        config = runner.config
        self._n_fragment = config.get_rollout_fragment_length(runner.worker_index) * runner.num_envs
        self._explore = bool(config.explore)
        self._n_steps = self._n_ended = 0

    def collect(self, buffer: TransitionBuffer, *, env_steps: int) -> int:
        """See `Collector`."""
        runner: Any = self._runner
        if runner._needs_initial_reset:
            runner._reset_envs_and_episodes(self._explore)
        n_steps = 0
        observations = runner._cached_to_module[Columns.OBS]
        while n_steps < self._n_fragment:
            choice = self._policy.choose(observations, explore=self._explore, t=env_steps + n_steps)
            results = runner._step(choice.actions_for_env)
            following = self._policy.to_tensor(results[0])
            n_steps += self._take_in(buffer, observations, choice, results, following)
            observations = following
        runner._cached_to_module = {Columns.OBS: observations}
        self._n_steps += n_steps
        return n_steps

    def log(self, metrics: MetricsLogger) -> None:
        """See `Collector`."""
        runner: Any = self._runner
        if not self._n_steps:
            return
        runner.metrics.log_value(WEIGHTS_SEQ_NO, runner._weights_seq_no, window=1)
        runner._log_env_steps(metric=runner._metrics_num_env_steps_sampled, num_steps=self._n_steps)
        runner._increase_sampled_metrics(self._n_steps, self._n_ended)
        self._n_steps = self._n_ended = 0
        metrics.aggregate([runner.get_metrics()], key=ENV_RUNNER_RESULTS)

    def _take_in(
        self, buffer: TransitionBuffer, before: Any, choice: Choice, results: Results, after: Any
    ) -> int:
        runner: Any = self._runner
        episodes: list[SingleAgentEpisode] = runner._ongoing_episodes
        _, rewards, terminateds, truncateds, _ = results
        # An environment whose episode ended in the step before was reset by this one.
        stepped = [i for i, episode in enumerate(episodes) if episode.is_reset]
        rows: Any = slice(None) if len(stepped) == len(episodes) else stepped
        keys: list[Hashable] = [episodes[i].id_ for i in stepped]
        ends = terminateds | truncateds
        if stepped:
            steps = Transitions(
                observations=before.cpu().numpy()[rows],
                actions=choice.actions[rows],
                rewards=rewards[rows],
                next_observations=after.cpu().numpy()[rows],
                terminateds=terminateds[rows],
            )
            buffer.add(steps, episodes=keys, ends=ends[rows].tolist())
        self._fill_episodes(choice.actions, results, ends)
        return len(stepped)

    def _fill_episodes(self, actions: Array, results: Results, ends: Array) -> None:
        runner: Any = self._runner
        observations, rewards, terminateds, truncateds, infos = results
        for i, episode in enumerate(runner._ongoing_episodes):
            if not episode.is_reset:
                episode.add_env_reset(observations[i], infos[i])
                continue
            episode.add_env_step(
                observations[i],
                actions[i],
                rewards[i],
                infos[i],
                terminated=bool(terminateds[i]),
                truncated=bool(truncateds[i]),
            )
            if ends[i]:
                runner._make_on_episode_callback("on_episode_end", i, runner._ongoing_episodes)
                runner._done_episodes_for_metrics.append(episode)
                runner._new_episode(i, runner._ongoing_episodes)
                self._n_ended += 1
            elif len(episode) >= _LONGEST_CHUNK:
                # Its steps are in the buffer. An environment may go on for ever, and so would this.
                earlier = runner._ongoing_episodes_for_metrics[episode.id_]
                if not earlier:
                    earlier.append(Played())
                earlier[0].add(episode)
                runner._ongoing_episodes[i] = episode.cut()


def add_chunk(buffer: TransitionBuffer, episode: SingleAgentEpisode) -> int:
    """Add an episode, or a chunk of one, as RLlib's runners give them.

    Returns:
        Its steps.
    """
    n_steps = len(episode)
    if not n_steps:
        return 0
    observations = np.asarray(episode.get_observations(slice(0, n_steps + 1)))
    terminateds = np.zeros(n_steps, np.bool_)
    terminateds[-1] = episode.is_terminated
    steps = Transitions(
        observations=observations[:-1],
        actions=np.asarray(episode.get_actions(slice(0, n_steps))),
        rewards=np.asarray(episode.get_rewards(slice(0, n_steps))),
        next_observations=observations[1:],
        terminateds=terminateds,
    )
    ends = [False] * (n_steps - 1) + [bool(episode.is_done)]
    buffer.add(steps, episodes=[episode.id_] * n_steps, ends=ends)
    return n_steps
