"""The environment that a config asks for, as RLlib makes it in each of its processes."""

from __future__ import annotations

from typing import Any

from gymnasium.wrappers import TimeLimit
from ray.tune.registry import register_env

from training.config import TrainingConfig
from training.env_building import build_env, is_plain


def evaluation_environment(config: TrainingConfig) -> str:
    """The name by which RLlib makes the environments of evaluations.

    They are those of training, with a limit of steps: an evaluation plays whole episodes.
    """
    env, wrappers = config.env, tuple(config.wrapper_calls())
    limit = config.evaluation.max_episode_steps

    def create(context: Any) -> Any:
        return TimeLimit(build_env(env, dict(context), wrappers), limit)

    name = f"policyserve/evaluation/{env}"
    register_env(name, create)
    return name


def rllib_environment(config: TrainingConfig) -> str:
    """The name by which RLlib makes a config's environment.

    A registered Gymnasium id without wrappers is its own name. Anything else is registered with
    Ray, which takes the function that makes it to every process.
    """
    if is_plain(config.env, config.wrappers):
        return config.env
    env, wrappers = config.env, tuple(config.wrapper_calls())

    def create(context: Any) -> Any:
        return build_env(env, dict(context), wrappers)

    name = f"policyserve/{env}"
    register_env(name, create)
    return name
