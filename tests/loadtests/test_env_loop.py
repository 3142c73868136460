"""Environment loops ask what a hand-played episode would ask."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from loadtests.env_loop import EnvLoop
from loadtests.recording import Recorder
from serving.client import Encoding, PolicyClient
from tests.bundles import LinearPolicy
from tests.serving.conftest import LiveServer


def played_by_hand(policy: LinearPolicy, seed: int) -> float:
    """An episode's return with NumPy alone."""
    env = gym.make("CartPole-v1")
    observation, _ = env.reset(seed=seed)
    total, is_over = 0.0, False
    while not is_over:
        logits = observation.astype(np.float64) @ policy.weights + policy.bias
        observation, reward, terminated, truncated, _ = env.step(int(np.argmax(logits)))
        total += float(reward)
        is_over = terminated or truncated
    env.close()
    return total


def run(loop: EnvLoop, client: PolicyClient, recorder: Recorder, n_episodes: int) -> None:
    while len(recorder.returns) < n_episodes:
        assert loop.take(client.exchange(loop.request())) is None
        loop.step()


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_returns_are_those_of_episodes_played_by_hand(
    loaded: LiveServer, cartpole_like: LinearPolicy, encoding: Encoding, n_envs: int
) -> None:
    recorder = Recorder()
    with PolicyClient(loaded.policy_url("cartpole"), encoding=encoding) as client:
        envs: list[gym.Env[Any, Any]] = [gym.make("CartPole-v1") for _ in range(n_envs)]
        loop = EnvLoop(envs, client.dialect(), recorder, first_seed=7, is_batch=n_envs > 1)
        run(loop, client, recorder, n_envs)
        loop.close()
    # The first episode of each environment; with several the shortest ends first, and then
    # further ones begin.
    by_hand = [played_by_hand(cartpole_like, 7 + index) for index in range(2 * n_envs + 4)]
    assert len(recorder.returns) >= n_envs
    assert all(each in by_hand for each in recorder.returns)
    assert recorder.returns[0] == min(by_hand[:n_envs])
    assert recorder.returns == recorder.lengths  # CartPole gives 1 for each step


class Counting(gym.Env[Any, Any]):
    """Three steps an episode; the reward is the step's number; notes what it was given."""

    observation_space = gym.spaces.Box(-10, 10, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
        self.at = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(int(action))
        self.at += 1
        observation = np.full(2, self.at, np.float32)
        return observation, float(self.at), self.at == 3, False, {}


@pytest.mark.parametrize("is_batch", [False, True])
def test_a_policys_memory_and_reward_last_for_an_episode(
    loaded: LiveServer, is_batch: bool
) -> None:
    """`memory_policy`: h' = h / 2 + observation, from 0.25, and it reads the last reward."""
    recorder = Recorder()
    asked: list[dict[str, Any]] = []
    with PolicyClient(loaded.policy_url("memory"), encoding="json") as client:
        loop = EnvLoop([Counting()], client.dialect(), recorder, first_seed=0, is_batch=is_batch)
        for _ in range(6):
            body = loop.request()
            asked.append(client.dialect().read(body))
            assert loop.take(client.exchange(body)) is None
            loop.step()
        loop.close()
    assert recorder.returns.tolist() == [6.0, 6.0]
    key = "rewards" if is_batch else "reward"
    rewards = [each.get(key) for each in asked]
    rewards = [each[0] if is_batch and each else each for each in rewards]
    assert [each or 0.0 for each in rewards] == [0.0, 1.0, 2.0, 0.0, 1.0, 2.0]
    states = [each.get("state") for each in asked]
    states = [each[0] if is_batch and each else each for each in states]
    assert states[0] is None
    assert states[3] is None
    h = 0.25
    for step in (1, 2):
        h = h / 2 + (step - 1)
        for episode in (0, 3):
            assert states[episode + step]["h"] == pytest.approx([h, h])


def test_an_answer_of_another_shape_is_told_and_not_stepped(loaded: LiveServer) -> None:
    with PolicyClient(loaded.policy_url("memory"), encoding="json") as client:
        loop = EnvLoop(
            [Counting(), Counting()], client.dialect(), Recorder(), first_seed=0, is_batch=True
        )
        answer = dict(client.exchange(loop.request()))
        assert loop.take({"policy": "x"}) is not None
        assert "found 1 actions" in (loop.take({**answer, "actions": answer["actions"][:1]}) or "")
        loop.close()
