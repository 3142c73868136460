"""What a policy is here: observations in, actions out, NumPy only.

The engines, the remote client and RLlib's own reference all satisfy `Policy`; one suite of
contract tests and one `evaluate_policy` serve them all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

OutputName = Literal["action_logp", "value", "action_dist_inputs"]
OUTPUT_NAMES: tuple[OutputName, ...] = ("action_logp", "value", "action_dist_inputs")


@dataclass(frozen=True)
class PolicyOutput:
    """The answer for B observations.

    Where an array is expected it stands for its actions, so that
    `vector_env.step(policy.compute_actions(observations))` works.

    Attributes:
        actions: (B, *action_shape) in the action space's dtype, as the environment takes them.
        action_logp: (B,) float32, natural log-probability (density for Box, of the action before
            unsquashing or clipping, as RLlib counts it); only if asked for.
        value: (B,) float32, the critic's estimate of the discounted return; only if asked for.
        action_dist_inputs: (B, D) float32, the distribution's parameters: logits for Discrete,
            means then log standard deviations for Box; only if asked for.
    """

    actions: NDArray[Any]
    action_logp: NDArray[np.float32] | None = None
    value: NDArray[np.float32] | None = None
    action_dist_inputs: NDArray[np.float32] | None = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """The actions."""
        return np.array(self.actions, dtype=dtype, copy=copy)

    def __len__(self) -> int:
        """B."""
        return len(self.actions)

    def __iter__(self) -> Iterator[Any]:
        """The actions, one by one."""
        return iter(self.actions)

    def __getitem__(self, index: Any) -> Any:
        """One action, or some."""
        return self.actions[index]


@runtime_checkable
class Policy(Protocol):
    """A function from observations to actions."""

    def compute_actions(
        self,
        observations: NDArray[Any],
        *,
        deterministic: bool = True,
        seed: int | None = None,
        outputs: Collection[OutputName] = (),
    ) -> PolicyOutput:
        """Compute one action per observation.

        Args:
            observations: (B, *observation_shape), raw: as the environment gives them.
            deterministic: Take the most likely action instead of sampling.
            seed: Makes sampled actions repeatable; unused when `deterministic`.
            outputs: What to answer beside the actions.

        Returns:
            The actions, and the outputs asked for.

        Raises:
            InvalidObservationError: An observation's shape, type or finiteness is wrong.
        """
        ...
