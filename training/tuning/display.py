"""What a search shows while it runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from training.tuning.outcomes import FAILED, STOPPED, Outcome, rank
from training.tuning.search import SearchJob
from training.tuning.trial import RETURN, TRIAL, VALUES

_N_RANKED = 8
_REFRESH_S = 0.25


class SearchDisplay:
    """Shows the running trials, the ended ones by rank, and how long it may take.

    Args:
        console: Where it is shown.
        job: The search.
        quiet: Show nothing.
    """

    def __init__(self, console: Console, job: SearchJob, *, quiet: bool = False) -> None:
        self._console = console
        self._job = job
        self._quiet = quiet
        self._live = Live(console=console, transient=True, auto_refresh=False)
        self._running: dict[str, dict[str, Any]] = {}
        self._outcomes = {item.trial: item for item in job.outcomes() if item.has_ended}
        self._n_before = len(self._outcomes)
        self._started_s = time.monotonic()
        self._next_refresh_s = 0.0
        self._values = {trial.name: dict(trial.values) for trial in job.trials}

    def __enter__(self) -> SearchDisplay:
        if self._console.is_terminal and not self._quiet:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live.is_started:
            self._live.stop()

    def started(self, name: str) -> None:
        """A trial begins or goes on."""
        self._running.setdefault(name, {})

    def progressed(self, name: str, row: Mapping[str, Any]) -> None:
        """A trial has trained an iteration."""
        self._running[name] = dict(row)
        self._values[name] = row["config"][TRIAL][VALUES]  # pbt changes them

    def ended(self, outcome: Outcome) -> None:
        """A trial isn't run any more."""
        self._running.pop(outcome.trial, None)
        self._outcomes[outcome.trial] = outcome
        if not self._live.is_started and not self._quiet:
            line = f"{len(self._outcomes)}/{len(self._job.trials)}  {self._line(outcome)}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def tick(self) -> None:
        """Draw the table anew, if it is time."""
        now = time.monotonic()
        if self._live.is_started and now >= self._next_refresh_s:
            self._next_refresh_s = now + _REFRESH_S
            self._live.update(self.render(), refresh=True)

    def render(self) -> Group:
        """The live table."""
        return Group(Text(self._headline()), *filter(None, (self._now(), self._ranked())))

    def _headline(self) -> str:
        n_ended, n_trials = len(self._outcomes), len(self._job.trials)
        parts = [f"{n_ended} of {n_trials} trials ended", f"{len(self._running)} running"]
        n_failed = sum(item.status == FAILED for item in self._outcomes.values())
        parts += [f"{n_failed} failed"] if n_failed else []
        return ", ".join(parts) + self._left()

    def _left(self) -> str:
        n_ended = len(self._outcomes) - self._n_before
        if not n_ended:
            return ""
        # Those that run are half done, on average.
        n_left = len(self._job.trials) - len(self._outcomes) - len(self._running) / 2
        seconds = (time.monotonic() - self._started_s) * max(n_left, 0.0) / n_ended
        return f"; about {_duration(seconds)} left"

    def _now(self) -> Table | None:
        if not self._running:
            return None
        table = _table("running", "steps", "return", "steps/s", *self._names())
        for name, row in sorted(self._running.items()):
            table.add_row(
                name,
                f"{row['env_steps']:,}" if row else "starting",
                _number(row.get(RETURN)),
                f"{row['env_steps_per_s']:,.0f}" if row else "",
                *self._settings(self._values[name]),
            )
        return table

    def _ranked(self) -> Table | None:
        if not self._outcomes:
            return None
        settings = self._job.search.settings
        table = _table(
            "ended", "steps", "return", objective_name(settings.objective), *self._names()
        )
        for outcome in rank(list(self._outcomes.values()), settings)[:_N_RANKED]:
            table.add_row(
                outcome.trial,
                f"{outcome.env_steps:,}",
                _number(outcome.best_return),
                _objective(outcome),
                *self._settings(outcome.values),
            )
        return table

    def _names(self) -> list[str]:
        return [parameter.path[-1] for parameter in self._job.search.parameters]

    def _settings(self, values: Mapping[str, Any]) -> list[str]:
        return [show_value(values[item.key]) for item in self._job.search.parameters]

    def _line(self, outcome: Outcome) -> str:
        pairs = zip(self._names(), self._settings(outcome.values), strict=True)
        settings = ", ".join(f"{name} {value}" for name, value in pairs)
        seen = f"return {_number(outcome.best_return)} after {outcome.env_steps:,} steps"
        if outcome.status == FAILED:
            seen = f"failed: {outcome.error}"
        elif outcome.status == STOPPED:
            seen += ", stopped early"
        elif outcome.reached and self._job.search.settings.mode == "min":
            seen = f"reached its return after {outcome.env_steps:,} steps, {outcome.time_s:.1f} s"
        return f"{outcome.trial}  {seen}  ({settings})"


def objective_name(objective: str | None) -> str:
    """The objective as a person says it."""
    return {
        "timesteps_to_stop_return": "steps to the stop return",
        "time_to_stop_return": "seconds to the stop return",
        "episode_return": "return of training episodes",
        "evaluation_return": "evaluation return",
    }.get(str(objective), str(objective))


def show_value(value: Any) -> str:
    """A setting's value, short."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return "x".join(map(str, value)) if all(isinstance(v, int) for v in value) else str(value)
    return str(value)


def median_time_s(outcomes: Sequence[Outcome]) -> float | None:
    """Median training seconds of the trials that ended."""
    times = [outcome.time_s for outcome in outcomes if outcome.has_ended]
    return statistics.median(times) if times else None


def _objective(outcome: Outcome) -> str:
    if outcome.status == FAILED:
        return "failed"
    if outcome.objective is not None:
        return f"{outcome.objective:,.6g}"
    return "stopped early" if outcome.status == STOPPED else "not reached"


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:,.1f}"


def _duration(seconds: float) -> str:
    whole = math.ceil(seconds)
    return f"{whole} s" if whole < 120 else f"{whole // 60} min {whole % 60:02d} s"


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table
