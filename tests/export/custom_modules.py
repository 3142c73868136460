"""Custom RLModules as a user writes them: some can be exported, some have to be refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.torch.torch_distribution import TorchCategorical
from ray.rllib.core.rl_module.apis import ValueFunctionAPI
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import nn

_N_HIDDEN = 24


class PlainMlp(TorchRLModule, ValueFunctionAPI):
    """A network of its own, with RLlib's categorical distribution and a critic."""

    def setup(self) -> None:
        n_inputs = self.observation_space.shape[0]
        self.body = nn.Sequential(nn.Linear(n_inputs, _N_HIDDEN), nn.ELU())
        self.logits = nn.Linear(_N_HIDDEN, int(self.action_space.n))
        self.critic = nn.Linear(_N_HIDDEN, 1)

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {Columns.ACTION_DIST_INPUTS: self.logits(self.body(batch[Columns.OBS]))}

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Any:
        embeddings = self.body(batch[Columns.OBS]) if embeddings is None else embeddings
        return self.critic(embeddings).squeeze(-1)


class DirectActions(TorchRLModule):
    """Returns actions itself, as DQN's module does; no distribution."""

    def setup(self) -> None:
        self.scores = nn.Linear(self.observation_space.shape[0], int(self.action_space.n))

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {Columns.ACTIONS: torch.argmin(self.scores(batch[Columns.OBS]), dim=-1)}


class MaskedDict(TorchRLModule, ValueFunctionAPI):
    """Dict observations without a flattening connector, one of them a mask of actions.

    As RLlib's `ActionMaskingTorchRLModule`, it takes the two keys out of the batch's own dict.
    """

    def setup(self) -> None:
        n_inputs = self.observation_space["observations"].shape[0]
        self.body = nn.Sequential(nn.Linear(n_inputs, _N_HIDDEN), nn.Tanh())
        self.logits = nn.Linear(_N_HIDDEN, int(self.action_space.n))
        self.critic = nn.Linear(_N_HIDDEN, 1)

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        mask = batch[Columns.OBS].pop("action_mask")
        logits = self.logits(self.body(batch[Columns.OBS].pop("observations")))
        lowest = torch.finfo(torch.float32).min
        return {Columns.ACTION_DIST_INPUTS: logits + torch.clamp(torch.log(mask), min=lowest)}

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Any:
        if embeddings is None:
            embeddings = self.body(batch[Columns.OBS]["observations"])
        return self.critic(embeddings).squeeze(-1)


class NestedState(TorchRLModule):
    """A GRU with a state of its own making: a dict that holds a tuple of two arrays."""

    def setup(self) -> None:
        n_inputs = self.observation_space.shape[0]
        self.gru = nn.GRU(n_inputs, _N_HIDDEN, batch_first=True)
        self.logits = nn.Linear(_N_HIDDEN, int(self.action_space.n))

    def get_initial_state(self) -> Any:
        # The trace does not start at zero: an initial value other than zero has to survive.
        return {
            "memory": (
                np.zeros((_N_HIDDEN,), np.float32),
                np.full((2, 3), 0.5, np.float32),
            )
        }

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        hidden, trace = batch[Columns.STATE_IN]["memory"]
        outputs, hidden = self.gru(batch[Columns.OBS], hidden.unsqueeze(0))
        trace = 0.5 * trace + outputs[:, -1, :6].reshape(-1, 2, 3)
        logits = self.logits(outputs) + trace.sum(dim=(1, 2)).reshape(-1, 1, 1)
        return {
            # Scaled by the trace, so that a lost trace changes the logits' differences.
            Columns.ACTION_DIST_INPUTS: logits * (1.0 + trace[:, :1, :1]),
            Columns.STATE_OUT: {"memory": (hidden.squeeze(0), trace)},
        }


class HalfTemperature(TorchCategorical):
    """A distribution that nobody but its author knows."""

    def __init__(self, logits: Any = None, probs: Any = None) -> None:
        super().__init__(None if logits is None else logits / 0.5, probs)


class UnknownDistribution(PlainMlp):
    """Names a distribution class that the exporter cannot know."""

    def setup(self) -> None:
        super().setup()
        self.action_dist_cls = HalfTemperature


class DataDependent(PlainMlp):
    """Takes another branch where the observations are large: a trace would hold one of them."""

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        logits = self.logits(self.body(batch[Columns.OBS]))
        if batch[Columns.OBS].sum() > 0:
            logits = -logits
        return {Columns.ACTION_DIST_INPUTS: logits}


class FixedBatch(PlainMlp):
    """Writes the batch size of the exporter's example into the graph."""

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        logits = self.logits(self.body(batch[Columns.OBS]))
        offset = torch.zeros(1, logits.shape[1]).repeat([len(logits), 1])
        return {Columns.ACTION_DIST_INPUTS: logits + offset}


class NumpyInside(PlainMlp):
    """Leaves torch for NumPy in the middle: a trace would freeze what it saw."""

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        scaled = np.tanh(batch[Columns.OBS].detach().numpy())
        logits = self.logits(self.body(torch.from_numpy(scaled)))
        return {Columns.ACTION_DIST_INPUTS: logits}
