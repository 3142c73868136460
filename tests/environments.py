"""Small environments for tests, by `module:EnvId`, e.g. tests.environments:StatelessCartPole-v1."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray


def stateless_cartpole(**options: Any) -> gymnasium.Env[Any, Any]:
    """CartPole-v1 that shows only the cart's position and the pole's angle.

    The velocities have to be remembered from the observations before.
    """
    return _Positions(gymnasium.make("CartPole-v1", **options))


def shifted_cartpole(**options: Any) -> gymnasium.Env[Any, Any]:
    """CartPole-v1 in bad units, as float64: scale * x + offset, each component with its own.

    What counts, the pole's angle and its velocity, are small changes of large numbers, which no
    network learns from as they are. In float32 they would be lost.
    """
    return _BadUnits(gymnasium.make("CartPole-v1", **options))


class _Positions(gymnasium.ObservationWrapper[Any, Any, Any]):
    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        limits = np.array([4.8, 0.42], np.float32)
        self.observation_space = spaces.Box(-limits, limits, dtype=np.float32)

    def observation(self, observation: NDArray[np.float32]) -> NDArray[np.float32]:
        return observation[[0, 2]]


class _BadUnits(gymnasium.ObservationWrapper[Any, Any, Any]):
    SCALE = np.array([1000.0, 300.0, 0.05, 0.01])
    OFFSET = np.array([300.0, 7.0, 40_000.0, -2.0])

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self.observation_space = spaces.Box(-np.inf, np.inf, (4,), np.float64)

    def observation(self, observation: NDArray[np.float32]) -> NDArray[np.float64]:
        return self.SCALE * observation + self.OFFSET


for _name, _entry_point in (
    ("StatelessCartPole-v1", stateless_cartpole),
    ("ShiftedCartPole-v1", shifted_cartpole),
):
    gymnasium.register(_name, entry_point=_entry_point)
