"""The environment that a config asks for, as RLlib makes it in each of its processes."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from gymnasium.wrappers import TimeLimit
from ray.tune.registry import ENV_CREATOR, _global_registry, register_env

from training.config import TrainingConfig
from training.env_building import WrapperCall, build_env, find_factory

_PREFIX = "policyserve/"


def evaluation_environment(config: TrainingConfig) -> str:
    """The name by which RLlib makes the environments of evaluations.

    They are those of training, with a limit of steps: an evaluation plays whole episodes.
    """
    env, wrappers = config.env, tuple(config.wrapper_calls())
    limit = config.evaluation.max_episode_steps

    def create(context: Any) -> Any:
        return TimeLimit(build_env(env, dict(context), wrappers), limit)

    name = f"{_PREFIX}evaluation-{_digest(wrappers, limit)}/{env}"
    register_env(name, create)
    return name


def rllib_environment(config: TrainingConfig) -> str:
    """The name by which RLlib makes a config's environment.

    A Gymnasium id, `module:EnvId` too, is its own name where there are no wrappers. Anything else
    is registered with Ray, which takes the function that makes it to every process.
    """
    if not config.wrappers and find_factory(config.env) is None:
        return config.env
    env, wrappers = config.env, tuple(config.wrapper_calls())

    def create(context: Any) -> Any:
        return build_env(env, dict(context), wrappers)

    create.wrappers = wrappers  # type: ignore[attr-defined]
    name = f"{_PREFIX}{_digest(wrappers)}/{env}"
    register_env(name, create)
    return name


def environment_id(rllib_name: str) -> str:
    """The environment's own name, of the name by which RLlib makes it."""
    if not rllib_name.startswith(_PREFIX):
        return rllib_name
    return rllib_name.removeprefix(_PREFIX).partition("/")[2]


def registered_wrappers(rllib_name: str) -> tuple[WrapperCall, ...]:
    """The wrappers around an environment that `rllib_environment` registered in this process."""
    if not _global_registry.contains(ENV_CREATOR, rllib_name):
        return ()
    return tuple(getattr(_global_registry.get(ENV_CREATOR, rllib_name), "wrappers", ()))


def _digest(*parts: Any) -> str:
    # Trials of one search share Ray's registry, and may differ in what is around the environment.
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
