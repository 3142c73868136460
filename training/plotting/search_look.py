"""What the parts of a search's report share: colours, marks, and places along a parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, Normalize

from training.plotting.runs import shown
from training.plotting.search import Parameter, Search, Trial
from training.plotting.style import Theme

_LOG_RATIO = 20.0  # of the objective's ends: beyond it an even scale hides the small ones
_JITTER = 0.22
_MIN_TICKS = 4


class Look(NamedTuple):
    """What all parts of the figure share."""

    search: Search
    theme: Theme
    colors: ScalarMappable
    best: Trial | None

    def color(self, trial: Trial) -> Any:
        """A trial's colour by its objective."""
        return self.colors.to_rgba(np.array([trial.objective or 0.0]))[0]


def color_map(search: Search, theme: Theme) -> ScalarMappable:
    """Objectives as shades of viridis, on a logarithm where they differ much."""
    values = [trial.objective for trial in search.trials if trial.objective is not None] or [0.0]
    low, high = min(values), max(values)
    if is_log(values):
        norm: Normalize = LogNorm(low, high)
    else:
        norm = Normalize(low, high if high > low else low + 1.0)
    # The best end is the one that stands out from the background; the other stays visible on it.
    weakest, strongest = theme.scale
    ends = (strongest, weakest) if search.is_minimised else (weakest, strongest)
    shades = mpl.colormaps["viridis"](np.linspace(*ends, 256))
    return ScalarMappable(norm, ListedColormap(shades))


def is_log(values: Sequence[float]) -> bool:
    """Whether objectives, at least one, are to be shown on a logarithm."""
    return min(values) > 0 and max(values) / min(values) > _LOG_RATIO


def star(look: Look) -> dict[str, Any]:
    """The mark of the best trial."""
    return {
        "marker": "*",
        "ms": 15,
        "mew": 1.1,
        "linestyle": "none",
        "zorder": 6,
        "mfc": look.theme.bad,
        "mec": look.theme.background,
    }


def place_of(parameter: Parameter, trial: Trial) -> float | None:
    """Where a trial stands along a parameter; None if it has no usable value."""
    value = trial.config.get(parameter.key)
    if parameter.is_categorical:
        text = shown(value)
        if value is None or text not in parameter.values:
            return None
        return parameter.values.index(text) + jitter(trial.name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if value > 0 or not parameter.is_logarithmic else None


def jitter(name: str) -> float:
    """The same for the same trial: values of one category don't hide each other."""
    spread = (sum(ord(letter) * (7 + index) for index, letter in enumerate(name)) * 61) % 101
    return (spread / 100 - 0.5) * 2 * _JITTER


def number_text(value: float) -> str:
    """A small number shortly: 0.003, 3e-5."""
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:g}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def range_of(parameter: Parameter, search: Search) -> tuple[float, float] | None:
    """From the smallest to the largest value that a parameter is drawn from, or that a trial has.

    The second can lie outside: population based training multiplies what a trial began with.
    """
    places = [place_of(parameter, trial) for trial in search.trials]
    ends = [end for end in (parameter.low, parameter.high) if isinstance(end, int | float)]
    values = [*ends, *(place for place in places if place is not None)]
    return (min(values), max(values)) if values else None


def log_ticks(low: float, high: float) -> list[float]:
    """Round places between two positive numbers: 1 and 3 of each decade, more in a narrow range."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7)):
        found = [digit * 10.0**exponent for exponent in exponents for digit in digits]
        found = [place for place in found if low * 0.999 <= place <= high * 1.001]
        if len(found) >= _MIN_TICKS:
            break
    return found
