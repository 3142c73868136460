"""Does a graph answer as RLlib did? The comparison that export and every load make.

Expected and found are dictionaries from an output's name to its array; the names are those of
the manifest's `outputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# float32 networks of two runtimes differ by a few 1e-7 (docs/export.md); 1e-5 leaves room for
# other processors and still catches weights rounded to float16 (1e-4).
TOLERANCE = 1e-5
BATCH_SIZES = (1, 7, 64)

Arrays = Mapping[str, NDArray[Any]]
Runner = Callable[[NDArray[np.float32], NDArray[np.float32]], Arrays]


@dataclass(frozen=True)
class Comparison:
    """One output compared.

    Attributes:
        name: The output.
        max_difference: Largest |expected - found| (floating-point outputs), else 0.
        max_error: Largest |expected - found| / (1 + |expected|), which the tolerance bounds.
        n_compared: Rows compared.
        n_mismatched: Rows that differ by more than the tolerance; for integer actions, rows
            with another action whose score is not within the tolerance of the best.
        first_mismatch: The first such row, or None.
    """

    name: str
    max_difference: float
    max_error: float
    n_compared: int
    n_mismatched: int
    first_mismatch: int | None


def compare(
    expected: Arrays,
    found: Arrays,
    noise: NDArray[np.float32],
    scores: NDArray[np.float32],
    tolerance: float = TOLERANCE,
) -> list[Comparison]:
    """Compare every expected output with what was found.

    Floating-point values agree within `tolerance * (1 + |expected|)`.

    Args:
        expected: RLlib's answers.
        found: The candidate's answers, the same names.
        noise: (B, D) float32, what both got; Gumbel noise decides which samples are ties.
        scores: (B, K) float32, RLlib's distribution inputs: where the two best lie closer than
            the tolerance, either integer action is right.
        tolerance: See above.
    """
    return [
        _compare_integers(
            name,
            values,
            found[name],
            scores + noise if name.startswith("sampled_") else scores,
            tolerance,
        )
        if np.issubdtype(values.dtype, np.integer)
        else _compare_floats(name, values, found[name], tolerance)
        for name, values in expected.items()
    ]


def _compare_floats(
    name: str, expected: NDArray[Any], found: NDArray[Any], tolerance: float
) -> Comparison:
    difference = np.abs(expected.astype(np.float64) - found.astype(np.float64))
    error = difference / (1.0 + np.abs(expected.astype(np.float64)))
    # NaN compares false, so an answer that is not a number counts as a mismatch.
    rows = np.any(~(error <= tolerance).reshape(len(expected), -1), axis=1)
    return _comparison(name, rows, float(difference.max(initial=0)), float(error.max(initial=0)))


def _compare_integers(
    name: str,
    expected: NDArray[Any],
    found: NDArray[Any],
    scores: NDArray[Any],
    tolerance: float,
) -> Comparison:
    # Where several scores are as good as the best, any of them is right.
    best = scores.max(axis=1).astype(np.float64)
    allowed = tolerance * (1.0 + np.abs(best))
    is_tie = np.ones(len(expected), dtype=np.bool_)
    for actions in (expected, found):
        is_index = (actions >= 0) & (actions < scores.shape[1])
        taken = scores[np.arange(len(actions)), np.where(is_index, actions, 0)]
        is_tie &= is_index & (best - taken <= allowed)
    return _comparison(name, (expected != found) & ~is_tie, 0.0, 0.0)


def _comparison(
    name: str, rows: NDArray[np.bool_], max_difference: float, max_error: float
) -> Comparison:
    bad = np.flatnonzero(rows)
    return Comparison(
        name=name,
        max_difference=max_difference,
        max_error=max_error,
        n_compared=len(rows),
        n_mismatched=len(bad),
        first_mismatch=int(bad[0]) if len(bad) else None,
    )


def run_in_batches(
    runner: Runner,
    observations: NDArray[np.float32],
    noise: NDArray[np.float32],
    batch_size: int,
) -> dict[str, NDArray[Any]]:
    """Run rows in batches of one size and put the answers together again."""
    parts = [
        runner(observations[start : start + batch_size], noise[start : start + batch_size])
        for start in range(0, len(observations), batch_size)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def describe_mismatches(comparisons: list[Comparison], expected: Arrays, found: Arrays) -> str:
    """One sentence that names what differs, or an empty string."""
    sentences = [
        f"{item.name} differs in {item.n_mismatched} of {item.n_compared} rows (row "
        f"{item.first_mismatch}: RLlib {_short(expected[item.name][item.first_mismatch])}, found "
        f"{_short(found[item.name][item.first_mismatch])})"
        for item in comparisons
        if item.first_mismatch is not None
    ]
    return "; ".join(sentences)


def _short(value: NDArray[Any]) -> str:
    return np.array2string(np.asarray(value), precision=6, threshold=6).replace("\n", "")
