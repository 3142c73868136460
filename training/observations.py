"""Which of RLlib's connectors a policy needs between an environment and its networks. No Ray."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from gymnasium import spaces

from training.config import TrainingConfig

Piece = Literal["prev_actions_prev_rewards", "flatten", "mean_std", "frame_stack"]

CONVOLVED_SIZES = (10, 42, 64, 84, 96)
"""Heights of square images that RLlib has default convolutions for.

Source: ray.rllib.models.utils.get_filter_config.
"""


def plan_pieces(config: TrainingConfig, space: spaces.Space[Any]) -> tuple[Piece, ...]:
    """Say which connectors turn an environment's observations into what the networks take.

    RLlib's networks take float arrays with one axis, or images; `flatten` makes one float32 array
    with one axis of anything else.

    Args:
        config: The run's settings; checked against the spaces (`training.spaces.check_spaces`).
        space: The environment's observations.

    Returns:
        The connectors in their order.
    """
    pieces: list[Piece] = []
    has_previous = bool(config.prev_actions or config.prev_rewards)
    if has_previous:
        pieces.append("prev_actions_prev_rewards")
    fits = is_vector(space) or is_float_image(space)
    wanted = config.flatten_observations
    if has_previous or wanted is True or (wanted == "auto" and not fits):
        pieces.append("flatten")
    if config.observation_filter == "mean_std":
        pieces.append("mean_std")
    if config.frame_stack > 1:
        pieces.append("frame_stack")
    return tuple(pieces)


def is_vector(space: spaces.Space[Any]) -> bool:
    """Whether dense layers take observations as they are: one axis, float32 or float64."""
    return _is_network_float(space) and len(space.shape or ()) == 1


def is_float_image(space: spaces.Space[Any]) -> bool:
    """Whether convolutions take observations as they are: three axes, float32 or float64."""
    return _is_network_float(space) and len(space.shape or ()) == 3


def is_integer_image(space: spaces.Space[Any]) -> bool:
    """Whether observations look like camera images, which RLlib's convolutions don't take."""
    return (
        isinstance(space, spaces.Box)
        and len(space.shape) == 3
        and bool(np.issubdtype(space.dtype, np.integer))
    )


def _is_network_float(space: spaces.Space[Any]) -> bool:
    # RLlib turns float64 into float32 for the networks, and leaves float16 and integers to fail.
    return isinstance(space, spaces.Box) and space.dtype in (np.float32, np.float64)
