"""The names of what is drawn: columns of progress.csv, as people read them."""

from __future__ import annotations

import difflib
import enum
from collections.abc import Sequence

from training.errors import ConfigError
from training.plotting.runs import RunCurve

RETURN = "return"  # training and evaluation returns in one panel
TRAINING, EVALUATION = "episode_return_mean", "evaluation_return_mean"


class XAxis(str, enum.Enum):
    """What a curve runs along."""

    steps = "steps"
    time = "time"
    iterations = "iterations"

    @property
    def column(self) -> str:
        """Of progress.csv."""
        return {"steps": "env_steps", "time": "time_s", "iterations": "iteration"}[self.value]


_LABELS = {
    RETURN: "mean return per episode",
    TRAINING: "mean return of training episodes",
    "episode_return_min": "lowest return of recent episodes",
    "episode_return_max": "highest return of recent episodes",
    "episode_length_mean": "mean episode length (steps)",
    "n_episodes": "episodes per iteration",
    "n_terminated": "terminated episodes per iteration",
    "n_truncated": "truncated episodes per iteration",
    EVALUATION: "mean return of evaluation episodes",
    "evaluation_return_std": "std of evaluation returns",
    "evaluation_length_mean": "mean evaluation length (steps)",
    "env_steps_per_s": "environment steps per second",
    "vf_loss": "value function loss",
    "entropy": "policy entropy (nats)",
    "vf_explained_var": "explained variance of returns",
    "lr": "learning rate",
}


def metric_label(metric: str) -> str:
    """What stands at the axis."""
    return _LABELS.get(metric, metric.replace("_", " "))


def check_metrics(metrics: Sequence[str], runs: Sequence[RunCurve]) -> None:
    """Refuse a metric that no run has.

    Raises:
        ConfigError: Names the nearest.
    """
    columns = dict.fromkeys(name for run in runs for name in run.columns)
    x_columns = {axis.column for axis in XAxis}
    known = [RETURN, *(name for name in columns if name not in x_columns)]
    for metric in metrics:
        if metric not in known:
            near = difflib.get_close_matches(metric, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"--metric {metric}: no run has this column; {hint}")
