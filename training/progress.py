"""What a run says while it trains: rows of progress.csv, and a live line on the terminal."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from training.config import StopConfig

_PLAIN_LINE_EVERY_S = 5.0


@dataclass(frozen=True)
class ProgressRow:
    """One row of progress.csv. Means are None where no episode ended.

    Attributes:
        iteration: Counted from 1.
        env_steps: So far, over the whole run.
        time_s: Training seconds so far, over the whole run, without Ray's start.
        episode_return_mean: Of the newest `stop.window_episodes` episodes.
        episode_return_min: Over the same episodes.
        episode_return_max: Over the same episodes.
        episode_length_mean: Over the same episodes, in steps.
        n_episodes: That ended in this iteration.
        n_terminated: Of them, those that ended by the environment's own rule.
        n_truncated: Of them, those that were cut off, for example by a time limit.
        evaluation_return_mean: Of this iteration's evaluation; None without one.
        evaluation_return_std: Its population's standard deviation.
        evaluation_length_mean: Of the same episodes, in steps.
        n_evaluation_episodes: How many it has.
        n_evaluation_terminated: Of them, those that ended by the environment's own rule.
        n_evaluation_truncated: Of them, those that were cut off.
        env_steps_per_s: In this iteration, learning included, without the evaluation.
        losses: The algorithm's own columns (`training.losses.LOSSES`); docs/metrics.md has them.
    """

    iteration: int
    env_steps: int
    time_s: float
    episode_return_mean: float | None
    episode_return_min: float | None
    episode_return_max: float | None
    episode_length_mean: float | None
    n_episodes: int
    n_terminated: int
    n_truncated: int
    evaluation_return_mean: float | None
    evaluation_return_std: float | None
    evaluation_length_mean: float | None
    n_evaluation_episodes: int | None
    n_evaluation_terminated: int | None
    n_evaluation_truncated: int | None
    env_steps_per_s: float
    losses: Mapping[str, float]

    def cells(self) -> dict[str, float | int | None]:
        """Every column of progress.csv by its name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**{name: value for name, value in named.items() if name != "losses"}, **self.losses}


class ProgressFile:
    """Appends rows to progress.csv; each is on disk before the next iteration starts."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, row: ProgressRow) -> None:
        """Write one row, and the header before the first."""
        is_new = not self._path.exists() or self._path.stat().st_size == 0
        with self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if is_new:
                writer.writerow(row.cells())
            writer.writerow(_cell(value) for value in row.cells().values())


class ProgressLine:
    """A line that follows the run on a terminal; a plain line now and then elsewhere."""

    def __init__(self, console: Console, stop: StopConfig, *, quiet: bool = False) -> None:
        self._console = console
        self._stop = stop
        self._quiet = quiet
        self._live = Live(console=console, transient=True, auto_refresh=False)
        self._speed: float | None = None
        self._evaluation: float | None = None
        self._next_plain_line_s = 0.0

    def __enter__(self) -> ProgressLine:
        if self._console.is_terminal and not self._quiet:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live.is_started:
            self._live.stop()

    def show(self, row: ProgressRow) -> None:
        """Show an iteration."""
        if self._quiet:
            return
        speed = row.env_steps_per_s
        self._speed = speed if self._speed is None else 0.8 * self._speed + 0.2 * speed
        text = self._text(row)
        if self._live.is_started:
            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
        elif time.monotonic() >= self._next_plain_line_s:
            self._next_plain_line_s = time.monotonic() + _PLAIN_LINE_EVERY_S
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _text(self, row: ProgressRow) -> str:
        mean = row.episode_return_mean
        if row.evaluation_return_mean is not None:
            self._evaluation = row.evaluation_return_mean
        parts = [
            f"iteration {row.iteration}",
            f"{row.env_steps:,} steps",
            "return -" if mean is None else f"return {return_text(mean)}",
            "" if self._evaluation is None else f"evaluation {return_text(self._evaluation)}",
            f"{self._speed or 0.0:,.0f} steps/s",
            self._left(row),
        ]
        return "  ".join(part for part in parts if part)

    def _left(self, row: ProgressRow) -> str:
        left: list[float] = []
        if self._stop.timesteps is not None and self._speed:
            left.append(max(0.0, (self._stop.timesteps - row.env_steps) / self._speed))
        if self._stop.time_s is not None:
            left.append(max(0.0, self._stop.time_s - row.time_s))
        if not left:
            return ""
        # A stop return can come at any time, so with one the time is an upper bound.
        bound = "at most " if self._stop.episode_return is not None else ""
        return f"{bound}{_duration(min(left))} left"


def return_text(value: float) -> str:
    """A return for the terminal: 484.0, -1076.1, 0.744."""
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    whole = math.ceil(seconds)
    return f"{whole} s" if whole < 120 else f"{whole // 60} min {whole % 60:02d} s"


def _cell(value: float | int | None) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
