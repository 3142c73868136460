"""Playing episodes: returns by hand, seeds by number, and environments that fail."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from scipy import stats

from serving.errors import UsageError
from serving.interface import Policy, PolicyOutput
from serving.rollout import (
    EnvironmentFailedError,
    EpisodeResult,
    RandomPolicy,
    RolloutResult,
    evaluate_policy,
    make_env,
)


class KnownEnv(gym.Env[Any, Any]):
    """Seeded with s: 1 + s % 4 steps, each rewarded s; terminated if s is even, else truncated.

    The action has to be twice the observation, which is 100 s + step.
    """

    observation_space = gym.spaces.Box(0, 1e6, (1,), np.float32)
    action_space = gym.spaces.Box(0, 1e6, (1,), np.float32)

    def __init__(self, fail_in: str = "") -> None:
        self.fail_in = fail_in
        self.seeds: list[int | None] = []
        self.is_closed = False

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, Any]:  # noqa: ARG002 - Gymnasium's
        assert not self.is_closed
        self.seeds.append(seed)
        self.seed = seed or 0
        self.steps = 0
        if self.fail_in == "reset":
            raise ZeroDivisionError("broken")
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, Any]:
        assert action == 2 * self._observation()
        if self.fail_in == "step" and self.steps == 1:
            raise ZeroDivisionError("broken")
        self.steps += 1
        over = self.steps == 1 + self.seed % 4
        is_even = self.seed % 2 == 0
        return self._observation(), self.seed, over and is_even, over and not is_even, {}

    def close(self) -> None:
        self.is_closed = True

    def _observation(self) -> Any:
        return np.array([100 * self.seed + self.steps], np.float32)


class DoublingPolicy:
    """Acts as KnownEnv wants; remembers how it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, bool, int | None]] = []

    def compute_actions(
        self, observations: Any, *, deterministic: bool, seed: int | None
    ) -> PolicyOutput:
        self.calls.append((len(observations), deterministic, seed))
        return PolicyOutput(actions=2 * observations)


def episode(index: int, seed: int) -> EpisodeResult:
    s = seed + index
    length = 1 + s % 4
    return EpisodeResult(
        index=index,
        episode_return=float(s * length),
        episode_length=length,
        terminated=s % 2 == 0,
        truncated=s % 2 == 1,
    )


@pytest.mark.parametrize("num_envs", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("seed", [0, 5])
def test_episode_i_is_that_of_seed_plus_i_whatever_num_envs(num_envs: int, seed: int):
    envs: list[KnownEnv] = []

    def make() -> KnownEnv:
        envs.append(KnownEnv())
        return envs[-1]

    result = evaluate_policy(DoublingPolicy(), make, n_episodes=7, seed=seed, num_envs=num_envs)
    assert result.episodes == tuple(episode(index, seed) for index in range(7))
    assert sorted(s for env in envs for s in env.seeds) == list(range(seed, seed + 7))
    assert len(envs) == min(num_envs, 7)
    assert all(env.is_closed for env in envs)


def test_the_figures_are_those_of_the_episodes():
    policy = DoublingPolicy()
    result = evaluate_policy(policy, KnownEnv, n_episodes=4, seed=1)
    # Seeds 1, 2, 3, 4: 2, 3, 4, 1 steps; returns 2, 6, 12, 4.
    assert result.returns.tolist() == [2, 6, 12, 4]
    assert result.n_steps == 10
    assert len(result.step_latencies_s) == len(policy.calls) == 10
    assert result.duration_s >= result.step_latencies_s.sum() > 0
    summary = result.summary()
    ci95 = summary.pop("ci95_return")
    assert isinstance(ci95, float)
    assert summary == {
        "mean_return": 6.0,
        "std_return": pytest.approx(np.sqrt((16 + 0 + 36 + 4) / 4)),
        "min_return": 2.0,
        "max_return": 12.0,
        "mean_length": 2.5,
        "n_episodes": 4,
        "n_terminated": 2,
        "n_truncated": 2,
    }


def result_of(returns: Any) -> RolloutResult:
    episodes = tuple(EpisodeResult(k, float(r), 1, True, False) for k, r in enumerate(returns))
    return RolloutResult(episodes, np.zeros(1), 1.0)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 7, 10, 12, 20, 25, 30, 31, 35, 50, 100, 1000])
def test_the_confidence_interval_is_student_s_within_three_percent(n: int):
    returns = np.random.default_rng(n).normal(size=n)
    half_width = result_of(returns).summary()["ci95_return"]
    expected = stats.t.ppf(0.975, n - 1) * stats.sem(returns)
    assert half_width == pytest.approx(expected, rel=0.03)


def test_one_episode_has_no_confidence_interval():
    assert result_of([3.0]).summary()["ci95_return"] is None


def test_environments_are_stepped_together_in_one_call():
    policy = DoublingPolicy()
    evaluate_policy(policy, KnownEnv, n_episodes=4, seed=0, num_envs=4)
    # 1, 2, 3, 4 steps: one environment fewer each step.
    assert [n for n, _, _ in policy.calls] == [4, 3, 2, 1]


def test_sampling_seeds_repeat_with_the_seed_and_differ_from_step_to_step():
    def seeds(seed: int) -> list[int | None]:
        policy = DoublingPolicy()
        evaluate_policy(policy, KnownEnv, n_episodes=5, seed=seed, deterministic=False)
        assert not any(deterministic for _, deterministic, _ in policy.calls)
        return [step_seed for _, _, step_seed in policy.calls]

    assert seeds(4) == seeds(4)
    assert len(set(seeds(4))) == len(seeds(4))
    policy = DoublingPolicy()
    evaluate_policy(policy, KnownEnv, n_episodes=1)
    assert policy.calls[0][1:] == (True, None)


def test_each_episode_is_reported_once_as_it_ends():
    reported: list[EpisodeResult] = []
    result = evaluate_policy(
        DoublingPolicy(), KnownEnv, n_episodes=6, num_envs=3, on_episode=reported.append
    )
    assert sorted(reported, key=lambda each: each.index) == list(result.episodes)


@pytest.mark.parametrize("where", ["reset", "step"])
def test_an_environment_that_raises_is_named_and_the_others_are_closed(where: str):
    envs: list[KnownEnv] = []

    def make() -> KnownEnv:
        envs.append(KnownEnv(fail_in=where if len(envs) == 1 else ""))
        return envs[-1]

    with pytest.raises(EnvironmentFailedError, match=rf"{where}.*ZeroDivisionError: broken"):
        evaluate_policy(DoublingPolicy(), make, n_episodes=4, num_envs=3, seed=2)
    assert len(envs) == 3
    assert all(env.is_closed for env in envs)


def test_an_environment_of_the_caller_s_is_left_open():
    env = KnownEnv()
    evaluate_policy(DoublingPolicy(), env, n_episodes=2)
    assert not env.is_closed
    with pytest.raises(UsageError, match="a function that makes one"):
        evaluate_policy(DoublingPolicy(), env, n_episodes=2, num_envs=2)


def test_random_actions_are_of_the_space_and_repeat_with_their_seed():
    def draw(space: gym.Space[Any], seed: int) -> Any:
        return RandomPolicy(space, seed).compute_actions(np.zeros((200, 1))).actions

    discrete = gym.spaces.Discrete(3, start=5)
    assert set(draw(discrete, 0).tolist()) == {5, 6, 7}
    np.testing.assert_array_equal(draw(discrete, 1), draw(discrete, 1))
    assert not np.array_equal(draw(discrete, 1), draw(discrete, 2))
    box = draw(gym.spaces.Box(-1, 2, (2,), np.float32), 0)
    assert box.shape == (200, 2)
    assert box.dtype == np.float32
    assert (box >= -1).all()
    assert (box <= 2).all()
    assert isinstance(RandomPolicy(discrete), Policy)


def test_an_unknown_environment_is_a_usage_error():
    with pytest.raises(UsageError, match="NoSuchEnv-v0"):
        make_env("NoSuchEnv-v0")
    with pytest.raises(UsageError, match="CartPole-v1"):
        make_env("CartPole-v1", no_such_argument=1)
