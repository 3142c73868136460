"""Observations to actions through an RLModule, without RLlib's pipelines of connectors."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.torch.torch_distribution import TorchCategorical
from ray.rllib.utils.spaces.space_utils import clip_action, unsquash_action

Array = NDArray[Any]

_NARROWER = {np.dtype(np.float64): np.float32, np.dtype(np.int64): np.int32}


class Choice(NamedTuple):
    """One vector step's actions.

    Attributes:
        actions: (N, *action_shape), as the policy sees them.
        actions_for_env: The same, scaled or cut to the action space's bounds.
        columns: What else RLlib keeps of each step, such as action_logp (N,) float32.
    """

    actions: Array
    actions_for_env: Array
    columns: dict[str, Array]


class LeanPolicy:
    """RLlib's default pipelines around a stateless module, in a few array operations.

    Args:
        module: A torch module without state; its mode (train or eval) is the caller's business.
        action_space: Discrete, MultiDiscrete or Box.
        device: Where the module is.
        normalize_actions: RLlib's setting: actions of -1 to 1 are scaled to the bounds.
        clip_actions: RLlib's setting: actions are cut at the bounds.
    """

    def __init__(
        self,
        module: Any,
        action_space: Any,
        *,
        device: Any,
        normalize_actions: bool,
        clip_actions: bool,
    ) -> None:
        self._module = module
        self._space = action_space
        self._device = device
        has_bounds = isinstance(action_space, spaces.Box)
        self._normalize = normalize_actions and has_bounds
        self._clip = clip_actions and has_bounds

    def to_tensor(self, observations: Array) -> torch.Tensor:
        """(N, *observation_shape) to a tensor on the device, floats as float32."""
        tensor = torch.from_numpy(observations)
        if tensor.is_floating_point():
            tensor = tensor.float()
        return tensor.to(self._device)

    def choose(self, observations: torch.Tensor, *, explore: bool, t: int) -> Choice:
        """Choose actions as RLlib does, from the same random numbers.

        Args:
            observations: (N, *observation_shape).
            explore: Sample; otherwise take the most likely actions.
            t: Environment steps so far, which exploration may depend on.
        """
        batch = {Columns.OBS: observations}
        if explore:
            found = self._module._forward_exploration(batch, t=t)
        else:
            found = self._module._forward_inference(batch)
        if Columns.ACTIONS not in found:
            with torch.no_grad():
                self._sample(found, explore)
        columns = {name: _to_numpy(value) for name, value in found.items()}
        actions = columns.pop(Columns.ACTIONS)
        for_env = columns.pop(Columns.ACTIONS_FOR_ENV, None)
        return Choice(actions, self._for_env(actions) if for_env is None else for_env, columns)

    def _sample(self, found: dict[str, Any], explore: bool) -> None:
        logits = found[Columns.ACTION_DIST_INPUTS]
        actions: Any
        logp: Any
        if explore:
            kind = self._module.get_exploration_action_dist_cls()
            if kind is TorchCategorical:
                actions, logp = _sample_categorical(logits)
            else:
                distribution = kind.from_logits(logits)
                actions = distribution.sample()
                logp = distribution.logp(actions)
        else:
            kind = self._module.get_inference_action_dist_cls()
            distribution = kind.from_logits(logits).to_deterministic()
            actions = distribution.sample()
            logp = distribution.logp(actions)
        found[Columns.ACTIONS] = actions
        found.setdefault(Columns.ACTION_LOGP, logp)

    def _for_env(self, actions: Array) -> Array:
        if self._normalize:
            scaled: Array = unsquash_action(actions, self._space)
            return scaled
        if self._clip:
            cut: Array = clip_action(actions, self._space)
            return cut
        return actions


def _sample_categorical(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # torch.distributions.Categorical's sample and log_prob, operation by operation: building the
    # object costs more than using it.
    normalized = logits - logits.logsumexp(dim=-1, keepdim=True)
    actions = torch.multinomial(torch.softmax(normalized, dim=-1), 1, True)
    return actions.squeeze(-1), normalized.gather(-1, actions).squeeze(-1)


def _to_numpy(tensor: torch.Tensor) -> Array:
    # RLlib halves the width of what it takes out of torch (`convert_to_numpy`).
    array: Array = tensor.detach().cpu().numpy()
    narrower = _NARROWER.get(array.dtype)
    return array if narrower is None else array.astype(narrower)
