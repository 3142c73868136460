"""Learning curves of groups of runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from training.plotting.bands import Band, BandKind, Numbers, band_edges, common_band, smoothed
from training.plotting.errors import PlotError
from training.plotting.metrics import EVALUATION, RETURN, TRAINING, XAxis, metric_label
from training.plotting.runs import RunCurve, RunGroup
from training.plotting.style import Theme, count_text, line_style, rc_of

_WIDTH, _PANEL_HEIGHT, _EXTRA_HEIGHT = 8.0, 3.6, 1.2
_MIN_PANEL_HEIGHT = 2.3
_MAX_PANELS_IN_COLUMN = 3
_RANGE = ("episode_return_min", "episode_return_max")
_HOUR_S, _MINUTE_S = 3600.0, 60.0


@dataclass(frozen=True)
class CurveOptions:
    """How curves are drawn.

    Attributes:
        metrics: A panel each: `return`, or a column of progress.csv.
        x: What they run along.
        band: What lies around the mean of a group.
        smooth: Each point is the mean of so many iterations, itself the newest.
        title: Above the figure; None for the environment's.
        theme: Colours.
    """

    metrics: Sequence[str]
    x: XAxis
    band: BandKind
    smooth: int
    title: str | None
    theme: Theme


def learning_figure(groups: Sequence[RunGroup], options: CurveOptions) -> Figure:
    """Draw the metrics of groups of runs, a panel each, a line per group.

    A group of several seeds is drawn as the mean where all of them have data, with a band, and the
    seeds as thin lines. Evaluation returns are points of their own.

    Raises:
        PlotError: No run has a value of a metric, or one lacks what the curves run along.
    """
    _check_x(groups, options.x)
    with mpl.rc_context(rc_of(options.theme)):  # type: ignore[arg-type]  # its keys are literals
        figure, panels = _panels(len(options.metrics))
        unit, unit_text = _x_unit(groups, options.x)
        for axes, metric in zip(panels, options.metrics, strict=True):
            _draw_metric(axes, metric, groups, options, unit)
            _format(axes, metric, options)
        for axes in panels[-_n_columns(len(panels)) :]:
            axes.set_xlabel(unit_text)
        _draw_titles(figure, panels[0], groups, options)
        _draw_legend(figure, groups, options)
    return figure


def _panels(n: int) -> tuple[Figure, list[Axes]]:
    columns = _n_columns(n)
    rows = -(-n // columns)
    height = max(_MIN_PANEL_HEIGHT, _PANEL_HEIGHT - 0.5 * (rows - 1)) * rows + _EXTRA_HEIGHT
    width = _WIDTH * (1.4 if columns > 1 else 1.0)
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.06))
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
    flat = list(grid.ravel())
    for axes in flat[n:]:
        axes.remove()
    return figure, flat[:n]


def _n_columns(n: int) -> int:
    return 1 if n <= _MAX_PANELS_IN_COLUMN else 2


def _check_x(groups: Sequence[RunGroup], x: XAxis) -> None:
    for run in (run for group in groups for run in group.runs):
        if x.column not in run.columns:
            raise PlotError(
                f"{run.path}: its progress.csv has no column {x.column!r}, along which the curves "
                f"were to run (--x {x.value}); choose another --x"
            )


def _x_unit(groups: Sequence[RunGroup], x: XAxis) -> tuple[float, str]:
    """What x values are divided by, and the axis's label."""
    if x is XAxis.steps:
        return 1.0, "environment steps"
    if x is XAxis.iterations:
        return 1.0, "training iterations"
    longest = max(float(run.columns["time_s"][-1]) for group in groups for run in group.runs)
    if longest > 3 * _HOUR_S:
        return _HOUR_S, "training time (hours)"
    if longest > 3 * _MINUTE_S:
        return _MINUTE_S, "training time (minutes)"
    return 1.0, "training time (seconds)"


def _draw_metric(
    axes: Axes, metric: str, groups: Sequence[RunGroup], options: CurveOptions, unit: float
) -> None:
    is_return = metric == RETURN
    if is_return and _is_lone(groups):
        _draw_range(axes, groups[0].runs[0], options, unit)
    n_drawn = 0
    for index, group in enumerate(groups):
        style = line_style(index, options.theme)
        if metric != EVALUATION:
            curves = _curves(group, TRAINING if is_return else metric, options, unit)
            n_drawn += _draw_curve(axes, curves, options, style)
        if is_return or metric == EVALUATION:
            bars = _evaluation_std(groups)
            n_drawn += _draw_evaluations(axes, group, options, unit, style, bars)
    if not n_drawn:
        raise PlotError(f"there is nothing to draw: no run has a value of {metric} yet")
    if metric in (RETURN, TRAINING, EVALUATION):
        _draw_stops(axes, groups, options.theme)


def _curves(
    group: RunGroup, column: str, options: CurveOptions, unit: float
) -> list[tuple[Numbers, Numbers]]:
    """Each run's x and y where it has a value; runs without any are left out."""
    found = []
    for run in group.runs:
        y = run.columns.get(column)
        if y is None:
            continue
        has_value = np.isfinite(y)
        if has_value.any():
            x = run.columns[options.x.column][has_value] / unit
            found.append((x, smoothed(y[has_value], options.smooth)))
    return found


def _draw_curve(
    axes: Axes,
    curves: list[tuple[Numbers, Numbers]],
    options: CurveOptions,
    style: dict[str, Any],
) -> int:
    if not curves:
        return 0
    band = common_band(curves, options.band)
    if len(curves) > 1:
        for x, y in curves:
            axes.plot(x, y, color=style["color"], linewidth=0.8, alpha=0.35, zorder=2)
    if band is not None:
        _draw_band(axes, band, style["color"])
        axes.plot(band.x, band.mean, linewidth=2.0, zorder=4, **style)
        if len(band.x) == 1:  # a line of one point shows nothing
            axes.plot(band.x, band.mean, "o", color=style["color"], zorder=4)
    return len(curves)


def _is_lone(groups: Sequence[RunGroup]) -> bool:
    return sum(len(group.runs) for group in groups) == 1


def _draw_range(axes: Axes, run: RunCurve, options: CurveOptions, unit: float) -> None:
    """From the lowest to the highest of the episodes that a point is the mean of."""
    if _has_range(run):
        low, high = (run.columns[name] for name in _RANGE)
        x = run.columns[options.x.column] / unit
        color = line_style(0, options.theme)["color"]
        axes.fill_between(x, low, high, color=color, alpha=0.14, linewidth=0, zorder=2)


def _has_range(run: RunCurve) -> bool:
    return all(name in run.columns for name in _RANGE)


def _evaluation_std(groups: Sequence[RunGroup]) -> Numbers | None:
    """Of a lone run, one for each evaluation."""
    if not _is_lone(groups):
        return None
    columns = groups[0].runs[0].columns
    std = columns.get("evaluation_return_std")
    if std is None or EVALUATION not in columns:
        return None
    return np.asarray(np.nan_to_num(std[np.isfinite(columns[EVALUATION])]))


def _draw_band(axes: Axes, band: Band, color: str) -> None:
    if np.any(band.high > band.low):
        axes.fill_between(
            band.x, band.low, band.high, color=color, alpha=0.18, linewidth=0, zorder=3
        )


def _draw_evaluations(
    axes: Axes,
    group: RunGroup,
    options: CurveOptions,
    unit: float,
    style: dict[str, Any],
    bars: Numbers | None,
) -> int:
    """A point for each evaluation, as it was measured; the band as bars.

    Of several runs those iterations count in which all that are evaluated at all were evaluated.
    `bars` are a lone run's: one standard deviation of its evaluation episodes.
    """
    measured = [
        run.columns
        for run in group.runs
        if EVALUATION in run.columns and np.isfinite(run.columns[EVALUATION]).any()
    ]
    if not measured:
        return 0
    rows = [np.isfinite(columns[EVALUATION]) for columns in measured]
    iterations = [columns["iteration"][row] for columns, row in zip(measured, rows, strict=True)]
    common = functools.reduce(np.intersect1d, iterations)
    picked = [np.isin(columns["iteration"], common) for columns in measured]
    pairs = list(zip(measured, picked, strict=True))
    x = np.stack([columns[options.x.column][row] for columns, row in pairs]).mean(axis=0) / unit
    values = np.stack([columns[EVALUATION][row] for columns, row in pairs])
    mean = values.mean(axis=0)
    if len(measured) > 1:
        low, high = band_edges(values, options.band)
        bars = np.stack([mean - low, high - mean])
    points = {**_POINTS, "color": style["color"], "markerfacecolor": options.theme.background}
    axes.errorbar(x, mean, yerr=bars, **points)
    return len(measured)


_POINTS: dict[str, Any] = {
    "linestyle": (0, (1, 1.5)),
    "linewidth": 1.2,
    "elinewidth": 1.0,
    "capsize": 2.5,
    "marker": "o",
    "markersize": 5.5,
    "markeredgewidth": 1.6,
    "zorder": 5,
}


_EVALUATED = "stop (evaluation)"


def _draw_stops(axes: Axes, groups: Sequence[RunGroup], theme: Theme) -> None:
    """The returns that the runs were to stop at."""
    runs = [run for group in groups for run in group.runs]
    # Each kind has one label, at its own side: neighbouring lines would write over each other.
    sides = (
        ("stop.return", "stop", 0.0, "left"),
        ("stop.evaluation_return", _EVALUATED, 1.0, "right"),
    )
    for key, name, x, side in sides:
        found = {run.settings.get(key) for run in runs}
        values = sorted(each for each in found if isinstance(each, int | float))
        for value in values:
            axes.axhline(value, color=theme.muted, linewidth=1.2, linestyle=(0, (6, 4)), zorder=1)
        if not values:
            continue
        axes.annotate(
            f"{name} at {', '.join(f'{value:g}' for value in values)}",
            (x, values[-1]),
            xycoords=("axes fraction", "data"),
            xytext=(4 if side == "left" else -4, 3),
            textcoords="offset points",
            horizontalalignment=side,
            color=theme.muted,
            fontsize=9,
        )


def _format(axes: Axes, metric: str, options: CurveOptions) -> None:
    axes.set_ylabel(metric_label(metric))
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    if options.x is not XAxis.time:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count_text(value)))
    low, high = axes.get_ylim()
    if max(abs(low), abs(high)) >= 10_000:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count_text(value)))
    axes.margins(x=0.02)
    axes.tick_params(length=3)


def _draw_titles(
    figure: Figure, top: Axes, groups: Sequence[RunGroup], options: CurveOptions
) -> None:
    runs = [run for group in groups for run in group.runs]
    title = options.title
    if title is None:
        algorithms = _distinct(runs, lambda run: run.algo)
        title = f"{' and '.join(algorithms)} on {' and '.join(_distinct(runs, _env_of))}"
    figure.suptitle(title, x=0.02, ha="left", fontsize=13, fontweight="bold")
    notes = []
    windows = {run.settings.get("stop.window_episodes") for run in runs}
    has_returns = any(metric in (RETURN, TRAINING) for metric in options.metrics)
    if has_returns and len(windows) == 1 and None not in windows:
        notes.append(f"each point: the last {windows.pop()} training episodes")
    if options.smooth > 1:
        notes.append(f"smoothed over {options.smooth} iterations")
    if notes:
        top.set_title("; ".join(notes), loc="left", fontsize=9, color=options.theme.muted)


def _env_of(run: RunCurve) -> str:
    return run.env


def _distinct(runs: Sequence[RunCurve], key: Callable[[RunCurve], str]) -> list[str]:
    return list(dict.fromkeys(map(key, runs)))


def _draw_legend(figure: Figure, groups: Sequence[RunGroup], options: CurveOptions) -> None:
    theme = options.theme
    handles: list[Any] = []
    labels: list[str] = []
    for index, group in enumerate(groups):
        handles.append(Line2D([], [], linewidth=2.0, **line_style(index, theme)))
        labels.append(f"{group.label} ({group.count})" if _has_seeds(group) else group.label)
    if any(map(_has_seeds, groups)):
        if options.band is not BandKind.none:
            handles.append(Patch(color=theme.muted, alpha=0.3, linewidth=0))
            labels.append(options.band.text)
        handles.append(Line2D([], [], color=theme.muted, linewidth=0.8, alpha=0.7))
        labels.append("single seeds")
    if RETURN in options.metrics and _is_lone(groups) and _has_range(groups[0].runs[0]):
        labels[0] = "training, mean"
        handles.append(Patch(color=line_style(0, theme)["color"], alpha=0.14, linewidth=0))
        labels.append("lowest to highest episode")
    if RETURN in options.metrics and _has_evaluation(groups):
        points = {key: _POINTS[key] for key in ("linestyle", "linewidth", "marker", "markersize")}
        hollow: dict[str, Any] = {"markerfacecolor": theme.background, "markeredgewidth": 1.6}
        handles.append(Line2D([], [], color=theme.muted, **points, **hollow))
        bars = "" if _evaluation_std(groups) is None else ", ± 1 std"
        labels.append(f"evaluation ({_how_evaluated(groups)}){bars}")
    if len(handles) > 1 or len(groups) > 1:
        columns = min(len(handles), 3 if max(map(len, labels)) > 18 else 4)
        figure.legend(handles, labels, loc="outside lower left", ncols=columns)


def _has_seeds(group: RunGroup) -> bool:
    return len(group.runs) > 1


def _has_evaluation(groups: Sequence[RunGroup]) -> bool:
    columns = [run.columns.get(EVALUATION) for group in groups for run in group.runs]
    return any(column is not None and np.isfinite(column).any() for column in columns)


def _how_evaluated(groups: Sequence[RunGroup]) -> str:
    key = "evaluation.deterministic"
    found = {run.settings.get(key, True) for group in groups for run in group.runs}
    return {frozenset({True}): "greedy", frozenset({False}): "sampled"}.get(
        frozenset(found), "greedy or sampled"
    )
