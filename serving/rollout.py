"""Any policy in any environment: the one loop behind `evaluate`, `play` and the demo."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from serving.episodes import EpisodeResult, RolloutResult
from serving.errors import PolicyServingError, UsageError
from serving.interface import OutputName, Policy, PolicyOutput, State
from serving.spaces import batch_size, describe_space, space_from_gymnasium, space_from_json


class EnvironmentFailedError(PolicyServingError):
    """The environment raised while it was stepped."""

    code = "environment_failed"
    title = "Environment failed"
    http_status = None


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
    use_action_mask: bool = False,
    on_episode: Callable[[EpisodeResult], None] | None = None,
) -> RolloutResult:
    """Play whole episodes and report their returns.

    Episode i is reset with `seed + i` whichever environment plays it, so that a deterministic
    policy gives the same returns for any `num_envs`. What a policy remembers is kept per episode,
    and forgotten at its end.

    Args:
        policy: A bundle, a client, or RLlib's own module.
        env: An environment, or a function that makes one (needed for `num_envs` > 1).
        n_episodes: How many.
        seed: Of the environments, and of sampled actions.
        deterministic: Take the most likely actions instead of sampling.
        num_envs: Environments stepped together; their observations go to the policy in one call.
        use_action_mask: Give the policy `info["action_mask"]`, as Gymnasium's environments state
            which actions are allowed.
        on_episode: Called after each episode.

    Raises:
        UsageError: `num_envs` > 1 with a single environment, or an `info` without a mask.
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
        loop = _Loop(policy, envs, n_episodes, seed, deterministic, use_action_mask, on_episode)
        return loop.run()
    finally:
        for entry in owned:
            entry.close()


@dataclass
class _Running:
    env: gym.Env[Any, Any]
    index: int
    observation: Any
    info: Mapping[str, Any]
    # What the policy remembers (one row), and the reward of the step before.
    state: State | None = None
    reward: float = 0.0
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
        use_action_mask: bool,
        on_episode: Callable[[EpisodeResult], None] | None,
    ) -> None:
        self._policy = policy
        self._envs = envs
        self._n_episodes = n_episodes
        self._seed = seed
        self._deterministic = deterministic
        self._use_action_mask = use_action_mask
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

    def _act(self, running: list[_Running]) -> list[Any]:
        masks: dict[str, Any] = {}
        if self._use_action_mask:
            masks["action_mask"] = [_action_mask(episode.info) for episode in running]
        observations = _batch([episode.observation for episode in running])
        rewards = np.array([episode.reward for episode in running], dtype=np.float32)
        seed = None if self._deterministic else next(self._seeds)
        started = time.perf_counter()
        output = self._policy.compute_actions(
            observations,
            deterministic=self._deterministic,
            seed=seed,
            state=self._state(running),
            rewards=rewards,
            **masks,
        )
        self._latencies_s.append(time.perf_counter() - started)
        if output.state is not None:
            for index, episode in enumerate(running):
                episode.state = {name: values[index] for name, values in output.state.items()}
        return list(output)

    def _state(self, running: list[_Running]) -> list[State | None] | None:
        states = [episode.state for episode in running]
        return None if all(state is None for state in states) else states

    def _action_seeds(self) -> Iterator[int]:
        generator = np.random.default_rng(self._seed)
        while True:
            yield int(generator.integers(2**31))

    def _reset(self, env: gym.Env[Any, Any], index: int) -> _Running:
        try:
            observation, info = env.reset(seed=self._seed + index)
        except Exception as exc:  # a user's environment can raise anything
            raise EnvironmentFailedError(
                f"the environment failed in reset (episode {index}): {type(exc).__name__}: {exc}"
            ) from exc
        return _Running(env, index, observation, info)

    def _step(self, episode: _Running, action: Any) -> bool:
        """Take one step; True when the episode is over."""
        try:
            observation, reward, terminated, truncated, info = episode.env.step(action)
        except Exception as exc:  # a user's environment can raise anything
            raise EnvironmentFailedError(
                f"the environment failed in step {episode.episode_length} of episode "
                f"{episode.index}: {type(exc).__name__}: {exc}"
            ) from exc
        episode.observation, episode.info = observation, info
        episode.reward = float(reward)
        episode.episode_return += episode.reward
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


def _batch(observations: list[Any]) -> Any:
    """One array where an observation is one; a Dict's or Tuple's stay a list, as `Policy` takes."""
    if isinstance(observations[0], Mapping | tuple):
        return observations
    return np.stack(observations)


def _action_mask(info: Mapping[str, Any]) -> NDArray[Any]:
    """The mask of an `info`; a MultiDiscrete's, one array per component, becomes one."""
    mask = info.get("action_mask")
    if mask is None:
        raise UsageError(
            f"the environment's info has no action_mask; it has {', '.join(info) or 'nothing'}"
        )
    if isinstance(mask, tuple):
        return np.concatenate([np.ravel(part) for part in mask])
    return np.asarray(mask)


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
        observations: Any,
        *,
        deterministic: bool = True,  # noqa: ARG002 - the protocol's
        seed: int | None = None,  # noqa: ARG002 - the protocol's
        outputs: Collection[OutputName] = (),  # noqa: ARG002 - the protocol's
        state: Any = None,  # noqa: ARG002 - the protocol's
        rewards: Any = None,  # noqa: ARG002 - the protocol's
        action_mask: Any = None,
    ) -> PolicyOutput:
        """One random action per observation, of those that a mask allows."""
        n = batch_size(observations)
        masks = [None] * n if action_mask is None else [self._gym_mask(row) for row in action_mask]
        return PolicyOutput(actions=_stack([self._space.sample(mask) for mask in masks]))

    def _gym_mask(self, mask: Any) -> Any:
        """As Gymnasium takes it: int8, for MultiDiscrete one array per component."""
        if mask is None:
            return None
        flat = np.asarray(mask, dtype=np.int8)
        if isinstance(self._space, gym.spaces.MultiDiscrete):
            return tuple(np.split(flat, np.cumsum(self._space.nvec)[:-1]))
        return flat


def _stack(actions: list[Any]) -> Any:
    """Actions of any space as a nested batch."""
    if isinstance(actions[0], Mapping):
        return {key: _stack([action[key] for action in actions]) for key in actions[0]}
    if isinstance(actions[0], tuple):
        return tuple(map(_stack, map(list, zip(*actions, strict=True))))
    return np.stack(actions)
