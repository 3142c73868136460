"""The `tune:` section of a search file: how many trials, what is best, who is stopped early."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from training.settings import (
    Count,
    Fraction,
    Number,
    PositiveCount,
    PositiveNumber,
    Section,
    Switch,
)

Objective = Literal[
    "timesteps_to_stop_return", "time_to_stop_return", "episode_return", "evaluation_return"
]
TO_STOP_RETURN = ("timesteps_to_stop_return", "time_to_stop_return")


class AshaSettings(Section):
    """Asynchronous successive halving: the worse trials of each rung are stopped.

    Source: Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020.
    """

    time: Literal["env_steps", "iterations"] = "env_steps"
    """What the rungs are counted in."""

    grace_period: PositiveCount | None = None
    """No trial is stopped before so many; null is a tenth of `max_time`."""

    max_time: PositiveCount | None = None
    """The highest rung; null is `stop.timesteps`, counted in env_steps."""

    reduction_factor: Annotated[Number, Field(gt=1)] = 3
    """At each rung one trial of so many goes on, and rungs are so many times apart."""

    @model_validator(mode="after")
    def _fits(self) -> AshaSettings:
        if self.time == "iterations" and self.max_time is None:
            raise ValueError("max_time is needed where time is iterations")
        if self.grace_period and self.max_time and self.grace_period >= self.max_time:
            raise ValueError(
                f"grace_period ({self.grace_period}) has to be below max_time ({self.max_time})"
            )
        return self


class PbtSettings(Section):
    """Population based training: bad trials go on from good ones, with changed settings.

    Source: Jaderberg et al., "Population Based Training of Neural Networks", 2017.
    """

    perturbation_interval: PositiveCount = 10
    """Iterations between the comparisons of a trial with the others."""

    quantile_fraction: Annotated[Number, Field(gt=0, le=0.5)] = 0.25
    """The worst of this fraction go on from one of the best of this fraction."""

    resample_probability: Fraction = 0.25
    """How often a changed setting is drawn anew instead of being perturbed."""

    perturbation_factors: tuple[PositiveNumber, PositiveNumber] = (1.2, 0.8)
    """A perturbed number is multiplied by one of these, and kept inside its range."""

    synchronous: Switch = False
    """Wait for the whole population at each comparison."""


class TuneSettings(Section):
    """How the search goes about it."""

    num_samples: PositiveCount = 1
    """Trials per point of the grid; without a grid, trials."""

    objective: Objective | None = None
    """What is best: fewest environment steps or seconds to the stop return, or the highest return
    of training or evaluation episodes. Null is timesteps_to_stop_return where there is a
    `stop.return`, else episode_return."""

    scheduler: Literal["none", "asha", "pbt"] = "none"
    """Who is stopped early or changed: nobody, the worse of each rung, the worst of the
    population."""

    asha: AshaSettings = Field(default_factory=AshaSettings)
    """Settings of `scheduler: asha`."""

    pbt: PbtSettings = Field(default_factory=PbtSettings)
    """Settings of `scheduler: pbt`."""

    max_concurrent_trials: Literal["auto"] | PositiveCount = "auto"
    """Trials at a time; auto is as many as the CPUs, the memory and the GPUs have room for."""

    seed: Annotated[Count, Field(ge=0, lt=2**31)] | None = None
    """Makes the drawing of values reproducible; where it is null one is drawn and written into
    search.yaml."""

    @property
    def mode(self) -> Literal["min", "max"]:
        """Whether the objective is best when low or when high."""
        return "min" if self.objective in TO_STOP_RETURN else "max"
