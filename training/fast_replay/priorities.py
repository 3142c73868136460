"""Priorities of a replay buffer's rows, drawn from in proportion."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_LOWEST = 1e-12  # as RLlib: nothing is never drawn again


class Priorities:
    """A tree of sums over the priorities of so many rows, whole batches at a time.

    Source: Schaul et al. (2016), proportional prioritization; RLlib's
    `PrioritizedEpisodeReplayBuffer`, whose numbers these are.

    Args:
        n_rows: Rows there can be.
        alpha: How much the priorities count; 0 is uniform.
    """

    def __init__(self, n_rows: int, *, alpha: float) -> None:
        self._alpha = alpha
        self._n_leaves = 1 << max(n_rows - 1, 1).bit_length()
        self._depth = self._n_leaves.bit_length() - 1
        # Node i's children are 2i and 2i + 1; the root is 1, the leaves fill the second half.
        self._sums = np.zeros(2 * self._n_leaves)
        self._highest = 1.0

    def add(self, rows: NDArray[np.int64]) -> None:
        """Give new rows (R,) the highest priority there was, so that each is drawn soon."""
        self._set(rows, np.full(len(rows), self._highest**self._alpha))

    def update(self, rows: NDArray[np.int64], errors: NDArray[Any]) -> None:
        """Give rows (R,) the priorities of their errors (R,), absolute."""
        priorities = np.maximum(np.asarray(errors, dtype=np.float64), _LOWEST)
        self._highest = max(self._highest, float(priorities.max()))
        self._set(rows, priorities**self._alpha)

    def draw(self, uniform: NDArray[np.float64], *, n_rows: int) -> NDArray[np.int64]:
        """Draw rows in proportion to their priorities.

        Args:
            uniform: (B,) numbers in [0, 1).
            n_rows: The rows there are, from 0 on.

        Returns:
            (B,) rows.
        """
        remaining = uniform * self._sums[1]
        nodes = np.ones(len(uniform), dtype=np.int64)
        for _ in range(self._depth):
            left = 2 * nodes
            sums = self._sums[left]
            is_right = remaining >= sums
            remaining = np.where(is_right, remaining - sums, remaining)
            nodes = left + is_right
        # Rounding may lead past the last row.
        return np.minimum(nodes - self._n_leaves, n_rows - 1)

    def weights(self, rows: NDArray[np.int64], *, n_rows: int, beta: float) -> NDArray[np.float64]:
        """The importance weights (R,) of drawn rows (R,), the largest possible one being 1."""
        leaves = self._sums[self._n_leaves : self._n_leaves + n_rows]
        weights: NDArray[np.float64] = (leaves[rows] / leaves.min()) ** -beta
        return weights

    def get_state(self, n_rows: int) -> dict[str, Any]:
        """What `set_state` takes: the rows from 0 to `n_rows`."""
        leaves = self._sums[self._n_leaves : self._n_leaves + n_rows]
        return {"priorities": leaves.copy(), "highest": self._highest}

    def set_state(self, state: dict[str, Any]) -> None:
        """Take over what `get_state` gave."""
        self._sums[:] = 0.0
        self._highest = float(state["highest"])
        self._set(np.arange(len(state["priorities"])), state["priorities"])

    def _set(self, rows: NDArray[np.int64], values: NDArray[np.float64]) -> None:
        nodes = rows + self._n_leaves
        self._sums[nodes] = values
        for _ in range(self._depth):
            nodes = nodes >> 1
            self._sums[nodes] = self._sums[2 * nodes] + self._sums[2 * nodes + 1]
