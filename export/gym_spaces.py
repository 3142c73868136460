"""Gymnasium spaces as RLlib sees them: the leaves of a tree."""

from __future__ import annotations

from typing import Any

import gymnasium as gym


def leaf_spaces(space: gym.Space[Any]) -> list[gym.Space[Any]]:
    """The leaves in dm_tree's order: Dict keys sorted, Tuple in order."""
    if isinstance(space, gym.spaces.Dict):
        return [leaf for key in sorted(space.spaces) for leaf in leaf_spaces(space[key])]
    if isinstance(space, gym.spaces.Tuple):
        return [leaf for child in space.spaces for leaf in leaf_spaces(child)]
    return [space]
