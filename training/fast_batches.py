"""PPO's train batch from episodes, and its minibatches, in whole columns.

The same rows in the same order as RLlib's learner pipeline and its minibatch iterator give, one row
more per episode included: that row carries the value of the last observation, and no loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.evaluation.postprocessing import Postprocessing

Array = NDArray[Any]
Batch = dict[str, torch.Tensor]


class TrainRows(NamedTuple):
    """The train batch before values are known; R rows: all steps, and one more per episode.

    Attributes:
        columns: Arrays with a leading axis of R.
        rewards: Each episode's own, with a 0 for the row more.
        terminateds: (R,) bool, true at an episode's last step.
        truncateds: (R,) bool, true at the last step of an episode that was cut or goes on.
        is_step: (R,) bool, false for the rows more.
    """

    columns: dict[str, Array]
    rewards: list[Array]
    terminateds: Array
    truncateds: Array
    is_step: Array


def rows_of(episodes: Iterable[Any]) -> TrainRows | None:
    """Put RLlib's single-agent episodes below each other; None where that isn't possible.

    Their data have to be plain arrays, the same columns in each, and there has to be an episode.
    """
    episodes = list(episodes)
    if not episodes or not all(isinstance(episode, SingleAgentEpisode) for episode in episodes):
        return None
    pieces: dict[str, list[Array]] = {}
    rewards = []
    for episode in episodes:
        found = _columns_of(episode)
        if found is None or (pieces and found.keys() != pieces.keys()):
            return None
        rewards.append(found[Columns.REWARDS])
        for name, array in found.items():
            pieces.setdefault(name, []).append(array)
    n_rows = sum(map(len, rewards))
    last = np.cumsum([len(array) for array in rewards]) - 1
    is_step, terminateds = np.ones(n_rows, np.bool_), np.zeros(n_rows, np.bool_)
    truncateds = np.zeros(n_rows, np.bool_)
    is_step[last] = False
    terminateds[last - 1] = [bool(episode.is_terminated) for episode in episodes]
    # A chunk of an episode that goes on is cut here: the value of what follows stands for the rest.
    truncateds[last - 1] = [
        bool(episode.is_truncated or not episode.is_terminated) for episode in episodes
    ]
    columns = {name: np.concatenate(arrays) for name, arrays in pieces.items()}
    return TrainRows(columns, rewards, terminateds, truncateds, is_step)


def _columns_of(episode: SingleAgentEpisode) -> dict[str, Array] | None:
    buffers: dict[str, Any] = {
        Columns.OBS: episode.observations,
        Columns.ACTIONS: episode.actions,
        Columns.REWARDS: episode.rewards,
        **episode.extra_model_outputs,
    }
    if not all(isinstance(buffer.data, np.ndarray) for buffer in buffers.values()):
        return None
    found = {}
    for name, buffer in buffers.items():
        data: Array = buffer.data[buffer.lookback :]
        if name == Columns.REWARDS:
            data = np.append(data, 0.0)
        elif name != Columns.OBS:
            data = np.concatenate([data, data[-1:]])
        found[name] = data
    return found


def to_tensors(columns: dict[str, Array], device: Any) -> Batch:
    """Arrays to tensors on a device, floats as float32."""
    tensors = {}
    for name, array in columns.items():
        tensor = torch.from_numpy(array)
        tensors[name] = (tensor.float() if tensor.is_floating_point() else tensor).to(device)
    return tensors


def advantages_and_targets(
    values: Array, rewards: Array, rows: TrainRows, *, gamma: float, lambda_: float
) -> tuple[Array, Array]:
    """Generalised advantage estimation, as RLlib's learner pipeline does it.

    Args:
        values: (R,) float32, the value network's.
        rewards: (R,) float32.
        rows: Where episodes end.
        gamma: Discount.
        lambda_: 0: one step's temporal difference; 1: all that was gathered.

    Returns:
        Advantages, standardised over the batch, and value targets; (R,) float32 each.

    Source: RLlib's `compute_value_targets`, number by number, but over a list: an array's single
    items are ten times as slow.
    """
    non_terminal = 1.0 - rows.terminateds
    propagate = non_terminal * (1.0 - rows.truncateds)
    next_values = np.append(values[1:], 0.0)
    residuals = (rewards + gamma * non_terminal * next_values - values).tolist()
    factors = (gamma * lambda_ * propagate).tolist()
    running, found = 0.0, []
    for residual, factor in zip(reversed(residuals), reversed(factors), strict=True):
        running = residual + factor * running
        found.append(running)
    advantages = np.array(found[::-1], dtype=np.float32)
    targets: Array = (advantages + values).astype(np.float32)
    advantages = targets - values
    spread = max(1e-4, advantages.std())
    return (advantages - advantages.mean()) / spread, targets


class Minibatch(NamedTuple):
    """Rows of one gradient step.

    Attributes:
        batch: Tensors with a leading axis of the minibatch's size.
        steps: Indices of the rows that count in the loss.
    """

    batch: Batch
    steps: torch.Tensor


def minibatches(
    batch: Batch,
    is_step: Array,
    *,
    size: int,
    n_epochs: int,
    shuffle: Callable[[int], Array] | None,
) -> Iterator[Minibatch]:
    """Walk through a batch as RLlib's `MiniBatchCyclicIterator` does.

    The batch is gone through epoch after epoch without a break, so that a minibatch may hold the
    end of one epoch and the beginning of the next; the first is not shuffled.

    Args:
        batch: Tensors with a leading axis of R.
        is_step: (R,) bool, rows that count in the loss.
        size: Rows of a minibatch.
        n_epochs: How often each row is gone through at least.
        shuffle: Gives a permutation of so many rows; None keeps their order.
    """
    n_rows = len(is_step)
    n_minibatches = math.ceil(n_epochs * n_rows / size)
    order = np.arange(n_rows)
    orders = [order]
    for _ in range(n_minibatches * size // n_rows):
        order = order if shuffle is None else order[shuffle(n_rows)]
        orders.append(order)
    walk = np.concatenate(orders)
    device = batch[Columns.OBS].device
    for start in range(0, n_minibatches * size, size):
        picked = walk[start : start + size]
        rows = torch.from_numpy(picked).to(device)
        steps = torch.from_numpy(np.flatnonzero(is_step[picked])).to(device)
        yield Minibatch({name: column[rows] for name, column in batch.items()}, steps)


ADVANTAGES, VALUE_TARGETS = Postprocessing.ADVANTAGES, Postprocessing.VALUE_TARGETS
