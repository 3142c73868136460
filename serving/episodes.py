"""What came of playing: finished episodes and their figures."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

_Z_95 = 1.959964  # the normal distribution's two-sided 95 % quantile


@dataclass(frozen=True)
class EpisodeResult:
    """One finished episode.

    Attributes:
        index: Its number, from 0; it was reset with `seed + index`.
        episode_return: Undiscounted sum of rewards.
        episode_length: Steps.
        terminated: It ended by the environment's own rule.
        truncated: It was cut off, for example by a time limit.
    """

    index: int
    episode_return: float
    episode_length: int
    terminated: bool
    truncated: bool


@dataclass(frozen=True)
class RolloutResult:
    """Finished episodes, in the order of their numbers.

    Attributes:
        episodes: One entry each.
        step_latencies_s: Seconds of each call of the policy (one per step of all environments).
        duration_s: Wall time of the whole rollout.
    """

    episodes: tuple[EpisodeResult, ...]
    step_latencies_s: NDArray[np.float64] = field(repr=False)
    duration_s: float

    @property
    def returns(self) -> NDArray[np.float64]:
        """(n_episodes,) returns."""
        return np.array([episode.episode_return for episode in self.episodes])

    @property
    def n_steps(self) -> int:
        """Environment steps in finished episodes."""
        return sum(episode.episode_length for episode in self.episodes)

    def summary(self) -> dict[str, float | int | None]:
        """What `evaluate --json` prints.

        `std_return` is the population's standard deviation; `ci95_return` half the width of the
        mean's 95 % confidence interval (Student's t), None for a single episode.
        """
        returns = self.returns
        lengths = [episode.episode_length for episode in self.episodes]
        n = len(returns)
        return {
            "mean_return": float(returns.mean()),
            "std_return": float(returns.std()),
            "ci95_return": _ci95(returns),
            "min_return": float(returns.min()),
            "max_return": float(returns.max()),
            "mean_length": float(np.mean(lengths)),
            "n_episodes": n,
            "n_terminated": sum(episode.terminated for episode in self.episodes),
            "n_truncated": sum(episode.truncated for episode in self.episodes),
        }


def _ci95(returns: NDArray[np.float64]) -> float | None:
    n = len(returns)
    if n < 2:
        return None
    return float(_student_t_95(n - 1) * returns.std(ddof=1) / math.sqrt(n))


def _student_t_95(degrees: int) -> float:
    """Student's t, two-sided 95 %: Abramowitz and Stegun 26.7.5, and exact for 1 and 2."""
    if degrees <= 2:
        return {1: 12.706205, 2: 4.302653}[degrees]
    z = _Z_95
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )
