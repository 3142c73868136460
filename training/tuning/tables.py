"""Outcomes to trials.csv, trials.parquet and best.yaml."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from training.tuning.definition import Search, Trial
from training.tuning.directory import SearchDirectory
from training.tuning.files import write_atomically
from training.tuning.history import HISTORY
from training.tuning.outcomes import Outcome, rank

_BEST = "best"
_FIRST = ("trial", "status", "objective", "reached", "env_steps", "time_s")
_LAST = ("episode_return_mean", "evaluation_return_mean", "error")
CONFIG = "config/"
"""What the column of a varying setting begins with; its dotted key follows."""


def write_tables(
    directory: SearchDirectory,
    search: Search,
    trials: Sequence[Trial],
    outcomes: Sequence[Outcome],
) -> Outcome | None:
    """Write trials.csv, trials.parquet and, once a trial has trained, best.yaml.

    Returns:
        The best trial, None before any has trained.
    """
    keys = [parameter.key for parameter in search.parameters]
    ranked = rank(outcomes, search.settings)
    rows = [_row(outcome, keys, is_best=outcome in ranked[:1]) for outcome in outcomes]
    write_atomically(directory.csv_file, _csv(rows, keys).encode())
    write_atomically(directory.parquet_file, _parquet(rows, keys))
    if not ranked:
        return None
    best = ranked[0]
    trial = next(trial for trial in trials if trial.name == best.trial)
    write_atomically(directory.best_file, _best_yaml(search, trial, best).encode())
    return best


def _row(outcome: Outcome, keys: Sequence[str], *, is_best: bool) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(outcome, name) for name in (*_FIRST, *_LAST)}
    return {**row, _BEST: is_best, **{CONFIG + key: _plain(outcome.values[key]) for key in keys}}


def _plain(value: Any) -> Any:
    # Lists and mappings as JSON text, so that the column is one of texts.
    return json.dumps(value) if isinstance(value, (list, dict, tuple)) else value


def _columns(keys: Sequence[str]) -> list[str]:
    return [*_FIRST, _BEST, *_LAST, *(CONFIG + key for key in keys)]


def _csv(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(keys), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def _parquet(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> bytes:
    import pyarrow as pa  # type: ignore[import-untyped]
    from pyarrow import parquet

    types = {
        **dict.fromkeys(("trial", "status", "error"), pa.string()),
        **dict.fromkeys(("objective", "time_s"), pa.float64()),
        **dict.fromkeys(("episode_return_mean", "evaluation_return_mean"), pa.float64()),
        "reached": pa.bool_(),
        _BEST: pa.bool_(),
        "env_steps": pa.int64(),
    }
    arrays = {}
    for name in _columns(keys):
        column = [row[name] for row in rows]
        arrays[name] = pa.array(*(column, types[name]) if name in types else _typed(column, pa))
    buffer = io.BytesIO()
    parquet.write_table(pa.table(arrays), buffer)
    return buffer.getvalue()


def _typed(column: list[Any], pa: Any) -> tuple[list[Any], Any]:
    """A varying setting's column: of one type, as text where its values have several."""
    kinds = {type(value) for value in column if value is not None}
    if kinds <= {bool}:
        return column, pa.bool_()
    if kinds <= {int}:
        return column, pa.int64()
    if kinds <= {int, float}:
        return [None if value is None else float(value) for value in column], pa.float64()
    return [None if value is None else str(value) for value in column], pa.string()


def _best_yaml(search: Search, trial: Trial, best: Outcome) -> str:
    from training.config_files import dump_config

    config = search.trial_config(Trial(trial.name, best.values, trial.seed))
    objective = "no objective" if best.objective is None else f"{best.objective:g}"
    lines = [
        f"# The best trial of this search, {best.trial}: {search.settings.objective} {objective}."
    ]
    if best.objective is None:
        lines.append("# None reached what was asked for; this one has the highest return.")
    if search.settings.scheduler == "pbt":
        lines.append(
            f"# Its settings changed while it trained, these are the last: trials/{best.trial}/"
            f"{HISTORY} has them all."
        )
    return "\n".join(lines) + "\n" + dump_config(config)
