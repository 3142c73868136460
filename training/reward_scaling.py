"""Rewards in units of the return's own spread, for the learner alone.

A value network learns returns of hundreds only slowly, whatever the task; with rewards divided by
the running standard deviation of the discounted return it starts at the right size. The policy, its
observations and actions, and every return that is reported stay as they are.

Source: gymnasium.wrappers.NormalizeReward and OpenAI Baselines' VecNormalize, which do it for the
environment. Here each chunk of an episode starts its discounted return at 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.connectors.learner import GeneralAdvantageEstimation
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns

from training.fast_learning import FastPPOLearner

_STATE_KEY = "policyserve_reward_moments"


class ScaleRewards(ConnectorV2):
    """Divides the batch's rewards by the standard deviation of the discounted return so far."""

    def __init__(self, *, gamma: float) -> None:
        super().__init__()
        self.gamma = gamma
        self.moments = (0.0, 0.0, 0.0)
        """Count, mean and sum of squared deviations of the discounted returns so far."""

    def __call__(self, *, batch: dict[str, Any], episodes: list[Any], **_: Any) -> dict[str, Any]:
        """Take the episodes into the statistics and scale the batch's rewards."""
        module_batch = batch[DEFAULT_MODULE_ID]
        rewards = [episode.get_rewards() for episode in episodes]
        module_batch[Columns.REWARDS] = self.scale(module_batch[Columns.REWARDS], rewards)
        return batch

    def scale(self, rewards: Any, episodes: Iterable[Iterable[float]]) -> Any:
        """Take episodes into the statistics and scale rewards.

        Args:
            rewards: Of all the episodes; a tensor or an array of any shape.
            episodes: Each episode's rewards.
        """
        discounted: list[float] = []
        for episode in episodes:
            running = 0.0
            for reward in episode:
                running = self.gamma * running + float(reward)
                discounted.append(running)
        self.moments = _merge(self.moments, discounted)
        count, _mean, squares = self.moments
        # Returns that never differ (rewards of 0 so far) have no scale to divide by.
        return rewards / (math.sqrt(squares / count) or 1.0) if count else rewards


class ScaledRewardPPOLearner(FastPPOLearner):
    """RLlib's PPO learner with `ScaleRewards` before the advantages are estimated."""

    def complete_pipeline(self) -> None:
        """Put the scaling into RLlib's pipeline."""
        self.reward_scaling = ScaleRewards(gamma=self.config.gamma)
        assert self._learner_connector is not None  # RLlib builds one unless told not to
        self._learner_connector.insert_before(GeneralAdvantageEstimation, self.reward_scaling)

    def lean_pipeline(self) -> list[str]:
        """RLlib's pieces, and the scaling before the advantages."""
        *before, advantages = super().lean_pipeline()
        return [*before, ScaleRewards.__name__, advantages]

    def scale_rewards(self, rewards: Any, episodes: list[Any]) -> Any:
        """Scale rewards (R,), given each episode's own."""
        return self.reward_scaling.scale(rewards, episodes)

    # RLlib's checkpoints leave a learner's connectors out, so their state goes with the learner's.
    def get_state(
        self, components: Any = None, *, not_components: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """RLlib's state of a learner, and the statistics of the rewards."""
        state: dict[str, Any] = super().get_state(
            components, not_components=not_components, **kwargs
        )
        if self._check_component(_STATE_KEY, components, not_components):
            state[_STATE_KEY] = self.reward_scaling.moments
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Take over a state that `get_state` gave."""
        super().set_state(state)
        if _STATE_KEY in state:
            self.reward_scaling.moments = state[_STATE_KEY]


def _merge(moments: tuple[float, float, float], values: list[float]) -> tuple[float, float, float]:
    # Chan, Golub and LeVeque's parallel update: exact, and stable where the mean is large.
    if not values:
        return moments
    count, mean, squares = moments
    new_count = len(values)
    new_mean = math.fsum(values) / new_count
    new_squares = math.fsum((value - new_mean) ** 2 for value in values)
    total = count + new_count
    delta = new_mean - mean
    return (
        total,
        mean + delta * new_count / total,
        squares + new_squares + delta * delta * count * new_count / total,
    )
