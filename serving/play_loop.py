"""The loop that plays episodes, step by step; `serving.rollout` has the functions to call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from serving.episodes import EpisodeResult, RolloutResult
from serving.errors import PolicyServingError, UsageError
from serving.interface import Policy, State


class EnvironmentFailedError(PolicyServingError):
    """The environment raised while it was stepped."""

    code = "environment_failed"
    title = "Environment failed"
    http_status = None


@dataclass
class RunningEpisode:
    """An episode as it stands; the loop changes it in place with each step.

    Attributes:
        env: The environment that plays it.
        index: Its number, from 0.
        observation: The newest.
        info: Of the newest step.
        state: What the policy remembers (one row), None where it remembers nothing.
        reward: Of the newest step.
        action: The action of the newest step, None before the first.
        episode_return: Undiscounted sum of rewards so far.
        episode_length: Steps so far.
        terminated: It ended by the environment's own rule.
        truncated: It was cut off, for example by a time limit.
    """

    env: gym.Env[Any, Any]
    index: int
    observation: Any
    info: Mapping[str, Any]
    state: State | None = None
    reward: float = 0.0
    action: Any = None
    episode_return: float = 0.0
    episode_length: int = 0
    terminated: bool = False
    truncated: bool = False

    @property
    def is_over(self) -> bool:
        """It was terminated or truncated."""
        return self.terminated or self.truncated

    def result(self) -> EpisodeResult:
        """Its figures."""
        return EpisodeResult(
            index=self.index,
            episode_return=self.episode_return,
            episode_length=self.episode_length,
            terminated=self.terminated,
            truncated=self.truncated,
        )


class PlayLoop:
    """Plays episodes; the arguments are those of `serving.rollout.evaluate_policy`."""

    def __init__(
        self,
        policy: Policy,
        envs: list[gym.Env[Any, Any]],
        n_episodes: int,
        seed: int,
        deterministic: bool,
        use_action_mask: bool,
        on_episode: Callable[[EpisodeResult], None] | None,
    ) -> None:
        self._policy = policy
        self._envs = envs
        self._n_episodes = n_episodes
        self._seed = seed
        self._deterministic = deterministic
        self._use_action_mask = use_action_mask
        self._on_episode = on_episode
        self._finished: list[EpisodeResult] = []
        self._latencies_s: list[float] = []
        self._seeds = self._action_seeds()

    def run(self) -> RolloutResult:
        """Play all episodes to their ends."""
        started = time.perf_counter()
        for _ in self.moves():
            pass
        return RolloutResult(
            episodes=tuple(sorted(self._finished, key=lambda episode: episode.index)),
            step_latencies_s=np.array(self._latencies_s),
            duration_s=time.perf_counter() - started,
        )

    def moves(self) -> Iterator[RunningEpisode]:
        """Play, and give an episode after its reset and after each of its steps."""
        indices = iter(range(self._n_episodes))
        running = []
        for env in self._envs:
            running.append(self._reset(env, next(indices)))
            yield running[-1]
        while running:
            actions = self._act(running)
            still: list[RunningEpisode] = []
            for episode, action in zip(running, actions, strict=True):
                self._step(episode, action)
                yield episode
                if not episode.is_over:
                    still.append(episode)
                elif (index := next(indices, None)) is not None:
                    still.append(self._reset(episode.env, index))
                    yield still[-1]
            running = still

    def _act(self, running: list[RunningEpisode]) -> list[Any]:
        masks: dict[str, Any] = {}
        if self._use_action_mask:
            masks["action_mask"] = [_action_mask(episode.info) for episode in running]
        observations = _batch([episode.observation for episode in running])
        rewards = np.array([episode.reward for episode in running], dtype=np.float32)
        seed = None if self._deterministic else next(self._seeds)
        started = time.perf_counter()
        output = self._policy.compute_actions(
            observations,
            deterministic=self._deterministic,
            seed=seed,
            state=self._state(running),
            rewards=rewards,
            **masks,
        )
        self._latencies_s.append(time.perf_counter() - started)
        if output.state is not None:
            for index, episode in enumerate(running):
                episode.state = {name: values[index] for name, values in output.state.items()}
        return list(output)

    def _state(self, running: list[RunningEpisode]) -> list[State | None] | None:
        states = [episode.state for episode in running]
        return None if all(state is None for state in states) else states

    def _action_seeds(self) -> Iterator[int]:
        generator = np.random.default_rng(self._seed)
        while True:
            yield int(generator.integers(2**31))

    def _reset(self, env: gym.Env[Any, Any], index: int) -> RunningEpisode:
        try:
            observation, info = env.reset(seed=self._seed + index)
        except Exception as exc:  # a user's environment can raise anything
            raise EnvironmentFailedError(
                f"the environment failed in reset (episode {index}): {type(exc).__name__}: {exc}"
            ) from exc
        return RunningEpisode(env, index, observation, info)

    def _step(self, episode: RunningEpisode, action: Any) -> None:
        try:
            observation, reward, terminated, truncated, info = episode.env.step(action)
        except Exception as exc:  # a user's environment can raise anything
            raise EnvironmentFailedError(
                f"the environment failed in step {episode.episode_length} of episode "
                f"{episode.index}: {type(exc).__name__}: {exc}"
            ) from exc
        episode.observation, episode.info, episode.action = observation, info, action
        episode.reward = float(reward)
        episode.episode_return += episode.reward
        episode.episode_length += 1
        episode.terminated, episode.truncated = bool(terminated), bool(truncated)
        if not episode.is_over:
            return
        result = episode.result()
        self._finished.append(result)
        if self._on_episode is not None:
            self._on_episode(result)


def _batch(observations: list[Any]) -> Any:
    """One array where an observation is one; a Dict's or Tuple's stay a list, as `Policy` takes."""
    if isinstance(observations[0], Mapping | tuple):
        return observations
    return np.stack(observations)


def _action_mask(info: Mapping[str, Any]) -> NDArray[Any]:
    """The mask of an `info`; a MultiDiscrete's, one array per component, becomes one."""
    mask = info.get("action_mask")
    if mask is None:
        raise UsageError(
            f"the environment's info has no action_mask; it has {', '.join(info) or 'nothing'}"
        )
    if isinstance(mask, tuple):
        return np.concatenate([np.ravel(part) for part in mask])
    return np.asarray(mask)
