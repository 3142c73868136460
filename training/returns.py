"""The newest training episodes, and which checkpoint is the best."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from training.episodes import PlayedEpisode


class ReturnTracker:
    """Keeps the newest training episodes.

    Args:
        stop_window: Episodes that the reported mean and the stop return are taken over.
        best_window: Episodes that a checkpoint is judged by where there is no evaluation.
    """

    def __init__(self, *, stop_window: int, best_window: int) -> None:
        self._stop_window = stop_window
        self._best_window = best_window
        longest = max(stop_window, best_window)
        self._returns: deque[float] = deque(maxlen=longest)
        self._lengths: deque[int] = deque(maxlen=longest)

    def add(self, episodes: Sequence[PlayedEpisode]) -> None:
        """Take in the episodes that ended since the last call."""
        self._returns.extend(episode.episode_return for episode in episodes)
        self._lengths.extend(episode.episode_length for episode in episodes)

    def recent(self) -> tuple[list[float], list[int]]:
        """Returns and lengths of the newest `stop_window` episodes, or of all where fewer ended."""
        return list(self._returns)[-self._stop_window :], list(self._lengths)[-self._stop_window :]

    def recent_mean(self) -> float | None:
        """Mean of the recent returns; None before the first episode has ended."""
        returns, _ = self.recent()
        return statistics.fmean(returns) if returns else None

    def has_reached(self, stop_return: float) -> bool:
        """Whether the recent mean is as high, over a full window: not a lucky first episode."""
        mean = self.recent_mean()
        return mean is not None and len(self._returns) >= self._stop_window and mean >= stop_return

    def best_window(self) -> list[float]:
        """The returns that a checkpoint is judged by; none before the window is full."""
        if len(self._returns) < self._best_window:
            return []
        return list(self._returns)[-self._best_window :]

    def state(self) -> dict[str, Any]:
        """JSON values to go on from."""
        return {
            "recent_episode_returns": list(self._returns),
            "recent_episode_lengths": list(self._lengths),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave.

        Raises:
            KeyError: Something is missing.
            TypeError: A value is not what `state` gave; also ValueError.
        """
        self._returns.extend(map(float, state["recent_episode_returns"]))
        self._lengths.extend(map(int, state["recent_episode_lengths"]))


class BestPolicy:
    """Knows whether the policy of now is the best so far, by the returns of some episodes.

    The best is the latest whose mean reaches the highest of all means less their own standard
    errors. Of equals the later one has learned longer, and the highest of many noisy means is
    mostly luck.
    """

    def __init__(self) -> None:
        self._threshold = -math.inf
        self.mean: float | None = None
        """Mean return that the best policy was judged by."""

    def is_best(self, returns: Sequence[float]) -> bool:
        """Judge the policy of now, and remember its mean if it is the best.

        Args:
            returns: Of its episodes; without any it is not judged.
        """
        if not returns:
            return False
        mean = statistics.fmean(returns)
        standard_error = statistics.pstdev(returns) / math.sqrt(len(returns))
        self._threshold = max(self._threshold, mean - standard_error)
        if mean < self._threshold:
            return False
        self.mean = mean
        return True

    def declare(self, mean: float | None) -> None:
        """The policy of now is the best: it reached the stop return."""
        self.mean = mean

    def forget(self) -> None:
        """The best checkpoint is gone."""
        self.mean, self._threshold = None, -math.inf

    def state(self) -> dict[str, Any]:
        """JSON values to go on from."""
        return {
            "best_return_mean": self.mean,
            "best_threshold": self._threshold if math.isfinite(self._threshold) else None,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave.

        Raises:
            KeyError: Something is missing.
            TypeError: A value is not what `state` gave; also ValueError.
        """
        mean, threshold = state["best_return_mean"], state["best_threshold"]
        self.mean = None if mean is None else float(mean)
        self._threshold = -math.inf if threshold is None else float(threshold)
