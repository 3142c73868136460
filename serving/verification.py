"""Replaying a bundle's golden vectors: is it, on this machine, still the policy that RLlib had?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from serving.bundle import GOLDEN, Bundle, read_bundle
from serving.engines.graph import DeviceName, EngineName, Graph, GraphPolicy, load_graph
from serving.errors import BundleError, VerificationError
from serving.parity import (
    BATCH_SIZES,
    TOLERANCE,
    Comparison,
    compare,
    describe_mismatches,
    run_in_batches,
)


@dataclass(frozen=True)
class VerificationReport:
    """What was replayed and how close it came.

    Attributes:
        engine: The runtime.
        device: Where it ran.
        n_observations: Golden rows.
        batch_sizes: Each row was replayed in batches of these sizes.
        max_difference: Per output, the largest difference from RLlib's answer.
        max_error: The largest |difference| / (1 + |RLlib's answer|), bounded by the tolerance.
    """

    engine: str
    device: str
    n_observations: int
    batch_sizes: tuple[int, ...]
    max_difference: dict[str, float]
    max_error: float


def verify_graph(bundle: Bundle, graph: Graph) -> VerificationReport:
    """Replay the golden vectors on a loaded graph.

    Both ways of running it are replayed: the whole graph, and greedy actions alone.

    Raises:
        VerificationError: Names each output that differs, and where.
    """
    golden = bundle.golden()
    names = list(bundle.manifest.outputs)
    _check_golden(bundle, golden)
    observations = golden["observation"].astype("float32")
    differences = dict.fromkeys(names, 0.0)
    max_error = 0.0
    for asked in (names, ["action"]):
        for batch_size in BATCH_SIZES:
            comparisons = _replay(bundle, graph, asked, batch_size)
            for item in comparisons:
                differences[item.name] = max(differences[item.name], item.max_difference)
                max_error = max(max_error, item.max_error)
    return VerificationReport(
        engine=graph.name,
        device=graph.device,
        n_observations=len(observations),
        batch_sizes=BATCH_SIZES,
        max_difference=differences,
        max_error=max_error,
    )


def _check_golden(bundle: Bundle, golden: Mapping[str, NDArray[Any]]) -> None:
    names = ("observation", "noise", *bundle.manifest.outputs)
    missing = [name for name in names if name not in golden]
    if missing:
        raise BundleError(f"{bundle.path / GOLDEN} lacks {', '.join(missing)}")
    manifest = bundle.manifest
    widths = {"observation": manifest.observation_space.shape, "noise": (manifest.noise.size,)}
    for name, shape in widths.items():
        if golden[name].shape[1:] != shape:
            raise BundleError(
                f"{bundle.path / GOLDEN}: {name} has rows of shape {golden[name].shape[1:]}, the "
                f"manifest says {shape}"
            )
    lengths = {name: len(golden[name]) if golden[name].ndim else 0 for name in names}
    if len(set(lengths.values())) != 1 or not lengths["observation"]:
        raise BundleError(
            f"{bundle.path / GOLDEN} holds no rows, or arrays of unequal lengths: {lengths}"
        )


def _replay(bundle: Bundle, graph: Graph, asked: list[str], batch_size: int) -> list[Comparison]:
    golden = bundle.golden()
    try:
        found = run_in_batches(
            lambda rows, noise: graph.run(asked, rows, noise),
            golden["observation"].astype("float32"),
            golden["noise"],
            batch_size,
        )
    except Exception as exc:  # the runtimes' own exceptions share no public base
        raise VerificationError(
            f"{bundle.path} on {graph.name} ({graph.device}) fails on its golden vectors: {exc}"
        ) from exc
    # The comparison of integer actions looks at RLlib's scores to tell a tie from a mistake.
    expected = {name: golden[name] for name in asked}
    comparisons = compare(expected, found, golden["noise"], golden["action_dist_inputs"], TOLERANCE)
    if any(item.n_mismatched for item in comparisons):
        raise VerificationError(
            f"{bundle.path} on {graph.name} ({graph.device}) does not act as RLlib did: "
            f"{describe_mismatches(comparisons, expected, found)}"
        )
    return comparisons


def load_verified_policy(
    path: Path, *, engine: EngineName = "onnx", device: DeviceName = "cpu"
) -> GraphPolicy:
    """Read a bundle, load it, and prove it on this machine.

    Raises:
        BundleError: It is damaged, or does not reproduce its golden vectors.
        ServingConfigError: The engine or device is not available.
    """
    bundle = read_bundle(path)
    graph = load_graph(bundle, engine, device)
    verify_graph(bundle, graph)
    return GraphPolicy(bundle.manifest, graph)
