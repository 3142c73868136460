"""train(config) -> TrainingResult: the loop from an environment to checkpoints."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training.algorithm import build_algorithm, restore_algorithm
from training.cluster import ray_cluster
from training.config import TrainingConfig
from training.config_files import dump_config
from training.failures import as_training_error
from training.progress import ProgressRow
from training.run_directory import BEST, LAST, RunDirectory
from training.session import Session, Status

logger = logging.getLogger("policyserve.training")


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended; `result.json` holds the same.

    Attributes:
        status: stop_return, stop_timesteps, stop_time, interrupted or failed.
        episode_return_mean: Of the newest window of training episodes; None if none ended.
        evaluation_return_mean: Of the last evaluation; None without one.
        best_return_mean: What the best checkpoint was judged by: its evaluation, or where there is
            none its window of training episodes; None where nothing was judged.
        env_steps: Over the whole run.
        iterations: Over the whole run.
        time_s: Training seconds over the whole run, evaluations included, without Ray's start.
        best_checkpoint: Relative to the run directory.
        last_checkpoint: Relative to the run directory.
        stop: The stop section of the config in force.
        error: One line about a failed run, else None.
    """

    status: Status
    episode_return_mean: float | None
    evaluation_return_mean: float | None
    best_return_mean: float | None
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
    starts_ray: bool = True,
) -> TrainingResult:
    """Train until a stop is reached, writing the run directory as it goes.

    Args:
        config: The config in force, its budget and seed filled in (`config.complete`).
        run: A run directory that was created, or that holds the run to resume.
        resume_from: A checkpoint of this run to go on from. It is unpickled: verify it first.
        on_progress: Called after each iteration.
        is_interrupted: Asked after each iteration; True ends the run with a checkpoint.
        starts_ray: Start Ray and end it; False uses the caller's, which runs already.

    Raises:
        EnvironmentFailedError: The environment raised. The result is written, the last checkpoint
            kept.
        TrainingError: Ray or RLlib failed, likewise.
    """
    session = Session(config, run, on_progress)
    if resume_from is not None:
        session.resume(resume_from)
    run.write_config(dump_config(config))
    try:
        status = session.reached()
        if status is None:
            with _ray(config) if starts_ray else contextlib.nullcontext():
                status = _train(config, resume_from, session, is_interrupted)
    except Exception as exc:
        logger.exception("the run failed")
        error = as_training_error(exc, config.env, run)
        with contextlib.suppress(OSError):  # the disk may be what failed
            run.write_result(asdict(_result(session, config, run, "failed", error.message)))
        raise error from exc
    result = _result(session, config, run, status)
    run.write_result(asdict(result))
    return result


def _ray(config: TrainingConfig) -> contextlib.AbstractContextManager[None]:
    n_workers = config.num_env_runners
    if config.evaluation.interval:
        n_workers += config.evaluation.num_env_runners
    return ray_cluster(n_workers=n_workers, n_gpus=config.num_gpus)


def _train(
    config: TrainingConfig,
    resume_from: Path | None,
    session: Session,
    is_interrupted: Callable[[], bool],
) -> Status:
    if resume_from is None:
        algorithm = build_algorithm(config)
    else:
        algorithm = restore_algorithm(config, resume_from)
        session.restore_buffer(algorithm)
    try:
        return session.loop(algorithm, is_interrupted)
    finally:
        algorithm.stop()


def _result(
    session: Session,
    config: TrainingConfig,
    run: RunDirectory,
    status: Status,
    error: str | None = None,
) -> TrainingResult:
    def relative(name: str) -> str | None:
        checkpoint = run.linked(name)
        return None if checkpoint is None else f"checkpoints/{checkpoint.name}"

    return TrainingResult(
        status=status,
        episode_return_mean=session.returns.recent_mean(),
        evaluation_return_mean=session.evaluation.return_mean if session.evaluation else None,
        best_return_mean=session.best.mean,
        env_steps=session.env_steps,
        iterations=session.iteration,
        time_s=round(session.time_s, 3),
        best_checkpoint=relative(BEST),
        last_checkpoint=relative(LAST),
        stop=config.stop.model_dump(mode="json", by_alias=True),
        error=error,
    )
