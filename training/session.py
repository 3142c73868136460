"""The state of one run between iterations: what it counts, stops on, judges and writes."""

from __future__ import annotations

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
from training.run_directory import BEST, LAST, RunDirectory

logger = logging.getLogger("policyserve.training")

Status = Literal["stop_return", "stop_timesteps", "stop_time", "interrupted", "failed"]


class Session:
    """One run, from its start or its resumption to its end.

    Args:
        config: The config in force.
        run: Its directory.
        on_progress: Called with each iteration's row.
    """

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
        self.returns = ReturnTracker(
            stop_window=config.stop.window_episodes,
            best_window=config.checkpoint.best_window_episodes,
        )
        self.best = BestPolicy()
        self.evaluation: Evaluation | None = None
        """The newest one of this process; None before the first."""
        self.iteration = 0
        self.env_steps = 0
        self.time_s = 0.0
        self._saved_iteration: int | None = None
        self._buffer: Mapping[str, str] = {}
        self._is_signed = _can_sign()

    def resume(self, checkpoint: Path) -> None:
        """Take over where a checkpoint was written, and forget what the run wrote after it.

        Raises:
            CheckpointNotFoundError: Its facts are missing or damaged.
        """
        facts = verify_checkpoint(checkpoint).facts
        try:
            self.iteration = int(facts["iteration"])
            self.env_steps = int(facts["env_steps"])
            self.time_s = float(facts["time_s"])
            self.returns.restore(facts)
            self.best.restore(facts)
            self._buffer = dict(facts.get("replay_buffer", {}))
        except (KeyError, TypeError, ValueError) as exc:
            raise CheckpointNotFoundError(
                f"{checkpoint} can't be resumed: its policyserve.json is missing or damaged"
            ) from exc
        self._run.drop_after(self.iteration)
        self._run.link(LAST, checkpoint)
        if self._run.linked(BEST) is None:
            self.best.forget()
        self._saved_iteration = self.iteration

    def restore_buffer(self, algorithm: Algorithm) -> None:
        """Give a restored algorithm its replay buffer back, where it has one."""
        if not restore_replay_buffer(algorithm, self._run.replay_buffer, self._buffer):
            logger.warning(
                "the replay buffer of iteration %d is not there: it fills anew", self.iteration
            )

    def loop(self, algorithm: Algorithm, is_interrupted: Callable[[], bool]) -> Status:
        """Train until a stop is reached; checkpoints and rows are written on the way."""
        status: Status | None = "interrupted" if is_interrupted() else self.reached()
        while status is None:
            started = time.perf_counter()
            result = run_iteration(algorithm, self._config.algo)
            duration_s = time.perf_counter() - started
            n_new_steps = self._take_in(result)
            status = "interrupted" if is_interrupted() else self.reached()
            evaluation = self._evaluate_if_due(algorithm, is_last=status is not None)
            if status is None or status == "stop_timesteps":
                status = self._evaluation_reached(evaluation) or status
            self.time_s += time.perf_counter() - started
            row = self._row(result, evaluation, n_new_steps / duration_s)
            # The row first: after a kill, a row without its checkpoint is dropped on resuming, but
            # a checkpoint without its row would leave a gap.
            self._file.append(row)
            self._save_if_due(algorithm, evaluation)
            self._on_progress(row)
        self._save_last(algorithm, status)
        return status

    def reached(self) -> Status | None:
        """The stop that training has come to, None where it goes on."""
        stop = self._config.stop
        if stop.episode_return is not None and self.returns.has_reached(stop.episode_return):
            return "stop_return"
        if stop.timesteps is not None and self.env_steps >= stop.timesteps:
            return "stop_timesteps"
        if stop.time_s is not None and self.time_s >= stop.time_s:
            return "stop_time"
        return None

    def _evaluation_reached(self, evaluation: Evaluation | None) -> Status | None:
        wanted = self._config.stop.evaluation_return
        if evaluation is None or wanted is None or evaluation.return_mean < wanted:
            return None
        return "stop_return"

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
        self.evaluation = evaluate(algorithm, self._config.evaluation, seed=seed % 2**31)
        return self.evaluation

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
            env_steps_per_s=steps_per_s,
            losses=result.losses,
        )

    def _save_if_due(self, algorithm: Algorithm, evaluation: Evaluation | None) -> None:
        if self._config.evaluation.interval:
            is_best = evaluation is not None and self.best.is_best(evaluation.returns)
        else:
            is_best = self.best.is_best(self.returns.best_window())
        if is_best or self.iteration % self._config.checkpoint.every == 0:
            checkpoint = self._save(algorithm)
            if is_best:
                self._run.link(BEST, checkpoint)

    def _save_last(self, algorithm: Algorithm, status: Status) -> None:
        # Without evaluation the policy that was asked for is the one that reached the stop.
        is_best = status == "stop_return" and not self._config.evaluation.interval
        if is_best:
            self.best.declare(self.returns.recent_mean())
        checkpoint = self._run.linked(LAST)
        if checkpoint is None or self._saved_iteration != self.iteration:
            checkpoint = self._save(algorithm)
        if is_best:
            self._run.link(BEST, checkpoint)

    def _save(self, algorithm: Algorithm) -> Path:
        buffer: Mapping[str, str] = {}
        if getattr(self._config.algo_config, "store_buffer_in_checkpoints", False):
            buffer = save_replay_buffer(algorithm, self._run.replay_buffer, self.iteration)
        facts: dict[str, Any] = {
            "env": self._config.env,
            "env_config": self._config.env_config,
            "wrappers": [[path, kwargs] for path, kwargs in self._config.wrapper_calls()],
            "iteration": self.iteration,
            "env_steps": self.env_steps,
            "time_s": self.time_s,
            "episode_return_mean": self.returns.recent_mean(),
            "evaluation_return_mean": self.evaluation.return_mean if self.evaluation else None,
            **self.returns.state(),
            **self.best.state(),
            **({"replay_buffer": buffer} if buffer else {}),
        }

        def write(path: Path) -> None:
            algorithm.save_to_path(str(path))
            (sign_checkpoint if self._is_signed else describe_checkpoint)(path, facts)

        checkpoint = self._run.save_checkpoint(self.iteration, write)
        self._saved_iteration = self.iteration
        self._run.prune(self._config.checkpoint.keep)
        prune_replay_buffers(self._run.replay_buffer, buffer)
        return checkpoint


def _can_sign() -> bool:
    try:
        ensure_key()
    except (OSError, RuntimeError) as exc:  # RuntimeError: the user has no home
        logger.warning("checkpoints are not signed, so export asks for --trust-checkpoint: %s", exc)
        return False
    return True
