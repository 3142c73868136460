"""The `tune` section's scheduler to Ray Tune's own."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray import tune
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)

from training.errors import ConfigError
from training.tuning.definition import Search
from training.tuning.space import Parameter
from training.tuning.trial import NAME, RETURN, TRIAL, VALUES

_MAX_DRAWS = 100


def build_scheduler(search: Search) -> TrialScheduler:
    """Build the scheduler; trials are compared by their newest return."""
    settings = search.settings
    if settings.scheduler == "asha":
        assert settings.asha.max_time is not None
        assert settings.asha.grace_period is not None
        return AsyncHyperBandScheduler(
            time_attr="env_steps" if settings.asha.time == "env_steps" else "iteration",
            metric=RETURN,
            mode="max",
            max_t=settings.asha.max_time,
            grace_period=settings.asha.grace_period,
            reduction_factor=settings.asha.reduction_factor,
            stop_last_trials=False,  # the run's own stop ends those that come so far
        )
    if settings.scheduler == "pbt":
        # Ray draws from the process-wide generators.
        random.seed(settings.seed)
        np.random.seed(settings.seed)
        return PopulationBasedTraining(
            time_attr="iteration",
            metric=RETURN,
            mode="max",
            perturbation_interval=settings.pbt.perturbation_interval,
            quantile_fraction=settings.pbt.quantile_fraction,
            resample_probability=settings.pbt.resample_probability,
            perturbation_factors=settings.pbt.perturbation_factors,
            hyperparam_mutations={TRIAL: {VALUES: _mutations(search.parameters)}},
            custom_explore_fn=_explored(search),
            log_config=False,
            synch=settings.pbt.synchronous,
        )
    return FIFOScheduler()


@dataclass(frozen=True)
class _EndedTrial:
    """What ASHA asks of a trial: a name."""

    trial_id: str


def remember(scheduler: TrialScheduler, ended: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Tell ASHA of the trials that ended before the search was resumed.

    Otherwise the others would be compared with nobody.

    Args:
        scheduler: The scheduler, which has seen no trial yet.
        ended: Each one's name to its rows of progress.csv.
    """
    if not isinstance(scheduler, AsyncHyperBandScheduler):
        return
    nobody: Any = None  # ASHA asks nothing of Tune's controller
    for name, rows in ended.items():
        trial: Any = _EndedTrial(name)
        scheduler.on_trial_add(nobody, trial)
        evaluation = None
        for row in rows:
            evaluation = row.get("evaluation_return_mean", evaluation)
            seen = row.get("episode_return_mean") if evaluation is None else evaluation
            scheduler.on_trial_result(
                nobody, trial, {**row, RETURN: math.nan if seen is None else seen}
            )
        scheduler.on_trial_remove(nobody, trial)


def _mutations(parameters: Sequence[Parameter]) -> dict[str, Any]:
    return {parameter.key: _mutation(parameter) for parameter in parameters}


def _mutation(parameter: Parameter) -> Any:
    if parameter.kind == "choice":
        return list(parameter.values)
    low, high = parameter.low, parameter.high
    assert low is not None
    assert high is not None
    if parameter.kind == "randint":
        return tune.randint(int(low), int(high) + 1)  # its upper end is never drawn
    return tune.loguniform(low, high) if parameter.kind == "loguniform" else tune.uniform(low, high)


def _explored(search: Search) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What is done to values that PBT changed: they stay in their ranges and fit each other."""
    rng = np.random.default_rng(search.settings.seed)

    def explore(config: dict[str, Any]) -> dict[str, Any]:
        changed = config[TRIAL][VALUES]
        values = {item.key: item.bounded(changed[item.key]) for item in search.parameters}
        for _ in range(_MAX_DRAWS):
            if _is_valid(search, values):
                break
            values = {item.key: item.sample(rng) for item in search.parameters}
        config[TRIAL][VALUES] = values
        return config

    return explore


def _is_valid(search: Search, values: dict[str, Any]) -> bool:
    try:
        search.config(values, None)
    except ConfigError:
        return False
    return True


def trial_space(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Ray Tune's search space for trials that are drawn already: each of them, once."""
    return {TRIAL: tune.grid_search(list(entries))}


def trial_name(config: dict[str, Any]) -> str:
    """The name that one of Tune's trials gets, which stays when pbt changes its config."""
    return str(config[TRIAL][NAME])
