"""The connectors that a config asks for, as RLlib builds them in each of its processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.connectors.env_to_module import (
    FlattenObservations,
    MeanStdFilter,
    PrevActionsPrevRewards,
)
from ray.rllib.connectors.env_to_module.frame_stacking import FrameStackingEnvToModule
from ray.rllib.connectors.learner.frame_stacking import FrameStackingLearner
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES

from training.config import TrainingConfig
from training.observations import Piece, plan_pieces


def env_to_module(config: TrainingConfig) -> Callable[..., list[ConnectorV2]]:
    """Give RLlib a function that builds the pieces between environment and networks.

    Which pieces depends on the environment's observation space, which RLlib's function is given.
    """

    def build(env: Any, spaces: Any = None, device: Any = None) -> list[ConnectorV2]:  # noqa: ARG001
        # Beside runner processes the training process has no environment, only its spaces.
        space = spaces[INPUT_ENV_SINGLE_SPACES][0] if env is None else env.single_observation_space
        return [_piece(piece, config) for piece in plan_pieces(config, space)]

    return build


def learner_connector(config: TrainingConfig) -> Callable[..., list[ConnectorV2]]:
    """Give RLlib a function that builds the pieces between episodes and the learner's networks.

    Most pieces leave what they made in the episodes; stacked frames are made a second time.
    """

    def build(observation_space: Any, action_space: Any) -> list[ConnectorV2]:  # noqa: ARG001
        if config.frame_stack == 1:
            return []
        return [FrameStackingLearner(num_frames=config.frame_stack)]

    return build


def _piece(piece: Piece, config: TrainingConfig) -> ConnectorV2:
    if piece == "prev_actions_prev_rewards":
        return PrevActionsPrevRewards(
            n_prev_actions=config.prev_actions, n_prev_rewards=config.prev_rewards
        )
    if piece == "flatten":
        return FlattenObservations()
    if piece == "mean_std":
        return MeanStdFilter()
    return FrameStackingEnvToModule(num_frames=config.frame_stack)
