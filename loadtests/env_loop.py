"""Environment loops as questions and answers, whatever carries them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np

from loadtests.recording import Recorder
from serving.calls import Dialect
from serving.errors import PolicyServingError


class EnvLoop:
    """N environments that are stepped together; each starts a new episode after its last."""

    def __init__(
        self,
        envs: list[gym.Env[Any, Any]],
        dialect: Dialect,
        recorder: Recorder,
        *,
        first_seed: int,
        is_batch: bool,
    ) -> None:
        """Reset all environments.

        Args:
            envs: Of the policy's spaces.
            dialect: Of the policy.
            recorder: Hears of finished episodes.
            first_seed: Episode k of the whole loop is reset with `first_seed` + k.
            is_batch: Ask for many actions in one request, even for one environment.
        """
        self._envs = envs
        self._dialect = dialect
        self._recorder = recorder
        self._next_seed = first_seed
        self._is_batch = is_batch
        self._actions: list[Any] = []
        self._observations: list[Any] = [None] * len(envs)
        self._states: list[Any] = [None] * len(envs)
        self._rewards = np.zeros(len(envs), np.float32)
        self._returns = np.zeros(len(envs))
        self._lengths = np.zeros(len(envs))
        for index in range(len(envs)):
            self._reset(index)

    @property
    def n_envs(self) -> int:
        """How many."""
        return len(self._envs)

    def request(self) -> bytes:
        """What to ask now."""
        if self._is_batch:
            observations: Any = self._observations
            if isinstance(observations[0], np.ndarray):
                observations = np.stack(observations)
            return self._dialect.body_for_many(
                observations, {}, state=self._states, rewards=self._rewards
            )
        return self._dialect.body_for_one(
            self._observations[0], {}, state=self._states[0], reward=float(self._rewards[0])
        )

    def take(self, answer: Mapping[str, Any]) -> str | None:
        """Read an answer's actions for the next step; what is wrong with them, or None."""
        try:
            if not self._is_batch:
                action, self._states[0] = self._dialect.step(answer)
                self._actions = [action]
                return None
            output = self._dialect.output(answer)
        except PolicyServingError as exc:
            return exc.message
        self._actions = list(output)
        if len(self._actions) != len(self._envs):
            return f"found {len(self._actions)} actions, expected {len(self._envs)}"
        if output.state is not None:
            self._states = [
                {name: values[index] for name, values in output.state.items()}
                for index in range(len(self._envs))
            ]
        return None

    def step(self) -> None:
        """Take one step in each environment with the actions that were taken."""
        for index, action in enumerate(self._actions):
            self._step(index, action)

    def _step(self, index: int, action: Any) -> None:
        found = self._envs[index].step(action)
        self._observations[index], reward, terminated, truncated, _ = found
        self._rewards[index] = reward
        self._returns[index] += float(reward)
        self._lengths[index] += 1
        if terminated or truncated:
            self._recorder.returns.append(self._returns[index])
            self._recorder.lengths.append(self._lengths[index])
            self._reset(index)

    def _reset(self, index: int) -> None:
        self._observations[index], _ = self._envs[index].reset(seed=self._next_seed)
        self._next_seed += 1
        self._states[index] = None
        self._rewards[index] = self._returns[index] = self._lengths[index] = 0.0

    def close(self) -> None:
        """Close the environments."""
        for env in self._envs:
            env.close()
