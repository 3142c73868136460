"""The environment that a policy was trained in, where it can be made here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium as gym

from export.policy import Checkpoint
from serving.environments import make_env
from training.env_building import build_env, is_plain


def training_environment(checkpoint: Checkpoint) -> Callable[[], gym.Env[Any, Any]] | None:
    """What makes the environment of a checkpoint, or None where it names none for one agent.

    What it returns may still raise: the environment may exist only where the policy was trained.
    """
    if checkpoint.agent_id is not None:
        return None
    if checkpoint.env_class is not None:
        env_class = checkpoint.env_class
        return lambda: env_class(dict(checkpoint.env_config))
    env_id = checkpoint.env_id
    if env_id is None:
        return None
    if is_plain(env_id, checkpoint.wrappers):
        return lambda: make_env(env_id, **checkpoint.env_config)
    # The user's own code by name: whoever let the checkpoint be read has vouched for it.
    return lambda: build_env(env_id, checkpoint.env_config, checkpoint.wrappers)
