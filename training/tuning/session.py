"""One trial's training in a thread, iteration by iteration, so that Ray Tune decides in between."""

from __future__ import annotations

import fcntl
import queue
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from training.config import TrainingConfig
from training.config_files import dump_config
from training.errors import CheckpointNotFoundError, UntrustedCheckpointError
from training.progress import ProgressRow
from training.resuming import checkpoints_to_resume
from training.run_directory import LAST, RunDirectory
from training.run_facts import run_facts
from training.terminal import output_to
from training.train import TrainingResult, train


class _AbandonedError(BaseException):
    """Another process trains this trial now; not an Exception, which `train` would write down."""


class TrialSession:
    """Trains one trial in its run directory, as `policyserve train` would.

    Each call of `advance` lets it train one iteration. A session that is left at rest, since Tune
    paused its trial, never writes again once another session has taken the trial over.

    Args:
        config: The trial's config in force.
        run: Its run directory, which may not exist yet.
        ownership: This process's claim on the trial.
        on_ready: Called once the run directory is there.
    """

    def __init__(
        self,
        config: TrainingConfig,
        run: RunDirectory,
        ownership: Ownership,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._on_ready = on_ready
        self._run = run
        self._ownership = ownership
        self._reports: queue.Queue[ProgressRow | TrainingResult | BaseException] = queue.Queue()
        self._may_go_on = threading.Semaphore(0)
        self._is_ending = False
        self._thread: threading.Thread | None = None
        self._newest: ProgressRow | None = None

    def advance(self) -> ProgressRow | TrainingResult:
        """Train one iteration; after the last one, how the run ended.

        Raises:
            Exception: What the training raised, its reason being in the run directory.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._train, daemon=True)
            self._thread.start()
        else:
            self._may_go_on.release()
        report = self._reports.get()
        if isinstance(report, BaseException):
            self._thread.join()
            raise report
        if isinstance(report, ProgressRow):
            self._newest = report
        else:
            self._thread.join()
        return report

    @property
    def iteration(self) -> int:
        """The newest iteration; 0 before the first."""
        return 0 if self._newest is None else self._newest.iteration

    def end(self) -> None:
        """End the training with a checkpoint, unless another session has taken the trial over."""
        if self._thread is None or not self._thread.is_alive():
            return
        self._is_ending = True
        with self._ownership.locked():
            self._may_go_on.release()
            self._thread.join()

    def save(self) -> None:
        """Make sure that the run directory has a checkpoint of the newest iteration."""
        newest = self._run.linked(LAST)
        if self._thread is None or (newest is not None and _iteration(newest) == self.iteration):
            return
        self.end()  # it saves last; the next `advance` goes on from there
        self._thread, self._is_ending = None, False
        self._may_go_on = threading.Semaphore(0)
        self._reports = queue.Queue()

    def _train(self) -> None:
        try:
            with self._ownership.locked():
                self._ownership.take()
                resume_from = prepare_run(self._config, self._run)
                self._on_ready()
            with output_to(self._run.log_file):
                result = train(
                    self._config,
                    self._run,
                    resume_from=resume_from,
                    on_progress=self._report,
                    is_interrupted=lambda: self._is_ending,
                    starts_ray=False,
                )
            self._reports.put(result)
        except _AbandonedError:
            pass
        except BaseException as exc:  # the thread's outermost edge: it is raised in `advance`
            self._reports.put(exc)

    def _report(self, row: ProgressRow) -> None:
        if self._is_ending:
            return
        self._reports.put(row)
        self._may_go_on.acquire()
        if not self._ownership.is_held():
            raise _AbandonedError


def prepare_run(config: TrainingConfig, run: RunDirectory) -> list[Path]:
    """Make a run directory ready to start or to go on.

    Returns:
        The checkpoints that this user's own training signed, to go on from, newest first; none to
        start from nothing.
    """
    if not (run.path / "run.json").exists():
        shutil.rmtree(run.path, ignore_errors=True)  # killed before it began
        run.create(run_facts(config), dump_config(config))
        return []
    try:
        return checkpoints_to_resume(run, trust=False)[0]
    except (CheckpointNotFoundError, UntrustedCheckpointError):
        run.drop_after(0)
        run.progress_file.unlink(missing_ok=True)
        return []


def _iteration(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("_")[2])


class Ownership:
    """Which process trains a trial: the one that wrote the newest token.

    Args:
        scratch: A directory of this start of the search.
        trial: The trial's name.
    """

    def __init__(self, scratch: Path, trial: str) -> None:
        self._lock_file = scratch / f"{trial}.lock"
        self._owner_file = scratch / f"{trial}.owner"
        self._token = secrets.token_hex(8)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from beginning or ending this trial for the block."""
        with self._lock_file.open("wb") as lock:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def take(self) -> None:
        """Be the one from now on."""
        self._owner_file.write_text(self._token, encoding="utf-8")

    def is_held(self) -> bool:
        """Whether nobody else has taken it since."""
        return self._owner_file.read_text(encoding="utf-8") == self._token
