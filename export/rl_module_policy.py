"""A checkpoint as a `Policy` that `evaluate` can play, through RLlib's own path."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tree
from numpy.typing import NDArray

from export.connectors import observation_twins
from export.policy import Checkpoint
from export.walk import Walk
from serving.errors import UsageError
from serving.interface import OutputName, PolicyOutput
from serving.spaces import rows, space_from_gymnasium


class RLModulePolicy:
    """A checkpoint as a `Policy`, through RLlib's own path.

    What RLlib remembers is the whole episode, so for policies with memory the answer's `state` is
    one episode object per row, to be given back like any other state.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._space = space_from_gymnasium(checkpoint.observation_space)
        self._has_memory = checkpoint.rl_module.is_stateful() or any(
            twin.initial_state()
            for twin in observation_twins(
                checkpoint.env_to_module, checkpoint.action_space, checkpoint.agent_id
            )
        )

    def compute_actions(
        self,
        observations: Any,
        *,
        deterministic: bool = True,
        seed: int | None = None,
        outputs: Collection[OutputName] = (),
        state: Any = None,
        rewards: Any = None,
        action_mask: Any = None,
    ) -> PolicyOutput:
        """See `serving.interface.Policy`; actions and state alone are available here.

        Raises:
            UsageError: `outputs` or a mask were asked for.
        """
        if outputs or action_mask is not None:
            raise UsageError("a checkpoint answers actions only; export it for outputs and masks")
        if seed is not None:
            torch.manual_seed(seed)  # RLlib samples with torch's global generator
        found = self._rows(observations)
        if not self._has_memory:
            actions, _ = _act(Walk(self._checkpoint, found), explore=not deterministic)
            return PolicyOutput(actions=self._batched(actions))
        memory = _memories(state, len(found))
        gained = np.zeros(len(found)) if rewards is None else np.asarray(rewards, dtype=float)
        actions = []
        for index, observation in enumerate(found):
            step = memory[index]
            if step is None:
                walk = Walk(self._checkpoint, [observation])
            else:
                walk, taken = step
                walk.advance(taken, [observation], [gained[index]])
            (action,), taken = _act(walk, explore=not deterministic)
            actions.append(action)
            memory[index] = (walk, taken)
        return PolicyOutput(actions=self._batched(actions), state={"episode": memory})

    def _rows(self, observations: Any) -> list[Any]:
        """Each observation as the environment gives it."""
        if isinstance(observations, list):
            return observations
        return rows(self._space, observations)

    def _batched(self, actions: Sequence[Any]) -> Any:
        space = self._checkpoint.action_space
        dtype = space.dtype if not isinstance(space, gym.spaces.Dict | gym.spaces.Tuple) else None
        return tree.map_structure(
            lambda *leaf: np.stack(leaf).astype(dtype or leaf[0].dtype),
            *[tree.map_structure(np.asarray, action) for action in actions],
        )


def _act(walk: Walk, *, explore: bool) -> tuple[list[Any], dict[str, Any]]:
    walk.forward(explore=explore)
    return walk.actions(explore=explore)


def _memories(state: Any, n: int) -> NDArray[np.object_]:
    found = np.full(n, None, dtype=object)
    if isinstance(state, Mapping):
        found[:] = list(state["episode"])
    elif state is not None:
        for index, row in enumerate(state):
            found[index] = None if row is None else np.asarray(row["episode"], dtype=object)[()]
    return found
