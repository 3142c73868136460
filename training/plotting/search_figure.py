"""The report of a search: the objective against each hyperparameter, and all of them together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from training.plotting.parallel_coordinates import draw_parallel
from training.plotting.runs import shown
from training.plotting.search import Parameter, Search, Trial
from training.plotting.search_look import (
    Look,
    color_map,
    is_log,
    log_ticks,
    number_text,
    place_of,
    range_of,
    star,
)
from training.plotting.style import Theme, count_text, rc_of

_WIDTH, _PANEL_HEIGHT, _PARALLEL_HEIGHT, _EXTRA_HEIGHT = 9.5, 2.9, 3.1, 1.5
_MAX_COLUMNS = 3


def search_figure(search: Search, title: str | None, theme: Theme) -> Figure:
    """Draw a search as far as it has come.

    Args:
        search: At least one trial.
        title: Above the figure; None for the environment's.
        theme: Colours.
    """
    with mpl.rc_context(rc_of(theme)):  # type: ignore[arg-type]  # its keys are literals
        look = Look(search, theme, color_map(search, theme), search.best)
        figure, panels, parallel = _panels(len(search.parameters))
        for index, (axes, parameter) in enumerate(zip(panels, search.parameters, strict=True)):
            _draw_parameter(axes, parameter, look, is_first=index % _MAX_COLUMNS == 0)
        draw_parallel(parallel, look)
        if look.best is not None:
            _draw_colors(figure, parallel, look)
        _draw_titles(figure, look, title)
        _draw_legend(figure, look)
    return figure


_COUNTS = FuncFormatter(lambda value, _: count_text(value))


def _draw_colors(figure: Figure, beside: Axes, look: Look) -> None:
    bar = figure.colorbar(look.colors, ax=beside, pad=0.01, aspect=16)
    bar.set_label(_short(look.search.objective_label))
    bar.ax.yaxis.set_major_formatter(_COUNTS)
    bar.outline.set_visible(False)


def _panels(n: int) -> tuple[Figure, list[Axes], Axes]:
    rows = math.ceil(n / _MAX_COLUMNS)
    height = rows * _PANEL_HEIGHT + _PARALLEL_HEIGHT + _EXTRA_HEIGHT
    engine = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=(_WIDTH, height), layout=engine)
    ratios = [*[_PANEL_HEIGHT] * rows, _PARALLEL_HEIGHT]
    # Twelfths, so that rows of one, two or three panels fill the width.
    grid = figure.add_gridspec(rows + 1, 12, height_ratios=ratios)
    panels: list[Axes] = []
    for row in range(rows):
        in_row = min(_MAX_COLUMNS, n - row * _MAX_COLUMNS)
        span = 12 // (in_row if rows == 1 else _MAX_COLUMNS)
        for column in range(in_row):
            place = grid[row, column * span : (column + 1) * span]
            shared = panels[0] if panels else None
            panels.append(figure.add_subplot(place, sharey=shared))
    return figure, panels, figure.add_subplot(grid[rows, :])


def _draw_parameter(axes: Axes, parameter: Parameter, look: Look, *, is_first: bool) -> None:
    search = look.search
    measured = [trial for trial in search.trials if trial.objective is not None]
    for trial in measured:
        x = place_of(parameter, trial)
        if x is None or trial.objective is None or trial is look.best:
            continue
        is_open = trial.is_reached is False
        color = look.color(trial)
        face = look.theme.background if is_open else color
        axes.plot(x, trial.objective, "o", ms=6.5, mec=color, mfc=face, mew=1.2, alpha=0.9)
    if parameter.is_categorical:
        _draw_medians(axes, parameter, measured, look.theme)
    best = look.best
    x = None if best is None else place_of(parameter, best)
    if x is not None and best is not None and best.objective is not None:
        axes.plot(x, best.objective, **star(look))
    _draw_lane(axes, parameter, look)
    _format_parameter(axes, parameter, search, is_first=is_first)


def _draw_medians(
    axes: Axes, parameter: Parameter, measured: Sequence[Trial], theme: Theme
) -> None:
    for index, text in enumerate(parameter.values):
        values = [
            trial.objective
            for trial in measured
            if trial.objective is not None and shown(trial.config.get(parameter.key)) == text
        ]
        if len(values) > 1:
            middle = float(np.median(values))
            axes.plot([index - 0.32, index + 0.32], [middle] * 2, color=theme.text, lw=1.6)


def _draw_lane(axes: Axes, parameter: Parameter, look: Look) -> None:
    """Trials without an objective, on a line of their own below the panel's values."""
    theme = look.theme
    groups = (
        (look.search.unreached, {"marker": "v", "mec": theme.muted, "mfc": theme.background}),
        (look.search.failed, {"marker": "x", "mec": theme.bad, "mfc": theme.bad}),
    )
    transform = axes.get_xaxis_transform()
    for trials, marks in groups:
        for trial in trials:
            x = place_of(parameter, trial)
            if x is not None:
                shape: dict[str, Any] = {"linestyle": "none", "ms": 6, "mew": 1.4, **marks}
                axes.plot(x, 0.05, transform=transform, zorder=5, **shape)


def _format_parameter(axes: Axes, parameter: Parameter, search: Search, *, is_first: bool) -> None:
    axes.set_xlabel(parameter.key)
    if parameter.is_categorical:
        axes.set_xticks(range(len(parameter.values)), parameter.values)
        axes.set_xlim(-0.6, len(parameter.values) - 0.4)
        axes.grid(visible=False, axis="x")
        if len(parameter.values) > 4:
            axes.tick_params(axis="x", labelrotation=30)
    elif parameter.is_logarithmic:
        axes.set_xscale("log")
        low, high = range_of(parameter, search) or axes.get_xlim()
        axes.set_xlim(low * (low / high) ** 0.06, high * (high / low) ** 0.06)
        axes.xaxis.set_major_locator(FixedLocator(log_ticks(low, high)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value)))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(_COUNTS)
    _format_objective(axes, search)
    if is_first:
        axes.set_ylabel(_short(search.objective_label))
    else:
        axes.tick_params(labelleft=False)
    axes.tick_params(length=3)


def _format_objective(axes: Axes, search: Search) -> None:
    values = [trial.objective for trial in search.trials if trial.objective is not None]
    if not values:
        axes.set_yticks([])
        return
    if is_log(values):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
        low, high = min(values), max(values)
        room = (high / low) ** 0.1
        axes.set_ylim(low / room**1.8, high * room)
    else:
        spread = (max(values) - min(values)) or abs(values[0]) or 1.0
        axes.set_ylim(min(values) - 0.18 * spread, max(values) + 0.1 * spread)
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(_COUNTS)


def _short(label: str) -> str:
    """A label in two lines where it has a part in brackets."""
    return label.replace(" (", "\n(", 1)


def _exact(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _draw_titles(figure: Figure, look: Look, title: str | None) -> None:
    search = look.search
    heading = title or f"Search: {search.algo} on {search.env}"
    figure.suptitle(
        f"{heading}\n", x=0.02, ha="left", fontsize=13, fontweight="bold", linespacing=1.5
    )  # the second line keeps the room that the summary is written into
    best = look.best
    text = search.summary
    if best is not None:
        settings = ", ".join(
            f"{parameter.name} {shown(best.config.get(parameter.key))}"
            for parameter in search.parameters
        )
        text += f"; best: {best.name} with {_exact(best.objective or 0.0)} ({settings})"
    height = figure.get_figheight()
    figure.text(0.02, 1 - 0.47 / height, text, fontsize=9, color=look.theme.muted, va="center")


def _draw_legend(figure: Figure, look: Look) -> None:
    theme, search = look.theme, look.search
    fill = {"marker": "o", "mfc": theme.muted, "mec": theme.muted, "ms": 6.5}
    hollow = {**fill, "mfc": theme.background}
    measured = [trial for trial in search.trials if trial.objective is not None]
    below = any(trial.is_reached is False for trial in measured)
    has_medians = any(parameter.is_categorical for parameter in search.parameters)
    is_any = look.best is not None
    entries: list[tuple[bool, dict[str, Any], str]] = [
        (is_any, star(look), "best trial"),
        (is_any, fill, "trial"),
        (below, hollow, "ended below the stop return"),
        (is_any and has_medians, {"color": theme.text, "linewidth": 1.6}, "median"),
        (bool(search.unreached), {**hollow, "marker": "v", "mew": 1.4}, "stop return not reached"),
        (bool(search.failed), {"marker": "x", "mec": theme.bad, "mew": 1.4}, "failed"),
    ]
    shown_entries = [(marks, text) for is_shown, marks, text in entries if is_shown]
    handles = [
        Line2D([], [], **{"linestyle": "none" if "marker" in marks else "solid", **marks})
        for marks, _ in shown_entries
    ]
    texts = [text for _, text in shown_entries]
    figure.legend(handles, texts, loc="outside lower left", ncols=len(texts) or 1)
