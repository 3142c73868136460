"""Playing episodes: returns by hand, seeds by number, and environments that fail."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from scipy import stats

from serving.client import PolicyClient
from serving.config import ServingConfig
from serving.environments import make_env
from serving.episodes import EpisodeResult, RolloutResult
from serving.errors import UsageError
from serving.interface import Policy, PolicyOutput
from serving.play_loop import EnvironmentFailedError
from serving.rollout import RandomPolicy, check_spaces, evaluate_policy
from serving.spaces import space_from_gymnasium
from tests.serving.conftest import serving_services
from tests.serving.numpy_policies import (
    ACTION_SPACES,
    OBSERVATION_SPACES,
    action_of,
    sample,
    services_of,
    summing_policy,
    total_of,
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
        self, observations: Any, *, deterministic: bool, seed: int | None, state: Any, rewards: Any
    ) -> PolicyOutput:
        assert state is None
        assert rewards.shape == (len(observations),)
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


MEMORY = {"total": {"dtype": "float32", "shape": [], "initial": 0.5}}


class SummingEnv(gym.Env[Any, Any]):
    """Wants the action of a policy that adds up every observation and reward of the episode.

    Seeded with s: 2 + s % 4 steps, the k-th rewarded k. `info` forbids the wanted action if
    `is_masking`, so that the next one has to be taken.
    """

    def __init__(self, observation: str, action: str, *, is_masking: bool = False) -> None:
        self.observation_space = OBSERVATION_SPACES[observation]
        self.action_space = ACTION_SPACES[action]
        self.is_masking = is_masking

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, Any]:  # noqa: ARG002 - Gymnasium's
        assert seed is not None
        self.seed = seed
        self.observations = sample(self.observation_space, 6, seed)
        self.steps = 0
        self.remembered = 0.5 + total_of(self.observations[0])
        return self.observations[0], self._info()

    def _info(self) -> dict[str, Any]:
        if not self.is_masking:
            return {}
        step = int(np.floor(self.remembered))
        if isinstance(self.action_space, gym.spaces.Discrete):
            mask = np.ones(self.action_space.n, np.int8)
            mask[step % self.action_space.n] = 0
            return {"action_mask": mask}
        assert isinstance(self.action_space, gym.spaces.MultiDiscrete)
        masks = [np.ones(n, np.int8) for n in self.action_space.nvec]
        for k, mask in enumerate(masks):
            mask[(step + k) % len(mask)] = 0
        return {"action_mask": tuple(masks)}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, Any]:
        assert self.action_space.contains(action)
        wanted = action_of(self.action_space, self.remembered + self.is_masking)
        np.testing.assert_equal(action, wanted)
        self.steps += 1
        reward = float(self.steps)
        observation = self.observations[self.steps % 6]
        self.remembered += total_of(observation) + 10 * reward
        return observation, reward, self.steps == 2 + self.seed % 4, False, self._info()


def summing(observation: str, action: str, **kwargs: Any) -> Any:
    return summing_policy(
        OBSERVATION_SPACES[observation],
        ACTION_SPACES[action],
        state=MEMORY,
        has_reward=True,
        **kwargs,
    )


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize(
    ("observation", "action"),
    [
        ("vector", "dict"),
        ("dict", "tuple"),
        ("tuple", "multi-binary"),
        ("discrete", "multi-discrete"),
        ("image", "box"),
        ("multi-binary", "discrete"),
    ],
)
def test_every_episode_has_its_own_memory_whatever_num_envs(observation, action, num_envs: int):
    result = evaluate_policy(
        summing(observation, action),
        lambda: SummingEnv(observation, action),
        n_episodes=7,
        num_envs=num_envs,
        seed=3,
    )
    # The environment asserts each action; rewards are 1 + 2 + ... + steps.
    lengths = [2 + (3 + k) % 4 for k in range(7)]
    assert result.returns.tolist() == [n * (n + 1) / 2 for n in lengths]


def test_a_served_policy_with_memory_is_played_as_the_same_policy_here():
    services = services_of({"p": summing("dict", "tuple")})
    with (
        serving_services(services, ServingConfig()) as server,
        PolicyClient(server.policy_url("p")) as client,
    ):
        result = evaluate_policy(
            client, lambda: SummingEnv("dict", "tuple"), n_episodes=5, num_envs=2
        )
        check_spaces("Summing", SummingEnv("dict", "tuple"), client.describe())
        with pytest.raises(UsageError, match="Dict"):
            check_spaces("Summing", SummingEnv("tuple", "tuple"), client.describe())
    assert result.n_steps == 2 + 3 + 4 + 5 + 2


@pytest.mark.parametrize("action", ["discrete", "multi-discrete"])
def test_what_the_environment_s_info_forbids_is_not_taken(action: str):
    policy = summing("vector", action, has_mask=True)
    env = SummingEnv("vector", action, is_masking=True)
    assert evaluate_policy(policy, env, n_episodes=4, use_action_mask=True).n_steps == 14
    with pytest.raises(EnvironmentFailedError):
        evaluate_policy(policy, env, n_episodes=1)
    with pytest.raises(UsageError, match="no action_mask"):
        evaluate_policy(policy, SummingEnv("vector", action), use_action_mask=True)


@pytest.mark.parametrize("name", ACTION_SPACES)
def test_random_actions_of_any_space_are_of_it(name: str):
    space = ACTION_SPACES[name]
    output = RandomPolicy(space).compute_actions([None] * 20)
    assert len(output) == 20
    assert all(space.contains(action) for action in output)


@pytest.mark.parametrize(
    ("name", "mask", "allowed"),
    [
        ("discrete", [0, 1, 0], [[6]]),
        ("multi-discrete", [0, 0, 1, 0, 1, 1, 0], [[2, 1], [2, 2]]),
    ],
)
def test_random_actions_keep_to_a_mask(name: str, mask: list[int], allowed: Any):
    policy = RandomPolicy(ACTION_SPACES[name])
    actions = policy.compute_actions([None] * 50, action_mask=[mask] * 50).actions
    assert {tuple(np.atleast_1d(action)) for action in actions} == set(map(tuple, allowed))


PAIRS = [(left, right) for left in OBSERVATION_SPACES for right in OBSERVATION_SPACES]


@pytest.mark.parametrize("where", ["observation_space", "action_space"])
def test_an_environment_fits_its_own_spaces_and_no_others(where: str):
    env = SummingEnv("vector", "box")
    plain = {name: space_from_gymnasium(space) for name, space in OBSERVATION_SPACES.items()}
    described = {
        "observation_space": space_from_gymnasium(env.observation_space).to_json(),
        "action_space": space_from_gymnasium(env.action_space).to_json(),
    }
    for left, right in PAIRS:
        setattr(env, where, OBSERVATION_SPACES[left])
        entry = {**described, where: plain[right].to_json()}
        if left == right:
            check_spaces("Some-v0", env, entry)
        else:
            with pytest.raises(UsageError, match="Some-v0 has the"):
                check_spaces("Some-v0", env, entry)


def test_an_unknown_environment_is_a_usage_error():
    with pytest.raises(UsageError, match="NoSuchEnv-v0"):
        make_env("NoSuchEnv-v0")
    with pytest.raises(UsageError, match="CartPole-v1"):
        make_env("CartPole-v1", no_such_argument=1)
