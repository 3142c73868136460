"""Run directories as curves, and which of them belong together."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from training.errors import ConfigError
from training.plotting.csv_columns import read_progress
from training.plotting.errors import PlotError
from training.run_directory import RunDirectory, read_run

# What doesn't change how a run learns, only how long and what is kept of it.
_INDIFFERENT = ("seed", "stop", "checkpoint", "evaluation", "num_gpus")
_MAX_KEYS_IN_LABEL = 3


@dataclass(frozen=True)
class RunCurve:
    """One run's progress.

    Attributes:
        path: The run directory.
        env: The environment's id.
        algo: The algorithm's name.
        seed: The seed in force.
        settings: The config in force, by dotted keys.
        columns: progress.csv, name to (n_iterations,) float64, NaN where a cell is empty.
        n_damaged: Rows of it that could not be read.
    """

    path: Path
    env: str
    algo: str
    seed: int | None
    settings: Mapping[str, Any]
    columns: Mapping[str, NDArray[np.float64]]
    n_damaged: int


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ by their seeds only, and what they are called.

    Attributes:
        label: What sets them apart from the other groups.
        runs: At least one.
    """

    label: str
    runs: tuple[RunCurve, ...]

    @property
    def count(self) -> str:
        """Such as `3 seeds`; `3 runs` if two have the same seed."""
        n = len(self.runs)
        are_seeds = len({run.seed for run in self.runs}) == n
        return f"{n} {'seed' if are_seeds else 'run'}{'s' if n != 1 else ''}"


def read_curve(path: Path) -> RunCurve:
    """Read a run directory, also of a run in progress.

    Raises:
        TrainingError: It is no run directory, or has nothing to draw yet.
    """
    info = read_run(path)
    progress = read_progress(RunDirectory(path).progress_file)
    return RunCurve(
        path=path,
        env=info.env,
        algo=info.algo,
        seed=info.seed,
        settings=_settings(path / "config.yaml"),
        columns=progress.columns,
        n_damaged=progress.n_damaged,
    )


def group_runs(runs: Sequence[RunCurve], key: str | None = None) -> list[RunGroup]:
    """Put runs together that have the same configuration, or the same value of `key`.

    Args:
        runs: In the order of the command line, which the groups keep.
        key: A dotted key of the config, e.g. `algo_config.lr`; `run` for each run by itself.

    Raises:
        ConfigError: No run has such a key.
    """
    if key == "run":
        return [RunGroup(label, (run,)) for label, run in zip(_names(runs), runs, strict=True)]
    if key is not None:
        key = _known_key(key, runs)
    found: dict[str, list[RunCurve]] = {}
    for run in runs:
        same = run.settings.get(key) if key else _learning_settings(run)
        found.setdefault(json.dumps(same, sort_keys=True, default=str), []).append(run)
    groups = list(found.values())
    if key is not None:
        labels = [f"{key} = {shown(members[0].settings.get(key))}" for members in groups]
    else:
        labels = _labels([members[0] for members in groups])
    return [RunGroup(label, tuple(each)) for label, each in zip(labels, groups, strict=True)]


def shown(value: Any) -> str:
    """A setting's value as a figure says it; layers as 64x64."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and value and all(isinstance(each, int) for each in value):
        return "x".join(map(str, value)) if len(value) > 1 else f"[{value[0]}]"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _settings(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as exc:
        raise PlotError(f"{path} can't be read: {' '.join(str(exc).split())}") from exc
    if not isinstance(document, dict):
        raise PlotError(f"{path} is no config: expected keys and values")
    return flattened(document)


def flattened(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in document.items():
        if isinstance(value, dict) and value:
            flat.update(flattened(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _learning_settings(run: RunCurve) -> dict[str, Any]:
    return {
        key: value
        for key, value in run.settings.items()
        if key.split(".")[0] not in _INDIFFERENT and value is not None
    }


def _known_key(key: str, runs: Sequence[RunCurve]) -> str:
    known = sorted({name for run in runs for name in run.settings})
    if key in known:
        return key
    by_ending = [name for name in known if name.endswith(f".{key}")]
    if len(by_ending) == 1:
        return by_ending[0]  # as `--set lr=1e-3` is short for algo_config.lr
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"--group-by {key}: no run's config has this key{hint}")


def _labels(firsts: Sequence[RunCurve]) -> list[str]:
    """What sets groups apart: the settings that differ, as few as tell them all apart."""
    if len(firsts) == 1:
        return [firsts[0].algo]
    settings = [_learning_settings(run) for run in firsts]
    keys = [key for key in _ordered_keys(settings) if _n_values(settings, [key]) > 1]
    if len(keys) > _MAX_KEYS_IN_LABEL:
        keys = _enough(keys, settings)
    if _n_values(settings, keys) < len(firsts) or len(keys) > _MAX_KEYS_IN_LABEL:
        return _names(firsts)
    return [", ".join(_part(key, each.get(key)) for key in keys) for each in settings]


def _ordered_keys(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Environment and algorithm first, then what every group has."""
    every = {key: sum(key in each for each in settings) for each in settings for key in each}
    first = ("env", "algo")
    return sorted(every, key=lambda key: (key not in first, -every[key], key))


def _enough(keys: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    chosen: list[str] = []
    for key in keys:
        if _n_values(settings, [*chosen, key]) > _n_values(settings, chosen):
            chosen.append(key)
    return chosen


def _n_values(settings: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> int:
    return len({json.dumps([each.get(key) for key in keys], default=str) for each in settings})


def _part(key: str, value: Any) -> str:
    if key in ("env", "algo", "model.fcnet_activation", "model.fcnet_hiddens"):
        return shown(value)  # says what it is by itself
    return f"{key.rsplit('.', 1)[-1]} {shown(value)}"


def _names(runs: Sequence[RunCurve]) -> list[str]:
    """Directory names, with their parents' where that tells them apart."""
    names = [run.path.resolve().name for run in runs]
    if len(set(names)) == len(names):
        return names
    return [f"{run.path.resolve().parent.name}/{run.path.resolve().name}" for run in runs]
