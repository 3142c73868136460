"""train(config) -> TrainingResult: the loop from an environment to checkpoints."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray.rllib.algorithms.algorithm import Algorithm

from training.algorithm import build_algorithm, restore_algorithm
from training.cluster import ray_cluster
from training.config import TrainingConfig
from training.config_files import dump_config
from training.errors import CheckpointDamagedError
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
    resume_from: Path | Sequence[Path] | None = None,
    on_progress: Callable[[ProgressRow], None] = lambda _: None,
    on_note: Callable[[str], None] = lambda _: None,
    is_interrupted: Callable[[], bool] = lambda: False,
    starts_ray: bool = True,
    keeps_initial: bool = False,
) -> TrainingResult:
    """Train until a stop is reached, writing the run directory as it goes.

    Args:
        config: The config in force, its budget and seed filled in (`config.complete`).
        run: A run directory that was created, or that holds the run to resume.
        resume_from: A checkpoint of this run to go on from, or several: the next one is taken where
            RLlib can't restore one. They are unpickled: verify them first.
        on_progress: Called after each iteration.
        on_note: Called with what the user should know before the first iteration.
        is_interrupted: Asked after each iteration; True ends the run with a checkpoint.
        starts_ray: Start Ray and end it; False uses the caller's, which runs already.
        keeps_initial: Keep a checkpoint of the untrained policy, linked as `initial`.

    Raises:
        EnvironmentFailedError: The environment raised. The result is written, the last checkpoint
            kept.
        TrainingError: Ray or RLlib failed, likewise.
    """
    session = Session(config, run, on_progress, keeps_initial=keeps_initial)
    checkpoints = [resume_from] if isinstance(resume_from, Path) else list(resume_from or ())
    if checkpoints:
        session.resume(checkpoints[0])
    try:
        run.write_config(dump_config(config))
        status = session.reached()
        if status is None:
            with _ray(config) if starts_ray else contextlib.nullcontext():
                algorithm = _algorithm(config, checkpoints, session, on_note)
                try:
                    _note_what_cannot_be_exported(config, algorithm, on_note)
                    status = session.loop(algorithm, is_interrupted)
                finally:
                    algorithm.stop()
        elif checkpoints:
            session.take_over(checkpoints[0])
        result = _result(session, config, run, status)
        run.write_result(asdict(result))
    except Exception as exc:
        logger.exception("the run failed")
        error = as_training_error(exc, config.env, run)
        with contextlib.suppress(OSError):  # the disk may be what failed
            run.write_result(asdict(_result(session, config, run, "failed", error.message)))
        raise error from exc
    return result


def _ray(config: TrainingConfig) -> contextlib.AbstractContextManager[None]:
    n_workers = config.num_env_runners
    if config.evaluation.interval:
        n_workers += config.evaluation.num_env_runners
    return ray_cluster(n_workers=n_workers, n_gpus=config.num_gpus)


def _algorithm(
    config: TrainingConfig,
    checkpoints: Sequence[Path],
    session: Session,
    on_note: Callable[[str], None],
) -> Algorithm:
    if not checkpoints:
        return build_algorithm(config)
    for i, checkpoint in enumerate(checkpoints, start=1):
        session.resume(checkpoint)
        try:
            algorithm = restore_algorithm(config, checkpoint)
            break
        except CheckpointDamagedError as exc:
            if i == len(checkpoints):
                raise
            logger.exception("%s is passed over", checkpoint)
            on_note(f"{checkpoint.name} is passed over: {exc.message}")
    session.take_over(checkpoint)
    note = session.restore_buffer(algorithm)
    if note is not None:
        on_note(note)
    return algorithm


def _note_what_cannot_be_exported(
    config: TrainingConfig, algorithm: Algorithm, on_note: Callable[[str], None]
) -> None:
    if config.model.module is None:  # RLlib's own networks are all exported
        return
    from training.exportability import why_not_exportable

    reason = why_not_exportable(algorithm)
    if reason is not None:
        logger.warning("can't be exported: %s", reason)
        on_note(f"warning: this policy trains, but `policyserve export` will refuse it: {reason}")


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
        evaluation_return_mean=session.evaluation_return_mean,
        best_return_mean=session.best.mean,
        env_steps=session.env_steps,
        iterations=session.iteration,
        time_s=round(session.time_s, 3),
        best_checkpoint=relative(BEST),
        last_checkpoint=relative(LAST),
        stop=config.stop.model_dump(mode="json", by_alias=True),
        error=error,
    )
