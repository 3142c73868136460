"""A search directory of `tune` as trials to draw."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.plotting.csv_columns import read_rows
from training.plotting.errors import PlotError
from training.plotting.runs import shown

FORMAT, FORMAT_VERSION = "policyserve-search", 1
_PREFIX = "config/"
_CATEGORICAL = ("grid", "choice")
_SWITCHES = {"true": True, "false": False}
_OBJECTIVES = {
    "timesteps_to_stop_return": "environment steps to the stop return",
    "time_to_stop_return": "seconds to the stop return",
    "evaluation_return": "evaluation return",
    "episode_return": "training return",
}


@dataclass(frozen=True)
class Parameter:
    """A hyperparameter that a search varies.

    Attributes:
        key: Its dotted key.
        kind: grid, choice, uniform, loguniform or randint.
        values: Of grid and choice, as they are shown; numbers in their order.
        low: The lower end of what it is drawn from; None where that isn't said.
        high: The upper end.
    """

    key: str
    kind: str
    values: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None

    @property
    def is_categorical(self) -> bool:
        """Its values are few and named."""
        return self.kind in _CATEGORICAL

    @property
    def is_logarithmic(self) -> bool:
        """Its values are spread evenly over a logarithm."""
        return self.kind == "loguniform"

    @property
    def name(self) -> str:
        """The key without its section."""
        return self.key.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class Trial:
    """A row of trials.csv.

    Attributes:
        name: The trial's.
        status: As the search says it.
        objective: None if the trial has none: it failed, goes on, or never reached the return.
        is_reached: It reached the stop return; None where that isn't asked.
        is_best: The search calls it the best; None where its table doesn't say, an older one's.
        config: The varied settings by key; None where there is none.
        error: Why it failed, else empty.
    """

    name: str
    status: str
    objective: float | None
    is_reached: bool | None
    is_best: bool | None
    config: Mapping[str, Any]
    error: str

    @property
    def has_failed(self) -> bool:
        """It ended by an error."""
        return bool(self.error) or self.status.lower() in ("failed", "error", "errored")

    @property
    def is_over(self) -> bool:
        """It will not go on."""
        return self.status.lower() not in ("pending", "running", "paused", "interrupted")


@dataclass(frozen=True)
class Search:
    """A search as far as it has come.

    Attributes:
        env: The environment's id.
        algo: The algorithm's name.
        objective: What is compared.
        is_minimised: Less is better.
        parameters: In the order of search.json.
        trials: In the order of trials.csv.
        n_damaged: Rows of it that could not be read.
    """

    env: str
    algo: str
    objective: str
    is_minimised: bool
    parameters: tuple[Parameter, ...]
    trials: tuple[Trial, ...]
    n_damaged: int = 0

    @property
    def objective_label(self) -> str:
        """The objective as an axis says it."""
        text = _OBJECTIVES.get(self.objective, self.objective.replace("_", " "))
        return f"{text} ({'fewer' if self.is_minimised else 'more'} is better)"

    @property
    def best(self) -> Trial | None:
        """The one of best.yaml, with an objective; None before the first.

        An older table doesn't say which it is: then the one with the best objective that didn't
        fail.
        """
        measured = [trial for trial in self.trials if trial.objective is not None]
        if any(trial.is_best is not None for trial in self.trials):
            return next((trial for trial in measured if trial.is_best), None)
        sign = 1.0 if self.is_minimised else -1.0
        return min(
            measured,
            key=lambda trial: (trial.has_failed, sign * (trial.objective or 0.0)),
            default=None,
        )

    @property
    def failed(self) -> list[Trial]:
        """Trials that ended by an error."""
        return [trial for trial in self.trials if trial.has_failed]

    @property
    def unreached(self) -> list[Trial]:
        """Trials that ended without an objective, though not by an error."""
        return [
            trial
            for trial in self.trials
            if trial.objective is None and trial.is_over and not trial.has_failed
        ]

    @property
    def summary(self) -> str:
        """Such as `20 trials, 3 never reached the stop return, 1 failed`."""
        n_open = sum(not trial.is_over for trial in self.trials)
        parts = [f"{len(self.trials)} trial{'s' if len(self.trials) != 1 else ''}"]
        if self.unreached:
            parts.append(f"{len(self.unreached)} never reached the stop return")
        if self.failed:
            parts.append(f"{len(self.failed)} failed")
        if n_open:
            parts.append(f"{n_open} not over")
        return ", ".join(parts)


def read_search(path: Path) -> Search:
    """Read search.json and trials.csv, also of a search in progress.

    Raises:
        PlotError: A file is missing or damaged, or no trial has started.
    """
    document = _read_document(path / "search.json")
    header, rows, _ = read_rows(path / "trials.csv")
    missing = {"trial", "status", "objective"} - set(header)
    if missing:
        raise PlotError(f"{path / 'trials.csv'} has no column {', '.join(sorted(missing))}")
    whole = [dict(zip(header, row, strict=True)) for row in rows if len(row) == len(header)]
    found = [_trial(row) for row in whole]
    trials = tuple(trial for trial in found if trial is not None)
    if not trials:
        raise PlotError(f"{path / 'trials.csv'} has no trial: none has started, or it is damaged")
    return Search(
        env=str(document.get("env", "")),
        algo=str(document.get("algo", "")),
        objective=str(document["objective"]),
        is_minimised=document["mode"] == "min",
        parameters=_parameters(document["parameters"], trials),
        trials=trials,
        n_damaged=len(rows) - len(trials),
    )


def _read_document(path: Path) -> Mapping[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise PlotError(f"{path} can't be read: {exc}") from exc
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise PlotError(f"{path} is not a {FORMAT} document")
    if document.get("format_version") != FORMAT_VERSION:
        raise PlotError(
            f"{path} has format_version {document.get('format_version')!r}, expected "
            f"{FORMAT_VERSION}: another version of policyserve wrote it"
        )
    parameters = document.get("parameters")
    if document.get("mode") not in ("min", "max") or "objective" not in document:
        raise PlotError(f"{path} lacks objective or mode (min or max): it is damaged")
    if not isinstance(parameters, dict) or not all(
        isinstance(each, dict) and isinstance(each.get("kind"), str) for each in parameters.values()
    ):
        raise PlotError(f"{path} lacks the kinds of its parameters: it is damaged")
    return document


def _trial(row: Mapping[str, str]) -> Trial | None:
    """A trial; None if its objective is no number."""
    try:
        objective = float(row["objective"]) if row["objective"] else None
    except ValueError:
        return None
    config = {
        name.removeprefix(_PREFIX): _value(cell)
        for name, cell in row.items()
        if name.startswith(_PREFIX)
    }
    is_number = objective is not None and math.isfinite(objective)
    return Trial(
        name=row["trial"],
        status=row["status"],
        objective=objective if is_number else None,
        is_reached=_SWITCHES.get(row.get("reached", "").lower()),
        is_best=_SWITCHES.get(row.get("best", "").lower()),
        config=config,
        error=row.get("error", ""),
    )


def _value(cell: str) -> Any:
    """A cell's value: a number, a list as JSON, true, or text as it stands."""
    try:
        return json.loads(cell)
    except ValueError:
        return {"": None, "True": True, "False": False}.get(cell, cell)


def _parameters(
    document: Mapping[str, Mapping[str, Any]], trials: Sequence[Trial]
) -> tuple[Parameter, ...]:
    found = []
    for key, space in document.items():
        values: tuple[str, ...] = ()
        if space["kind"] in _CATEGORICAL:
            seen = [trial.config[key] for trial in trials if trial.config.get(key) is not None]
            given = space.get("values")
            values = _ordered([*(given if isinstance(given, list) else []), *seen])
        found.append(Parameter(key, space["kind"], values, *map(space.get, ("low", "high"))))
    return tuple(found)


def _ordered(values: Sequence[Any]) -> tuple[str, ...]:
    are_numbers = all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values
    )
    in_order = sorted(values) if are_numbers else values
    return tuple(dict.fromkeys(map(shown, in_order)))
