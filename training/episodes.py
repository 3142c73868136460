"""What is known of a whole episode. Imports no Ray."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PlayedEpisode:
    """A whole episode.

    Attributes:
        episode_return: Undiscounted sum of rewards.
        episode_length: Steps.
        terminated: It ended by the environment's own rule.
        truncated: It was cut off, for example by a time limit.
    """

    episode_return: float
    episode_length: int
    terminated: bool
    truncated: bool
