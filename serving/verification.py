"""Replaying a bundle's golden vectors: is it, on this machine, still the policy that RLlib had?"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.bundle import GOLDEN, Bundle, read_bundle
from serving.engines.graph import (
    DeviceName,
    EngineName,
    Graph,
    GraphPolicy,
    load_graph,
    unmasked,
)
from serving.errors import BundleError, VerificationError
from serving.manifest import ACTION_MASK, InputSpec, step_outputs
from serving.parity import (
    BATCH_SIZES,
    Comparison,
    Scores,
    action_scales,
    action_scores,
    compare,
    describe_mismatches,
    replay,
    run_in_batches,
)

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class VerificationReport:
    """What was replayed and how close it came.

    Attributes:
        engine: The runtime.
        device: Where it ran.
        n_observations: Golden rows; with memory, golden steps of all episodes.
        batch_sizes: Each row was replayed in batches of these sizes.
        max_difference: Per output that RLlib shows, the largest difference from its answer.
        max_error: The largest |difference| / (1 + |RLlib's answer|), bounded by the tolerance.
    """

    engine: str
    device: str
    n_observations: int
    batch_sizes: tuple[int, ...]
    max_difference: dict[str, float]
    max_error: float


@dataclass(frozen=True)
class _Golden:
    """Golden vectors, checked.

    Attributes:
        inputs: The graph's inputs but the state, in their dtypes; with memory `is_sampled` too.
        expected: RLlib's answers.
        scores: What decides integer actions.
        has_steps: Whether the second axis counts steps.
    """

    inputs: Arrays
    expected: Arrays
    scores: Scores
    has_steps: bool

    def take(self, chosen: NDArray[np.bool_]) -> _Golden:
        """Some of the rows, or of all episodes' steps, as rows."""
        return _Golden(
            inputs={name: values[chosen] for name, values in self.inputs.items()},
            expected={name: values[chosen] for name, values in self.expected.items()},
            scores={name: [part[chosen] for part in parts] for name, parts in self.scores.items()},
            has_steps=False,
        )


def verify_graph(bundle: Bundle, graph: Graph) -> VerificationReport:
    """Replay the golden vectors on a loaded graph.

    Every way of running it is replayed: the whole graph, a step's outputs alone, greedy or not,
    and the same without a mask.

    Raises:
        BundleError: The golden vectors are incomplete.
        VerificationError: Names each output that differs, and where.
    """
    golden = _read_golden(bundle)
    differences = dict.fromkeys(golden.expected, 0.0)
    max_error = 0.0
    for batch_size in BATCH_SIZES:
        for item in _replay(bundle, graph, golden, batch_size):
            differences[item.name] = max(differences[item.name], item.max_difference)
            max_error = max(max_error, item.max_error)
    first = golden.expected[next(iter(golden.expected))]
    return VerificationReport(
        engine=graph.name,
        device=graph.device,
        n_observations=first.shape[0] * (first.shape[1] if golden.has_steps else 1),
        batch_sizes=BATCH_SIZES,
        max_difference=differences,
        max_error=max_error,
    )


def _replay(bundle: Bundle, graph: Graph, golden: _Golden, batch_size: int) -> list[Comparison]:
    manifest = bundle.manifest
    whole, comparisons = _attempt(
        bundle,
        graph,
        golden,
        lambda: replay(graph.run, golden.inputs, manifest.state, manifest.outputs, batch_size),
    )
    steps = dataclasses.replace(
        golden,
        inputs={
            **golden.inputs,
            **{name: values for name, values in whole.items() if name.startswith("state/")},
        },
        # RLlib does not show every state; what the whole graph answered stands in for it.
        expected={**whole, **golden.expected},
    )
    for part, some in _step_graphs(graph, steps):
        for names in step_outputs(manifest.outputs):
            asked = dataclasses.replace(
                some, expected={name: some.expected[name] for name in names}
            )
            run = functools.partial(_run_steps, part, names, some, batch_size)
            _, found = _attempt(bundle, part, asked, run)
            comparisons += [item for item in found if item.name in golden.expected]
    return comparisons


def _attempt(
    bundle: Bundle, graph: Graph, golden: _Golden, run: Callable[[], Arrays]
) -> tuple[Arrays, list[Comparison]]:
    where = f"{bundle.path} on {graph.name} ({graph.device})"
    try:
        found = run()
        comparisons = compare(
            golden.expected,
            found,
            scores=golden.scores,
            scales=action_scales(bundle.manifest.action_space),
            tolerance=bundle.manifest.tolerance,
            has_steps=golden.has_steps,
        )
    except Exception as exc:  # the runtimes' own exceptions share no public base
        raise VerificationError(f"{where} fails on its golden vectors: {exc}") from exc
    if any(item.n_mismatched for item in comparisons):
        raise VerificationError(
            f"{where} does not act as RLlib did: "
            f"{describe_mismatches(comparisons, golden.expected, found)}"
        )
    return found, comparisons


def _step_graphs(graph: Graph, golden: _Golden) -> Iterator[tuple[Graph, _Golden]]:
    """What serves a step, with and without a mask, and the vectors that it can be asked."""
    yield graph, golden
    free = unmasked(graph)
    if free is not graph:
        is_free = np.asarray(golden.inputs[ACTION_MASK].all(axis=-1))
        if is_free.any():
            yield free, golden.take(is_free)


def _run_steps(graph: Graph, names: Sequence[str], golden: _Golden, batch_size: int) -> Arrays:
    """Some outputs of every row or step, each step from the state that it had before."""
    inputs = golden.inputs
    if not golden.has_steps:
        return run_in_batches(lambda batch: graph.run(names, batch), inputs, batch_size)
    lead = golden.inputs["is_sampled"].shape
    flat = {name: values.reshape(-1, *values.shape[2:]) for name, values in inputs.items()}
    found = run_in_batches(lambda batch: graph.run(names, batch), flat, batch_size)
    return {name: values.reshape(*lead, *values.shape[1:]) for name, values in found.items()}


def _read_golden(bundle: Bundle) -> _Golden:
    manifest = bundle.manifest
    stored = bundle.golden()
    has_steps = bool(manifest.state)
    lead = (manifest.n_golden_rows, manifest.n_golden_steps)[: 1 + has_steps]
    specs = [spec for spec in manifest.inputs if spec.role != "state"]
    if has_steps:
        specs.append(InputSpec("is_sampled", "", "bool", ()))
    if "action_mask" not in stored and manifest.mask_size:
        stored["action_mask"] = np.ones((*lead, manifest.mask_size), dtype=np.bool_)
    # RLlib shows only some states (a stack of frames is the connectors' own).
    outputs = [
        name
        for name in manifest.outputs
        if name in stored or name.split("/")[0] not in ("next_state", "sampled_next_state")
    ]
    _check_golden(bundle, stored, specs, outputs, lead)
    inputs = {
        spec.name: np.ascontiguousarray(stored[spec.name], dtype=spec.dtype) for spec in specs
    }
    expected = {name: stored[name] for name in outputs}
    scores = action_scores(manifest.action_space, inputs, expected)
    return _Golden(inputs=inputs, expected=expected, scores=scores, has_steps=has_steps)


def _check_golden(
    bundle: Bundle,
    stored: Mapping[str, NDArray[Any]],
    specs: Sequence[InputSpec],
    outputs: Sequence[str],
    lead: tuple[int, ...],
) -> None:
    path = bundle.path / GOLDEN
    missing = [name for name in (*(spec.name for spec in specs), *outputs) if name not in stored]
    if missing:
        raise BundleError(f"{path} lacks {', '.join(missing)}")
    for spec in specs:
        array = stored[spec.name]
        if array.shape != (*lead, *spec.shape):
            raise BundleError(
                f"{path}: {spec.name} has the shape {array.shape}, the manifest says "
                f"{(*lead, *spec.shape)}"
            )
        if not np.can_cast(array.dtype, spec.dtype, casting="same_kind"):
            raise BundleError(f"{path}: {spec.name} is {array.dtype}, expected {spec.dtype}")
    for name in outputs:
        if stored[name].shape[: len(lead)] != lead or stored[name].dtype.kind not in "fiub":
            raise BundleError(
                f"{path}: {name} has the shape {stored[name].shape} ({stored[name].dtype}), "
                f"expected numbers in {lead} rows"
            )


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
