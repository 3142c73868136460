"""What RLlib's `NormalizeAndClipActions` does to an action, as tensors, leaf by leaf."""

from __future__ import annotations

from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch

from export.gym_spaces import leaf_spaces

ActionBounding = Literal["none", "unsquash", "clip"]


class BoxBounds(torch.nn.Module):
    """A Box leaf: (B, *shape) from the network's scale to the environment's."""

    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, space: gym.spaces.Box, bounding: ActionBounding) -> None:
        super().__init__()
        # RLlib unsquashes float32 and float64 only, and a Box only where every component has both
        # bounds; integers it counts from the lower bound; else it leaves the action alone.
        bounded = bool(np.all(space.bounded_below) and np.all(space.bounded_above))
        is_float = space.dtype in (np.dtype(np.float32), np.dtype(np.float64))
        self._is_shifted = (
            bounding == "unsquash" and bounded and np.issubdtype(space.dtype, np.integer)
        )
        is_untouched = bounding == "unsquash" and not (bounded and is_float)
        self.bounding: ActionBounding = "none" if is_untouched else bounding
        self._shape = tuple(space.shape)
        self.register_buffer("low", torch.as_tensor(np.asarray(space.low)))
        self.register_buffer("high", torch.as_tensor(np.asarray(space.high)))

    def forward(self, action: torch.Tensor) -> torch.Tensor:
        """RLlib `unsquash_action` / `clip_action`, in the same order of operations."""
        action = action.reshape(action.shape[0], *self._shape)
        if self._is_shifted:
            return (action + self.low).to(self.low.dtype)
        if self.bounding == "unsquash":
            action = self.low + (action + 1.0) * (self.high - self.low) / 2.0
        if self.bounding != "none":
            action = torch.minimum(torch.maximum(action, self.low), self.high)
        return action.to(self.low.dtype)


class Integers(torch.nn.Module):
    """A Discrete or MultiDiscrete leaf: as it is, from 0, which is what RLlib sends."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._shape = shape

    def forward(self, action: torch.Tensor) -> torch.Tensor:
        """To int64, (B, *shape)."""
        return action.reshape(action.shape[0], *self._shape).long()


def action_bounds(space: gym.Space[Any], bounding: ActionBounding) -> list[torch.nn.Module]:
    """One module per leaf of the action space, in dm_tree's order."""
    return [
        BoxBounds(leaf, bounding)
        if isinstance(leaf, gym.spaces.Box)
        else Integers(leaf.shape or ())
        for leaf in leaf_spaces(space)
    ]
