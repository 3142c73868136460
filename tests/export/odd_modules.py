"""RLModules as their authors did not mean them to be exported."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import nn


class ExploresAtRandom(TorchRLModule):
    """Answers a distribution where it is greedy, and actions of its own where it explores."""

    def setup(self) -> None:
        self.logits = nn.Linear(self.observation_space.shape[0], int(self.action_space.n))

    def _forward_inference(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {Columns.ACTION_DIST_INPUTS: self.logits(batch[Columns.OBS])}

    def _forward_exploration(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        n = len(batch[Columns.OBS])
        return {Columns.ACTIONS: torch.randint(int(self.action_space.n), (n,))}


class ChoosesLast(TorchRLModule):
    """Answers a distribution and, beside it, the last action whatever that says."""

    def setup(self) -> None:
        self.logits = nn.Linear(self.observation_space.shape[0], int(self.action_space.n))

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        logits = self.logits(batch[Columns.OBS])
        last = torch.full_like(logits[:, 0], int(self.action_space.n) - 1).long()
        return {Columns.ACTION_DIST_INPUTS: logits, Columns.ACTIONS: last}


class TurnedState(TorchRLModule):
    """Begins with h and c, in float64, and answers c and h."""

    def setup(self) -> None:
        self.logits = nn.Linear(self.observation_space.shape[0], int(self.action_space.n))

    def get_initial_state(self) -> Any:
        return {"h": np.zeros(3), "c": np.zeros(3)}

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        state = batch[Columns.STATE_IN]
        logits = self.logits(batch[Columns.OBS]) + state["h"][:, None] - 0.1 * state["c"][:, None]
        return {
            Columns.ACTION_DIST_INPUTS: logits,
            Columns.STATE_OUT: {"c": state["c"] + 10.0, "h": state["h"] + 1.0},
        }


class Embeds(TorchRLModule):
    """Looks up an observation that counts from 10."""

    def setup(self) -> None:
        n_rows = int(self.observation_space.n)
        self.logits = nn.Embedding(n_rows, int(self.action_space.n))

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        row = batch[Columns.OBS] - int(self.observation_space.start)
        return {Columns.ACTION_DIST_INPUTS: self.logits(row)}


class DividesByNorm(TorchRLModule):
    """Has no answer to an observation of zeros."""

    def setup(self) -> None:
        self.logits = nn.Linear(self.observation_space.shape[0], int(self.action_space.n))

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        observation = batch[Columns.OBS]
        norm = observation.norm(dim=1, keepdim=True)
        return {Columns.ACTION_DIST_INPUTS: self.logits(observation / norm)}
