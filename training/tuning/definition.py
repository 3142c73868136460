"""A search file: a training YAML with search spaces in it, to the trials that it means."""

from __future__ import annotations

import copy
import difflib
import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError

from training.config import TrainingConfig
from training.config_files import (
    SEARCH_SECTION,
    config_from_mapping,
    find_config,
    parse_set,
    read_document,
)
from training.errors import ConfigError
from training.tuning.settings import TO_STOP_RETURN, TuneSettings
from training.tuning.space import Parameter, Path, find_parameters

_MAX_TRIALS = 10_000
_STOP_RETURNS = ("return", "episode_return", "evaluation_return")  # under `stop`; one has two names


@dataclass(frozen=True)
class Trial:
    """One training run of a search.

    Attributes:
        name: E.g. "trial_0003"; its run directory is called so.
        values: Dotted key of each varying setting to this trial's value.
        seed: The run's seed.
    """

    name: str
    values: Mapping[str, Any]
    seed: int


@dataclass(frozen=True)
class Search:
    """A search file, checked.

    Attributes:
        document: The training settings, search spaces included.
        parameters: The settings that vary, in the file's order.
        settings: The `tune` section, its objective filled in.
        source: Where it was read, for messages.
        sources: Where each key stands in it, by its path.
    """

    document: Mapping[str, Any]
    parameters: Sequence[Parameter]
    settings: TuneSettings
    source: str
    sources: Mapping[Path, str] = field(default_factory=dict, compare=False)

    def config(self, values: Mapping[str, Any], seed: int | None) -> TrainingConfig:
        """The whole config of a trial.

        Args:
            values: Dotted key of each varying setting to its value.
            seed: The run's seed; None leaves the file's.

        Raises:
            ConfigError: A value is wrong, or values don't fit each other.
        """
        document = copy.deepcopy(dict(self.document))
        for parameter in self.parameters:
            _put(document, parameter.path, copy.deepcopy(values[parameter.key]))
        if seed is not None:
            document["seed"] = seed
        return config_from_mapping(document, source=self.sources)

    def trial_config(self, trial: Trial) -> TrainingConfig:
        """The config in force of a trial, its budget filled in."""
        return self.config(trial.values, trial.seed).complete()

    def has_stop_return(self, values: Mapping[str, Any]) -> bool:
        """Whether a trial with these values has a return to stop at."""
        document = {"stop": copy.deepcopy(self.document.get("stop"))}
        for parameter in self.parameters:
            if parameter.path[0] == "stop":
                _put(document, parameter.path, values[parameter.key])
        stop = document["stop"] or {}
        return any(stop.get(name) is not None for name in _STOP_RETURNS)

    def draw_trials(self) -> list[Trial]:
        """Draw every trial's values: for each sample, each point of the grid.

        The same file and `tune.seed` give the same trials.

        Raises:
            ConfigError: Values that were drawn don't fit each other.
        """
        rng = np.random.default_rng(self.settings.seed)
        grids = [parameter for parameter in self.parameters if parameter.kind == "grid"]
        points = list(itertools.product(*(parameter.values for parameter in grids)))
        _check_count(len(points) * self.settings.num_samples, self.source)
        trials: list[Trial] = []
        for _, point in itertools.product(range(self.settings.num_samples), points):
            fixed = {grid.key: value for grid, value in zip(grids, point, strict=True)}
            values = {
                parameter.key: fixed[parameter.key]
                if parameter.kind == "grid"
                else parameter.sample(rng)
                for parameter in self.parameters
            }
            trials.append(self._trial(len(trials) + 1, values, int(rng.integers(2**31))))
        return trials

    def dump(self) -> str:
        """The search in force as YAML that `load_search` reads back equal."""
        tune = self.settings.model_dump(mode="json")
        return yaml.safe_dump({**self.document, SEARCH_SECTION: tune}, sort_keys=False)

    def _trial(self, number: int, values: Mapping[str, Any], drawn_seed: int) -> Trial:
        given = values.get("seed", self.document.get("seed"))
        trial = Trial(
            f"trial_{number:04d}", values, given if isinstance(given, int) else drawn_seed
        )
        try:  # settings that don't fit each other are said before Ray starts
            self.trial_config(trial)
        except ConfigError as exc:
            drawn = ", ".join(f"{key}={value}" for key, value in values.items())
            raise ConfigError(f"{exc.message} (in {trial.name}, with {drawn})") from exc
        return trial


def load_search(file: str | FilePath, sets: Sequence[str] = ()) -> Search:
    """Read and check a search file.

    Args:
        file: A YAML file, or the bare name of a shipped search, e.g. "tune-cartpole".
        sets: `key=value` texts that go before the file; a value may be a search space.

    Raises:
        ConfigError: Any key, value or search space is wrong.
    """
    path = find_config(file)
    document, sources = read_document(path)
    for text in sets:
        key, value = parse_set(text)
        _put(document, key, value)
        sources[key] = f"--set {text}"
    tune = document.pop(SEARCH_SECTION, None)
    if tune is None and (SEARCH_SECTION,) not in sources:
        raise ConfigError(
            f"{path} has no `tune` section, so it is no search: train it with `policyserve train`, "
            "or say what to search, e.g. `tune: {num_samples: 10}`"
        )
    settings = _settings(tune or {}, sources)
    parameters = find_parameters(document, sources)
    if not parameters and settings.num_samples == 1:
        raise ConfigError(
            f"{path} has no search space and one sample, so there is nothing to search: give a "
            "setting one, e.g. `lr: {loguniform: [1e-4, 1e-2]}`"
        )
    search = Search(document, parameters, settings, str(path), sources)
    _check_spaces(search)
    return _completed(search)


def _put(document: dict[str, Any], path: Path, value: Any) -> None:
    branch = document
    for name in path[:-1]:
        if not isinstance(branch.get(name), dict):
            branch[name] = {}
        branch = branch[name]
    branch[path[-1]] = value


def _first_values(parameters: Sequence[Parameter]) -> dict[str, Any]:
    return {parameter.key: parameter.extremes[0] for parameter in parameters}


def _check_count(n_trials: int, source: str) -> None:
    if n_trials > _MAX_TRIALS:
        raise ConfigError(
            f"{source} asks for {n_trials:,} trials, at most {_MAX_TRIALS:,} can be run: a smaller "
            "grid, or `choice` with a `num_samples`"
        )


def _settings(tune: Any, sources: Mapping[Path, str]) -> TuneSettings:
    if not isinstance(tune, dict):
        raise ConfigError(
            f"`tune` is {tune!r} ({sources.get((SEARCH_SECTION,), 'the search')}), expected "
            "`key: value` lines under it"
        )
    try:
        return TuneSettings.model_validate(tune)
    except ValidationError as exc:
        raise ConfigError(_describe(exc, sources)) from exc


def _describe(exc: ValidationError, sources: Mapping[Path, str]) -> str:
    # The misspelt key first: what else is wrong may follow from it.
    errors = sorted(
        exc.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden"
    )
    error = errors[0]
    names = [part for part in error["loc"] if isinstance(part, str)]
    path: Path = (SEARCH_SECTION,)
    for name in names:
        if (*path, name) in sources:
            path = (*path, name)
    where = next(
        (sources[path[:n]] for n in range(len(path), 0, -1) if path[:n] in sources), "tune"
    )
    if error["type"] == "extra_forbidden":
        return f"no setting `{SEARCH_SECTION}.{'.'.join(names)}` ({where}){_nearest(names)}"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    found = repr(error["input"])
    if len(found) > 60 or isinstance(error["input"], dict):
        return f"`{'.'.join(path)}`: {message} ({where})"
    expected = message if message.startswith("expected") else f"expected {message}"
    return f"`{'.'.join(path)}` is {found}, {expected} ({where})"


def _nearest(names: Sequence[str]) -> str:
    fields = TuneSettings.model_fields
    if len(names) > 1 and names[0] in ("asha", "pbt"):
        section = fields[names[0]].annotation
        fields = getattr(section, "model_fields", fields)
    near = difflib.get_close_matches(names[-1], fields, n=1, cutoff=0.6)
    if near:
        return f"; did you mean `{'.'.join((SEARCH_SECTION, *names[:-1], near[0]))}`?"
    return f"; known here: {', '.join(fields)}"


def _check_spaces(search: Search) -> None:
    """Make sure that every value of a list and both ends of a range can be had."""
    first = _first_values(search.parameters)
    for parameter in search.parameters:
        for value in parameter.extremes:
            _check_values(search, {**first, parameter.key: value})


def _check_values(search: Search, values: Mapping[str, Any]) -> None:
    try:
        search.config(values, None)
    except ConfigError as exc:
        # Settings that don't fit each other name no place in the file: the trials that are drawn
        # say whether they ever come together.
        if any(f"({source})" in exc.message for source in search.sources.values()):
            raise


def _completed(search: Search) -> Search:
    """Fill in what the file leaves open, and refuse what can't be searched."""
    document = copy.deepcopy(dict(search.document))
    settings = search.settings
    common = _common_config(search)
    stop = common.stop
    has_stop_return = stop.episode_return is not None or stop.evaluation_return is not None
    objective = settings.objective or (
        "timesteps_to_stop_return" if has_stop_return else "episode_return"
    )
    if objective in TO_STOP_RETURN and not has_stop_return:
        raise ConfigError(
            f"`tune.objective` is {objective}, which needs a return to stop at: give `stop.return`"
        )
    update: dict[str, Any] = {"objective": objective}
    if settings.seed is None:
        update["seed"] = random.SystemRandom().randrange(2**31)
    needs_evaluation = objective == "evaluation_return" or stop.evaluation_return is not None
    if "evaluation" not in document and not needs_evaluation:
        # Evaluations cost each trial time, and nobody asked for them.
        document["evaluation"] = {"interval": 0}
    if objective == "evaluation_return" and not common.evaluation.interval:
        raise ConfigError(
            "`tune.objective` is evaluation_return, and `evaluation.interval` is 0: give the "
            "iterations between evaluations"
        )
    if settings.scheduler == "asha":
        update["asha"] = _completed_asha(settings, stop.timesteps)
    if settings.scheduler == "pbt":
        _check_pbt(search)
        # A member's checkpoint is there when another wants to go on from it.
        checkpoint = document["checkpoint"] = dict(document.get("checkpoint") or {})
        checkpoint.setdefault("every", settings.pbt.perturbation_interval)
    return replace(search, document=document, settings=settings.model_copy(update=update))


def _common_config(search: Search) -> TrainingConfig:
    """A config that says what all trials have in common."""
    try:
        return search.config(_first_values(search.parameters), None)
    except ConfigError:  # the first values may not fit each other
        rng = np.random.default_rng(search.settings.seed)
        values = {parameter.key: parameter.sample(rng) for parameter in search.parameters}
        return search.config(values, None)


def _completed_asha(settings: TuneSettings, timesteps: int | None) -> Any:
    asha = settings.asha
    max_time = asha.max_time or timesteps
    if max_time is None:
        raise ConfigError(
            "`tune.scheduler` is asha, which needs to know how long a trial can last: give "
            "`stop.timesteps`, or `tune.asha.max_time`"
        )
    grace = asha.grace_period or max(1, max_time // 10)
    if grace >= max_time:
        raise ConfigError(
            f"`tune.asha.grace_period` ({grace}) has to be below the highest rung ({max_time})"
        )
    return asha.model_copy(update={"max_time": max_time, "grace_period": grace})


def _check_pbt(search: Search) -> None:
    for parameter in search.parameters:
        if parameter.kind == "grid":
            raise ConfigError(
                f"`{parameter.key}` ({parameter.source}) is a grid, and pbt changes values while "
                "trials train, so that no point of a grid is kept: make it a `choice`"
            )
        if parameter.path[0] != "algo_config":
            raise ConfigError(
                f"`{parameter.key}` ({parameter.source}) can't vary under pbt: a trial goes on "
                "from another's checkpoint, so that only settings under `algo_config` can change"
            )
    if not search.parameters:
        raise ConfigError("pbt changes settings while trials train, and no setting varies")
    if search.settings.num_samples < 2:
        raise ConfigError(
            f"pbt needs a population, and `tune.num_samples` is {search.settings.num_samples}: "
            "give 4 or more"
        )
    if search.settings.objective in TO_STOP_RETURN:
        raise ConfigError(
            f"`tune.objective` is {search.settings.objective}, and under pbt a trial's steps are "
            "several trials' together: give episode_return or evaluation_return"
        )
