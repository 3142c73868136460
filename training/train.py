"""train(config) -> TrainingResult: the loop from an environment to checkpoints."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray.rllib.algorithms.algorithm import Algorithm

from training.algorithm import IterationResult, build_algorithm, restore_algorithm, run_iteration
from training.cluster import ray_cluster
from training.config import TrainingConfig
from training.config_files import dump_config
from training.errors import CheckpointNotFoundError, EnvironmentFailedError
from training.failures import as_training_error
from training.progress import ProgressFile, ProgressRow
from training.provenance import describe_checkpoint, ensure_key, sign_checkpoint, verify_checkpoint
from training.returns import ReturnTracker
from training.run_directory import BEST, LAST, RunDirectory

logger = logging.getLogger("policyserve.training")

STOP_RETURN, STOP_TIMESTEPS, STOP_TIME = "stop_return", "stop_timesteps", "stop_time"
INTERRUPTED, FAILED = "interrupted", "failed"


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended; `result.json` holds the same.

    Attributes:
        status: stop_return, stop_timesteps, stop_time, interrupted or failed.
        episode_return_mean: Of the newest window of training episodes; None if none ended.
        best_episode_return_mean: Of the best checkpoint; None before the first full window.
        env_steps: Over the whole run.
        iterations: Over the whole run.
        time_s: Training seconds over the whole run, without Ray's start.
        best_checkpoint: Relative to the run directory.
        last_checkpoint: Relative to the run directory.
        stop: The stop section of the config in force.
        error: One line about a failed run, else None.
    """

    status: str
    episode_return_mean: float | None
    best_episode_return_mean: float | None
    env_steps: int
    iterations: int
    time_s: float
    best_checkpoint: str | None
    last_checkpoint: str | None
    stop: Mapping[str, Any]
    error: str | None = None


def train(
    config: TrainingConfig,
    run: RunDirectory,
    *,
    resume_from: Path | None = None,
    on_progress: Callable[[ProgressRow], None] = lambda _: None,
    is_interrupted: Callable[[], bool] = lambda: False,
) -> TrainingResult:
    """Train until a stop is reached, writing the run directory as it goes.

    Args:
        config: The config in force, its budget and seed filled in (`config.complete`).
        run: A run directory that was created, or that holds the run to resume.
        resume_from: A checkpoint of this run to go on from. It is unpickled: verify it first.
        on_progress: Called after each iteration.
        is_interrupted: Asked after each iteration; True ends the run with a checkpoint.

    Raises:
        EnvironmentFailedError: The environment raised. The result is written, the last checkpoint
            kept.
        TrainingError: Ray or RLlib failed, likewise.
    """
    session = _Session(config, run, on_progress)
    if resume_from is not None:
        session.resume(resume_from)
    run.write_config(dump_config(config))
    try:
        status = session.reached()
        if status is None:
            status = _train(config, resume_from, session, is_interrupted)
    except Exception as exc:
        logger.exception("the run failed")
        error = as_training_error(exc, config.env, run)
        run.write_result(asdict(session.result(FAILED, error=error.message)))
        raise error from exc
    result = session.result(status)
    run.write_result(asdict(result))
    return result


def _train(
    config: TrainingConfig,
    resume_from: Path | None,
    session: _Session,
    is_interrupted: Callable[[], bool],
) -> str:
    with ray_cluster(n_workers=config.num_env_runners, n_gpus=config.num_gpus):
        algorithm = (
            build_algorithm(config)
            if resume_from is None
            else restore_algorithm(config, resume_from)
        )
        try:
            return session.loop(algorithm, is_interrupted)
        finally:
            algorithm.stop()


class _Session:
    """The state of one run between iterations."""

    def __init__(
        self,
        config: TrainingConfig,
        run: RunDirectory,
        on_progress: Callable[[ProgressRow], None],
    ) -> None:
        self._config = config
        self._run = run
        self._on_progress = on_progress
        self._file = ProgressFile(run.progress_file)
        self._returns = ReturnTracker(
            stop_window=config.stop.window_episodes,
            best_window=config.checkpoint.best_window_episodes,
        )
        self._iteration = 0
        self._env_steps = 0
        self._time_s = 0.0
        self._saved_iteration: int | None = None
        self._is_signed = _can_sign()

    def resume(self, checkpoint: Path) -> None:
        facts = verify_checkpoint(checkpoint).facts
        try:
            self._iteration = int(facts["iteration"])
            self._env_steps = int(facts["env_steps"])
            self._time_s = float(facts["time_s"])
            self._returns.restore(facts)
        except (KeyError, TypeError, ValueError) as exc:
            raise CheckpointNotFoundError(
                f"{checkpoint} can't be resumed: its policyserve.json is missing or damaged"
            ) from exc
        self._run.drop_after(self._iteration)
        self._run.link(LAST, checkpoint)
        if self._run.linked(BEST) is None:
            self._returns.forget_best()
        self._saved_iteration = self._iteration

    def loop(self, algorithm: Algorithm, is_interrupted: Callable[[], bool]) -> str:
        status = INTERRUPTED if is_interrupted() else self.reached()
        while status is None:
            started = time.perf_counter()
            result = run_iteration(algorithm)
            row = self._record(result, time.perf_counter() - started)
            status = INTERRUPTED if is_interrupted() else self.reached()
            # The row first: after a kill, a row without its checkpoint is dropped on resuming, but
            # a checkpoint without its row would leave a gap.
            self._file.append(row)
            self._save_if_due(algorithm)
            self._on_progress(row)
        self._save_last(algorithm, status)
        return status

    def result(self, status: str, error: str | None = None) -> TrainingResult:
        return TrainingResult(
            status=status,
            episode_return_mean=self._returns.recent_mean(),
            best_episode_return_mean=self._returns.best,
            env_steps=self._env_steps,
            iterations=self._iteration,
            time_s=round(self._time_s, 3),
            best_checkpoint=self._relative(BEST),
            last_checkpoint=self._relative(LAST),
            stop=self._config.stop.model_dump(mode="json", by_alias=True),
            error=error,
        )

    def _relative(self, name: str) -> str | None:
        checkpoint = self._run.linked(name)
        return None if checkpoint is None else f"checkpoints/{checkpoint.name}"

    def _record(self, result: IterationResult, duration_s: float) -> ProgressRow:
        if not all(map(math.isfinite, result.episode_returns)):
            raise EnvironmentFailedError(
                f"environment {self._config.env!r} gave a reward that is not a finite number; "
                "the last checkpoint is kept"
            )
        new_steps = result.env_steps - self._env_steps
        self._iteration, self._env_steps = result.iteration, result.env_steps
        self._time_s += duration_s
        self._returns.add(result.episode_returns, result.episode_lengths)
        returns, lengths = self._returns.recent()
        return ProgressRow(
            iteration=self._iteration,
            env_steps=self._env_steps,
            time_s=self._time_s,
            episode_return_mean=self._returns.recent_mean(),
            episode_return_min=min(returns, default=None),
            episode_return_max=max(returns, default=None),
            episode_length_mean=statistics.fmean(lengths) if lengths else None,
            n_episodes=len(result.episode_returns),
            env_steps_per_s=new_steps / duration_s,
            **result.losses,
        )

    def reached(self) -> str | None:
        stop = self._config.stop
        if stop.episode_return is not None and self._returns.has_reached(stop.episode_return):
            return STOP_RETURN
        if stop.timesteps is not None and self._env_steps >= stop.timesteps:
            return STOP_TIMESTEPS
        if stop.time_s is not None and self._time_s >= stop.time_s:
            return STOP_TIME
        return None

    def _save_if_due(self, algorithm: Algorithm) -> None:
        is_best = self._returns.is_best()
        if is_best or self._iteration % self._config.checkpoint.every == 0:
            checkpoint = self._save(algorithm)
            if is_best:
                self._run.link(BEST, checkpoint)

    def _save_last(self, algorithm: Algorithm, status: str) -> None:
        if status == STOP_RETURN:  # the policy that was asked for
            self._returns.declare_best()
        checkpoint = self._run.linked(LAST)
        if checkpoint is None or self._saved_iteration != self._iteration:
            checkpoint = self._save(algorithm)
        if status == STOP_RETURN:
            self._run.link(BEST, checkpoint)

    def _save(self, algorithm: Algorithm) -> Path:
        facts = {
            "env": self._config.env,
            "env_config": self._config.env_config,
            "iteration": self._iteration,
            "env_steps": self._env_steps,
            "time_s": self._time_s,
            "episode_return_mean": self._returns.recent_mean(),
            **self._returns.state(),
        }

        def write(path: Path) -> None:
            algorithm.save_to_path(str(path))
            (sign_checkpoint if self._is_signed else describe_checkpoint)(path, facts)

        checkpoint = self._run.save_checkpoint(self._iteration, write)
        self._saved_iteration = self._iteration
        self._run.prune(self._config.checkpoint.keep)
        return checkpoint


def _can_sign() -> bool:
    try:
        ensure_key()
    except (OSError, RuntimeError) as exc:  # RuntimeError: the user has no home
        logger.warning("checkpoints are not signed, so export asks for --trust-checkpoint: %s", exc)
        return False
    return True
