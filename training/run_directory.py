"""Everything that a training run leaves on disk. Imports neither Ray nor torch.

RUN_DIR/
  run.json         the marker: environment, algorithm, seed, versions, machine
  config.yaml      the config in force; `policyserve train config.yaml` takes it
  progress.csv     one row per iteration
  tensorboard/     the same as TensorBoard event files
  result.json      how it ended
  train.log        whatever Ray and RLlib said, and the traceback of a failed run
  checkpoints/     iteration_000020/ ..., and the links `best`, `last`, `initial`
  replay_buffer/   off-policy algorithms: what the two newest checkpoints go on learning from
"""

from __future__ import annotations

import csv
import datetime as dt
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.durable_files import (
    delete_leftovers,
    delete_tree,
    sync,
    sync_tree,
    temporary_name,
    write_text,
)
from training.errors import CheckpointNotFoundError, ConfigError

RUN_FORMAT = "policyserve-run"
RUN_FORMAT_VERSION = 1
BEST, LAST, INITIAL = "best", "last", "initial"
_RLLIB_MARKER = "rllib_checkpoint.json"  # RLlib writes it into every Algorithm checkpoint
_ITERATION = re.compile(r"iteration_(\d{6,})")
# A fast run saves several times a second, and a checkpoint takes some 50 ms to be on the disk.
_PRUNE_EVERY_S = 5.0


@dataclass(frozen=True)
class RunInfo:
    """What `run.json` says about a run, and where its checkpoints are.

    Attributes:
        path: The run directory.
        env: The Gymnasium environment id.
        env_config: The keyword arguments that the environment was made with.
        algo: RLlib's name of the algorithm, e.g. "PPO".
        seed: The seed in force.
        created: When the run started, ISO 8601 with an offset.
        versions: Package to version, e.g. {"ray": "2.60.0"}.
        best_checkpoint: None before the first full window of episodes.
        last_checkpoint: None before the first checkpoint.
    """

    path: Path
    env: str
    env_config: Mapping[str, Any]
    algo: str
    seed: int | None
    created: str
    versions: Mapping[str, str]
    best_checkpoint: Path | None
    last_checkpoint: Path | None


class RunDirectory:
    """One run directory: names, atomic writes and the checkpoints' links."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.config_file = self.path / "config.yaml"
        self.progress_file = self.path / "progress.csv"
        self.result_file = self.path / "result.json"
        self.log_file = self.path / "train.log"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.replay_buffer = self.path / "replay_buffer"
        self._pruned_at_s = -math.inf

    def create(self, facts: Mapping[str, Any], config_yaml: str) -> None:
        """Start a new run here.

        Raises:
            ConfigError: The path already holds a run or other files, or can't be written.
        """
        self.refuse_if_used()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.write_config(config_yaml)
            created = dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds")
            marker = {"format": RUN_FORMAT, "format_version": RUN_FORMAT_VERSION}
            _write_json(self.path / "run.json", {**marker, **facts, "created": created})
        except OSError as exc:
            raise ConfigError(f"the run directory {self.path} can't be written: {exc}") from exc

    def refuse_if_used(self) -> None:
        """Raise ConfigError if a new run can't start here: a run is never overwritten."""
        if (self.path / "run.json").exists():
            raise ConfigError(
                f"{self.path} already holds a run: continue it with `--resume {self.path}`, "
                "or give another --run-dir"
            )
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ConfigError(
                f"{self.path} is not an empty directory: give a --run-dir that is empty or new"
            )

    def write_config(self, config_yaml: str) -> None:
        """Write the config in force."""
        write_text(self.config_file, config_yaml)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write `result.json`."""
        _write_json(self.result_file, result)

    def save_checkpoint(self, iteration: int, write: Callable[[Path], None]) -> Path:
        """Write a checkpoint under a temporary name, rename it when whole, and point `last` at it.

        Args:
            iteration: The training iteration that it follows.
            write: Called with the temporary directory; leaves the whole checkpoint in it.

        Returns:
            The checkpoint directory. One of the same iteration is replaced.
        """
        final = self.checkpoints / f"iteration_{iteration:06d}"
        temporary = temporary_name(self.checkpoints / f"new_{final.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            write(temporary)
            if self.progress_file.exists():  # no checkpoint is found later without its rows
                sync(self.progress_file)
            if final.exists():
                delete_tree(final)
            temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self.link(LAST, final)
        return final

    def link(self, name: str, checkpoint: Path) -> None:
        """Point `checkpoints/<name>` at a checkpoint, in one step."""
        temporary = temporary_name(self.checkpoints / name)
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(checkpoint.name)
        link = self.checkpoints / name
        if link.is_dir() and not link.is_symlink():  # a copy of the run that followed its links
            shutil.rmtree(link)
        temporary.replace(link)

    def linked(self, name: str) -> Path | None:
        """The checkpoint that `best` or `last` points at, None where there is none."""
        target = (self.checkpoints / name).resolve()
        return target if _is_checkpoint(target) else None

    def last(self) -> Path | None:
        """The last checkpoint, None where there is none.

        A copy of a run may have lost its links: then it is the newest that is whole.
        """
        return self.linked(LAST) or next(iter(self.all_checkpoints()), None)

    def all_checkpoints(self) -> list[Path]:
        """Every whole checkpoint, newest iteration first."""
        found = self.checkpoints.glob("iteration_*") if self.checkpoints.is_dir() else ()
        whole = [path for path in found if is_checkpoint_name(path.name) and _is_checkpoint(path)]
        return sorted(whole, key=iteration_of, reverse=True)

    def prune(self, keep: int, *, is_last: bool = True) -> None:
        """Delete all but the newest `keep` checkpoints; linked ones always stay.

        The newest is on the disk before an older one is deleted, so that a power cut leaves one.

        Args:
            keep: How many stay.
            is_last: No further call follows soon; others are put off where one was a moment ago.
        """
        if not is_last and time.monotonic() - self._pruned_at_s < _PRUNE_EVERY_S:
            return
        linked = {self.linked(name) for name in (BEST, LAST, INITIAL)}
        newest_first = self.all_checkpoints()
        doomed = [path for path in newest_first[keep:] if path.resolve() not in linked]
        if not doomed:
            return
        sync_tree(newest_first[0])
        for path in doomed:
            delete_tree(path)
        self._pruned_at_s = time.monotonic()

    def drop_after(self, iteration: int) -> None:
        """Forget what came after an iteration: its checkpoints and progress rows, and the result.

        A run that was killed may have logged iterations past the checkpoint that it resumes from;
        without this the resumed curve would hold them twice.
        """
        # The rows last: killed in between, no checkpoint is left whose rows are gone.
        for path in self.all_checkpoints():
            if iteration_of(path) > iteration:
                delete_tree(path)
        self.result_file.unlink(missing_ok=True)
        self._drop_rows_after(iteration)
        for directory in (self.path, self.checkpoints, self.replay_buffer):
            delete_leftovers(directory)

    def _drop_rows_after(self, iteration: int) -> None:
        if not self.progress_file.exists():
            return
        # Bytes that are no text are the rest of a row that a power cut ended.
        text = self.progress_file.read_text(encoding="utf-8", errors="replace")
        header, *lines = text.splitlines(keepends=True) or [""]
        n_cells = len(next(csv.reader([header]), []))
        kept = [line for line in lines if _is_row(line, n_cells, iteration)]
        if kept:
            write_text(self.progress_file, "".join([header, *kept]))
        else:  # the header may have been cut short as well
            self.progress_file.unlink()


def is_checkpoint_name(name: str) -> bool:
    """Whether a run could have a checkpoint of that name."""
    return _ITERATION.fullmatch(name) is not None


def iteration_of(checkpoint: Path) -> int:
    """The iteration that a checkpoint of a run follows."""
    return int(checkpoint.name.split("_")[1])


def find_checkpoint(path: Path) -> Path:
    """Find the checkpoint that a path means: a run directory's best, else its last, or itself.

    Raises:
        CheckpointNotFoundError: The path is neither a run with a checkpoint nor a checkpoint.
    """
    if not path.exists():
        raise CheckpointNotFoundError(f"{path} does not exist")
    if _is_checkpoint(path):
        return path.resolve()
    run = RunDirectory(path)
    checkpoint = run.linked(BEST) or run.last()
    if checkpoint is not None:
        return checkpoint
    if (path / "run.json").exists():
        raise CheckpointNotFoundError(f"{path} is a run without a checkpoint: it ended too early")
    raise CheckpointNotFoundError(
        f"{path} is neither a run directory (no run.json) nor an RLlib checkpoint "
        f"(no {_RLLIB_MARKER}); give what `policyserve train` wrote"
    )


def read_run(path: Path) -> RunInfo:
    """Read a run directory's marker.

    Raises:
        CheckpointNotFoundError: The path is not a run directory, or its `run.json` is damaged.
    """
    marker = path / "run.json"
    try:
        facts = json.loads(marker.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointNotFoundError(f"{path} is not a run directory: no run.json") from None
    except (OSError, ValueError) as exc:
        raise CheckpointNotFoundError(f"{marker} can't be read: {exc}") from exc
    if not isinstance(facts, dict) or facts.get("format") != RUN_FORMAT:
        raise CheckpointNotFoundError(f"{marker} is not a {RUN_FORMAT} document")
    if facts.get("format_version") != RUN_FORMAT_VERSION:
        raise CheckpointNotFoundError(
            f"{marker} has format_version {facts.get('format_version')!r}, "
            f"expected {RUN_FORMAT_VERSION}: another version of policyserve wrote it"
        )
    run = RunDirectory(path)
    try:
        return RunInfo(
            path=run.path,
            env=facts["env"],
            env_config=facts["env_config"],
            algo=facts["algo"],
            seed=facts["seed"],
            created=facts["created"],
            versions=facts["versions"],
            best_checkpoint=run.linked(BEST),
            last_checkpoint=run.last(),
        )
    except KeyError as exc:
        raise CheckpointNotFoundError(f"{marker} lacks {exc.args[0]!r}: it is damaged") from exc


def _is_row(line: str, n_cells: int, last_iteration: int) -> bool:
    # A row that a kill or a full disk cut short lacks cells, or at least the end of its line.
    first, *others = line.split(",")
    is_whole = line.endswith("\n") and 1 + len(others) == n_cells and first.isdecimal()
    return is_whole and int(first) <= last_iteration


def _is_checkpoint(path: Path) -> bool:
    return (path / _RLLIB_MARKER).is_file()


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")
