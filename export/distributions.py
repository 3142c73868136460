"""Action distributions as tensors: the network's output to actions, sampled by noise from outside.

Each leaf of the action space has a head; a Dict or Tuple space has one per leaf, in dm_tree's
order (Dict keys sorted), as RLlib's TorchMultiDistribution splits its inputs.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import tree

from export.errors import UnsupportedPolicyError
from export.gym_spaces import leaf_spaces
from serving.manifest import NoiseSegment

DeterministicAction = Literal["rllib", "tanh"]
_LOG_2PI = math.log(2.0 * math.pi)
# ray.rllib.utils.numpy: the bounds of a squashed Gaussian's log standard deviation.
_MIN_LOG_STD, _MAX_LOG_STD = -5.0, 2.0
ActionAndLogp = tuple[torch.Tensor, torch.Tensor]


class ActionHead(abc.ABC):
    """One leaf of the action space.

    Attributes:
        n_inputs: Columns of the distribution inputs that it reads.
        noise: What its sample is drawn from.
        n_mask: Columns of the action mask that it reads; 0: it takes none.
    """

    n_inputs: int
    noise: NoiseSegment
    n_mask: int = 0

    @abc.abstractmethod
    def greedy(self, inputs: torch.Tensor, mask: torch.Tensor | None) -> ActionAndLogp:
        """RLlib's deterministic action (B, *shape) before bounding, and its logp (B,) in nats."""

    @abc.abstractmethod
    def sampled(
        self, inputs: torch.Tensor, noise: torch.Tensor, mask: torch.Tensor | None
    ) -> ActionAndLogp:
        """The action that `noise` (B, noise.size) draws, and its logp."""


class Categorical(ActionHead):
    """Discrete: logits. Sampled by the Gumbel-max trick (Gumbel 1954)."""

    def __init__(self, n: int) -> None:
        self.n_inputs = self.n_mask = n
        self.noise = NoiseSegment("gumbel", n)

    def greedy(self, inputs: torch.Tensor, mask: torch.Tensor | None) -> ActionAndLogp:
        """The first of the largest logits."""
        logits = masked(inputs, mask)
        return _choose(logits, logits)

    def sampled(
        self, inputs: torch.Tensor, noise: torch.Tensor, mask: torch.Tensor | None
    ) -> ActionAndLogp:
        """The largest of logits plus Gumbel noise."""
        logits = masked(inputs, mask)
        return _choose(logits, logits + noise)


class MultiCategorical(ActionHead):
    """MultiDiscrete: one categorical per component, side by side."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = list(sizes)
        self.n_inputs = self.n_mask = sum(sizes)
        self.noise = NoiseSegment("gumbel", sum(sizes))

    def greedy(self, inputs: torch.Tensor, mask: torch.Tensor | None) -> ActionAndLogp:
        """Component by component."""
        logits = masked(inputs, mask)
        return self._choose(logits, logits)

    def sampled(
        self, inputs: torch.Tensor, noise: torch.Tensor, mask: torch.Tensor | None
    ) -> ActionAndLogp:
        """Component by component."""
        logits = masked(inputs, mask)
        return self._choose(logits, logits + noise)

    def _choose(self, logits: torch.Tensor, scores: torch.Tensor) -> ActionAndLogp:
        parts = [
            _choose(*pair)
            for pair in zip(
                torch.split(logits, self._sizes, dim=1),
                torch.split(scores, self._sizes, dim=1),
                strict=True,
            )
        ]
        actions = torch.stack([action for action, _ in parts], dim=1)
        return actions, torch.stack([logp for _, logp in parts]).sum(dim=0)


def masked(logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Logits with minus infinity where the mask (B, n) bool forbids the action."""
    if mask is None:
        return logits
    return torch.where(mask, logits, -math.inf)


def _choose(logits: torch.Tensor, scores: torch.Tensor) -> ActionAndLogp:
    action = torch.argmax(scores, dim=1)
    logp = torch.log_softmax(logits, dim=1)
    return action, torch.gather(logp, 1, action.unsqueeze(1)).squeeze(1)


class DiagGaussian(ActionHead):
    """Box under RLlib's TorchDiagGaussian: means, then log standard deviations."""

    def __init__(self, size: int) -> None:
        self.n_inputs = 2 * size
        self.noise = NoiseSegment("normal", size)

    def greedy(self, inputs: torch.Tensor, mask: torch.Tensor | None) -> ActionAndLogp:  # noqa: ARG002
        """The mean."""
        mean, log_std = torch.chunk(inputs, 2, dim=1)
        return mean, _peak(log_std).sum(dim=1)

    def sampled(
        self,
        inputs: torch.Tensor,
        noise: torch.Tensor,
        mask: torch.Tensor | None,  # noqa: ARG002
    ) -> ActionAndLogp:
        """Mean plus noise times deviation."""
        mean, log_std = torch.chunk(inputs, 2, dim=1)
        # log N(mean + std * noise) = -noise^2/2 - log_std - log(2 pi)/2, from the noise itself:
        # recomputing it from the action loses four digits in float32.
        logp = (_peak(log_std) - 0.5 * noise * noise).sum(dim=1)
        return mean + torch.exp(log_std) * noise, logp


def _peak(log_std: torch.Tensor) -> torch.Tensor:
    return -log_std - 0.5 * _LOG_2PI


class SquashedGaussian(ActionHead):
    """Box under RLlib's TorchSquashedGaussian (SAC and what shares its module).

    RLlib's deterministic action is the mean *without* tanh; `deterministic_action="tanh"` is what
    the SAC paper (Haarnoja et al. 2018) acts by.
    """

    def __init__(self, size: int, deterministic_action: DeterministicAction) -> None:
        self.n_inputs = 2 * size
        self.noise = NoiseSegment("normal", size)
        self._has_tanh = deterministic_action == "tanh"

    def greedy(self, inputs: torch.Tensor, mask: torch.Tensor | None) -> ActionAndLogp:  # noqa: ARG002
        """The mean; under `tanh`, squashed. The density in both is that of tanh(mean)."""
        mean, log_std = _squashed_parameters(inputs)
        logp = (_peak(log_std) - _log_jacobian(mean)).sum(dim=1)
        return (torch.tanh(mean) if self._has_tanh else mean), logp

    def sampled(
        self,
        inputs: torch.Tensor,
        noise: torch.Tensor,
        mask: torch.Tensor | None,  # noqa: ARG002
    ) -> ActionAndLogp:
        """Tanh of mean plus noise times deviation."""
        mean, log_std = _squashed_parameters(inputs)
        unsquashed = mean + torch.exp(log_std) * noise
        logp = _peak(log_std) - 0.5 * noise * noise - _log_jacobian(unsquashed)
        return torch.clamp(torch.tanh(unsquashed), -1.0, 1.0), logp.sum(dim=1)


def _squashed_parameters(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, log_std = torch.chunk(inputs, 2, dim=1)
    return mean, torch.clamp(log_std, _MIN_LOG_STD, _MAX_LOG_STD)


def _log_jacobian(unsquashed: torch.Tensor) -> torch.Tensor:
    """log(1 - tanh(u)^2) in its stable form (Haarnoja et al. 2018, appendix C, eq. 21)."""
    # softplus(-2u), written out: ONNX Runtime has no Softplus for float64.
    limited = torch.clamp(-2.0 * unsquashed, min=0.0)
    softplus = limited + torch.log1p(torch.exp(-2.0 * torch.abs(unsquashed)))
    return 2.0 * (math.log(2.0) - unsquashed - softplus)


# RLlib's distribution class to the name in the manifest.
_NAMES = {
    "TorchCategorical": "categorical",
    "TorchMultiCategorical": "multi_categorical",
    "TorchDiagGaussian": "diag_gaussian",
    "TorchSquashedGaussian": "squashed_gaussian",
    "TorchMultiDistribution": "multi",
}


class ActionDistribution:
    """All heads of an action space.

    Attributes:
        name: The distribution's name in the manifest.
        n_inputs: Width of `action_dist_inputs`.
        noise: What to draw, head by head.
        mask_size: Width of the action mask; 0 where the space takes none.
    """

    def __init__(self, name: str, heads: Sequence[ActionHead]) -> None:
        self.name = name
        self.heads = tuple(heads)
        self.n_inputs = sum(head.n_inputs for head in heads)
        self.noise = tuple(head.noise for head in heads)
        # A mask over a Dict or Tuple has no form that the field agrees on.
        self.mask_size = 0 if name == "multi" else heads[0].n_mask

    @property
    def noise_size(self) -> int:
        """D in noise (B, D)."""
        return sum(segment.size for segment in self.noise)

    def greedy(self, inputs: torch.Tensor, mask: torch.Tensor | None) -> list[ActionAndLogp]:
        """The deterministic action of each leaf, before bounding."""
        return [
            head.greedy(part, mask)
            for head, part in zip(self.heads, self._split(inputs), strict=True)
        ]

    def sampled(
        self, inputs: torch.Tensor, noise: torch.Tensor, mask: torch.Tensor | None
    ) -> list[ActionAndLogp]:
        """The sampled action of each leaf, before bounding."""
        sizes = [segment.size for segment in self.noise]
        noises = (noise,) if len(sizes) == 1 else torch.split(noise, sizes, dim=1)
        return [
            head.sampled(part, own, mask)
            for head, part, own in zip(self.heads, self._split(inputs), noises, strict=True)
        ]

    def _split(self, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if len(self.heads) == 1:
            return (inputs,)
        return torch.split(inputs, [head.n_inputs for head in self.heads], dim=1)


def action_distribution(
    rl_module: Any,
    action_space: gym.Space[Any],
    deterministic_action: DeterministicAction = "rllib",
) -> ActionDistribution:
    """The distribution that an RLModule's outputs parametrise.

    Raises:
        UnsupportedPolicyError: A distribution of the user's own, or one that does not belong to
            the action space.
    """
    try:
        inference = rl_module.get_inference_action_dist_cls()
        exploration = rl_module.get_exploration_action_dist_cls()
    except Exception as exc:  # RLlib raises whatever its lookup raises
        raise UnsupportedPolicyError(
            f"the RLModule {type(rl_module).__name__} answers action_dist_inputs but has no "
            f"distribution for {action_space}: {exc}"
        ) from exc
    name = _class_name(inference)
    if name != _class_name(exploration):
        raise UnsupportedPolicyError(
            f"the RLModule acts by {name} but explores by {_class_name(exploration)}; one "
            "distribution for both is what can be exported"
        )
    if name not in _NAMES:
        raise UnsupportedPolicyError(
            f"the action distribution {name} is none of RLlib's ({', '.join(_NAMES)}), so how it "
            "turns the network's outputs into actions is unknown; use one of those, or let the "
            "RLModule return `actions`"
        )
    heads = [
        _head(space, kind, deterministic_action)
        for space, kind in zip(
            leaf_spaces(action_space), _leaf_classes(inference, name), strict=True
        )
    ]
    return ActionDistribution(_NAMES[name], heads)


def _class_name(dist_class: Any) -> str:
    """RLlib's own class behind a partial one; a subclass of the user's keeps its name."""
    for candidate in dist_class.__mro__:
        if candidate.__name__.endswith("Partial"):
            continue
        is_known = candidate.__module__.startswith("ray.rllib.")
        return candidate.__name__ if is_known else f"{candidate.__module__}.{candidate.__name__}"
    return str(dist_class)


def _leaf_classes(dist_class: Any, name: str) -> list[str]:
    if name != "TorchMultiDistribution":
        return [name]
    # The partial class keeps its arguments in the closure of `_merge_kwargs`.
    children = dist_class._merge_kwargs()["child_distribution_cls_struct"]
    return [_class_name(child) for child in tree.flatten(children)]


def _head(
    space: gym.Space[Any],
    kind: str,
    deterministic_action: DeterministicAction,
) -> ActionHead:
    if kind == "TorchCategorical" and isinstance(space, gym.spaces.Discrete):
        return Categorical(int(space.n))
    if kind == "TorchMultiCategorical" and isinstance(space, gym.spaces.MultiDiscrete):
        return MultiCategorical([int(n) for n in np.asarray(space.nvec).reshape(-1)])
    if kind == "TorchDiagGaussian" and isinstance(space, gym.spaces.Box):
        return DiagGaussian(int(np.prod(space.shape)))
    if kind == "TorchSquashedGaussian" and isinstance(space, gym.spaces.Box):
        return SquashedGaussian(int(np.prod(space.shape)), deterministic_action)
    raise UnsupportedPolicyError(
        f"the action space {space} with the distribution {kind} cannot be exported"
    )
