"""The returns of the newest training episodes: what a run stops on and judges checkpoints by."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any


class ReturnTracker:
    """Keeps the newest episodes and knows whether the policy of now is the best so far.

    Args:
        stop_window: Episodes that the reported mean and the stop return are taken over.
        best_window: Episodes that a checkpoint is judged by.
    """

    def __init__(self, *, stop_window: int, best_window: int) -> None:
        self._stop_window = stop_window
        self._best_window = best_window
        longest = max(stop_window, best_window)
        self._returns: deque[float] = deque(maxlen=longest)
        self._lengths: deque[int] = deque(maxlen=longest)
        self._threshold = -math.inf
        self.best: float | None = None
        """Mean return that the best checkpoint was judged by."""

    def add(self, returns: Sequence[float], lengths: Sequence[int]) -> None:
        """Take in the episodes that ended since the last call."""
        self._returns.extend(returns)
        self._lengths.extend(lengths)

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

    def is_best(self) -> bool:
        """Judge the policy of now, and remember its mean if it is the best.

        The best is the latest whose mean lies at most one standard error below the highest. Of
        equals the later one has learned longer, and the highest of many noisy means is mostly
        luck. Without a full window there is no best.
        """
        if len(self._returns) < self._best_window:
            return False
        returns = list(self._returns)[-self._best_window :]
        mean = statistics.fmean(returns)
        standard_error = statistics.pstdev(returns) / math.sqrt(len(returns))
        self._threshold = max(self._threshold, mean - standard_error)
        if mean < self._threshold:
            return False
        self.best = mean
        return True

    def declare_best(self) -> None:
        """The policy of now is the best: it reached the stop return."""
        self.best = self.recent_mean()

    def forget_best(self) -> None:
        """The best checkpoint is gone."""
        self.best, self._threshold = None, -math.inf

    def state(self) -> dict[str, Any]:
        """JSON values to go on from."""
        return {
            "recent_episode_returns": list(self._returns),
            "recent_episode_lengths": list(self._lengths),
            "best_episode_return_mean": self.best,
            "best_threshold": self._threshold if math.isfinite(self._threshold) else None,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave.

        Raises:
            KeyError: Something is missing.
            TypeError: A value is not what `state` gave; also ValueError.
        """
        self._returns.extend(map(float, state["recent_episode_returns"]))
        self._lengths.extend(map(int, state["recent_episode_lengths"]))
        best, threshold = state["best_episode_return_mean"], state["best_threshold"]
        self.best = None if best is None else float(best)
        self._threshold = -math.inf if threshold is None else float(threshold)
