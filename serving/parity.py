"""Does a graph answer as RLlib did? The comparison that export and every load make.

Expected and found are dictionaries from an output's name to its array; the names are those of
the manifest's `outputs`. Arrays have a leading axis of rows, and for a policy with memory a
second one of steps: (N, ...) or (N, T, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.manifest import StateSpec, score_size
from serving.spaces import BoxSpace, DiscreteSpace, LeafSpace, MultiDiscreteSpace, Space, leaves

# float32 networks of two runtimes differ by a few 1e-7 (docs/export.md); 1e-5 leaves room for
# other processors and still catches weights rounded to float16 (1e-4).
TOLERANCE = 1e-5
BATCH_SIZES = (1, 7, 64)
SAMPLED = "sampled_"
_NO_SCALE = np.zeros(())

Arrays = Mapping[str, NDArray[Any]]
Run = Callable[[Sequence[str], Arrays], Arrays]
# Integer output -> the scores of each component's values.
Scores = Mapping[str, Sequence[NDArray[Any]]]


@dataclass(frozen=True)
class Comparison:
    """One output compared.

    Attributes:
        name: The output.
        max_difference: Largest |expected - found| (floating-point outputs), else 0.
        max_error: Largest |expected - found| / max(1 + |expected|, scale), which the tolerance
            bounds.
        n_compared: Rows compared; with memory each step counts as one.
        n_mismatched: Rows that differ by more than the tolerance; for integer actions, rows
            with another action whose score is not within the tolerance of the best.
        first_mismatch: Row, or row and step, of the first, or None.
    """

    name: str
    max_difference: float
    max_error: float
    n_compared: int
    n_mismatched: int
    first_mismatch: tuple[int, ...] | None


def action_scores(action_space: Space, inputs: Arrays, expected: Arrays) -> Scores:
    """What decides each integer action: where two scores are as good, either action is right.

    Args:
        action_space: Its leaves split the scores, in order.
        inputs: What was asked: `noise` decides samples, an `action_mask` forbids actions.
        expected: RLlib's `action_dist_inputs`, or else its `q_values`.

    Returns:
        By the name of an integer action output, one array (..., n) per component of the action:
        the scores of its values, counted from 0 as RLlib counts. Empty where RLlib shows no
        scores, or not as many; integers then have to be equal.
    """
    found: dict[str, list[NDArray[Any]]] = {}
    action_leaves = leaves(action_space, "action")
    name = "action_dist_inputs" if "action_dist_inputs" in expected else "q_values"
    width = sum(_n_inputs(leaf) for leaf in action_leaves.values())
    if name not in expected or expected[name].shape[-1] != width:
        return found
    scores = expected[name].astype(np.float64)
    if "action_mask" in inputs:  # such a space is one leaf, so the mask is as wide as the scores
        scores = np.where(inputs["action_mask"], scores, -np.inf)
    start = noise_start = 0
    for name, leaf in action_leaves.items():
        size = score_size(leaf)
        if isinstance(leaf, DiscreteSpace | MultiDiscreteSpace):
            sizes = [leaf.n] if isinstance(leaf, DiscreteSpace) else leaf.nvec.ravel().tolist()
            ends = np.cumsum(sizes)[:-1]
            own = scores[..., start : start + size]
            found[name] = np.split(own, ends, axis=-1)
            if "noise" in inputs:
                perturbed = own + inputs["noise"][..., noise_start : noise_start + size]
                found[SAMPLED + name] = np.split(perturbed, ends, axis=-1)
        start += _n_inputs(leaf)
        noise_start += size
    return found


def _n_inputs(leaf: LeafSpace) -> int:
    """How many distribution inputs a leaf has: logits, or a mean and a log std each."""
    is_discrete = isinstance(leaf, DiscreteSpace | MultiDiscreteSpace)
    return score_size(leaf) * (1 if is_discrete else 2)


def action_scales(action_space: Space) -> dict[str, NDArray[np.float64]]:
    """Half the range of each bounded Box action, by output name.

    Unsquashing multiplies the network's output by it, and with it the last digit's rounding: an
    action of [-1000, 1000] is as exact as one of [-1, 1] if it agrees a thousand times as coarsely.
    """
    found: dict[str, NDArray[np.float64]] = {}
    for name, leaf in leaves(action_space, "action").items():
        if isinstance(leaf, BoxSpace):
            half = (np.asarray(leaf.high) - np.asarray(leaf.low)) / 2.0
            found[name] = found[SAMPLED + name] = np.where(np.isfinite(half), half, 0.0)
    return found


def compare(
    expected: Arrays,
    found: Arrays,
    *,
    scores: Scores,
    scales: Arrays | None = None,
    tolerance: float = TOLERANCE,
    has_steps: bool = False,
) -> list[Comparison]:
    """Compare every expected output with what was found.

    Floating-point values agree within `tolerance * max(1 + |expected|, scale)`. Where an integer
    action differs and is as good, what follows from it (its log-probability, its next state) is
    not compared.

    Args:
        expected: RLlib's answers.
        found: The candidate's answers, the same names and perhaps more.
        scores: See `action_scores`.
        scales: See `action_scales`; none: 0.
        tolerance: See above.
        has_steps: Whether the second axis counts steps.

    Raises:
        ValueError: An answer has another shape.
    """
    n_axes = 2 if has_steps else 1
    comparisons = {}
    tied: dict[str, NDArray[np.bool_]] = {}
    for name, values in expected.items():
        if found[name].shape != values.shape:
            raise ValueError(f"{name} has the shape {found[name].shape}, expected {values.shape}")
        if not np.issubdtype(values.dtype, np.floating):
            rows = _differing(values, found[name], n_axes)
            right = rows & _is_as_good(values, found[name], scores.get(name), tolerance, n_axes)
            prefix = _prefix(name)
            tied[prefix] = tied.get(prefix, False) | right
            comparisons[name] = _comparison(name, rows & ~right, 0.0, 0.0)
    for name, values in expected.items():
        if name not in comparisons:
            ignored = tied.get(_prefix(name)) if _follows_from_action(name) else None
            scale = (scales or {}).get(name, _NO_SCALE)
            error = _error(values, found[name], scale)
            comparisons[name] = _compare_floats(name, error, tolerance, n_axes, ignored)
    return [comparisons[name] for name in expected]


def _prefix(name: str) -> str:
    return SAMPLED if name.startswith(SAMPLED) else ""


def _follows_from_action(name: str) -> bool:
    return name.removeprefix(SAMPLED).split("/")[0] in ("action_logp", "next_state")


@dataclass(frozen=True)
class _Error:
    """How far two arrays are apart: absolutely, and in what the tolerance counts in."""

    difference: NDArray[np.float64]
    relative: NDArray[np.float64]


def _error(expected: NDArray[Any], found: NDArray[Any], scale: NDArray[Any]) -> _Error:
    wide, other = expected.astype(np.float64), found.astype(np.float64)
    with np.errstate(invalid="ignore"):
        # Equal infinities (a masked logit) do not differ.
        difference = np.where(wide == other, 0.0, np.abs(wide - other))
        size = 1.0 + np.abs(np.where(np.isfinite(wide), wide, 0.0))
        return _Error(difference, difference / np.maximum(size, scale))


def _compare_floats(
    name: str,
    error: _Error,
    tolerance: float,
    n_axes: int,
    ignored: NDArray[np.bool_] | None,
) -> Comparison:
    difference, relative = error.difference, error.relative
    if ignored is not None:
        rows = ignored.reshape(*ignored.shape, *[1] * (relative.ndim - n_axes))
        difference, relative = (np.where(rows, 0.0, values) for values in (difference, relative))
    # NaN compares false, so an answer that is not a number counts as a mismatch.
    bad = np.any(~(relative <= tolerance).reshape(*relative.shape[:n_axes], -1), axis=-1)
    return _comparison(name, bad, float(difference.max(initial=0)), float(relative.max(initial=0)))


def _differing(expected: NDArray[Any], found: NDArray[Any], n_axes: int) -> NDArray[np.bool_]:
    is_other = (expected != found).reshape(*expected.shape[:n_axes], -1)
    return np.asarray(is_other.any(axis=-1))


def _is_as_good(
    expected: NDArray[Any],
    found: NDArray[Any],
    scores: Sequence[NDArray[Any]] | None,
    tolerance: float,
    n_axes: int,
) -> NDArray[np.bool_]:
    """Which rows hold, expected and found, a best value of every component that differs."""
    lead = expected.shape[:n_axes]
    right = np.full(lead, scores is not None)
    actions = np.stack([each.reshape(*lead, -1) for each in (expected, found)])
    for index, own in enumerate(scores or ()):
        best = own.max(axis=-1)
        allowed = tolerance * (1.0 + np.abs(best))
        is_same = actions[0, ..., index] == actions[1, ..., index]
        for values in actions[..., index]:
            is_value = (values >= 0) & (values < own.shape[-1])
            place = np.where(is_value, values, 0)[..., None].astype(np.int64)
            taken = np.take_along_axis(own, place, axis=-1)[..., 0]
            right &= is_same | (is_value & (best - taken <= allowed))
    return right


def _comparison(
    name: str, rows: NDArray[np.bool_], max_difference: float, max_error: float
) -> Comparison:
    bad = np.argwhere(rows)
    return Comparison(
        name=name,
        max_difference=max_difference,
        max_error=max_error,
        n_compared=rows.size,
        n_mismatched=len(bad),
        first_mismatch=tuple(bad[0].tolist()) if len(bad) else None,
    )


def run_in_batches(
    run: Callable[[Arrays], Arrays], inputs: Arrays, batch_size: int
) -> dict[str, NDArray[Any]]:
    """Run rows in batches of one size and put the answers together again."""
    n_rows = len(next(iter(inputs.values())))
    parts = [
        run({name: rows[start : start + batch_size] for name, rows in inputs.items()})
        for start in range(0, n_rows, batch_size)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def replay(
    run: Run,
    inputs: Arrays,
    state: Mapping[str, StateSpec],
    names: Sequence[str],
    batch_size: int,
) -> dict[str, NDArray[Any]]:
    """Run golden inputs; for a policy with memory, episode by episode from the initial state.

    Args:
        run: A graph's `run`.
        inputs: The graph's inputs without state, (N, ...); with memory (N, T, ...) and
            `is_sampled` (N, T) bool, which action was taken, hence which state comes next.
        state: What the policy remembers.
        names: All outputs of the graph.
        batch_size: How many rows (episodes) run at once.

    Returns:
        The outputs, (N, ...) or (N, T, ...), and with memory `state/<name>`, the state that each
        step was given.
    """
    if not state:
        return run_in_batches(lambda batch: run(names, batch), inputs, batch_size)
    return run_in_batches(lambda batch: _play(run, batch, state, names), inputs, batch_size)


def _play(
    run: Run, inputs: Arrays, state: Mapping[str, StateSpec], names: Sequence[str]
) -> dict[str, NDArray[Any]]:
    is_sampled = inputs["is_sampled"]
    n_rows, n_steps = is_sampled.shape
    remembered = {
        f"state/{name}": np.array(np.broadcast_to(spec.initial, (n_rows, *spec.shape)))
        for name, spec in state.items()
    }
    steps = []
    for step in range(n_steps):
        here = {name: np.ascontiguousarray(values[:, step]) for name, values in inputs.items()}
        found = run(names, {**here, **remembered})
        steps.append({**found, **remembered})
        remembered = {
            f"state/{name}": _next_state(name, found, is_sampled[:, step]) for name in state
        }
    return {name: np.stack([each[name] for each in steps], axis=1) for name in steps[0]}


def _next_state(name: str, found: Arrays, is_sampled: NDArray[np.bool_]) -> NDArray[Any]:
    greedy = found[f"next_state/{name}"]
    sampled = found.get(f"{SAMPLED}next_state/{name}")
    if sampled is None:
        return greedy
    return np.where(is_sampled.reshape(-1, *[1] * (greedy.ndim - 1)), sampled, greedy)


def describe_mismatches(comparisons: list[Comparison], expected: Arrays, found: Arrays) -> str:
    """One sentence that names what differs, or an empty string."""
    sentences = []
    for item in comparisons:
        place = item.first_mismatch
        if place is not None:
            where = ", step ".join(map(str, place))
            sentences.append(
                f"{item.name} differs in {item.n_mismatched} of {item.n_compared} "
                f"{'steps' if len(place) > 1 else 'rows'} (row {where}: RLlib "
                f"{_short(expected[item.name][place])}, found {_short(found[item.name][place])})"
            )
    return "; ".join(sentences)


def _short(value: NDArray[Any]) -> str:
    return np.array2string(np.asarray(value), precision=6, threshold=6).replace("\n", "")
