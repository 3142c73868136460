"""Everything that a search leaves on disk. Imports neither Ray nor torch.

SEARCH_DIR/
  search.json      the marker: what is searched, and every trial's values and seed
  search.yaml      the search in force; `policyserve tune` takes it
  trials.csv       one row per trial, rewritten as trials end; trials.parquet holds the same
  best.yaml        the best trial's whole config; `policyserve train` takes it
  tune.log         what Ray said
  trials/          trial_0001/ ..., each a run directory as `policyserve train` writes it
"""

from __future__ import annotations

import datetime as dt
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.durable_files import delete_leftovers
from training.errors import CheckpointNotFoundError, ConfigError
from training.run_directory import RunDirectory
from training.tuning.definition import Search, Trial, load_search
from training.tuning.files import write_atomically, write_json

SEARCH_FORMAT = "policyserve-search"
SEARCH_FORMAT_VERSION = 1
MARKER = "search.json"


class SearchDirectory:
    """One search directory: names, atomic writes, and the lock of whoever runs it."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.marker = self.path / MARKER
        self.search_file = self.path / "search.yaml"
        self.csv_file = self.path / "trials.csv"
        self.parquet_file = self.path / "trials.parquet"
        self.best_file = self.path / "best.yaml"
        self.log_file = self.path / "tune.log"
        self.trials = self.path / "trials"
        self.scratch = self.path / ".tune"
        """What Ray Tune writes while it runs. Deleted at the end, and never read by another
        process than the ones that wrote it: it is pickled."""

    def run(self, name: str) -> RunDirectory:
        """The run directory of a trial."""
        return RunDirectory(self.trials / name)

    def create(self, search: Search, trials: Sequence[Trial], facts: Mapping[str, Any]) -> None:
        """Start a new search here.

        Args:
            search: The search in force.
            trials: Every trial that it will run.
            facts: What else the marker says: env, algo, versions, machine.

        Raises:
            ConfigError: The path already holds a search or other files, or can't be written.
        """
        self.refuse_if_used()
        marker = {
            "format": SEARCH_FORMAT,
            "format_version": SEARCH_FORMAT_VERSION,
            **facts,
            "objective": search.settings.objective,
            "mode": search.settings.mode,
            "parameters": {item.key: item.describe() for item in search.parameters},
            "created": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
            "trials": [
                {"trial": trial.name, "config": dict(trial.values), "seed": trial.seed}
                for trial in trials
            ],
        }
        try:
            self.trials.mkdir(parents=True, exist_ok=True)
            write_atomically(self.search_file, search.dump().encode())
            write_json(self.marker, marker)
        except OSError as exc:
            raise ConfigError(f"the search directory {self.path} can't be written: {exc}") from exc

    def refuse_if_used(self) -> None:
        """Raise ConfigError if a new search can't start here: a search is never overwritten."""
        if self.marker.exists():
            raise ConfigError(
                f"{self.path} already holds a search: continue it with `policyserve tune --resume "
                f"{self.path}`, or give another --run-dir"
            )
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ConfigError(
                f"{self.path} is not an empty directory: give a --run-dir that is empty or new"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the search while the block runs; the lock ends with the process, however it ends.

        Raises:
            ConfigError: Another process runs this search.
        """
        with (self.path / ".lock").open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"{self.path} is in use: another `policyserve tune` runs this search"
                ) from None
            except OSError:  # a file system without locks
                pass
            delete_leftovers(self.path)
            yield


def read_search(directory: SearchDirectory) -> tuple[Search, list[Trial]]:
    """Read back what `SearchDirectory.create` wrote.

    Raises:
        CheckpointNotFoundError: The path holds no search, or a damaged one.
        ConfigError: The search was edited into one that can't be run.
    """
    facts = _read_marker(directory)
    search = load_search(directory.search_file)
    keys = {parameter.key for parameter in search.parameters}
    try:
        trials = [
            Trial(str(item["trial"]), dict(item["config"]), int(item["seed"]))
            for item in facts["trials"]
        ]
    except (KeyError, TypeError, ValueError) as exc:
        raise CheckpointNotFoundError(f"{directory.marker} is damaged: {exc}") from exc
    names = [trial.name for trial in trials]
    wrong = [name for name in names if os.sep in name or not name.startswith("trial_")]
    if wrong or len(set(names)) < len(names):
        raise CheckpointNotFoundError(f"{directory.marker} is damaged: its trials' names are wrong")
    if any(set(trial.values) != keys for trial in trials):
        raise ConfigError(
            f"{directory.search_file} has other search spaces than the search began with: start a "
            "new search with it"
        )
    return search, trials


def _read_marker(directory: SearchDirectory) -> dict[str, Any]:
    try:
        facts = json.loads(directory.marker.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        hint = (
            ": it is a run, continue it with `policyserve train --resume`"
            if (directory.path / "run.json").exists()
            else ""
        )
        raise CheckpointNotFoundError(
            f"{directory.path} is not a search directory (no {MARKER}){hint}"
        ) from None
    except (OSError, ValueError) as exc:
        raise CheckpointNotFoundError(f"{directory.marker} can't be read: {exc}") from exc
    if not isinstance(facts, dict) or facts.get("format") != SEARCH_FORMAT:
        raise CheckpointNotFoundError(f"{directory.marker} is not a {SEARCH_FORMAT} document")
    if facts.get("format_version") != SEARCH_FORMAT_VERSION:
        raise CheckpointNotFoundError(
            f"{directory.marker} has format_version {facts.get('format_version')!r}, expected "
            f"{SEARCH_FORMAT_VERSION}: another version of policyserve wrote it"
        )
    return facts
