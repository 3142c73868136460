"""A bundle in float16 or int8: converted, proved again, and played against its float32 form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym

from export.graph import PolicyGraph
from export.policy import Checkpoint
from export.precision import check_precision, convert_precision
from export.training_environment import training_environment
from export.vectors import Vectors
from serving.bundle import ONNX, write_manifest
from serving.engines.graph import GraphPolicy
from serving.engines.onnx_engine import OnnxGraph
from serving.episodes import RolloutResult
from serving.interface import Policy
from serving.manifest import PolicyManifest
from serving.rollout import evaluate_policy

N_EPISODES = 20
_KEPT = ("mean_return", "std_return", "ci95_return")


def write_reduced(
    directory: Path,
    facts: Mapping[str, Any],
    files: Sequence[str],
    *,
    checkpoint: Checkpoint,
    graph: PolicyGraph,
    vectors: Vectors,
    precision: Literal["float16", "int8"],
    tolerance: float,
) -> PolicyManifest:
    """Put the smaller ONNX file in the place of the float32 one and write the manifest.

    Args:
        directory: Holds the float32 `policy.onnx`, which has passed its own gate, and the other
            files.
        facts: The float32 bundle's manifest.
        files: The names of the bundle's files.
        checkpoint: The policy.
        graph: The policy as one module.
        vectors: What the file is measured by.
        precision: What to convert to.
        tolerance: What to hold it to.

    Returns:
        The manifest: `parity` holds both reports (`onnx`, `onnx_float32`), `return` what
        `measure_return` found.

    Raises:
        ExportError: There is nothing to convert, or the tolerance is exceeded.
    """
    path = directory / ONNX
    float32 = OnnxGraph(path, graph.output_names)
    smaller = directory / f"{ONNX}.{precision}"
    convert_precision(path, smaller, precision)
    smaller.replace(path)
    converted = OnnxGraph(path, graph.output_names)
    report = check_precision(ONNX, converted.run, graph, vectors, precision, tolerance)
    own = {
        **facts,
        "precision": precision,
        "tolerance": tolerance,
        "parity": {"onnx": report, "onnx_float32": facts["parity"]["onnx"]},
    }
    manifest = write_manifest(directory, own, files)
    make = training_environment(checkpoint)
    own["return"] = (
        not_measured("the checkpoint names no environment for a single agent")
        if make is None
        else measure_return(GraphPolicy(manifest, float32), GraphPolicy(manifest, converted), make)
    )
    return write_manifest(directory, own, files)


def measure_return(
    float32_policy: Policy,
    other_policy: Policy,
    make_environment: Callable[[], gym.Env[Any, Any]],
    *,
    n_episodes: int = N_EPISODES,
) -> dict[str, Any]:
    """Play the same episodes with both, greedily.

    Args:
        float32_policy: What the other one was made from.
        other_policy: The policy in another precision.
        make_environment: Makes the training environment.
        n_episodes: Episode i of both is reset with seed i.

    Returns:
        `is_measured` true, `n_episodes`, and for `float32`, `converted` and `difference` (converted
        less float32, episode by episode) `mean_return`, `std_return` and `ci95_return`, half the
        width of the mean's 95 % confidence interval. Where the environment fails: `is_measured`
        false and the `reason`.
    """
    try:
        float32, converted = (
            evaluate_policy(policy, make_environment, n_episodes=n_episodes)
            for policy in (float32_policy, other_policy)
        )
    except Exception as exc:  # a user's environment can raise anything
        return not_measured(f"the environment fails here: {exc}")
    difference = dataclasses.replace(
        converted,
        episodes=tuple(
            dataclasses.replace(after, episode_return=after.episode_return - before.episode_return)
            for before, after in zip(float32.episodes, converted.episodes, strict=True)
        ),
    )
    return {
        "is_measured": True,
        "n_episodes": n_episodes,
        "float32": _figures(float32),
        "converted": _figures(converted),
        "difference": _figures(difference),
    }


def not_measured(reason: str) -> dict[str, Any]:
    """The report of a return that could not be measured."""
    return {"is_measured": False, "reason": reason}


def _figures(result: RolloutResult) -> dict[str, Any]:
    summary = result.summary()
    return {name: summary[name] for name in _KEPT}
