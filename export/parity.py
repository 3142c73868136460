"""The parity gate: RLlib's own pipelines against the exported file, on the same raw inputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray

from export.checkpoint import Checkpoint
from export.errors import ParityError
from export.graph import DistributionSpec
from export.reference import RLlibReference
from serving.bundle import NoiseSpec
from serving.errors import UsageError
from serving.parity import (
    BATCH_SIZES,
    TOLERANCE,
    compare,
    describe_mismatches,
    run_in_batches,
)
from serving.rollout import EnvironmentFailedError, make_env

logger = logging.getLogger("policyserve.export")

_SEED = 20260  # any fixed number: the gate has to be repeatable
_N_SAMPLES = 128
_N_ON_POLICY = 448
_N_GOLDEN = 128
# Stand-ins for a missing bound, from usual sizes to where tanh saturates.
_EDGE_VALUES = (0.0, 1.0, -1.0, 10.0, -10.0)

Vectors = dict[str, NDArray[Any]]
GraphRun = Callable[
    [Sequence[str], NDArray[np.float32], NDArray[np.float32]], Mapping[str, NDArray[Any]]
]


def parity_vectors(checkpoint: Checkpoint, distribution: DistributionSpec) -> Vectors:
    """Raw observations, noise, and RLlib's answers to them.

    The observations are edge values, samples of the space, and, where the training environment
    can be built here, those of real greedy episodes.

    Returns:
        `observation` (N, *shape) in the space's dtype, `noise` (N, D) float32, `source` (N,)
        names, and RLlib's answers under the graph's output names.
    """
    reference = RLlibReference(checkpoint)
    space = checkpoint.observation_space
    assert isinstance(space, gym.spaces.Box)  # convert.py has refused every other
    space.seed(_SEED)
    parts = {
        "edge": _edge_observations(space),
        "space_sample": np.stack([space.sample() for _ in range(_N_SAMPLES)]),
        "on_policy": _on_policy_observations(checkpoint, reference),
    }
    parts = {name: rows for name, rows in parts.items() if len(rows)}
    observations = np.concatenate(list(parts.values())).astype(space.dtype)
    noise = NoiseSpec(distribution.noise, distribution.noise_size).draw(
        np.random.default_rng(_SEED), len(observations)
    )
    answers = reference.answer(observations, noise, distribution)
    source = np.concatenate([np.full(len(rows), name) for name, rows in parts.items()])
    return {"observation": observations, "noise": noise, "source": source, **answers}


def _edge_observations(space: gym.spaces.Box) -> NDArray[Any]:
    rows = [np.full(space.shape, value) for value in _EDGE_VALUES]
    rows += [
        np.where(np.abs(bound) < 1e6, bound, np.sign(bound) * 10.0)
        for bound in (space.low, space.high)
    ]
    clipped = [np.clip(row, space.low, space.high) for row in rows]
    return np.stack(clipped).astype(space.dtype)


def _on_policy_observations(checkpoint: Checkpoint, reference: RLlibReference) -> NDArray[Any]:
    empty = np.empty((0, *(checkpoint.observation_space.shape or ())))
    if checkpoint.env_id is None:
        return empty
    try:
        env = make_env(checkpoint.env_id, **checkpoint.env_config)
    except (UsageError, EnvironmentFailedError):
        return empty  # an environment that only the trainer had: the report counts none
    rows: list[NDArray[Any]] = []
    torch.manual_seed(_SEED)  # RLlib samples with torch's global generator
    try:
        while len(rows) < _N_ON_POLICY:
            observation, _ = env.reset(seed=_SEED + len(rows))
            over = False
            while not over and len(rows) < _N_ON_POLICY:
                rows.append(np.asarray(observation))
                # Alternate greedy and sampled steps: greedy alone can stay in one place.
                action = reference.act(observation[None], explore=len(rows) % 2 == 0)[0]
                observation, _, terminated, truncated, _ = env.step(action)
                over = terminated or truncated
    except Exception:  # a user's environment can raise anything; what it gave so far counts
        logger.warning("the environment %s failed during the parity check", checkpoint.env_id)
    finally:
        env.close()
    return np.stack(rows) if rows else empty


def check_parity(
    name: str, run: GraphRun, output_names: Sequence[str], vectors: Vectors
) -> dict[str, Any]:
    """Compare a file's answers with RLlib's at every batch size.

    Returns:
        The report for the manifest.

    Raises:
        ParityError: Names each output that differs, by how much, and where.
    """
    observations = vectors["observation"].astype(np.float32)
    expected = {output: vectors[output] for output in output_names}
    differences = dict.fromkeys(output_names, 0.0)
    max_error = 0.0
    for batch_size in BATCH_SIZES:
        found = run_in_batches(
            lambda rows, noise: run(output_names, rows, noise),
            observations,
            vectors["noise"],
            batch_size,
        )
        comparisons = compare(expected, found, vectors["noise"], vectors["action_dist_inputs"])
        if any(item.n_mismatched for item in comparisons):
            raise ParityError(
                f"the {name} file does not act as RLlib does (batch size {batch_size}): "
                f"{describe_mismatches(comparisons, expected, found)}; no bundle was written"
            )
        for item in comparisons:
            differences[item.name] = max(differences[item.name], item.max_difference)
            max_error = max(max_error, item.max_error)
    sources, counts = np.unique(vectors["source"], return_counts=True)
    return {
        "reference": "RLlib connector pipelines and RLModule",
        "tolerance": TOLERANCE,
        "criterion": "|RLlib - found| <= tolerance * (1 + |RLlib|); integer actions equal",
        "batch_sizes": list(BATCH_SIZES),
        "n_observations": len(observations),
        "observations": dict(zip(sources.tolist(), counts.tolist(), strict=True)),
        "max_difference": differences,
        "max_error": max_error,
        "n_mismatched_actions": 0,
    }


def golden_vectors(vectors: Vectors) -> Vectors:
    """The rows that travel in the bundle: all edge cases, and an even choice of the others."""
    n_rows = len(vectors["observation"])
    edges = np.flatnonzero(vectors["source"] == "edge")
    others = np.setdiff1d(np.arange(n_rows), edges)
    step = max(1, len(others) // _N_GOLDEN)
    rows = np.concatenate([edges, others[::step][:_N_GOLDEN]])
    return {name: values[rows] for name, values in vectors.items() if name != "source"}
