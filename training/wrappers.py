"""Wrappers that the shipped configs name: `wrappers: ["training.wrappers:..."]`. Imports no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray


class SelectComponents(gymnasium.ObservationWrapper[NDArray[Any], Any, NDArray[Any]]):
    """Shows only some components of a Box with one axis: what is left out the policy never sees.

    CartPole-v1's components are position, velocity, angle and angular velocity; with [0, 2] its
    velocities are hidden, and a policy needs memory to balance the pole.

    Args:
        env: Its observations are a Box of shape (n,).
        components: Which of the n, from 0.

    Raises:
        TypeError: The observations are no Box with one axis.
        IndexError: There is no such component.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], components: Sequence[int]) -> None:
        super().__init__(env)
        space = env.observation_space
        if not isinstance(space, spaces.Box) or len(space.shape) != 1:
            raise TypeError(f"SelectComponents needs a Box with one axis, found {space}")
        if wrong := [index for index in components if not 0 <= index < space.shape[0]]:
            raise IndexError(f"component {wrong[0]} is none of {space.shape[0]}, counted from 0")
        self._components = np.array(components, dtype=np.intp)
        dtype: Any = space.dtype
        self.observation_space = spaces.Box(
            space.low[self._components], space.high[self._components], dtype=dtype
        )

    def observation(self, observation: NDArray[Any]) -> NDArray[Any]:
        """The chosen components, shape (len(components),), in the order given."""
        chosen: NDArray[Any] = observation[self._components]
        return chosen
