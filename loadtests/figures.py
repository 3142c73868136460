"""The figures of a load test's report."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)
from numpy.typing import NDArray

from loadtests.steps import Step
from loadtests.summary import windows
from loadtests.verdicts import load_of

# Distinguishable with any colour vision (Okabe and Ito).
_BLUE, _ORANGE, _RED, _GREEN = "#0072b2", "#e69f00", "#d55e00", "#009e73"
_SHADES = "viridis"
_WIDTH = 8.0
_HEIGHT = 3.2
_TICKS = (0.0, 50.0, 90.0, 99.0, 99.9, 99.99, 99.999)
# So many values have to lie beyond a point of the percentile curve.
_N_BEYOND = 10
_STYLE = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.hashsalt": "policyserve",
}


def figures(steps: Sequence[Step], told: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """Every figure that the steps of a load test give, by its title.

    Args:
        steps: What was measured.
        told: The figures of each step.
    """
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]  # its keys are literals
        found: dict[str, Figure] = {}
        if len(steps) > 1:
            found["Latency against throughput"] = _latency_throughput(told)
        else:
            found["Latency over time"] = _over_time(steps[0])
        if any(step.recording.is_ok.sum() > _N_BEYOND for step in steps):
            found["Percentiles of the latency"] = _percentiles(steps, told)
        if len(steps) > 1:
            if all(each["server_cpu_percent"] is not None for each in told):
                found["CPU against throughput"] = _cpu_throughput(told)
        elif told[0]["server_cpu_percent"] is not None:
            found["The server's CPU and memory"] = _server(steps[0])
        returns = np.concatenate([step.recording.returns for step in steps])
        if len(returns):
            found["Episode returns"] = _returns(returns)
        return found


def to_svg(figure: Figure) -> str:
    """A figure as an element for a page of HTML."""
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]  # its keys are literals
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _new(height: float = _HEIGHT, rows: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)
    return figure, list(axes[:, 0])


def _logarithmic_ms(axis: Axes) -> None:
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    # Two decades or less have too few powers of ten to read a value by.
    subs = (1.0, 2.0, 5.0) if high / low < 1e3 else (1.0,)
    axis.yaxis.set_major_locator(LogLocator(subs=subs))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylabel("latency (ms)")


def _legend_above(axis: Axes) -> None:
    if not axis.get_legend_handles_labels()[0]:
        return
    axis.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4, borderaxespad=0.1)


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> NDArray[np.float64]:
    return np.array([np.nan if row[key] is None else row[key] for row in rows], float)


def _over_time(step: Step) -> Figure:
    rows = windows(step)
    at_s = _series(rows, "start_s")
    width = at_s[1] if len(at_s) > 1 else step.recording.duration_s
    figure, (latency, rate) = _new(5.0, rows=2)
    middle = at_s + width / 2.0
    for key, label, colour in (
        ("max_ms", "largest", _RED),
        ("p99_ms", "p99", _ORANGE),
        ("p50_ms", "median", _BLUE),
    ):
        values = _series(rows, key)
        if np.isfinite(values).any():
            latency.plot(middle, values, color=colour, label=label, marker=".", markersize=3)
    _logarithmic_ms(latency)
    if not step.recording.is_ok.any():
        latency.text(0.5, 0.5, "no right answer", ha="center", transform=latency.transAxes)
    _legend_above(latency)
    rate.step(at_s, _series(rows, "answers_per_s"), where="post", color=_GREEN, label="answers")
    if step.plan.rate is not None:
        rate.axhline(step.plan.rate, color="grey", linestyle=":", label="asked for")
    errors = _series(rows, "n_errors") / width
    if errors.any():
        rate.step(at_s, errors, where="post", color=_RED, label="errors")
    rate.set_ylim(bottom=0.0)
    rate.set_ylabel("per second")
    rate.set_xlabel(f"time since the start (s), in windows of {width:g} s")
    _legend_above(rate)
    return figure


def _latency_throughput(told: Sequence[Mapping[str, Any]]) -> Figure:
    figure, (axis,) = _new(3.8)
    answered = [each for each in told if each["p50_ms"] is not None]
    rate = [each["requests_per_s"] for each in answered]
    for key, label, colour in (("p99_ms", "p99", _ORANGE), ("p50_ms", "median", _BLUE)):
        axis.plot(rate, [each[key] for each in answered], "o-", color=colour, label=label)
    void = [each for each in answered if each["driver_was_limit"]]
    if void:
        axis.plot(
            [each["requests_per_s"] for each in void],
            [each["p99_ms"] for each in void],
            "x",
            color="black",
            markersize=9,
            label="the driver was the limit",
        )
    for each in answered:
        axis.annotate(
            load_of(each),
            (each["requests_per_s"], each["p99_ms"]),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=7.5,
        )
    axis.margins(x=0.12, y=0.15)
    _logarithmic_ms(axis)
    axis.set_xlim(left=0.0)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_xlabel("right answers per second")
    _legend_above(axis)
    return figure


def _percentiles(steps: Sequence[Step], told: Sequence[Mapping[str, Any]]) -> Figure:
    figure, (axis,) = _new(3.6)
    colours = mpl.colormaps[_SHADES](np.linspace(0.0, 0.85, len(steps)))
    furthest = 50.0
    for step, each, colour in zip(steps, told, colours, strict=True):
        latency = step.recording.ok_latency_ms
        n = len(latency)
        if n <= _N_BEYOND:
            continue
        last = 100.0 * (1.0 - _N_BEYOND / n)
        furthest = max(furthest, last)
        decades = np.linspace(0.0, -np.log10(1.0 - last / 100.0), 200)
        percents = 100.0 * (1.0 - 10.0**-decades)
        axis.plot(decades, np.percentile(latency, percents), color=colour, label=load_of(each))
    ticks = [tick for tick in _TICKS if tick <= furthest + 1e-9]
    axis.xaxis.set_major_locator(FixedLocator([-np.log10(1.0 - tick / 100.0) for tick in ticks]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticklabels([f"{tick:g} %" for tick in ticks])
    _logarithmic_ms(axis)
    axis.set_xlabel("share of the answers that were at least as fast")
    if len(steps) > 1:
        _legend_above(axis)
    return figure


def _server(step: Step) -> Figure:
    samples = step.samples
    at_s = np.array(samples.at_s) - step.recording.started
    is_during = (at_s >= 0.0) & (at_s <= step.recording.duration_s + 0.5)
    figure, (cpu, memory) = _new(4.2, rows=2)
    cpu.plot(at_s[is_during], np.array(samples.cpu_percent)[is_during], color=_BLUE)
    cpu.set_ylim(bottom=0.0)
    cpu.set_ylabel("CPU (% of one core)")
    memory.plot(at_s[is_during], np.array(samples.rss_mb)[is_during], color=_GREEN)
    low, high = memory.get_ylim()
    if high - low < 0.02 * high:  # or rounding looks like growth
        memory.set_ylim(0.98 * low, 1.02 * high)
    memory.ticklabel_format(useOffset=False)
    memory.set_ylabel("memory (MB)")
    memory.set_xlabel("time since the start (s)")
    return figure


def _cpu_throughput(told: Sequence[Mapping[str, Any]]) -> Figure:
    figure, (axis,) = _new()
    rate = [each["requests_per_s"] for each in told]
    for key, label, colour in (
        ("server_cpu_percent", "server", _BLUE),
        ("driver_cpu_percent", "driver", _ORANGE),
    ):
        axis.plot(rate, [each[key] for each in told], "o-", color=colour, label=label)
    axis.set_xlim(left=0.0)
    axis.set_ylim(bottom=0.0)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_xlabel("right answers per second")
    axis.set_ylabel("CPU (% of one core)")
    _legend_above(axis)
    return figure


def _returns(returns: NDArray[np.float64]) -> Figure:
    figure, (axis,) = _new(2.6)
    low, high = float(returns.min()), float(returns.max())
    spread = max(high - low, 1e-9, 1e-3 * abs(high))
    axis.hist(
        returns,
        bins=min(40, max(5, len(returns) // 3)),
        color=_GREEN,
        range=(low - 0.02 * spread, high + 0.02 * spread),
    )
    axis.axvline(float(returns.mean()), color="black", linestyle=":", label="mean")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.ticklabel_format(axis="x", useOffset=False)
    axis.set_xlabel("return of an episode")
    axis.set_ylabel("episodes")
    _legend_above(axis)
    return figure
