"""An environment's spaces compared with what RLlib can be trained on, before Ray starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from gymnasium import spaces

from training.config import TrainingConfig
from training.errors import ConfigError
from training.observations import (
    CONVOLVED_SIZES,
    is_float_image,
    is_integer_image,
    plan_pieces,
)


def check_spaces(
    config: TrainingConfig,
    observation_space: spaces.Space[Any],
    action_space: spaces.Space[Any],
) -> list[str]:
    """Make sure that a policy can be trained on an environment's spaces with these settings.

    Returns:
        What the user should know, one line each; usually nothing.

    Raises:
        ConfigError: A space, or a setting for it, can't be trained with.
    """
    _check_observations(config.env, observation_space)
    _check_actions(config.env, action_space)
    _check_algorithm(config, action_space)
    _check_memory(config, action_space)
    _check_previous(config, action_space)
    _check_frame_stack(config, observation_space)
    _check_convolutions(config, observation_space)
    if "flatten" not in plan_pieces(config, observation_space):
        return []
    n_values, previous = spaces.flatdim(observation_space), ""
    if isinstance(action_space, spaces.Discrete) and config.prev_actions + config.prev_rewards:
        previous = (
            f" with {config.prev_actions} last actions and {config.prev_rewards} last rewards"
        )
        n_values += config.prev_actions * int(action_space.n) + config.prev_rewards
    what = f"observations {describe(observation_space)}{previous}"
    note = f"{what} are flattened to {n_values} float32 values"
    if is_integer_image(observation_space):
        note += (
            ", unscaled (observation_filter=mean_std scales them); for convolutions wrap the "
            "environment so that its images are float32"
        )
    return [note]


def describe(space: spaces.Space[Any]) -> str:
    """Name a space in a few words."""
    if isinstance(space, spaces.Box):  # a Box's own text lists every bound
        return f"Box(shape={space.shape}, dtype={space.dtype})"
    text = str(space)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_observations(env: str, space: spaces.Space[Any]) -> None:
    for where, leaf in _leaves(space):
        what = f"environment {env!r} has observations {describe(leaf)}{where}"
        if isinstance(leaf, (spaces.Box, spaces.MultiBinary)):
            continue
        if not isinstance(leaf, (spaces.Discrete, spaces.MultiDiscrete)):
            raise ConfigError(
                f"{what}, which can't be trained on: expected Box, Discrete, MultiDiscrete, "
                "MultiBinary, or a Dict or Tuple of them"
            )
        if np.any(leaf.start):
            # RLlib's one-hot encoding counts from 0 whatever `start` is, and fails on the last.
            raise ConfigError(
                f"{what}, and RLlib ignores the start: wrap the environment so that they count "
                "from 0"
            )
        if isinstance(leaf, spaces.MultiDiscrete) and leaf.nvec.ndim > 1:
            raise ConfigError(
                f"{what}, and RLlib takes MultiDiscrete with one axis alone: wrap the environment "
                "so that they have one"
            )
    if not spaces.flatdim(space):
        raise ConfigError(f"environment {env!r} has observations {describe(space)}: no values")


def _check_actions(env: str, space: spaces.Space[Any]) -> None:
    leaves = list(_leaves(space))
    if not leaves:
        raise ConfigError(f"environment {env!r} has actions {describe(space)}: no values")
    for where, leaf in leaves:
        if problem := _action_problem(leaf):
            raise ConfigError(f"environment {env!r} has actions {describe(leaf)}{where}{problem}")


def _action_problem(leaf: spaces.Space[Any]) -> str | None:
    if isinstance(leaf, (spaces.Discrete, spaces.MultiDiscrete)):
        if np.any(leaf.start):
            # RLlib's connectors send 0..n-1 whatever `start` is, so every action would be wrong.
            return (
                ", and RLlib ignores the start: wrap the environment so that its actions count "
                "from 0"
            )
        if isinstance(leaf, spaces.MultiDiscrete) and leaf.nvec.ndim > 1:
            return ", and RLlib takes MultiDiscrete with one axis alone: flatten them"
        return None
    if isinstance(leaf, spaces.Box):
        if not np.issubdtype(leaf.dtype, np.floating):
            return (
                ", and RLlib has no distribution for whole numbers in a Box: make them "
                "MultiDiscrete, or float"
            )
        if len(leaf.shape) != 1:
            return ", and RLlib takes a Box with one axis alone: flatten them"
        return None
    if isinstance(leaf, spaces.MultiBinary):
        return (
            ", and RLlib has no distribution for them: make them MultiDiscrete "
            f"{[2] * min(leaf.n if isinstance(leaf.n, int) else 1, 4)}"
        )
    return (
        ", which can't be trained on: expected Discrete, MultiDiscrete, a float Box with one axis, "
        "or a Dict or Tuple of them"
    )


def _check_algorithm(config: TrainingConfig, action_space: spaces.Space[Any]) -> None:
    found = f"environment {config.env!r} has actions {describe(action_space)}"
    if config.algo == "DQN" and not isinstance(action_space, spaces.Discrete):
        raise ConfigError(
            f"DQN chooses among Discrete actions, and {found}: use PPO, or SAC for a Box"
        )
    if config.algo != "SAC" or isinstance(action_space, spaces.Discrete):
        return
    if not isinstance(action_space, spaces.Box):
        raise ConfigError(f"SAC takes a Box or Discrete actions, and {found}: use PPO")
    if not (action_space.is_bounded() and config.normalize_actions):
        raise ConfigError(
            "SAC's actions lie in [-1, 1] and are scaled to the environment's: that needs bounds "
            f"of each component and `normalize_actions`, and {found}"
            + ("" if action_space.is_bounded() else " without bounds")
        )


def _check_memory(config: TrainingConfig, action_space: spaces.Space[Any]) -> None:
    # RLlib's TorchMultiDistribution.logp takes the time axis of one step for an axis too many of
    # the Discrete actions, and answers (B, B) probabilities for B environments.
    if not config.model.use_lstm or config.num_envs_per_env_runner == 1:
        return
    for where, leaf in _leaves(action_space):
        if where and isinstance(leaf, spaces.Discrete):
            raise ConfigError(
                f"environment {config.env!r} has actions {describe(leaf)}{where}, which RLlib "
                "trains with an LSTM one environment at a time only: give "
                "`num_envs_per_env_runner=1`, or make them MultiDiscrete"
            )


def _check_previous(config: TrainingConfig, action_space: spaces.Space[Any]) -> None:
    given = [name for name in ("prev_actions", "prev_rewards") if getattr(config, name)]
    if given and not isinstance(action_space, spaces.Discrete):
        raise ConfigError(
            f"`{given[0]}` needs Discrete actions (RLlib's PrevActionsPrevRewards takes no "
            f"others), and environment {config.env!r} has {describe(action_space)}: use "
            "`model.use_lstm` for memory"
        )


def _check_frame_stack(config: TrainingConfig, space: spaces.Space[Any]) -> None:
    if config.frame_stack == 1:
        return
    if config.prev_actions or config.prev_rewards:
        raise ConfigError(
            "`frame_stack` stacks images and `prev_actions` and `prev_rewards` flatten them: give "
            "one or the other"
        )
    if not is_float_image(space) or space.shape is None or space.shape[2] != 1:
        raise ConfigError(
            f"`frame_stack` needs float images (height, width, 1), and environment {config.env!r} "
            f"has observations {describe(space)}: use a wrapper, e.g. "
            "gymnasium.wrappers.FrameStackObservation"
        )


def _check_convolutions(config: TrainingConfig, space: spaces.Space[Any]) -> None:
    if config.model.module is not None:
        return
    is_flat = "flatten" in plan_pieces(config, space)
    if not is_flat and is_float_image(space):
        height, width = (space.shape or ())[:2]
        if config.model.conv_filters is None and (height != width or height not in CONVOLVED_SIZES):
            raise ConfigError(
                f"RLlib has no default convolutions for observations {describe(space)} (height, "
                "width, channels): give `model.conv_filters`, e.g. "
                "--set model.conv_filters=[[16,4,2],[32,4,2]]"
            )
    elif config.model.conv_filters is not None:
        raise ConfigError(
            f"`model.conv_filters` is given, and observations {describe(space)} go through dense "
            "layers: convolutions take float32 images with three axes, without `prev_actions` and "
            "`prev_rewards`"
        )


def _leaves(space: spaces.Space[Any], pointer: str = "") -> Iterator[tuple[str, spaces.Space[Any]]]:
    if isinstance(space, spaces.Dict):
        for name, child in space.spaces.items():
            yield from _leaves(child, f"{pointer}/{name}")
    elif isinstance(space, spaces.Tuple):
        for index, child in enumerate(space.spaces):
            yield from _leaves(child, f"{pointer}/{index}")
    else:
        yield f" at {pointer}" if pointer else "", space
