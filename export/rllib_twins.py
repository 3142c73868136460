"""The tensor twins of RLlib's own observation connectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from export.errors import UnsupportedPolicyError
from export.gym_spaces import leaf_spaces
from export.twins import ConnectorTwin, Observation, TwinContext, TwinFactory


class Flatten(ConnectorTwin):
    """RLlib `FlattenObservations`: one float32 vector, one-hot for discrete leaves."""

    def __init__(self, space: gym.Space[Any], removed: Sequence[str] = ()) -> None:
        super().__init__()
        self._space = space
        self._removed = tuple(removed)
        for leaf in leaf_spaces(space):
            if isinstance(leaf, gym.spaces.Discrete) and leaf.start != 0:
                raise UnsupportedPolicyError(
                    f"the observation space {space} holds {leaf}: RLlib's FlattenObservations "
                    "cannot encode a Discrete that does not start at 0; shift it in the environment"
                )

    def forward(
        self,
        observation: Observation,
        state: dict[str, torch.Tensor],
        reward: torch.Tensor | None,  # noqa: ARG002
    ) -> tuple[Observation, dict[str, torch.Tensor]]:
        """Concatenate the leaves: Dict keys sorted, Tuple in order (dm_tree's order)."""
        parts: list[torch.Tensor] = []
        self._collect(self._space, observation, parts, self._removed)
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)), state

    def _collect(
        self, space: Any, value: Any, parts: list[torch.Tensor], removed: Sequence[str] = ()
    ) -> None:
        if isinstance(space, gym.spaces.Dict):
            for key in sorted(space.spaces):
                # PrevActionsPrevRewards names a key in its space also where it adds none.
                if key in value and key not in removed:
                    self._collect(space[key], value[key], parts)
        elif isinstance(space, gym.spaces.Tuple):
            for child, item in zip(space.spaces, value, strict=True):
                self._collect(child, item, parts)
        elif isinstance(space, gym.spaces.Discrete):
            parts.append(_one_hot(value, int(space.n)))
        elif isinstance(space, gym.spaces.MultiDiscrete):
            columns = value.flatten(1)
            sizes = np.asarray(space.nvec).reshape(-1).tolist()
            parts += [_one_hot(columns[:, index], size) for index, size in enumerate(sizes)]
        else:
            parts.append(value.reshape(value.shape[0], -1).float())


def _one_hot(value: torch.Tensor, n: int) -> torch.Tensor:
    return (value.unsqueeze(-1) == torch.arange(n, device=value.device)).float()


class FrozenMeanStd(ConnectorTwin):
    """RLlib `MeanStdFilter` with the statistics of the checkpoint, no longer updated.

    Source: RLlib `utils/filter.py`, `MeanStdFilter.__call__`: subtract the float64 mean, divide
    by the standard deviation plus 1e-6, clip, back to the observation's dtype. In float64 here.
    """

    def __init__(
        self, mean: NDArray[Any] | None, scale: NDArray[Any] | None, clip: float | None
    ) -> None:
        super().__init__()
        self.mean: torch.Tensor | None
        self.scale: torch.Tensor | None
        self.register_buffer("mean", None if mean is None else torch.as_tensor(mean).double())
        self.register_buffer("scale", None if scale is None else torch.as_tensor(scale).double())
        self._clip = clip

    def forward(
        self,
        observation: Observation,
        state: dict[str, torch.Tensor],
        reward: torch.Tensor | None,  # noqa: ARG002
    ) -> tuple[Observation, dict[str, torch.Tensor]]:
        """Standardise."""
        values = observation.double()
        if self.mean is not None:
            values = values - self.mean
        if self.scale is not None:
            values = values / self.scale
        if self._clip:
            values = torch.clamp(values, -self._clip, self._clip)
        return values.to(observation.dtype), state


class FrameStack(ConnectorTwin):
    """RLlib `FrameStackingEnvToModule`: the last n frames along the last axis, oldest first.

    The memory holds the n - 1 frames before this one, zeros at an episode's start.
    """

    def __init__(self, space: gym.spaces.Box, n_frames: int) -> None:
        super().__init__()
        self._shape = (*space.shape[:-1], n_frames - 1)
        self._dtype = space.dtype

    def initial_state(self) -> Mapping[str, NDArray[Any]]:
        """No frame yet."""
        return {"frames": np.zeros(self._shape, dtype=self._dtype)}

    def forward(
        self,
        observation: Observation,
        state: dict[str, torch.Tensor],
        reward: torch.Tensor | None,  # noqa: ARG002
    ) -> tuple[Observation, dict[str, torch.Tensor]]:
        """Append the newest frame."""
        stacked = torch.cat([state["frames"], observation], dim=-1)
        return stacked, {"frames": stacked[..., 1:]}


class PreviousActionsRewards(ConnectorTwin):
    """RLlib `PrevActionsPrevRewards`: the last actions (one-hot) and rewards, beside the rest.

    Zeros stand for what was before the episode's start.
    """

    reads_action = True
    reads_reward = True

    def __init__(self, n_actions: int, n_prev_actions: int, n_prev_rewards: int) -> None:
        super().__init__()
        self._n_actions = n_actions
        self._n_prev_actions = n_prev_actions
        self._n_prev_rewards = n_prev_rewards

    def initial_state(self) -> Mapping[str, NDArray[Any]]:
        """No action and no reward yet."""
        state: dict[str, NDArray[Any]] = {}
        if self._n_prev_actions:
            state["prev_actions"] = np.zeros((self._n_prev_actions, self._n_actions), np.float32)
        if self._n_prev_rewards:
            state["prev_rewards"] = np.zeros(self._n_prev_rewards, np.float32)
        return state

    def forward(
        self,
        observation: Observation,
        state: dict[str, torch.Tensor],
        reward: torch.Tensor | None,
    ) -> tuple[Observation, dict[str, torch.Tensor]]:
        """The keys are RLlib's; a Flatten after this one sorts them."""
        state = dict(state)
        augmented = {"_orig_obs": observation}
        if self._n_prev_actions:
            augmented["prev_n_actions"] = state["prev_actions"].flatten(1)
        if self._n_prev_rewards:
            assert reward is not None
            window = torch.cat([state["prev_rewards"][:, 1:], reward.unsqueeze(1)], dim=1)
            augmented["prev_n_rewards"] = state["prev_rewards"] = window
        return augmented, state

    def after_action(self, state: dict[str, torch.Tensor], action: Any) -> dict[str, torch.Tensor]:
        """Push the newest action."""
        if not self._n_prev_actions:
            return state
        newest = _one_hot(action, self._n_actions).unsqueeze(1)
        return {**state, "prev_actions": torch.cat([state["prev_actions"][:, 1:], newest], dim=1)}


def _flatten(piece: Any, context: TwinContext) -> ConnectorTwin:
    agents = piece._agent_ids
    if context.agent_id is not None and agents and context.agent_id not in agents:
        return ConnectorTwin()
    return Flatten(context.observation_space, piece._keys_to_remove)


def _mean_std(piece: Any, context: TwinContext) -> ConnectorTwin:
    if piece._filters is None:
        piece._init_new_filters()
    entry = piece._filters[context.agent_id]
    if entry.no_preprocessor or not isinstance(context.observation_space, gym.spaces.Box):
        raise UnsupportedPolicyError(
            f"MeanStdFilter over {context.observation_space}: RLlib filters one Box only; put "
            "FlattenObservations before it"
        )
    if not np.issubdtype(context.observation_space.dtype, np.floating):
        raise UnsupportedPolicyError(
            f"MeanStdFilter over {context.observation_space} truncates to integers in RLlib; put "
            "FlattenObservations before it, which makes float32 of them"
        )
    stats = entry.running_stats
    mean = np.asarray(stats.mean) if entry.demean else None
    # RLlib adds its SMALL_NUMBER (1e-6) to the deviation; both may be float32 there.
    scale = np.asarray(stats.std + 1e-6) if entry.destd else None
    return FrozenMeanStd(mean, scale, entry.clip)


def _frame_stack(piece: Any, context: TwinContext) -> ConnectorTwin:
    space = context.observation_space
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 3 or space.shape[-1] != 1:
        raise UnsupportedPolicyError(
            f"frame stacking over {space}: RLlib stacks Box spaces of shape (height, width, 1) only"
        )
    return FrameStack(space, piece.num_frames)


def _previous(piece: Any, context: TwinContext) -> ConnectorTwin:
    if not isinstance(context.action_space, gym.spaces.Discrete):
        raise UnsupportedPolicyError(
            f"PrevActionsPrevRewards with the action space {context.action_space}: RLlib does it "
            "for Discrete only"
        )
    return PreviousActionsRewards(
        int(context.action_space.n), piece.n_prev_actions, piece.n_prev_rewards
    )


_CONNECTORS = "ray.rllib.connectors"
RLLIB_TWINS: Mapping[str, TwinFactory] = {
    f"{_CONNECTORS}.common.flatten_observations.FlattenObservations": _flatten,
    f"{_CONNECTORS}.common.frame_stacking.FrameStacking": _frame_stack,
    f"{_CONNECTORS}.env_to_module.mean_std_filter.MeanStdFilter": _mean_std,
    f"{_CONNECTORS}.env_to_module.prev_actions_prev_rewards.PrevActionsPrevRewards": _previous,
}
