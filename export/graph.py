"""PolicyGraph: raw observations to the actions that the environment takes, as one torch module.

The only file that knows RLlib's column names.
"""

from __future__ import annotations

import copy
import math
import types
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch

from export.connectors import ActionBounding
from export.errors import UnsupportedPolicyError

OBS = "obs"  # ray.rllib.core.columns.Columns.OBS
ACTION_DIST_INPUTS = "action_dist_inputs"  # Columns.ACTION_DIST_INPUTS

INPUT_NAMES = ("observation", "noise")
OUTPUT_NAMES = (
    "action",
    "action_logp",
    "sampled_action",
    "sampled_action_logp",
    "action_dist_inputs",
    "value",
)

DistributionName = Literal["categorical", "diag_gaussian"]


@dataclass(frozen=True)
class DistributionSpec:
    """How the network's output becomes an action.

    Attributes:
        name: The distribution.
        noise: What the graph's `noise` input is drawn from: `gumbel` or `normal`.
        noise_size: Its width, D in (B, D).
    """

    name: DistributionName
    noise: Literal["gumbel", "normal"]
    noise_size: int


def distribution_spec(rl_module: Any, action_space: gym.Space[Any]) -> DistributionSpec:
    """Which distribution the module uses.

    Raises:
        UnsupportedPolicyError: A distribution or action space that this version cannot export.
    """
    dist_class = rl_module.get_inference_action_dist_cls()
    name = getattr(dist_class, "__name__", str(dist_class))
    if isinstance(action_space, gym.spaces.Discrete) and name == "TorchCategorical":
        return DistributionSpec("categorical", "gumbel", int(action_space.n))
    if isinstance(action_space, gym.spaces.Box) and name == "TorchDiagGaussian":
        return DistributionSpec("diag_gaussian", "normal", int(np.prod(action_space.shape)))
    raise UnsupportedPolicyError(
        f"the action space {action_space} with the distribution {name} cannot be exported by this "
        "version; it takes Discrete with TorchCategorical and Box with TorchDiagGaussian"
    )


class PolicyGraph(torch.nn.Module):
    """The whole policy: network, distribution and action bounding.

    Sampling takes its noise as an input, so that a caller can repeat a sample: Gumbel noise
    added to logits before the argmax (the Gumbel-max trick, Gumbel 1954) or standard normal
    noise scaled by the Gaussian's deviation.
    """

    def __init__(
        self,
        rl_module: Any,
        action_space: gym.Space[Any],
        distribution: DistributionSpec,
        bounding: ActionBounding,
    ) -> None:
        super().__init__()
        self.module = with_dynamic_batch(rl_module)
        self.distribution = distribution
        self.bounding = _effective_bounding(action_space, bounding)
        self.has_value = hasattr(rl_module, "compute_values")
        self.low: torch.Tensor
        self.high: torch.Tensor
        if isinstance(action_space, gym.spaces.Box):
            self.register_buffer("low", torch.as_tensor(action_space.low))
            self.register_buffer("high", torch.as_tensor(action_space.high))

    @property
    def output_names(self) -> tuple[str, ...]:
        """The names of what `forward` returns, in order."""
        return OUTPUT_NAMES if self.has_value else OUTPUT_NAMES[:-1]

    def forward(self, observation: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute everything that can be asked of the policy.

        Args:
            observation: (B, *observation_shape) float32, raw.
            noise: (B, D) float32, see `DistributionSpec`.

        Returns:
            The tensors of `output_names`: actions (B, *action_shape), log-probabilities (B,) in
            nats, distribution inputs (B, K), values (B,).
        """
        batch = {OBS: observation}
        inputs = self.module._forward_inference(batch)[ACTION_DIST_INPUTS]
        if self.distribution.name == "categorical":
            actions = self._categorical(inputs, noise)
        else:
            actions = self._diag_gaussian(inputs, noise)
        if not self.has_value:
            return (*actions, inputs)
        return (*actions, inputs, self.module.compute_values(batch))

    def _categorical(self, logits: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logp = torch.log_softmax(logits, dim=-1)
        results: list[torch.Tensor] = []
        for scores in (logits, logits + noise):
            action = torch.argmax(scores, dim=-1)
            results += [action, torch.gather(logp, -1, action.unsqueeze(-1)).squeeze(-1)]
        return tuple(results)

    def _diag_gaussian(self, inputs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mean, log_std = torch.chunk(inputs, 2, dim=-1)
        # log N(mean + std * noise) = -noise^2/2 - log_std - log(2 pi)/2, from the noise itself:
        # recomputing it from the action loses four digits in float32.
        peak = -log_std - 0.5 * math.log(2.0 * math.pi)
        sampled = mean + torch.exp(log_std) * noise
        return (
            self._bound(mean),
            peak.sum(dim=-1),
            self._bound(sampled),
            (peak - 0.5 * noise * noise).sum(dim=-1),
        )

    def _bound(self, action: torch.Tensor) -> torch.Tensor:
        """RLlib `unsquash_action` / `clip_action`, in the same order of operations."""
        if self.bounding == "unsquash":
            action = self.low + (action + 1.0) * (self.high - self.low) / 2.0
        if self.bounding == "none":
            return action
        return torch.minimum(torch.maximum(action, self.low), self.high)


def _effective_bounding(action_space: gym.Space[Any], bounding: ActionBounding) -> ActionBounding:
    if not isinstance(action_space, gym.spaces.Box):
        return "none"
    bounded = bool(np.all(action_space.bounded_below) and np.all(action_space.bounded_above))
    # RLlib unsquashes a Box only where every component has both bounds, and else leaves it alone.
    return "none" if bounding == "unsquash" and not bounded else bounding


def with_dynamic_batch(rl_module: Any) -> Any:
    """A copy of the module in which no part fixes the batch size.

    RLlib's free-log-std head repeats its parameter `len(mean)` times, which a tracer writes
    down as a constant; `expand_as` says the same for any batch.
    """
    rl_module = copy.deepcopy(rl_module)
    for part in rl_module.modules():
        if type(part).__name__ == "TorchFreeLogStdMLPHead":
            part._forward = types.MethodType(_free_log_std_forward, part)
    return rl_module


def _free_log_std_forward(self: Any, inputs: torch.Tensor, **_: Any) -> torch.Tensor:
    mean = self.net(inputs)
    log_std = self.log_std
    if self.clip_log_std:
        limit = self.log_std_clip_param_const
        log_std = torch.clamp(log_std, -limit, limit)
    return torch.cat([mean, log_std.expand_as(mean)], dim=1)
