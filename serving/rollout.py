"""Any policy in any environment: the one loop behind `evaluate`, `play` and the demo."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from serving.errors import PolicyServingError, UsageError
from serving.interface import OutputName, Policy, PolicyOutput
from serving.spaces import describe_space, space_from_gymnasium, space_from_json

_Z_95 = 1.959964  # the normal distribution's two-sided 95 % quantile


class EnvironmentFailedError(PolicyServingError):
    """The environment raised while it was stepped."""

    code = "environment_failed"
    title = "Environment failed"
    http_status = None


@dataclass(frozen=True)
class EpisodeResult:
    """One finished episode.

    Attributes:
        index: Its number, from 0; it was reset with `seed + index`.
        episode_return: Undiscounted sum of rewards.
        episode_length: Steps.
        terminated: It ended by the environment's own rule.
        truncated: It was cut off, for example by a time limit.
    """

    index: int
    episode_return: float
    episode_length: int
    terminated: bool
    truncated: bool


@dataclass(frozen=True)
class RolloutResult:
    """Finished episodes, in the order of their numbers.

    Attributes:
        episodes: One entry each.
        step_latencies_s: Seconds of each call of the policy (one per step of all environments).
        duration_s: Wall time of the whole rollout.
    """

    episodes: tuple[EpisodeResult, ...]
    step_latencies_s: NDArray[np.float64] = field(repr=False)
    duration_s: float

    @property
    def returns(self) -> NDArray[np.float64]:
        """(n_episodes,) returns."""
        return np.array([episode.episode_return for episode in self.episodes])

    @property
    def n_steps(self) -> int:
        """Environment steps in finished episodes."""
        return sum(episode.episode_length for episode in self.episodes)

    def summary(self) -> dict[str, float | int | None]:
        """What `evaluate --json` prints.

        `std_return` is the population's standard deviation; `ci95_return` half the width of the
        mean's 95 % confidence interval (Student's t), None for a single episode.
        """
        returns = self.returns
        lengths = [episode.episode_length for episode in self.episodes]
        n = len(returns)
        return {
            "mean_return": float(returns.mean()),
            "std_return": float(returns.std()),
            "ci95_return": _ci95(returns),
            "min_return": float(returns.min()),
            "max_return": float(returns.max()),
            "mean_length": float(np.mean(lengths)),
            "n_episodes": n,
            "n_terminated": sum(episode.terminated for episode in self.episodes),
            "n_truncated": sum(episode.truncated for episode in self.episodes),
        }


def _ci95(returns: NDArray[np.float64]) -> float | None:
    n = len(returns)
    if n < 2:
        return None
    return float(_student_t_95(n - 1) * returns.std(ddof=1) / math.sqrt(n))


def _student_t_95(degrees: int) -> float:
    """Student's t, two-sided 95 %: Abramowitz and Stegun 26.7.5, and exact for 1 and 2."""
    if degrees <= 2:
        return {1: 12.706205, 2: 4.302653}[degrees]
    z = _Z_95
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


def make_env(env_id: str, /, **kwargs: Any) -> gym.Env[Any, Any]:
    """A Gymnasium environment by its id.

    Args:
        env_id: Such as `CartPole-v1`, or `module:EnvId`, whose module may lie in the current
            directory.
        kwargs: What the environment is made with.

    Raises:
        UsageError: No such environment (with the nearest ids), or not with these arguments.
        EnvironmentFailedError: It raised while it was made.
    """
    if ":" in env_id and "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return gym.make(env_id, **kwargs)
    except gym.error.Error as exc:
        raise UsageError(f"cannot make the environment {env_id!r}: {exc}") from exc
    except (ImportError, TypeError) as exc:
        raise UsageError(f"cannot build the environment {env_id!r}: {exc}") from exc
    except Exception as exc:  # a user's environment can raise anything
        raise EnvironmentFailedError(
            f"the environment {env_id!r} failed while it was made: {type(exc).__name__}: {exc}"
        ) from exc


def evaluate_policy(
    policy: Policy,
    env: gym.Env[Any, Any] | Callable[[], gym.Env[Any, Any]],
    *,
    n_episodes: int = 10,
    seed: int = 0,
    deterministic: bool = True,
    num_envs: int = 1,
    on_episode: Callable[[EpisodeResult], None] | None = None,
) -> RolloutResult:
    """Play whole episodes and report their returns.

    Episode i is reset with `seed + i` whichever environment plays it, so that a deterministic
    policy gives the same returns for any `num_envs`.

    Args:
        policy: A bundle, a client, or RLlib's own module.
        env: An environment, or a function that makes one (needed for `num_envs` > 1).
        n_episodes: How many.
        seed: Of the environments, and of sampled actions.
        deterministic: Take the most likely actions instead of sampling.
        num_envs: Environments stepped together; their observations go to the policy in one call.
        on_episode: Called after each episode.

    Raises:
        UsageError: `num_envs` > 1 with a single environment.
        EnvironmentFailedError: An environment raised.
    """
    owned: list[gym.Env[Any, Any]] = []
    if callable(env) and not isinstance(env, gym.Env):
        make = env
    elif num_envs == 1 and isinstance(env, gym.Env):
        make = None
    else:
        raise UsageError("several environments need a function that makes one")
    try:
        if make is not None:
            for _ in range(min(num_envs, n_episodes)):
                owned.append(make())  # noqa: PERF401 - what was made is closed if the next fails
        envs = owned or [cast("gym.Env[Any, Any]", env)]
        return _Loop(policy, envs, n_episodes, seed, deterministic, on_episode).run()
    finally:
        for entry in owned:
            entry.close()


@dataclass
class _Running:
    env: gym.Env[Any, Any]
    index: int
    observation: Any
    episode_return: float = 0.0
    episode_length: int = 0


class _Loop:
    def __init__(
        self,
        policy: Policy,
        envs: list[gym.Env[Any, Any]],
        n_episodes: int,
        seed: int,
        deterministic: bool,
        on_episode: Callable[[EpisodeResult], None] | None,
    ) -> None:
        self._policy = policy
        self._envs = envs
        self._n_episodes = n_episodes
        self._seed = seed
        self._deterministic = deterministic
        self._on_episode = on_episode
        self._finished: list[EpisodeResult] = []
        self._latencies_s: list[float] = []
        self._seeds = self._action_seeds()

    def run(self) -> RolloutResult:
        started = time.perf_counter()
        indices = iter(range(self._n_episodes))
        running = [self._reset(env, next(indices)) for env in self._envs]
        while running:
            actions = self._act(running)
            still: list[_Running] = []
            for episode, action in zip(running, actions, strict=True):
                if not self._step(episode, action):
                    still.append(episode)
                elif (index := next(indices, None)) is not None:
                    still.append(self._reset(episode.env, index))
            running = still
        return RolloutResult(
            episodes=tuple(sorted(self._finished, key=lambda episode: episode.index)),
            step_latencies_s=np.array(self._latencies_s),
            duration_s=time.perf_counter() - started,
        )

    def _act(self, running: list[_Running]) -> NDArray[Any]:
        observations = np.stack([episode.observation for episode in running])
        seed = None if self._deterministic else next(self._seeds)
        started = time.perf_counter()
        output = self._policy.compute_actions(
            observations, deterministic=self._deterministic, seed=seed
        )
        self._latencies_s.append(time.perf_counter() - started)
        return output.actions

    def _action_seeds(self) -> Iterator[int]:
        generator = np.random.default_rng(self._seed)
        while True:
            yield int(generator.integers(2**31))

    def _reset(self, env: gym.Env[Any, Any], index: int) -> _Running:
        try:
            observation, _ = env.reset(seed=self._seed + index)
        except Exception as exc:  # a user's environment can raise anything
            raise EnvironmentFailedError(
                f"the environment failed in reset (episode {index}): {type(exc).__name__}: {exc}"
            ) from exc
        return _Running(env, index, observation)

    def _step(self, episode: _Running, action: Any) -> bool:
        """Take one step; True when the episode is over."""
        try:
            observation, reward, terminated, truncated, _ = episode.env.step(action)
        except Exception as exc:  # a user's environment can raise anything
            raise EnvironmentFailedError(
                f"the environment failed in step {episode.episode_length} of episode "
                f"{episode.index}: {type(exc).__name__}: {exc}"
            ) from exc
        episode.observation = observation
        episode.episode_return += float(reward)
        episode.episode_length += 1
        if not (terminated or truncated):
            return False
        result = EpisodeResult(
            index=episode.index,
            episode_return=episode.episode_return,
            episode_length=episode.episode_length,
            terminated=bool(terminated),
            truncated=bool(truncated),
        )
        self._finished.append(result)
        if self._on_episode is not None:
            self._on_episode(result)
        return True


def policy_environment(
    described: Mapping[str, Any], env_id: str | None = None
) -> tuple[str | None, dict[str, Any]]:
    """The environment to step a policy in: the one asked for, else the one that it was trained in.

    Args:
        described: A policy's description (`PolicyClient.describe`) or manifest.
        env_id: What the user asked for.

    Returns:
        The id, or None if neither names one; and its keyword arguments.
    """
    environment = described.get("environment") or {}
    if env_id is not None:
        return env_id, {}
    return environment.get("id"), dict(environment.get("kwargs") or {})


def check_spaces(env_id: str, env: gym.Env[Any, Any], described: Mapping[str, Any]) -> None:
    """Refuse to play an environment that is not of the policy's spaces.

    Args:
        env_id: Its name, for the message.
        env: The environment.
        described: A policy's description or manifest.

    Raises:
        UsageError: Names both spaces.
    """
    for key in ("observation_space", "action_space"):
        expected = describe_space(space_from_json(described[key]))
        try:
            found = describe_space(space_from_gymnasium(getattr(env, key)))
        except TypeError:
            found = str(getattr(env, key))
        if found != expected:
            raise UsageError(
                f"{env_id} has the {key.replace('_', ' ')} {found}, the policy's is {expected}: "
                "this is not the environment it was made for"
            )


def parse_env_config(text: str | None) -> dict[str, Any]:
    """The keyword arguments of an environment from a command's `--env-config`.

    Raises:
        UsageError: Not a JSON object.
    """
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as exc:
        raise UsageError(f"--env-config is not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise UsageError(f'--env-config is {text!r}, expected an object like {{"gravity": 5.0}}')
    return value


class RandomPolicy:
    """Uniform random actions: the baseline called `random`."""

    def __init__(self, action_space: gym.Space[Any], seed: int = 0) -> None:
        self._space = action_space
        self._space.seed(seed)

    def compute_actions(
        self,
        observations: NDArray[Any],
        *,
        deterministic: bool = True,  # noqa: ARG002 - the protocol's
        seed: int | None = None,  # noqa: ARG002 - the protocol's
        outputs: Collection[OutputName] = (),  # noqa: ARG002 - the protocol's
    ) -> PolicyOutput:
        """One random action per observation."""
        return PolicyOutput(actions=np.stack([self._space.sample() for _ in observations]))
