"""The statistics of runner processes' observation filters, merged into those of all observations.

RLlib 2.60 (since its pull request 53484) merges them wrongly from the second time on: a runner's
`RunningStat` notes by how much its mean and its sum of squares moved, and the merge takes that for
the mean and the sum of squares of the new observations alone. The merged mean decays towards 0, and
the deviation grows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.connectors.env_to_module import MeanStdFilter
from ray.rllib.utils.filter import RunningStat

States = list[dict[Any, Any]]


def mend_filter_merging(algorithm: Algorithm) -> None:
    """Make an algorithm merge its runners' observation statistics rightly.

    Only the training process merges, so its connectors alone are changed, and in place: a
    checkpoint names RLlib's own classes.
    """
    runner = algorithm.env_runner
    for piece in runner._env_to_module.connectors:
        if isinstance(piece, MeanStdFilter):
            mend_filter(piece)


def mend_filter(piece: MeanStdFilter) -> None:
    """Make one filter merge other filters' statistics rightly."""
    merge: Callable[[States], dict[Any, Any]] = piece.merge_states

    def merge_states(states: States) -> dict[Any, Any]:
        return merge([_with_new_moments(state) for state in states])

    piece.merge_states = merge_states  # type: ignore[method-assign]


def _with_new_moments(state: Mapping[Any, Any]) -> dict[Any, Any]:
    return {
        agent: {**found, "running_stats": [_new_moments(stat) for stat in found["running_stats"]]}
        for agent, found in state.items()
    }


def _new_moments(state: dict[str, Any]) -> dict[str, Any]:
    # The whole is what was there before and what is new, put together by Chan, Golub and LeVeque's
    # formula: solved here for the new part.
    stat = RunningStat.from_state(state)
    count, new_count = stat.num_pushes, stat.num_pushes_delta
    if new_count == 0 or new_count == count:
        return state
    moved = stat.mean_delta_array  # the mean of all less the mean before
    step = moved * (count / new_count)  # the mean of the new less the mean before
    stat.mean_delta_array = stat.mean_array - moved + step
    stat.sum_sq_diff_delta_array = stat.sum_sq_diff_delta_array - step**2 * (
        (count - new_count) * new_count / count
    )
    new: dict[str, Any] = stat.to_state()
    return new
