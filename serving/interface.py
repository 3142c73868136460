"""What a policy is here: observations in, actions out, NumPy only.

The engines, the remote client and RLlib's own reference all satisfy `Policy`; one suite of
contract tests and one `evaluate_policy` serve them all.

A batch of a Dict or Tuple space is nested as Gymnasium nests it: a dict or a tuple of batches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from serving.spaces import batch_size, take

OutputName = Literal["action_logp", "value", "action_dist_inputs", "q_values"]
OUTPUT_NAMES: tuple[OutputName, ...] = ("action_logp", "value", "action_dist_inputs", "q_values")
# What a policy remembers of B episodes: name -> (B, *shape).
State: TypeAlias = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class PolicyOutput:
    """The answer for B observations.

    Where an array is expected it stands for its actions, so that
    `vector_env.step(policy.compute_actions(observations))` works.

    Attributes:
        actions: (B, *action_shape) as the environment takes them; nested for a Dict or Tuple
            action space.
        action_logp: (B,) float32, natural log-probability (density for Box, of the action before
            unsquashing or clipping, as RLlib counts it); only if asked for.
        value: (B,) float32, the critic's estimate of the discounted return; only if asked for.
        action_dist_inputs: (B, K) float32, the distribution's parameters: logits for Discrete and
            MultiDiscrete, means then log standard deviations for Box, one after the other for
            Dict and Tuple; only if asked for.
        q_values: (B, A) float32, the estimate of the discounted return of each action; only if
            asked for.
        state: What to give back with the next observations of the same episodes; None for a
            policy without memory.
    """

    actions: Any
    action_logp: NDArray[np.float32] | None = None
    value: NDArray[np.float32] | None = None
    action_dist_inputs: NDArray[np.float32] | None = None
    q_values: NDArray[np.float32] | None = None
    state: State | None = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """The actions, where they are one array."""
        if isinstance(self.actions, dict | tuple):
            raise TypeError(
                "the actions of a Dict or Tuple space are not one array; use `actions`, or "
                "iterate over them"
            )
        return np.array(self.actions, dtype=dtype, copy=copy)

    def __len__(self) -> int:
        """B."""
        return batch_size(self.actions)

    def __iter__(self) -> Iterator[Any]:
        """The actions one by one, each in the environment's form."""
        return (take(self.actions, index) for index in range(len(self)))

    def rows(self) -> Iterator[PolicyOutput]:
        """The answers of single rows, B = 1 each."""
        for index in range(len(self)):
            yield self.cut(slice(index, index + 1))

    def cut(self, rows: slice) -> PolicyOutput:
        """The answers of some rows; arrays are views."""
        others = {name: values[rows] for name, values in self.outputs().items()}
        return PolicyOutput(
            actions=take(self.actions, rows),
            state=None if self.state is None else take(dict(self.state), rows),
            **others,
        )

    def outputs(self) -> dict[str, NDArray[np.float32]]:
        """What was answered beside the actions and the state, by name."""
        found = {name: getattr(self, name) for name in OUTPUT_NAMES}
        return {name: values for name, values in found.items() if values is not None}

    def __getitem__(self, index: Any) -> Any:
        """One action in the environment's form; for a slice a smaller batch of actions."""
        return take(self.actions, index)


@runtime_checkable
class Policy(Protocol):
    """A function from observations (and, where it has a memory, its state) to actions."""

    def compute_actions(
        self,
        observations: Any,
        *,
        deterministic: bool = True,
        seed: int | None = None,
        outputs: Collection[OutputName] = (),
        state: State | Sequence[State | None] | None = None,
        rewards: Any = None,
        action_mask: Any = None,
    ) -> PolicyOutput:
        """Compute one action per observation.

        Args:
            observations: B observations, raw, as the environment gives them: a nested batch
                (an array for a space that is no Dict or Tuple), or a list.
            deterministic: Take the most likely action instead of sampling.
            seed: Makes sampled actions repeatable; unused when `deterministic`.
            outputs: What to answer beside the actions.
            state: The last answer's `state`, or one entry per row, None where an episode starts;
                None: every row starts an episode.
            rewards: (B,) the rewards of the step before, for policies that read them; None:
                zeros, as at an episode's start.
            action_mask: (B, M) 0/1 or bool, which actions are allowed, for Discrete (M = n) and
                MultiDiscrete (M = sum of nvec, one component after the other); a list may hold
                None for rows without a mask; None: all are allowed.

        Returns:
            The actions, the outputs asked for, and the state of a policy with memory.

        Raises:
            InvalidObservationError: An observation's structure, shape, type or finiteness is
                wrong.
            InvalidRequestError: Something else that was given does not fit the policy.
        """
        ...
