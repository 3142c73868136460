"""Everything that a training run leaves on disk. Imports neither Ray nor torch.

RUN_DIR/
  run.json         the marker: environment, algorithm, seed, versions, machine
  config.yaml      the config in force; `policyserve train config.yaml` takes it
  progress.csv     one row per iteration
  result.json      how it ended
  train.log        whatever Ray and RLlib said, and the traceback of a failed run
  checkpoints/     iteration_000020/ ..., and the links `best` and `last`
  replay_buffer/   off-policy algorithms: what the newest checkpoint goes on learning from
"""

from __future__ import annotations

import csv
import datetime as dt
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import CheckpointNotFoundError, ConfigError

RUN_FORMAT = "policyserve-run"
RUN_FORMAT_VERSION = 1
BEST, LAST = "best", "last"
_RLLIB_MARKER = "rllib_checkpoint.json"  # RLlib writes it into every Algorithm checkpoint
_ITERATION = re.compile(r"iteration_(\d{6,})")


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
        self.checkpoints = self.path / "checkpoints"
        self.replay_buffer = self.path / "replay_buffer"

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
        _write_text(self.config_file, config_yaml)

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
        temporary = self.checkpoints / f".{final.name}.{os.getpid()}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            write(temporary)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self.link(LAST, final)
        return final

    def link(self, name: str, checkpoint: Path) -> None:
        """Point `checkpoints/<name>` at a checkpoint, in one step."""
        temporary = self.checkpoints / f".{name}.{os.getpid()}.tmp"
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
        whole = [path for path in found if _ITERATION.fullmatch(path.name) and _is_checkpoint(path)]
        return sorted(whole, key=lambda path: int(path.name.split("_")[1]), reverse=True)

    def prune(self, keep: int) -> None:
        """Delete all but the newest `keep` checkpoints; `best` and `last` always stay."""
        linked = {self.linked(BEST), self.linked(LAST)}
        for path in self.all_checkpoints()[keep:]:
            if path.resolve() not in linked:
                shutil.rmtree(path)

    def drop_after(self, iteration: int) -> None:
        """Forget what came after an iteration: its progress rows and checkpoints.

        A run that was killed may have logged iterations past the checkpoint that it resumes from;
        without this the resumed curve would hold them twice.
        """
        if self.progress_file.exists():
            with self.progress_file.open(newline="", encoding="utf-8") as file:
                header, *rows = [row for row in csv.reader(file) if row] or [[]]
            # A row cut short by the kill is dropped too.
            kept = [row for row in rows if len(row) == len(header) and int(row[0]) <= iteration]
            lines = [",".join(row) for row in [header, *kept] if row]
            _write_text(self.progress_file, "".join(line + "\n" for line in lines))
        for path in self.all_checkpoints():
            if int(path.name.split("_")[1]) > iteration:
                shutil.rmtree(path)
        for leftover in self.checkpoints.glob(".*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)


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


def _is_checkpoint(path: Path) -> bool:
    return (path / _RLLIB_MARKER).is_file()


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    _write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
