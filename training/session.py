"""The state of one run between iterations: what it counts, stops on, judges and writes."""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from ray.rllib.algorithms.algorithm import Algorithm

from training.algorithm import IterationResult, run_iteration
from training.config import TrainingConfig
from training.errors import CheckpointNotFoundError, EnvironmentFailedError
from training.evaluation import Evaluation, evaluate
from training.progress import ProgressFile, ProgressRow
from training.provenance import describe_checkpoint, ensure_key, sign_checkpoint, verify_checkpoint
from training.replay_buffer import (
    prune_replay_buffers,
    restore_replay_buffer,
    save_replay_buffer,
)
from training.returns import BestPolicy, ReturnTracker
from training.run_directory import BEST, INITIAL, LAST, RunDirectory
from training.tensorboard import TensorBoardFiles

logger = logging.getLogger("policyserve.training")

Status = Literal["stop_return", "stop_timesteps", "stop_time", "interrupted", "failed"]


class Session:
    """One run, from its start or its resumption to its end.

    Args:
        config: The config in force.
        run: Its directory.
        on_progress: Called with each iteration's row.
        keeps_initial: Keep a checkpoint of the untrained policy, linked as `initial`.
    """

    def __init__(
        self,
        config: TrainingConfig,
        run: RunDirectory,
        on_progress: Callable[[ProgressRow], None],
        *,
        keeps_initial: bool = False,
    ) -> None:
        self._config = config
        self._run = run
        self._on_progress = on_progress
        self._keeps_initial = keeps_initial
        self._file = ProgressFile(run.progress_file)
        self.returns = _return_tracker(config)
        self.best = BestPolicy()
        self.evaluation_return_mean: float | None = None
        """Of the newest evaluation; None before the first."""
        self.iteration = 0
        self.env_steps = 0
        self.time_s = 0.0
        self._saved_iteration: int | None = None
        self._was_best = False
        self._buffer: Mapping[str, str] = {}
        self._is_signed = _can_sign()

    def resume(self, checkpoint: Path) -> None:
        """Read where a checkpoint was written; the run directory stays as it is.

        May be called again with another one.

        Raises:
            CheckpointNotFoundError: Its facts are missing or damaged.
        """
        facts = verify_checkpoint(checkpoint).facts
        self.returns, self.best = _return_tracker(self._config), BestPolicy()
        try:
            self.iteration = int(facts["iteration"])
            self.env_steps = int(facts["env_steps"])
            self.time_s = float(facts["time_s"])
            self.returns.restore(facts)
            self.best.restore(facts)
            self._buffer = dict(facts.get("replay_buffer", {}))
            self._was_best = bool(facts.get("is_best", False))
            evaluated = facts.get("evaluation_return_mean")
            self.evaluation_return_mean = None if evaluated is None else float(evaluated)
        except (KeyError, TypeError, ValueError) as exc:
            raise CheckpointNotFoundError(
                f"{checkpoint} can't be resumed: its policyserve.json is missing or damaged"
            ) from exc

    def take_over(self, checkpoint: Path) -> None:
        """Go on from the checkpoint of `resume`: forget what the run wrote after it."""
        self._run.drop_after(self.iteration)
        self._run.link(LAST, checkpoint)
        if self._was_best:  # a kill may have come before the link
            self._run.link(BEST, checkpoint)
        elif self._run.linked(BEST) is None:
            self.best.forget()
        self._prune_buffers()
        self._saved_iteration = self.iteration

    def restore_buffer(self, algorithm: Algorithm) -> str | None:
        """Give a restored algorithm its replay buffer back, where it has one.

        Returns:
            What the user should know where it starts empty.
        """
        if restore_replay_buffer(algorithm, self._run.replay_buffer, self._buffer):
            return None
        note = (
            f"the replay buffer of iteration {self.iteration} is not there: it fills anew, and "
            "nothing is learned until it holds as much as before the first update"
        )
        logger.warning(note)
        return note

    def loop(self, algorithm: Algorithm, is_interrupted: Callable[[], bool]) -> Status:
        """Train until a stop is reached; checkpoints and rows are written on the way."""
        if self._keeps_initial and self.iteration == 0:
            self._run.link(INITIAL, self._save(algorithm))
        with contextlib.closing(
            TensorBoardFiles(self._run.tensorboard, self._run.progress_file)
        ) as tensorboard:
            status: Status | None = "interrupted" if is_interrupted() else self.reached()
            while status is None:
                row, status = self._iterate(algorithm, is_interrupted)
                tensorboard.append(row.cells())
                self._on_progress(row)
                if status is None and is_interrupted():  # while the row was shown
                    status = "interrupted"
        self._save_last(algorithm, status)
        return status

    def _iterate(
        self, algorithm: Algorithm, is_interrupted: Callable[[], bool]
    ) -> tuple[ProgressRow, Status | None]:
        started = time.perf_counter()
        result = run_iteration(algorithm, self._config.algo)
        duration_s = time.perf_counter() - started
        n_new_steps = self._take_in(result)
        status: Status | None = "interrupted" if is_interrupted() else self.reached()
        evaluation = None
        if status != "interrupted":  # who stops a run doesn't wait for episodes
            evaluation = self._evaluate_if_due(algorithm, is_last=status is not None)
        if status in (None, "stop_timesteps", "stop_time"):
            status = "stop_return" if self._evaluation_reached() else status
        self.time_s += time.perf_counter() - started
        row = self._row(result, evaluation, n_new_steps / duration_s)
        # The row first: after a kill, a row without its checkpoint is dropped on resuming, but
        # a checkpoint without its row would leave a gap.
        self._file.append(row)
        self._save_if_due(algorithm, evaluation)
        return row, status

    def reached(self) -> Status | None:
        """The stop that training has come to, None where it goes on."""
        stop = self._config.stop
        if stop.episode_return is not None and self.returns.has_reached(stop.episode_return):
            return "stop_return"
        if self._evaluation_reached():
            return "stop_return"
        if stop.timesteps is not None and self.env_steps >= stop.timesteps:
            return "stop_timesteps"
        if stop.time_s is not None and self.time_s >= stop.time_s:
            return "stop_time"
        return None

    def _evaluation_reached(self) -> bool:
        wanted, found = self._config.stop.evaluation_return, self.evaluation_return_mean
        return wanted is not None and found is not None and found >= wanted

    def _take_in(self, result: IterationResult) -> int:
        if not all(math.isfinite(episode.episode_return) for episode in result.episodes):
            raise EnvironmentFailedError(
                f"environment {self._config.env!r} gave a reward that is not a finite number; "
                "the last checkpoint is kept"
            )
        n_new_steps = result.env_steps - self.env_steps
        self.iteration, self.env_steps = result.iteration, result.env_steps
        self.returns.add(result.episodes)
        return n_new_steps

    def _evaluate_if_due(self, algorithm: Algorithm, *, is_last: bool) -> Evaluation | None:
        interval = self._config.evaluation.interval
        if not interval or not (is_last or self.iteration % interval == 0):
            return None
        seed = (self._config.seed or 0) + 1_000_003 * self.iteration
        evaluation = evaluate(algorithm, self._config.evaluation, seed=seed % 2**31)
        self.evaluation_return_mean = evaluation.return_mean
        return evaluation

    def _row(
        self, result: IterationResult, evaluation: Evaluation | None, steps_per_s: float
    ) -> ProgressRow:
        returns, lengths = self.returns.recent()
        return ProgressRow(
            iteration=self.iteration,
            env_steps=self.env_steps,
            time_s=self.time_s,
            episode_return_mean=self.returns.recent_mean(),
            episode_return_min=min(returns, default=None),
            episode_return_max=max(returns, default=None),
            episode_length_mean=statistics.fmean(lengths) if lengths else None,
            n_episodes=len(result.episodes),
            n_terminated=sum(episode.terminated for episode in result.episodes),
            n_truncated=sum(episode.truncated for episode in result.episodes),
            evaluation_return_mean=evaluation.return_mean if evaluation else None,
            evaluation_return_std=evaluation.return_std if evaluation else None,
            evaluation_length_mean=evaluation.length_mean if evaluation else None,
            n_evaluation_episodes=len(evaluation.episodes) if evaluation else None,
            n_evaluation_terminated=evaluation.n_terminated if evaluation else None,
            n_evaluation_truncated=evaluation.n_truncated if evaluation else None,
            env_steps_per_s=steps_per_s,
            losses=result.losses,
        )

    def _save_if_due(self, algorithm: Algorithm, evaluation: Evaluation | None) -> None:
        if self._config.evaluation.interval:
            is_best = evaluation is not None and self.best.is_best(evaluation.returns)
        else:
            is_best = self.best.is_best(self.returns.best_window())
        if is_best or self.iteration % self._config.checkpoint.every == 0:
            self._save(algorithm, is_best=is_best)

    def _save_last(self, algorithm: Algorithm, status: Status) -> None:
        # Without evaluation the policy that was asked for is the one that reached the stop.
        is_best = status == "stop_return" and not self._config.evaluation.interval
        if is_best:
            self.best.declare(self.returns.recent_mean())
        checkpoint = self._run.linked(LAST)
        if checkpoint is None or self._saved_iteration != self.iteration:
            self._save(algorithm, is_best=is_best)
        elif is_best:
            self._run.link(BEST, checkpoint)
        self._run.prune(self._config.checkpoint.keep)

    def _save(self, algorithm: Algorithm, *, is_best: bool = False) -> Path:
        buffer: Mapping[str, str] = {}
        if getattr(self._config.algo_config, "store_buffer_in_checkpoints", False):
            buffer = save_replay_buffer(algorithm, self._run.replay_buffer, self.iteration)
        facts: dict[str, Any] = {
            "env": self._config.env,
            "env_config": self._config.env_config,
            "wrappers": [[path, kwargs] for path, kwargs in self._config.wrapper_calls()],
            "module": self._config.model.module,
            "iteration": self.iteration,
            "env_steps": self.env_steps,
            "time_s": self.time_s,
            "episode_return_mean": self.returns.recent_mean(),
            "evaluation_return_mean": self.evaluation_return_mean,
            **self.returns.state(),
            **self.best.state(),
            "is_best": is_best,
            **({"replay_buffer": buffer} if buffer else {}),
        }

        def write(path: Path) -> None:
            algorithm.save_to_path(str(path))
            (sign_checkpoint if self._is_signed else describe_checkpoint)(path, facts)

        checkpoint = self._run.save_checkpoint(self.iteration, write)
        self._saved_iteration = self.iteration
        if is_best:
            self._run.link(BEST, checkpoint)
        self._run.prune(self._config.checkpoint.keep, is_last=False)
        self._prune_buffers()
        return checkpoint

    def _prune_buffers(self) -> None:
        # Of the newest checkpoints that stay: others are still there until the next `prune`.
        newest_first = self._run.all_checkpoints()[: self._config.checkpoint.keep]
        prune_replay_buffers(self._run.replay_buffer, newest_first)


def _return_tracker(config: TrainingConfig) -> ReturnTracker:
    return ReturnTracker(
        stop_window=config.stop.window_episodes,
        best_window=config.checkpoint.best_window_episodes,
    )


def _can_sign() -> bool:
    try:
        ensure_key()
    except (OSError, RuntimeError) as exc:  # RuntimeError: the user has no home
        logger.warning("checkpoints are not signed, so export asks for --trust-checkpoint: %s", exc)
        return False
    return True
