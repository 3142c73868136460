"""A replay buffer of single transitions in flat arrays."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.fast_replay.priorities import Priorities

logger = logging.getLogger("policyserve.training")

Array = NDArray[Any]

_FORMAT = "policyserve transitions 1"
_COLUMNS = ("observations", "next_observations", "actions", "rewards", "terminateds")


@dataclass(frozen=True)
class Transitions:
    """R steps, or B drawn ones whose rewards are summed over several steps.

    Attributes:
        observations: (R, *observation_shape), as the network takes them.
        actions: (R, *action_shape), as the network gives them.
        rewards: (R,) float32.
        next_observations: (R, *observation_shape): what the step, or the last of them, led to. At
            an episode's end it is the final one, not the next episode's first.
        terminateds: (R,) bool: the episode ended there by itself, so that nothing follows.
    """

    observations: Array
    actions: Array
    rewards: Array
    next_observations: Array
    terminateds: Array


@dataclass(frozen=True)
class Drawn:
    """B transitions to learn from.

    Attributes:
        transitions: Their rewards are discounted sums of `n_steps` steps.
        n_steps: (B,) int64: how many steps each spans. Fewer than asked for where the episode ends
            before, or has come no further yet.
        weights: (B,) float32 importance weights, at most 1.
        rows: (B,) where they lie in the buffer, for `update_priorities`.
    """

    transitions: Transitions
    n_steps: NDArray[np.int64]
    weights: NDArray[np.float32]
    rows: NDArray[np.int64]


class TransitionBuffer:
    """The newest transitions of any number of episodes that go on side by side.

    Args:
        capacity: Transitions that it holds; the oldest go first.
        observation: (shape, dtype) of an observation.
        action: (shape, dtype) of an action.
        seed: Of what is drawn; None draws the seed too.
        alpha: The exponent of the priorities; None draws uniformly.
    """

    def __init__(
        self,
        capacity: int,
        *,
        observation: tuple[Sequence[int], Any],
        action: tuple[Sequence[int], Any],
        seed: int | None,
        alpha: float | None = None,
    ) -> None:
        self._capacity = capacity
        shape, dtype = observation
        # The system hands out this memory as it is first written to.
        self._columns: dict[str, Array] = {
            "observations": np.zeros((capacity, *shape), dtype),
            "next_observations": np.zeros((capacity, *shape), dtype),
            "actions": np.zeros((capacity, *action[0]), action[1]),
            "rewards": np.zeros(capacity, np.float32),
            "terminateds": np.zeros(capacity, np.bool_),
        }
        # The row of the same episode's next step; -1 where there is none. It is always the newer
        # one, so it is there for as long as the row itself.
        self._following = np.full(capacity, -1, np.int64)
        self._n_added = 0
        # Each episode's newest step, by its place in the order of all steps ever added.
        self._newest: dict[Hashable, int] = {}
        self._rng = np.random.default_rng(seed)
        self._priorities = None if alpha is None else Priorities(capacity, alpha=alpha)

    def __len__(self) -> int:
        return min(self._n_added, self._capacity)

    @property
    def n_added(self) -> int:
        """Transitions ever added."""
        return self._n_added

    def add(
        self, steps: Transitions, *, episodes: Sequence[Hashable], ends: Sequence[bool]
    ) -> None:
        """Add R steps, of one episode or of several.

        Args:
            steps: An episode's steps in their order.
            episodes: R keys: which episode each belongs to.
            ends: R flags: whether the episode is over with it, terminated or truncated.
        """
        n_steps = len(steps.rewards)
        for first in range(0, n_steps, self._capacity):
            part = slice(first, min(first + self._capacity, n_steps))
            self._add_part(steps, part, episodes[part], ends[part])

    def sample(
        self, n_items: int, *, n_step: int | tuple[int, int], gamma: float, beta: float = 0.0
    ) -> Drawn:
        """Draw transitions, each independently of the others.

        Args:
            n_items: B, how many.
            n_step: Steps whose rewards are summed; (low, high) draws them, both included.
            gamma: The discount per step.
            beta: The exponent of the importance weights, with priorities.

        Raises:
            ValueError: The buffer is empty.
        """
        size = len(self)
        if not size:
            raise ValueError("the replay buffer is empty: there is nothing to learn from yet")
        weights = np.ones(n_items, np.float32)
        if self._priorities is None:
            rows = self._rng.integers(size, size=n_items)
        else:
            rows = self._priorities.draw(self._rng.random(n_items), n_rows=size)
            weights = self._priorities.weights(rows, n_rows=size, beta=beta).astype(np.float32)
        low, high = n_step if isinstance(n_step, tuple) else (n_step, n_step)
        wanted = low if low == high else self._rng.integers(low, high, size=n_items, endpoint=True)
        last, rewards, n_steps = self._follow(rows, wanted, high, gamma)
        columns = self._columns
        transitions = Transitions(
            observations=columns["observations"][rows],
            actions=columns["actions"][rows],
            rewards=rewards,
            next_observations=columns["next_observations"][last],
            terminateds=columns["terminateds"][last],
        )
        return Drawn(transitions, n_steps, weights, rows)

    def update_priorities(self, rows: NDArray[np.int64], errors: Array) -> None:
        """Make the absolute errors (R,) of rows (R,) their priorities; nothing without them."""
        if self._priorities is not None:
            self._priorities.update(rows, errors)

    def get_state(self) -> dict[str, Any]:
        """What `set_state` takes: the transitions in arrays, and the generator's state."""
        size = len(self)
        state: dict[str, Any] = {
            "format": _FORMAT,
            "n_added": self._n_added,
            "capacity": self._capacity,
            "following": self._following[:size].copy(),
            "rng": self._rng.bit_generator.state,
            **{name: column[:size].copy() for name, column in self._columns.items()},
        }
        if self._priorities is not None:
            state["priorities"] = self._priorities.get_state(size)
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Take over what `get_state` gave, of a buffer of any capacity.

        Episodes that were going on then are not gone on with: a resumed run resets its
        environments. A state of another kind, such as RLlib's, leaves the buffer empty.
        """
        if state.get("format") != _FORMAT:
            logger.warning("the replay buffer's file is of another kind: it fills anew")
            return
        order = _oldest_first(state)[-self._capacity :]
        place = np.full(len(state["rewards"]) + 1, -1)  # the last stays: where -1 points to
        place[order] = np.arange(len(order))
        for name in _COLUMNS:
            self._columns[name][: len(order)] = state[name][order]
        self._following[: len(order)] = place[state["following"][order]]
        self._n_added = len(order)
        self._newest = {}
        self._rng.bit_generator.state = state["rng"]
        if self._priorities is not None:
            self._restore_priorities(state.get("priorities"), order)

    def _restore_priorities(self, state: dict[str, Any] | None, order: NDArray[np.int64]) -> None:
        assert self._priorities is not None
        if state is None:  # it was drawn from uniformly before
            self._priorities.add(np.arange(len(order)))
        else:
            self._priorities.set_state({**state, "priorities": state["priorities"][order]})

    def _add_part(
        self, steps: Transitions, part: slice, episodes: Sequence[Hashable], ends: Sequence[bool]
    ) -> None:
        n_new = part.stop - part.start
        rows = (self._n_added + np.arange(n_new)) % self._capacity
        for name, column in self._columns.items():
            column[rows] = getattr(steps, name)[part]
        self._following[rows] = -1
        oldest = self._n_added + n_new - self._capacity
        for i, (episode, is_last) in enumerate(zip(episodes, ends, strict=True)):
            before = self._newest.get(episode)
            if before is not None and before >= oldest:
                self._following[before % self._capacity] = rows[i]
            self._newest[episode] = self._n_added + i
            if is_last:
                del self._newest[episode]
        self._n_added += n_new
        if self._priorities is not None:
            self._priorities.add(rows)

    def _follow(
        self, rows: NDArray[np.int64], wanted: Any, most: int, gamma: float
    ) -> tuple[NDArray[np.int64], Array, NDArray[np.int64]]:
        # The last row of each draw, the discounted sum of the rewards up to it, and their count.
        rewards = self._columns["rewards"]
        last, total = rows, rewards[rows]
        n_steps = np.ones(len(rows), np.int64)
        for step in range(1, most):
            following = self._following[last]
            goes_on = (n_steps == step) & (step < wanted) & (following >= 0)
            last = np.where(goes_on, following, last)
            total = total + np.where(goes_on, np.float32(gamma**step) * rewards[last], 0)
            n_steps += goes_on
        return last, total.astype(np.float32), n_steps


def _oldest_first(state: dict[str, Any]) -> NDArray[np.int64]:
    size = len(state["rewards"])
    first = state["n_added"] % state["capacity"] if size == state["capacity"] else 0
    return (first + np.arange(size)) % max(size, 1)
