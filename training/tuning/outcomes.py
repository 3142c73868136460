"""How each trial stands, read from its run directory; and which one is best."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.run_directory import RunDirectory
from training.tuning.definition import Search, Trial
from training.tuning.files import read_json, write_json
from training.tuning.history import current_values
from training.tuning.settings import TuneSettings

PENDING, RUNNING, INTERRUPTED = "pending", "running", "interrupted"
DONE, STOPPED, FAILED = "done", "stopped", "failed"
ENDED = (DONE, STOPPED, FAILED)
"""Of a trial that isn't run again: it ended by itself, was stopped early, or failed."""

_VERDICT = "trial.json"  # in the run directory: what its own result.json can't say


@dataclass(frozen=True)
class Outcome:
    """How a trial stands: a row of trials.csv.

    Attributes:
        trial: Its name.
        values: Dotted key of each varying setting to its value; under pbt the newest.
        status: pending, running, interrupted, done, stopped (early, by the scheduler) or failed.
        reached: Whether it reached its stop return; where the search gives it none, whether it has
            an objective and did not fail.
        objective: Environment steps, seconds or a return; None where there is none.
        env_steps: So far.
        time_s: Training seconds so far.
        episode_return_mean: Of the newest window of training episodes.
        evaluation_return_mean: The highest of its evaluations.
        error: One line about a failed trial.
    """

    trial: str
    values: Mapping[str, Any]
    status: str = PENDING
    reached: bool = False
    objective: float | None = None
    env_steps: int = 0
    time_s: float = 0.0
    episode_return_mean: float | None = None
    evaluation_return_mean: float | None = None
    error: str | None = None

    @property
    def has_ended(self) -> bool:
        """Whether it isn't run again."""
        return self.status in ENDED

    @property
    def best_return(self) -> float | None:
        """The evaluation's return where there is one, else training's."""
        if self.evaluation_return_mean is not None:
            return self.evaluation_return_mean
        return self.episode_return_mean


def read_outcome(
    trial: Trial, run: RunDirectory, search: Search, *, is_running: bool = False
) -> Outcome:
    """Read how a trial stands from what its run left on disk.

    Args:
        trial: Its name and first values.
        run: Its run directory, which may not exist yet.
        search: The search in force. Whether there is a return to reach is read there: a trial that
            runs, was killed or was stopped early has no `result.json` that says it.
        is_running: A process trains it now.
    """
    if not run.path.exists():
        return Outcome(trial.name, trial.values, RUNNING if is_running else PENDING)
    result = read_json(run.result_file)
    rows = read_progress(run.progress_file)
    last = rows[-1] if rows else {}
    evaluations = [row["evaluation_return_mean"] for row in rows if "evaluation_return_mean" in row]
    evaluation = max(evaluations, default=None)
    status, error = _status(run, result, is_running)
    reached = result.get("status") == "stop_return" and status == DONE
    objective = _objective(search.settings, reached, last, evaluation)
    if not search.has_stop_return(trial.values):
        reached = objective is not None and status != FAILED
    return Outcome(
        trial=trial.name,
        values=current_values(run, trial.values),
        status=status,
        reached=reached,
        objective=objective,
        env_steps=int(last.get("env_steps", 0)),
        time_s=last.get("time_s", 0.0),
        episode_return_mean=last.get("episode_return_mean"),
        evaluation_return_mean=evaluation,
        error=error,
    )


def write_verdict(run: RunDirectory, status: str, error: str | None = None) -> None:
    """Note that a trial was stopped early, or that its process failed."""
    run.path.mkdir(parents=True, exist_ok=True)
    write_json(run.path / _VERDICT, {"status": status, "error": error})


def forget_failure(run: RunDirectory) -> None:
    """Forget that a trial failed, so that it goes on."""
    (run.path / _VERDICT).unlink(missing_ok=True)
    if read_json(run.result_file).get("status") == FAILED:
        run.result_file.unlink()


def read_progress(path: Path) -> list[dict[str, float]]:
    """Read a progress.csv: a row per iteration, by column, without the empty cells.

    A row that a kill cut short is left out, and one that a power cut left junk in.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    # Line by line: a stray quotation mark spoils no more than its own row.
    header, *lines = [_cells(line) for line in io.StringIO(text, newline="\n")] or [[]]
    rows = [_row(header, cells) for cells in lines]
    return [row for row in rows if "iteration" in row]


def rank(outcomes: Sequence[Outcome], settings: TuneSettings) -> list[Outcome]:
    """The trials that trained at all, the best first.

    Those with an objective come first, by it; then the others by their return.
    """
    trained = [outcome for outcome in outcomes if outcome.env_steps > 0]
    sign = 1.0 if settings.mode == "min" else -1.0

    def key(outcome: Outcome) -> tuple[bool, bool, float]:
        if outcome.objective is not None:
            return False, outcome.status == FAILED, sign * outcome.objective
        best = outcome.best_return
        return True, outcome.status == FAILED, math.inf if best is None else -best

    return sorted(trained, key=key)


def _status(
    run: RunDirectory, result: Mapping[str, Any], is_running: bool
) -> tuple[str, str | None]:
    verdict = read_json(run.path / _VERDICT)
    ended = str(result.get("status", ""))
    if ended.startswith("stop_"):  # it ended by itself, whatever the scheduler thought of it
        return DONE, None
    if ended == FAILED:
        return FAILED, _one_line(result.get("error"))
    if verdict.get("status") in ENDED:
        return str(verdict["status"]), _one_line(verdict.get("error"))
    if is_running:
        return RUNNING, None
    return (INTERRUPTED if run.progress_file.exists() else PENDING), None


def _objective(
    settings: TuneSettings,
    reached: bool,
    last: Mapping[str, float],
    evaluation: float | None,
) -> float | None:
    if settings.objective == "timesteps_to_stop_return":
        return last.get("env_steps") if reached else None
    if settings.objective == "time_to_stop_return":
        return last.get("time_s") if reached else None
    if settings.objective == "evaluation_return":
        return evaluation
    return last.get("episode_return_mean")


def _one_line(text: Any) -> str | None:
    return " ".join(str(text).split())[:500] if text else None


def _cells(line: str) -> list[str]:
    try:
        return next(csv.reader([line]), []) if line.endswith("\n") else []
    except csv.Error:
        return []


def _row(header: Sequence[str], cells: Sequence[str]) -> dict[str, float]:
    """A row's numbers by column; {} if it is damaged."""
    if len(cells) != len(header):
        return {}
    try:
        numbers = {name: float(cell) for name, cell in zip(header, cells, strict=True) if cell}
    except ValueError:
        return {}
    return {name: number for name, number in numbers.items() if math.isfinite(number)}
