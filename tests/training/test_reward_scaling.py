"""Imports RLlib, so it runs in a process of its own, where RLlib's warnings are no errors."""

from __future__ import annotations

import pytest

from tests.processes import python

pytestmark = pytest.mark.slow

CHECK = """
import numpy as np, torch
from training.reward_scaling import ScaleRewards

class Episode:
    def __init__(self, rewards):
        self.rewards = rewards
    def get_rewards(self):
        return self.rewards

scaling = ScaleRewards(gamma=0.5)

def scaled(*episodes):
    rewards = torch.tensor([reward for episode in episodes for reward in episode])
    batch = {"default_policy": {"rewards": rewards}}
    result = scaling(batch=batch, episodes=[Episode(episode) for episode in episodes])
    return result["default_policy"]["rewards"].numpy()

# By hand: the discounted returns of (4, 2) at 0.5 are 4 and 4/2 + 2 = 4; of (8,) it is 8.
# Their deviation is that of (4, 4, 8).
first = np.std([4.0, 4.0, 8.0])
np.testing.assert_allclose(scaled([4.0, 2.0], [8.0]), np.array([4.0, 2.0, 8.0]) / first, rtol=1e-6)
# The next batch adds (0, 1000) to what was seen: a reward once scaled is not scaled by its own.
both = np.std([4.0, 4.0, 8.0, 0.0, 1000.0])
np.testing.assert_allclose(scaled([0.0, 1000.0]), np.array([0.0, 1000.0]) / both, rtol=1e-6)
# Rewards that never change have no deviation to divide by: they stay as they are.
scaling = ScaleRewards(gamma=0.0)
assert scaled([3.0, 3.0]).tolist() == [3.0, 3.0]
"""


def test_rewards_are_divided_by_the_running_deviation_of_the_discounted_return():
    done = python("-c", CHECK)
    assert done.returncode == 0, done.stderr[-2000:]
