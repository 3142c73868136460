"""search(): run a search's trials on Ray Tune, and keep its tables as they end."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from ray import tune
from ray.tune import Callback, Stopper
from typing_extensions import override

from training.cluster import ray_cluster
from training.tuning.definition import Search, Trial
from training.tuning.directory import SearchDirectory
from training.tuning.history import current_values
from training.tuning.machine import Resources
from training.tuning.outcomes import (
    FAILED,
    STOPPED,
    Outcome,
    read_outcome,
    read_progress,
    write_verdict,
)
from training.tuning.schedulers import build_scheduler, remember, trial_name, trial_space
from training.tuning.tables import write_tables
from training.tuning.trial import DIRECTORY, FINISHED, NAME, VALUES, TuneTrial

logger = logging.getLogger("policyserve.training")

_SWITCHES = {
    # Ray Tune's, which it reads from the environment.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours: it saves every trial first
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the run directories hold it all
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # its own state is never read again
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of the config mean the user's directory
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "1000000",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "120",  # of an interrupted trial that does not end by itself
    "RAY_AIR_NEW_OUTPUT": "0",
}
_KEPT_CHECKPOINTS = 4  # of each trial in the scratch directory: others go on from the newest


class Watcher(Protocol):
    """Whoever shows how a search goes."""

    def started(self, name: str) -> None:
        """A trial begins or goes on."""

    def progressed(self, name: str, row: dict[str, Any]) -> None:
        """A trial has trained an iteration."""

    def ended(self, outcome: Outcome) -> None:
        """A trial isn't run any more."""

    def tick(self) -> None:
        """Time has passed."""


@dataclass(frozen=True)
class SearchJob:
    """A search that is ready to run.

    Attributes:
        search: The search in force.
        directory: Where it goes; created.
        trials: Every trial, those that have ended too.
        n_concurrent: Trials at a time.
        per_trial: What each needs.
    """

    search: Search
    directory: SearchDirectory
    trials: Sequence[Trial]
    n_concurrent: int
    per_trial: Resources

    def outcomes(self, running: frozenset[str] = frozenset()) -> list[Outcome]:
        """How every trial stands."""
        return [
            read_outcome(
                trial,
                self.directory.run(trial.name),
                self.search,
                is_running=trial.name in running,
            )
            for trial in self.trials
        ]


def run_search(
    job: SearchJob, watcher: Watcher, is_interrupted: Callable[[], bool] = lambda: False
) -> tuple[list[Outcome], Outcome | None]:
    """Run the trials that haven't ended, and write the tables.

    Args:
        job: The search.
        watcher: Told of what happens.
        is_interrupted: Asked all the time; True ends the search, every trial with a checkpoint.

    Returns:
        How each trial stands, and the best one.

    Raises:
        TrainingError: Ray did not start or could not be joined.
    """
    left = [
        trial
        for trial, outcome in zip(job.trials, job.outcomes(), strict=True)
        if not outcome.has_ended
    ]
    try:
        if left and not is_interrupted():
            _run_trials(job, left, watcher, is_interrupted)
    finally:
        shutil.rmtree(job.directory.scratch, ignore_errors=True)
        outcomes = job.outcomes()
        best = write_tables(job.directory, job.search, job.trials, outcomes)
    return outcomes, best


def _run_trials(
    job: SearchJob,
    trials: Sequence[Trial],
    watcher: Watcher,
    is_interrupted: Callable[[], bool],
) -> None:
    scratch = job.directory.scratch
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(mode=0o700)
    n_concurrent = min(job.n_concurrent, len(trials))
    scheduler = build_scheduler(job.search)
    running = {trial.name for trial in trials}
    ended = [trial.name for trial in job.trials if trial.name not in running]
    remember(
        scheduler,
        {name: read_progress(job.directory.run(name).progress_file) for name in ended},
    )
    entries = [
        {
            DIRECTORY: str(job.directory.path),
            NAME: trial.name,
            VALUES: current_values(job.directory.run(trial.name), trial.values),
        }
        for trial in trials
    ]
    with (
        _environment(_SWITCHES),
        ray_cluster(
            n_workers=n_concurrent * job.per_trial.n_cpus - 1,
            n_gpus=n_concurrent * job.per_trial.n_gpus,
        ),
    ):
        tune.Tuner(
            tune.with_resources(TuneTrial, _placement(job.per_trial)),
            param_space=trial_space(entries),
            tune_config=tune.TuneConfig(
                scheduler=scheduler,
                reuse_actors=True,  # a new process would import RLlib for seconds
                trial_name_creator=lambda trial: trial_name(trial.config),
                trial_dirname_creator=lambda trial: trial_name(trial.config),
                max_concurrent_trials=_limit(job),
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=str(scratch),
                callbacks=[_Reporter(job, watcher)],
                stop=_InterruptStopper(is_interrupted),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=_KEPT_CHECKPOINTS),
                verbose=0,
            ),
        ).fit()


def _placement(needed: Resources) -> tune.PlacementGroupFactory:
    own = {"CPU": 1.0, **({"GPU": float(needed.n_gpus)} if needed.n_gpus else {})}
    return tune.PlacementGroupFactory([own, *[{"CPU": 1.0}] * (needed.n_cpus - 1)])


def _limit(job: SearchJob) -> int | None:
    # On a cluster of our own its CPUs are the limit. On a joined one a number that was given is;
    # under pbt it would keep the paused part of the population from ever running.
    settings = job.search.settings
    if not os.environ.get("RAY_ADDRESS") or settings.scheduler == "pbt":
        return None
    given = settings.max_concurrent_trials
    return None if given == "auto" else given


class _InterruptStopper(Stopper):
    def __init__(self, is_interrupted: Callable[[], bool]) -> None:
        self._is_interrupted = is_interrupted

    def __reduce__(self) -> tuple[Any, ...]:
        return _InterruptStopper, (_never,)  # Ray Tune pickles what it is given; nobody reads it

    @override
    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._is_interrupted()


def _never() -> bool:
    return False


class _Reporter(Callback):
    """Ray Tune's events to the watcher and to the tables."""

    def __init__(self, job: SearchJob, watcher: Watcher) -> None:
        self._job = job
        self._watcher = watcher
        self._by_name = {trial.name: trial for trial in job.trials}
        self._outcomes = {outcome.trial: outcome for outcome in job.outcomes()}
        self._running: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return Callback, ()  # Ray Tune pickles what it is given; nobody reads it

    @override
    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        name = str(trial)
        self._running.add(name)
        self._watcher.started(name)

    @override
    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        if not result.get(FINISHED):
            self._watcher.progressed(str(trial), result)

    @override
    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        name = str(trial)
        if not (trial.last_result or {}).get(FINISHED):
            write_verdict(self._job.directory.run(name), STOPPED)
        self._end(name)

    @override
    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        name = str(trial)
        run = self._job.directory.run(name)
        write_verdict(run, FAILED, _reason(trial.get_error()))
        self._end(name)

    @override
    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        self._watcher.tick()

    def _end(self, name: str) -> None:
        self._running.discard(name)
        job = self._job
        for other in [item for item, outcome in self._outcomes.items() if not outcome.has_ended]:
            self._outcomes[other] = read_outcome(
                self._by_name[other],
                job.directory.run(other),
                job.search,
                is_running=other in self._running,
            )
        outcomes = [self._outcomes[trial.name] for trial in job.trials]
        write_tables(job.directory, job.search, job.trials, outcomes)
        self._watcher.ended(self._outcomes[name])


def _reason(exc: Any) -> str:
    while (cause := getattr(exc, "cause", None) or getattr(exc, "__cause__", None)) is not None:
        exc = cause
    if type(exc).__name__ in ("ActorDiedError", "RayActorError", "OutOfMemoryError"):
        return "its process died: killed, out of memory, or it crashed"
    text = str(getattr(exc, "message", exc)).strip()
    return (text.splitlines() or [type(exc).__name__])[-1]


@contextmanager
def _environment(switches: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in switches}
    os.environ.update(switches)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
