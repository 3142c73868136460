"""Sampled actions as distributions: do the file's samples fall as often as RLlib's own?

The parity gate fixes the noise, so it shows that one draw becomes the right action. This shows
that the noise which is drawn is the right noise: RLlib draws by its own exploration path, the
file by its noise input, and the two samples are compared by statistics.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import tree
from numpy.typing import NDArray
from scipy import special

from export.errors import ParityError
from export.graph import ACTION_DIST_INPUTS, PolicyGraph
from export.gym_spaces import leaf_spaces
from export.policy import Checkpoint
from export.vectors import edge_observations
from export.walk import Walk
from serving.conforming import conform_observations
from serving.manifest import NoiseSpec
from serving.parity import Run
from serving.spaces import leaves

_SEED = 20261
_N_OBSERVATIONS = 3
_N_DRAWS = 2000
# Of a false alarm in one comparison; a few dozen comparisons an export.
_SIGNIFICANCE = 1e-7


def check_samples(
    name: str, checkpoint: Checkpoint, run: Run, graph: PolicyGraph
) -> dict[str, Any] | None:
    """Compare two samples per observation, leaf by leaf and component by component.

    A policy with memory is asked at an episode's start.

    Returns:
        The report for the manifest; None for a policy without a distribution.

    Raises:
        ParityError: Names the action whose samples differ from RLlib's.
    """
    if graph.distribution is None:
        return None
    torch.manual_seed(_SEED)  # RLlib samples with torch's global generator
    rng = np.random.default_rng(_SEED)
    space = checkpoint.observation_space
    space.seed(_SEED)
    smallest = 1.0
    n_compared = 0
    n_observations = 0
    for observation in (
        *(space.sample() for _ in range(_N_OBSERVATIONS)),
        *edge_observations(space),
    ):
        if n_observations == _N_OBSERVATIONS:
            break
        observations = [observation] * _N_DRAWS
        rllib = _draw_by_rllib(checkpoint, graph, observations)
        if rllib is None:
            continue
        n_observations += 1
        found = _draw_by_file(run, graph, observations, rng)
        for action, values in found.items():
            for component, p_value in enumerate(_p_values(rllib[action], values)):
                if p_value < _SIGNIFICANCE:
                    raise ParityError(
                        f"the {name} file samples {action} (component {component}) otherwise than "
                        f"RLlib does: of {_N_DRAWS} draws each, p = {p_value:.1e} that both come "
                        "from one distribution; no bundle was written"
                    )
                smallest = min(smallest, p_value)
                n_compared += 1
    return {
        "n_draws": _N_DRAWS,
        "n_comparisons": n_compared,
        "smallest_p_value": smallest,
        "significance": _SIGNIFICANCE,
    }


def _draw_by_rllib(
    checkpoint: Checkpoint, graph: PolicyGraph, observations: list[Any]
) -> dict[str, NDArray[Any]] | None:
    """RLlib's draws, or None where it has no numbers to draw by."""
    walk = Walk(checkpoint, observations)
    output = walk.forward(explore=True)
    # As RLlib's GetActions samples, without its log-probability, which fails for batches of
    # nested actions (ray issue 53994).
    if bool(output[ACTION_DIST_INPUTS].isnan().any()):
        return None
    dist_class = checkpoint.rl_module.get_exploration_action_dist_cls()
    sample = dist_class.from_logits(output[ACTION_DIST_INPUTS]).sample()
    actions, _ = walk.actions(sample, explore=True)
    names = leaves(graph.action_space, "action")
    columns: list[list[Any]] = [[] for _ in names]
    for action in actions:
        for column, value in zip(columns, _leaf_values(checkpoint, action), strict=True):
            column.append(np.asarray(value))
    return {name: np.stack(column) for name, column in zip(names, columns, strict=True)}


def _leaf_values(checkpoint: Checkpoint, action: Any) -> list[Any]:
    if len(leaf_spaces(checkpoint.action_space)) == 1 and not isinstance(action, dict | tuple):
        return [action]
    return list(tree.flatten(action))


def _draw_by_file(
    run: Run, graph: PolicyGraph, observations: list[Any], rng: np.random.Generator
) -> dict[str, NDArray[Any]]:
    n = len(observations)
    assert graph.distribution is not None
    inputs = conform_observations(observations[:1], graph.observation_space)
    inputs = {name: np.repeat(values, n, axis=0) for name, values in inputs.items()}
    for name, spec in graph.state.items():
        inputs[f"state/{name}"] = np.array(np.broadcast_to(spec.initial, (n, *spec.shape)))
    inputs["reward"] = np.zeros(n, np.float32)
    inputs["action_mask"] = np.ones((n, graph.mask_size), np.bool_)
    inputs["noise"] = NoiseSpec(graph.distribution.noise).draw(rng, n)
    found = run(graph.output_names, inputs)
    return {name: found[f"sampled_{name}"] for name in leaves(graph.action_space, "action")}


def _p_values(first: NDArray[Any], second: NDArray[Any]) -> list[float]:
    """Component by component: chi-square for integers, Kolmogorov-Smirnov for numbers."""
    is_integer = np.issubdtype(second.dtype, np.integer)
    test = _chi_square if is_integer else _kolmogorov_smirnov
    return [
        test(one, other)
        for one, other in zip(
            first.reshape(len(first), -1).T, second.reshape(len(second), -1).T, strict=True
        )
    ]


def _chi_square(first: NDArray[Any], second: NDArray[Any]) -> float:
    values = np.union1d(first, second)
    counts = np.array([[np.sum(sample == value) for value in values] for sample in (first, second)])
    # Cells that hardly occur are put together: the test needs a few counts in each.
    order = np.argsort(counts.sum(axis=0))
    rare = np.cumsum(counts.sum(axis=0)[order]) < 20
    merged = np.column_stack([counts[:, order[rare]].sum(axis=1), counts[:, order[~rare]]])
    merged = merged[:, merged.sum(axis=0) > 0]
    if merged.shape[1] < 2:
        return 1.0
    expected = merged.sum(axis=1, keepdims=True) * merged.sum(axis=0) / merged.sum()
    statistic = float(((merged - expected) ** 2 / expected).sum())
    return float(special.chdtrc(merged.shape[1] - 1, statistic))


def _kolmogorov_smirnov(first: NDArray[Any], second: NDArray[Any]) -> float:
    """The two-sample test's asymptotic p-value (Smirnov 1939)."""
    # Rounded: samples at a bound are equal up to the last digit, which would count as different.
    one, other = (np.sort(np.round(each.astype(np.float64), 5)) for each in (first, second))
    values = np.concatenate([one, other])
    distance = np.abs(
        np.searchsorted(one, values, side="right") / len(one)
        - np.searchsorted(other, values, side="right") / len(other)
    ).max()
    effective = np.sqrt(len(one) * len(other) / (len(one) + len(other)))
    return float(special.kolmogorov(effective * distance))
