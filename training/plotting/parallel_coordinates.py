"""Every trial of a search as a line through its settings to its objective."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from training.plotting.search import Parameter, Search, Trial
from training.plotting.search_look import (
    Look,
    is_log,
    log_ticks,
    number_text,
    place_of,
    range_of,
)
from training.plotting.style import Theme, count_text

_LANE = -0.12  # where trials without an objective end, below the axes of height 1
_ROUND = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])


def draw_parallel(axes: Axes, look: Look) -> None:
    """Every trial as a line through its settings to its objective, the best on top."""
    search = look.search
    scales = [_Scale.of_parameter(parameter, search) for parameter in search.parameters]
    scales.append(_Scale.of_objective(search))
    order = sorted(search.trials, key=lambda trial: trial is look.best)
    for trial in order:
        heights = [scale.height(trial) for scale in scales]
        if trial.objective is None:
            heights[-1] = None if not trial.is_over else _LANE
        points = [(x, y) for x, y in enumerate(heights) if y is not None]
        if len(points) < 2 or not trial.is_over:
            continue
        xs, ys = zip(*(_curve(points)), strict=True)
        axes.plot(xs, ys, **_line(trial, look))
    for x, scale in enumerate(scales):
        is_measured = scale.parameter is not None or look.best is not None
        _draw_scale(axes, x, scale, look.theme, is_measured=is_measured)
    below = {"not reached": search.unreached, "failed": search.failed}
    lane = " / ".join(name for name, trials in below.items() if trials)
    if lane:
        _write(axes, len(scales) - 1, _LANE, lane, look.theme)
    axes.set_xlim(-0.3, len(scales) - 0.7 + 0.25)
    axes.set_ylim(-0.2, 1.06)
    axes.set_xticks(range(len(scales)), [scale.name for scale in scales])
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.tick_params(length=0, pad=6)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _line(trial: Trial, look: Look) -> dict[str, Any]:
    if trial is look.best:
        return {"color": look.theme.bad, "linewidth": 2.8, "zorder": 4}
    if trial.objective is not None:
        return {"color": look.color(trial), "linewidth": 1.4, "alpha": 0.8, "zorder": 3}
    dashes = (0, (1.2, 1.6)) if trial.has_failed else (0, (4, 2))
    return {"color": look.theme.muted, "lw": 1.0, "ls": dashes, "alpha": 0.8, "zorder": 2}


def _curve(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Smooth steps between points: lines that cross at an axis stay apart to the eye."""
    along = np.linspace(0.0, 1.0, 24)
    ease = along * along * (3 - 2 * along)
    found: list[tuple[float, float]] = []
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        xs, ys = x0 + (x1 - x0) * along, y0 + (y1 - y0) * ease
        found.extend(zip(xs.tolist(), ys.tolist(), strict=True))
    return found


class _Scale(NamedTuple):
    """One upright axis of the parallel coordinates: values to heights from 0 to 1."""

    name: str
    parameter: Parameter | None
    low: float
    high: float
    is_log: bool

    @classmethod
    def of_parameter(cls, parameter: Parameter, search: Search) -> _Scale:
        """Over what it is drawn from, and every value that a trial has."""
        if parameter.is_categorical:
            return cls(parameter.name, parameter, -0.4, len(parameter.values) - 0.6, False)
        ends = _apart(range_of(parameter, search) or (0.0, 1.0))
        return cls(parameter.name, parameter, *ends, parameter.is_logarithmic)

    @classmethod
    def of_objective(cls, search: Search) -> _Scale:
        """From the smallest to the largest objective."""
        values = [trial.objective for trial in search.trials if trial.objective is not None]
        name = search.objective_label.split(" (")[0].replace(" to the ", "\nto the ")
        ends = _apart((min(values), max(values)) if values else (0.0, 1.0))
        return cls(name, None, *ends, bool(values) and is_log(values))

    def height(self, trial: Trial) -> float | None:
        """Where a trial's line meets the axis."""
        value = trial.objective if self.parameter is None else place_of(self.parameter, trial)
        if value is None:
            return None
        return self.at(value)

    def at(self, value: float) -> float:
        """A value's height."""
        if self.is_log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """Heights and what stands there: round values, or every category."""
        if self.parameter is not None and self.parameter.is_categorical:
            return [(self.at(i), text) for i, text in enumerate(self.parameter.values)]
        if self.is_log:
            values = log_ticks(self.low, self.high)
        else:
            values = list(_ROUND.tick_values(self.low, self.high))
        text = count_text if self.parameter is None else _significant
        return [(self.at(x), text(x)) for x in values if self.low <= x <= self.high]


def _significant(value: float) -> str:
    return number_text(float(f"{value:.2g}"))


def _apart(ends: tuple[float, float]) -> tuple[float, float]:
    low, high = ends
    return (low, high) if high > low else (low, low + (abs(low) or 1.0))


def _draw_scale(
    axes: Axes, x: int, scale: _Scale, theme: Theme, *, is_measured: bool = True
) -> None:
    axes.plot([x, x], [0, 1], color=theme.text, linewidth=1.4, zorder=5)
    for height, text in scale.ticks() if is_measured else ():
        axes.plot([x - 0.015, x + 0.015], [height] * 2, color=theme.text, lw=1.2, zorder=5)
        _write(axes, x, height, text, theme)


def _write(axes: Axes, x: float, height: float, text: str, theme: Theme) -> None:
    box = {"facecolor": theme.background, "edgecolor": "none", "alpha": 0.75, "pad": 1.0}
    axes.annotate(
        text,
        (x, height),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        bbox=box,
        zorder=7,
    )
