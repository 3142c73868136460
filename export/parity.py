"""The parity gate: RLlib's own pipelines against the exported file, on the same raw inputs."""

from __future__ import annotations

from typing import Any

import numpy as np

from export.errors import ParityError
from export.graph import PolicyGraph
from export.vectors import Vectors
from serving.parity import (
    BATCH_SIZES,
    TOLERANCE,
    Run,
    action_scales,
    action_scores,
    compare,
    describe_mismatches,
    replay,
)


def check_parity(
    name: str, run: Run, graph: PolicyGraph, vectors: Vectors, *, tolerance: float = TOLERANCE
) -> dict[str, Any]:
    """Compare a file's answers with RLlib's at every batch size, step by step where it remembers.

    Args:
        name: What the file is called in messages.
        run: The file in its runtime.
        graph: Which outputs there are.
        vectors: What was asked and what RLlib answered (`parity_vectors`).
        tolerance: Of |RLlib - found| / max(1 + |RLlib|, half the action's range).

    Returns:
        The report for the manifest.

    Raises:
        ParityError: Names each output that differs, by how much, and where.
    """
    inputs, expected = split(graph, vectors)
    scores = action_scores(graph.action_space, inputs, expected)
    scales = action_scales(graph.action_space)
    differences = dict.fromkeys(expected, 0.0)
    max_error = 0.0
    n_ties = 0
    for batch_size in BATCH_SIZES:
        try:
            found = replay(run, inputs, graph.state, graph.output_names, batch_size)
            comparisons = compare(
                expected,
                found,
                scores=scores,
                scales=scales,
                tolerance=tolerance,
                has_steps=graph.has_memory,
            )
        except Exception as exc:  # the runtimes' own exceptions share no public base
            raise ParityError(
                f"the {name} file fails on what RLlib answers (batch size {batch_size}): {exc}"
            ) from exc
        if any(item.n_mismatched for item in comparisons):
            raise ParityError(
                f"the {name} file does not act as RLlib does (batch size {batch_size}): "
                f"{describe_mismatches(comparisons, expected, found)}; no bundle was written"
            )
        for item in comparisons:
            differences[item.name] = max(differences[item.name], item.max_difference)
            max_error = max(max_error, item.max_error)
        n_ties = max(n_ties, _n_other_actions(expected, found))
    sources, counts = np.unique(vectors["source"], return_counts=True)
    n_steps = vectors["is_sampled"].shape[1] if graph.has_memory else 1
    return {
        "reference": "RLlib connector pipelines and RLModule",
        "tolerance": tolerance,
        "criterion": "|RLlib - found| <= tolerance * max(1 + |RLlib|, half the action's range); "
        "integer actions equal, or as good within the tolerance",
        "batch_sizes": list(BATCH_SIZES),
        "n_observations": len(vectors["source"]) * n_steps,
        "n_steps": n_steps,
        "observations": {
            source: int(count) * n_steps
            for source, count in zip(sources.tolist(), counts.tolist(), strict=True)
        },
        "max_difference": differences,
        "max_error": max_error,
        "n_without_answer": int(vectors["n_without_answer"][0]),
        "n_mismatched_actions": 0,
        "n_tied_actions": n_ties,
    }


def split(graph: PolicyGraph, vectors: Vectors) -> tuple[Vectors, Vectors]:
    """The graph's inputs (and `is_sampled`), and RLlib's answers."""
    asked = {spec.name for spec in graph.inputs} | {"is_sampled"}
    inputs = {name: values for name, values in vectors.items() if name in asked}
    expected = {name: values for name, values in vectors.items() if name in graph.output_names}
    return inputs, expected


def _n_other_actions(expected: Vectors, found: Any) -> int:
    return sum(
        int((values != found[name]).reshape(len(values), -1).any(axis=1).sum())
        for name, values in expected.items()
        if np.issubdtype(values.dtype, np.integer)
    )
