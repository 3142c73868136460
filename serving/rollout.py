"""Any policy in any environment: the one loop behind `evaluate`, `play` and the demo."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, cast

import gymnasium as gym
import numpy as np

from serving.episodes import EpisodeResult, RolloutResult
from serving.errors import UsageError
from serving.interface import OutputName, Policy, PolicyOutput
from serving.play_loop import PlayLoop, RunningEpisode
from serving.spaces import batch_size, describe_space, space_from_gymnasium, space_from_json


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
        loop = PlayLoop(policy, envs, n_episodes, seed, deterministic, use_action_mask, on_episode)
        return loop.run()
    finally:
        for entry in owned:
            entry.close()


def play_steps(
    policy: Policy,
    env: gym.Env[Any, Any],
    *,
    seed: int = 0,
    deterministic: bool = True,
    use_action_mask: bool = False,
) -> Iterator[RunningEpisode]:
    """Play one episode and look at it after its reset and after each step.

    Args:
        policy: As of `evaluate_policy`.
        env: The environment.
        seed: Of the reset, and of sampled actions.
        deterministic: Take the most likely actions instead of sampling.
        use_action_mask: As of `evaluate_policy`.

    Returns:
        The same object each time, changed by the step; stop asking to leave the episode early.

    Raises:
        UsageError: An `info` without a mask.
        EnvironmentFailedError: The environment raised.
    """
    return PlayLoop(policy, [env], 1, seed, deterministic, use_action_mask, None).moves()


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
