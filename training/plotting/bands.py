"""Several seeds as one line with a band."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
_N_GRID = 400  # points of a line: more than a figure's pixels can show apart


class BandKind(str, enum.Enum):
    """What a band covers: of the mean, of the seeds, or nothing."""

    ci95 = "ci95"
    std = "std"
    minmax = "minmax"
    none = "none"

    @property
    def text(self) -> str:
        """As a legend says it."""
        return {"ci95": "95 % CI of the mean", "std": "± 1 std", "minmax": "min to max"}.get(
            self.value, ""
        )


class Band(NamedTuple):
    """A mean and what lies around it.

    Attributes:
        x: (n,) places.
        mean: (n,) over the runs.
        low: (n,) the band's lower edge; the mean itself where there is none.
        high: (n,) likewise.
    """

    x: Numbers
    mean: Numbers
    low: Numbers
    high: Numbers


def common_band(curves: Sequence[tuple[Numbers, Numbers]], kind: BandKind) -> Band | None:
    """Curves on one grid, where every one of them has data; linear in between.

    Args:
        curves: Each x, increasing, and y, both (n_i,) and finite; n_i at least 1.
        kind: What the band covers. Of a single curve there is none.

    Returns:
        None if there is no place that all curves have.
    """
    low = max(x[0] for x, _ in curves)
    high = min(x[-1] for x, _ in curves)
    if low > high:
        return None
    inside = curves[0][0][(curves[0][0] >= low) & (curves[0][0] <= high)]
    grid = inside if len(curves) == 1 else np.unique([low, *np.linspace(low, high, _N_GRID), high])
    values = np.stack([np.interp(grid, x, y) for x, y in curves])
    return Band(grid, values.mean(axis=0), *band_edges(values, kind))


def band_edges(values: Numbers, kind: BandKind) -> tuple[Numbers, Numbers]:
    """The band around the mean of some runs.

    Args:
        values: (n_runs, n) one row per run.
        kind: `ci95` is Student's t interval of the mean, `std` one sample standard deviation on
            either side, `minmax` the range.

    Returns:
        Its lower and upper edge, (n,) each; the mean twice for a single run or `none`.
    """
    n = len(values)
    mean = values.mean(axis=0)
    if n < 2 or kind is BandKind.none:
        return mean, mean
    if kind is BandKind.minmax:
        return values.min(axis=0), values.max(axis=0)
    half = values.std(axis=0, ddof=1)
    if kind is BandKind.ci95:
        from scipy.special import stdtrit  # it takes long to import

        half = half * float(stdtrit(n - 1, 0.975)) / np.sqrt(n)
    return mean - half, mean + half


def smoothed(values: Numbers, window: int) -> Numbers:
    """Each value's mean with the up to `window - 1` values before it."""
    if window <= 1:
        return values
    total = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return np.asarray((total[ends] - total[starts]) / (ends - starts))
